"""`motet app digest`: several questions about each long article, which a language model reads once.

All prompts about one text share its prefill. To show what that saves, the same questions are also asked one job at a
time. The articles are the BBC's, with the topic that its newsroom gave them (motet.datasets.bbc_news).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from motet import datasets
from motet.apps import scores
from motet.apps.application import Application, AppOutcome, RunOptions, Score
from motet.apps.pictures import Bars, draw
from motet.cli.show import cut, table
from motet.datasets import LabelledText
from motet.demo.stage import StagedCluster, told_of
from motet.evaluation import Estimate
from motet.results import Row
from motet.tasks import Choose, Classify, Generate, Task

if TYPE_CHECKING:
    from rich.table import Table

WRITER = "smollm2-135m"
TOPICS = ("business", "entertainment", "politics", "sport", "tech")
PROMPTS: Mapping[str, Task] = {
    "topic": Choose(WRITER, labels=TOPICS, question="Which section of a newspaper is this from?"),
    "headline": Generate(WRITER, prompt="Write a headline for this article.", max_tokens=16),
    "summary": Generate(WRITER, prompt="Summarise this article in one sentence.", max_tokens=40),
    "who": Generate(WRITER, prompt="Who is this article about? Answer with names only.", max_tokens=16),
    "next": Generate(WRITER, prompt="What may happen next? Answer in one sentence.", max_tokens=32),
}
#: The shipped head reads the same articles, for comparison.
HEAD: Mapping[str, Task] = {"head": Classify("news-topics")}
#: What the head calls a section otherwise.
_SAME = {"sports": "sport"}
#: Characters of a long article, and how many articles.
_LENGTHS, _ARTICLES, _QUICK = (2000, 4000), 60, 12


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    return digest(stage, asked, choose(_QUICK if asked.quick else _ARTICLES))


def digest(stage: StagedCluster, asked: RunOptions, articles: Sequence[LabelledText]) -> AppOutcome:
    """Ask all prompts about each article, together and then apart."""
    texts = [one.text for one in articles]
    stage.plan(texts, PROMPTS)
    job, seconds = stage.run(texts, PROMPTS, f"{len(PROMPTS)} prompts together")
    rows = list(job.results())
    stage.story.show(_table(rows))
    headed, _ = stage.run(texts, HEAD, "the shipped head")
    together = job.usage
    apart = [stage.run(texts, {name: task}, f"{name} apart") for name, task in PROMPTS.items()]
    apart_s, apart_busy_s = sum(s for _, s in apart), sum(one.usage["busy_s"] for one, _ in apart)

    truth = [one.label for one in articles]
    head = [_SAME.get(str(row["head"]), str(row["head"])) for row in headed.results()]
    topic = Score(
        name="topic, by the language model",
        figure="accuracy",
        rows=len(rows),
        estimate=scores.accuracy(truth, [str(row["topic"]) if row["topic"].ok else None for row in rows]),
        baselines={
            "the shipped head": scores.accuracy(truth, head),
            "always the commonest": scores.accuracy(truth, [scores.commonest(truth)] * len(truth)),
        },
    )
    stage.story.say(
        f"\n{together['tokens']:,} tokens of prompts, {together['tokens_cached']:,} of them not computed again; "
        f"{together['busy_s']:.1f} device-seconds together, {apart_busy_s:.1f} apart"
    )
    bars = {"together": Estimate(together["busy_s"]), "each prompt apart": Estimate(apart_busy_s)}
    return AppOutcome(
        scores=(topic,),
        unmeasured={
            "headlines, summaries, names": "nobody has judged them, and 135 million parameters are few"
        },
        measured={
            **told_of(job, seconds),
            "prompts": len(PROMPTS),
            "tokens": together["tokens"],
            "tokens_cached": together["tokens_cached"],
            "busy_s": round(together["busy_s"], 2),
            "apart_busy_s": round(apart_busy_s, 2),
            "apart_seconds": round(apart_s, 2),
        },
        files=(
            draw(
                asked.folder / "digest.svg",
                "motet app digest",
                [
                    Bars(
                        f"{len(PROMPTS)} prompts about {len(rows)} articles: device-seconds",
                        bars,
                        rivals=True,
                    )
                ],
            ),
        ),
    )


def choose(articles: int) -> list[LabelledText]:
    """Long articles, always the same ones, none of them twice."""
    low, high = _LENGTHS
    long = {one.document: one for one in datasets.bbc_news() if low <= len(one.text) <= high}
    picked = list(long.values())
    random.Random(datasets.SEED).shuffle(picked)
    return picked[:articles]


def _table(rows: Sequence[Row], most: int = 8) -> Table:
    return table(
        ("!topic", "headline", "summary", "who"),
        (
            (
                str(row["topic"]),
                *(cut(str(row[name]), 60) for name in ("headline", "summary", "who")),
            )
            for row in rows[:most]
        ),
    )


APPLICATION = Application(run=run, registers=("--smollm2",), data=(datasets.BBC_NEWS,))
