"""The cluster of a demo or an application, which is stopped whatever happens, and the story that it prints."""

from __future__ import annotations

import logging
import shlex
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.cli.show import console, plan_line, plan_picture, program
from motet.client import Client
from motet.job import Job
from motet.messages.jobs import Plan
from motet.protocol.manifest import Manifest
from motet.states import LIVE
from motet.tasks import Classify, Number, Task
from motet.training.epochs import score_words
from motet.training.lesson import Learned, read_lesson
from motet.training.run import TrainRun
from motet.training.starting import VECTORS
from motet.words import count

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Texts, pictures, or rows of fields.
SourceRows = Sequence[Any]
#: Every demo's job is called so.
DEMO = "motet demo"
#: Seconds to wait for all workers: the plan estimates with those that are ready.
_WORKERS_S = 20.0


@dataclass(slots=True)
class StagedCluster:
    """Where a demo or an application plays."""

    client: Client
    #: An administrator's, to register what was trained or fitted.
    admin: Client
    data: Path
    story: Story
    #: Every job is called so.
    name: str = DEMO
    #: Id of the job that it ran, for the commands that are shown at the end.
    job: str = ""

    def plan(self, rows: SourceRows, tasks: Mapping[str, Task]) -> Plan:
        """Plan a job, and draw it."""
        with self.story.phase("planning") as note:
            plan = self.client.plan(rows, tasks)
            note(plan_line(plan))
        self.story.show(plan_picture(plan, width=console().width))
        return plan

    def run(self, rows: SourceRows, tasks: Mapping[str, Task], what: str = "the job") -> tuple[Job, float]:
        """Run it: the ended job, and its seconds. Raises JobFailed."""
        start = time.monotonic()
        # Without reuse, so that every run computes; with it, the second one would only look up.
        with self.story.phase(f"running {what}", slow=True) as note:
            progress = False if self.story.quiet else None
            job = self.client.submit(rows, tasks, name=self.name, reuse=False, progress=progress)
            _follow(job, self.story)
            seconds = time.monotonic() - start
            note(str(job.progress))
        self.job = job.id
        return job, seconds

    def train(
        self,
        name: str,
        *,
        trunk: str,
        tasks: Mapping[str, Learned],
        train: SourceRows,
        test: SourceRows,
        text: str | Sequence[str] = "text",
        licence: str = "",
    ) -> dict[str, Task]:
        """Learn heads on a frozen trunk and register them; return the tasks that ask them. Raises as ``Client.train``.

        Heads that an earlier run learned from the same rows on the same trunk are taken as they are.
        """
        if known := self._learned_before(
            name, trunk, tasks, read_lesson(train, test, tasks, text=text).digest
        ):
            with self.story.phase(f"{name} was trained before") as note:
                note(
                    "; ".join(f"{task} {score_words(model.scores['test'])}" for task, model in known.items())
                )
            return {task: _asking(model) for task, model in known.items()}
        with self.story.phase(f"training {name} on {count(len(train), 'row')}", slow=True) as note:
            progress = False if self.story.quiet else None
            run = self.client.train(
                name=name, trunk=trunk, tasks=tasks, train=train, test=test, text=text, licence=licence,
                progress=progress,
            )  # fmt: skip
            _follow(run.job, self.story)
            told = "; ".join(f"{task} {score_words(s)}" for task, s in run.answer()["scores"].items())
            note(f"{name}: {told}")
        return TrainRun(self.admin.job(run.job.id), name, list(tasks)).tasks()

    def _learned_before(
        self, name: str, trunk: str, tasks: Iterable[str], digest: str
    ) -> dict[str, Manifest] | None:
        """The newest head of each task; None unless all of them learned from these rows."""
        base = self.client.model(trunk).ref
        newest = {
            model.name.removeprefix(f"{name}."): model
            for model in sorted(self.client.models(), key=lambda model: int(model.version) if model.version.isdecimal() else 0)
            if model.name.startswith(f"{name}.")
            and (model.source.get("data"), model.source.get("began_with")) == (digest, base)
        }  # fmt: skip
        return {task: newest[task] for task in tasks} if set(tasks) <= newest.keys() else None


def _asking(model: Manifest) -> Task:
    return Number(model.ref) if model.answers == "number" else Classify(model.ref)


@contextmanager
def staged(
    data: Path,
    story: Story,
    *,
    cpus: int,
    keep: bool,
    models: Sequence[str] = (),
    name: str = DEMO,
    settings: Mapping[str, str] | None = None,
) -> Iterator[StagedCluster]:
    """A cluster of its own with its workers ready, and stopped at the end; with ``keep`` at Ctrl-C.

    ``models``: what is registered beside the models that motet ships; ``settings``: of its processes; see ``Cluster``.
    """
    from motet.local.cluster import Cluster

    with story.phase(f"starting Postgres, Valkey, API, scheduler and {cpus} CPU workers", slow=True) as note:
        cluster = Cluster(data, cpus=cpus, port=0, models=models, settings=settings)
        cluster.start()
        note(f"ready at {cluster.url}; logs in {data / 'logs'}")
    try:
        with (
            Client(cluster.url, cluster.tokens["user"]) as client,
            Client(cluster.url, cluster.tokens["admin"]) as admin,
        ):
            _cancel_unfinished(client, story, name)
            _await_workers(client, cpus, story)
            stage = StagedCluster(client, admin, data, story, name)
            yield stage
        if keep:
            story.say(f"\nthe cluster runs on at {cluster.url}, until Ctrl-C; in another shell:")
            story.command(f"{_shell(data)} {program()} jobs")
            _until_interrupted()
    finally:
        with story.phase(f"ending {name}", slow=True) as note:
            cluster.stop()
            note("everything is stopped")
    if not keep:
        story.say("\nto look on, start the cluster again in one shell:")
        story.command(f"{program()} up --data {shlex.quote(str(data.resolve()))}")
        story.say("and read the results in another:")
        story.command(f"{_shell(data)} {program()} results {stage.job[:8]}")


def told_of(job: Job, seconds: float) -> dict[str, Any]:
    """What is measured of every job."""
    return {
        "job": job.id,
        "state": job.state,
        "rows": job.rows,
        "tasks": len(job.tasks),
        "passes": len(job.passes),
        "cells": job.progress.total,
        "ok": job.progress.ok,
        "seconds": round(seconds, 3),
    }


def _follow(job: Job, story: Story) -> None:
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


def _cancel_unfinished(client: Client, story: Story, name: str) -> None:
    """End what one that was killed has left, its training too: it would take the workers from this one."""
    live = [job for state in LIVE for job in client.jobs(state)]
    left = [job for job in live if f"{job.name} ".startswith(f"{name} ") or job.name.endswith(VECTORS)]
    for job in left:
        job.cancel()
    if left:
        story.say(f"         cancelled {count(len(left), 'job')} of an earlier {name.removeprefix('motet ')}")


def _await_workers(client: Client, wanted: int, story: Story) -> None:
    with story.phase("waiting for the workers") as note:
        end = time.monotonic() + _WORKERS_S
        while (ready := sum(w.state == "ready" for w in client.workers())) < wanted:
            if time.monotonic() >= end:
                break
            time.sleep(0.2)
        note(f"{ready} of {wanted} ready")


class Story:
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

    def write(self, text: str) -> None:
        """Print text as it comes; the line goes on."""
        if not self.quiet:
            print(text, end="", flush=True)

    def command(self, line: str) -> None:
        """Print a command, whole, so that it can be pasted."""
        if not self.quiet:
            print(f"  {line}", flush=True)

    def show(self, thing: RenderableType) -> None:
        if not self.quiet:
            console().print(thing)

    @contextmanager
    def phase(self, words: str, *, slow: bool = False) -> Iterator[Note]:
        """A line when it is over; a slow phase also says that it has begun, and what the cluster logs meanwhile."""
        note, start = Note(), time.monotonic()
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


class Note:
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
