"""How often each way to rank finds the film that was hidden from it: among 100 films, among all, and of cold films alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from motet.apps.application import Score
from motet.apps.data.movielens import Ratings, Viewer
from motet.apps.pictures import Bars, Lines, Panel
from motet.evaluation import Estimate
from motet.evaluation.evaluation import Evaluation
from motet.job import Job

#: Ways to rank, from what everybody gets to what the application serves.
WAYS = {
    "popularity": "most liked by others",
    "neighbours": "item-kNN, last 20 likes",
    "content": "vectors of the lines",
    "hybrid": "kNN and vectors",
}
#: Lengths of lists that the curve shows.
LENGTHS = (1, 2, 3, 5, 7, 10, 15, 20)


@dataclass(frozen=True, slots=True)
class FilmTrial:
    """Evaluations of one job; each task of it is a way to rank."""

    #: The hidden film among 100.
    of_100: Evaluation
    #: The same, of viewers whose hidden film nobody is known to like.
    cold: Evaluation
    #: The hidden film among all that the viewer has not seen.
    of_all: Evaluation

    def scores(self) -> tuple[Score, ...]:
        above = self.of_100.compare("hybrid", "popularity").figures["hit_rate_at_10"].difference
        rows = self.of_100["hybrid"].rows
        return (
            _score("hidden film, of 100", self.of_100, floor=0.65),
            Score(name="  … above popularity", figure="HR@10 points", rows=rows, estimate=above, floor=0.0),
            _score("cold hidden film, of 100, by its line", self.cold, serves="content", floor=0.30),
            _score("hidden film, of all unseen", self.of_all, task="all_{}", floor=0.08),
        )

    def panels(self) -> list[Panel]:
        curves = {
            words: [(float(k), _hits(self.of_100, way, k).value or 0.0) for k in LENGTHS]
            for way, words in WAYS.items()
        }
        cold = {words: _hits(self.cold, way) for way, words in WAYS.items()}
        return [
            Lines("HR@k: share of viewers", curves, x="k"),
            Bars("HR@10, cold films alone", cold),
        ]


def measure(job: Job, known: Ratings, tested: Sequence[Viewer]) -> FilmTrial:
    """The job's lists beside the film that was hidden from each of its viewers."""
    warm = known.liked_once()
    labels = [
        {"hidden": str(one.hidden), "cold": None if one.hidden in warm else str(one.hidden)} for one in tested
    ]
    return FilmTrial(
        of_100=job.evaluate(labels, dict.fromkeys(WAYS, "hidden"), at=LENGTHS),
        cold=job.evaluate(labels, dict.fromkeys(WAYS, "cold"), at=10),
        of_all=job.evaluate(labels, {f"all_{way}": "hidden" for way in WAYS}, at=10),
    )


def _score(name: str, found: Evaluation, *, serves: str = "hybrid", task: str = "{}", floor: float) -> Score:
    return Score(
        name=name,
        figure="HR@10",
        rows=found[task.format(serves)].rows,
        estimate=_hits(found, task.format(serves)),
        baselines={words: _hits(found, task.format(way)) for way, words in WAYS.items() if way != serves},
        floor=floor,
    )


def _hits(found: Evaluation, task: str, k: int = 10) -> Estimate:
    return found[task].figures[f"hit_rate_at_{k}"]
