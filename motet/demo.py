"""`motet demo`: a whole cluster, one real job of four tasks over real texts, what it measured, and everything stopped.

The texts are those that the shipped heads were never trained on, so the accuracy told is an honest one.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet import datasets
from motet.cli.show import console, plan_line, plan_table, program, result_table
from motet.client import Client, State
from motet.job import Job, Plan, count
from motet.tasks import Classify, Embed, Task

if TYPE_CHECKING:
    from rich.console import RenderableType

TASKS: Mapping[str, Task] = {
    "topic": Classify("news-topics"),
    "sentiment": Classify("review-sentiment"),
    "tone": Classify("tone"),
    "vector": Embed("all-MiniLM-L6-v2", dtype="fp16"),
}
#: One article among so many texts; the others are sentences and tweets.
_ARTICLE_EACH = 10
_ROWS_SHOWN = 8
_NAME = "motet demo"
_UNFINISHED: Sequence[State] = ("loading", "running")
#: The plan's seconds are those of the workers that are there: it waits so long for all of them.
_WORKERS_S = 20.0


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
    story = _Story(quiet)
    with story.phase("reading public texts") as note:
        texts = choose(rows)
        note(f"{len(texts):,} texts that the models were not trained on")

    from motet.embedded.cluster import Cluster

    with story.phase(f"starting Postgres, Valkey, API, scheduler and {cpus} CPU workers", slow=True) as note:
        cluster = Cluster(data, cpus=cpus, port=0)
        cluster.start()
        note(f"ready at {cluster.url}; logs in {data / 'logs'}")
    try:
        with Client(cluster.url, cluster.tokens["user"]) as client:
            _cancel_unfinished(client, story)
            _await_workers(client, cpus, story)
            measured = _run_job(client, texts, data, story)
        if keep:
            story.say(f"\nthe cluster runs on at {cluster.url}, until Ctrl-C; in another shell:")
            story.command(f"{_shell(data)} {program()} jobs")
            _until_interrupted()
    finally:
        with story.phase("ending the demo", slow=True) as note:
            cluster.stop()
            note("everything is stopped")
    if not keep:
        story.say("\nto look on, start the cluster again in one shell:")
        story.command(f"{program()} up --data {shlex.quote(str(data.resolve()))}")
        story.say("and read the results in another:")
        story.command(f"{_shell(data)} {program()} results {measured['job'][:8]}")
    return measured


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


def _cancel_unfinished(client: Client, story: _Story) -> None:
    """End what a demo that was killed has left: it would take the workers from this one."""
    left = [job for state in _UNFINISHED for job in client.jobs(state) if job.name == _NAME]
    for job in left:
        job.cancel()
    if left:
        story.say(f"         cancelled {count(len(left), 'job')} of an earlier demo")


def _await_workers(client: Client, wanted: int, story: _Story) -> None:
    with story.phase("waiting for the workers") as note:
        end = time.monotonic() + _WORKERS_S
        while (ready := sum(w.state == "ready" for w in client.workers())) < wanted:
            if time.monotonic() >= end:
                break
            time.sleep(0.2)
        note(f"{ready} of {wanted} ready")


def _run_job(client: Client, texts: Sequence[Text], data: Path, story: _Story) -> dict[str, Any]:
    source = [t.text for t in texts]
    with story.phase("planning") as note:
        plan = client.plan(source, TASKS)
        note(plan_line(plan))
    story.show(plan_table(plan))
    if plan.truncated_rows:
        story.say(
            f"~{plan.truncated_rows:,} articles are longer than the model reads: they are cut, and marked so\n"
        )

    start = time.monotonic()
    # Without reuse, so that every run of the demo computes; with it, the second one would only look up.
    with story.phase("running the job", slow=True) as note:
        job = client.submit(source, TASKS, name=_NAME, reuse=False, progress=False if story.quiet else None)
        _follow(job, story)
        seconds = time.monotonic() - start
        note(str(job.progress))

    story.show(result_table(list(islice(job.results(), _ROWS_SHOWN)), source, width=console().width))
    out = data / (
        "motet-demo-results.parquet" if importlib.util.find_spec("pyarrow") else "motet-demo-results.jsonl"
    )
    with story.phase("writing the merged rows", slow=True) as note:
        (job.to_parquet if out.suffix == ".parquet" else job.to_jsonl)(out)
        note(f"{out}, {out.stat().st_size / 1e6:.1f} MB")
    measured = _measure(job, plan, texts, seconds) | {"results": str(out)}
    story.say(_summary(measured))
    return measured


def _follow(job: Job, story: _Story) -> None:
    """Wait for the job. It ends with the demo: nobody would come back for it. Raises JobFailed."""
    try:
        with job.bar() as bar:
            for progress in job.watch():
                bar.track(progress)
    except KeyboardInterrupt:
        story.say("         interrupted: cancelling the job …")
        job.cancel()
        raise
    job.wait()


def _measure(job: Job, plan: Plan, texts: Sequence[Text], seconds: float) -> dict[str, Any]:
    usage = job.usage
    tokens, computed = usage["tokens"], usage["computed_tokens"]
    #: How many times as much a pass per task reads, after truncation, as planned from a sample.
    fused = plan.unfused_tokens / plan.tokens if plan.tokens else 1.0
    labelled = [
        (row["topic"], texts[row.index].topic) for row in job.results(["topic"]) if texts[row.index].topic
    ]
    return {
        "job": job.id,
        "state": job.state,
        "rows": job.rows,
        "tasks": len(job.tasks),
        "passes": len(job.passes),
        "cells": job.progress.total,
        "ok": job.progress.ok,
        "seconds": round(seconds, 3),
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


class _Story:
    """Tells what happens, with the seconds that each phase took; says nothing if ``quiet``."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, lines: str) -> None:
        """Print lines; those that are too wide for the terminal go on in the next one, between words."""
        if self.quiet:
            return
        width = console().width
        for line in lines.split("\n"):
            print(_folded(line, width), flush=True)

    def command(self, line: str) -> None:
        """Print a command, whole, so that it can be pasted."""
        if not self.quiet:
            print(f"  {line}", flush=True)

    def show(self, thing: RenderableType) -> None:
        if not self.quiet:
            console().print(thing)

    @contextmanager
    def phase(self, words: str, *, slow: bool = False) -> Iterator[_Note]:
        """A line when it is over; a slow phase also says that it has begun, and what the cluster logs meanwhile."""
        note, start = _Note(), time.monotonic()
        if slow:
            self.say(f"         {words} …")
        with _cluster_log(shown=slow and not self.quiet):
            yield note
        ended = note.words if slow else ": ".join(filter(None, (words, note.words)))
        self.say(f"{time.monotonic() - start:6.1f} s {ended}")


def _folded(line: str, width: int) -> str:
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


class _Note:
    """What a phase found out."""

    words = ""

    def __call__(self, words: str) -> None:
        self.words = words


@contextmanager
def _cluster_log(*, shown: bool) -> Iterator[None]:
    """Show what the cluster says of its processes, so that a slow start is not silent."""
    log, handler = logging.getLogger("motet.cluster"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("           %(message)s"))
    if not shown:
        yield
        return
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _shell(data: Path) -> str:
    """The variable that points the command line at this cluster."""
    return f"MOTET_HOME={shlex.quote(str(data.resolve()))}"
