"""`motet demo`: a whole cluster, one real job of four tasks over real texts, what it measured, and everything stopped.

The texts are those that the shipped heads were never trained on, so the accuracy told is an honest one.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from motet import datasets
from motet.cli.show import console, result_table
from motet.demo.stage import StagedCluster, Story, staged, told_of
from motet.job import Job
from motet.messages.jobs import Plan
from motet.tasks import Classify, Embed, Task

TASKS: Mapping[str, Task] = {
    "topic": Classify("news-topics"),
    "sentiment": Classify("review-sentiment"),
    "tone": Classify("tone"),
    "vector": Embed("all-MiniLM-L6-v2", dtype="fp16"),
}
#: One text of this many is an article; the others are sentences and tweets.
_ARTICLE_EACH = 10
_ROWS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text of the demo, and its topic where people have said what it is."""

    text: str
    topic: str | None = None


def run(
    *, data: Path, rows: int = 3000, cpus: int = 2, keep: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run the demo and return what it measured; tell the story on stdout unless ``quiet``.

    ``data`` keeps the cluster, the results and the models for the next run. ``keep`` leaves the cluster
    running until Ctrl-C. Raises SetupError where the machine lacks something, JobFailed where the job fails.
    """
    story = Story(quiet)
    with story.phase("reading public texts") as note:
        texts = choose(rows)
        note(f"{len(texts):,} texts that the models were not trained on")

    with staged(data, story, cpus=cpus, keep=keep) as stage:
        return _run_job(stage, texts)


def choose(rows: int, cache: Path | None = None) -> list[Text]:
    """Pick texts that no shipped head was trained on, always the same ones, articles among sentences and tweets.

    Fewer than asked for where there are not so many.
    """
    _, articles = datasets.split(datasets.bbc_news(cache))
    _, sentences = datasets.split(datasets.vader(cache))
    dice = random.Random(datasets.SEED)
    dice.shuffle(articles)
    dice.shuffle(sentences)
    picked = [Text(text=a.text, topic=a.label) for a in islice(articles, rows // _ARTICLE_EACH)]
    picked += [Text(text=s.text) for s in islice(sentences, rows - len(picked))]
    dice.shuffle(picked)
    return picked


def _run_job(stage: StagedCluster, texts: Sequence[Text]) -> dict[str, Any]:
    story = stage.story
    source = [t.text for t in texts]
    plan = stage.plan(source, TASKS)
    if plan.truncated_rows:
        story.say(
            f"~{plan.truncated_rows:,} articles are longer than the model reads: they are cut, and marked so\n"
        )

    job, seconds = stage.run(source, TASKS)
    story.show(result_table(list(islice(job.results(), _ROWS_SHOWN)), source, width=console().width))
    out = stage.data / (
        "motet-demo-results.parquet" if importlib.util.find_spec("pyarrow") else "motet-demo-results.jsonl"
    )
    with story.phase("writing the merged rows", slow=True) as note:
        (job.to_parquet if out.suffix == ".parquet" else job.to_jsonl)(out)
        note(f"{out}, {out.stat().st_size / 1e6:.1f} MB")
    measured = _measure(job, plan, texts, seconds) | {"results": str(out)}
    story.say(_summary(measured))
    return measured


def _measure(job: Job, plan: Plan, texts: Sequence[Text], seconds: float) -> dict[str, Any]:
    usage = job.usage
    tokens, computed = usage["tokens"], usage["computed_tokens"]
    #: How many times as much a pass per task reads, after truncation, as planned from a sample.
    fused = plan.unfused_tokens / plan.tokens if plan.tokens else 1.0
    labelled = [
        (row["topic"], texts[row.index].topic) for row in job.results(["topic"]) if texts[row.index].topic
    ]
    return {
        **told_of(job, seconds),
        "rows_per_s": round(job.rows / seconds, 1),
        "tokens": tokens,
        "computed_tokens": computed,
        "real_share": round(tokens / computed, 4) if computed else None,
        "unfused_computed_tokens": round(computed * fused),
        "busy_s": round(usage["busy_s"], 3),
        "labelled_rows": len(labelled),
        "topic_accuracy": round(sum(c == t for c, t in labelled) / len(labelled), 4) if labelled else None,
    }


def _summary(m: Mapping[str, Any]) -> str:
    lines = [
        f"{m['rows']:,} rows × {m['tasks']} tasks in {m['seconds']:.1f} s: {m['rows_per_s']:,.0f} rows/s, "
        f"{m['ok']:,} of {m['cells']:,} cells ok",
        f"tokens    {m['tokens']:,} read, {m['computed_tokens']:,} computed"
        + (f": {m['real_share']:.1%} of the work was real" if m["real_share"] else ""),
        f"unfused   a pass per task would have computed ~{m['unfused_computed_tokens']:,} tokens",
    ]
    if m["topic_accuracy"] is not None:
        lines.append(
            f"topic     agrees with the newsroom on {m['topic_accuracy']:.1%} of {m['labelled_rows']:,} "
            "articles that it was not trained on"
        )
    lines.append("reuse     was off, so that this run computed; by default the same job again runs nothing")
    return "\n" + "\n".join(lines)
