"""`motet top`: the whole cluster, live. Rendering is plain functions from what the API told; the loop is at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from motet.cli.drawing import bar, live_table, meter, number, plain, seconds, state, text
from motet.cli.show import as_json, console, put_json
from motet.cli.watch import REDRAW_S, near
from motet.messages.jobs import JobRecord
from motet.progress import Progress, clock
from motet.states import State
from motet.words import count

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType

    from motet.client import Client
    from motet.messages.cluster import Worker

#: Unfinished jobs that are asked for; a screen holds fewer.
_JOBS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What the API told of devices and unfinished jobs, at one moment."""

    url: str
    workers: Sequence[Worker]
    #: Those that run, then those that load, newest first.
    jobs: Sequence[JobRecord]
    #: Seconds of this machine's clock.
    at: float = 0.0
    #: Open job -> rows per second since the look before.
    rates: Mapping[str, float] = field(default_factory=dict)


@click.command(
    epilog="""\b
Examples:
  motet top
  motet top --once
  motet top --json | jq '.workers[] | select(.state != "ready")'"""
)
@click.option("--once", is_flag=True, help="Print it once and end, as in a pipe.")
@as_json
def top(once: bool, as_json: bool) -> None:
    """Show devices and jobs live; q ends it.

    Devices: state, memory, how busy in the last second, backlog (seconds of work that wait there), sub-tasks held,
    learned tokens/s, rows done since its start, models in its memory. Jobs: those of your tenant that have not
    ended, and where they run; sub-tasks of other tenants are only counted.

    With --json: one document with workers and jobs.
    """
    with near() as client:
        seen = look(client)
        if as_json:
            put_json(
                {
                    "workers": [w.to_json() for w in seen.workers],
                    "jobs": [j.to_json() for j in seen.jobs],
                }
            )
            return
        screen = console()
        if once or not screen.is_terminal or screen.is_dumb_terminal:
            screen.print(frame(seen, width=screen.width))
        else:
            _follow(client, seen, screen)


# -- what is drawn ---------------------------------------------------------------------------------


def frame(seen: ClusterView, *, width: int, height: int = 1000, note: str = "") -> Group:
    """The cluster as of one moment; ``note`` stands at the end.

    Nothing is wider than ``width``; devices and jobs that do not fit into ``height`` lines are counted.
    """
    from rich.console import Group
    from rich.text import Text

    room = max(2, height - 8 - (2 if note else 0))
    # Half of it each, and what one does not need is the other's.
    jobs = min(len(seen.jobs), max(room // 2, room - len(seen.workers)))
    devices = min(len(seen.workers), max(1, room - jobs))
    parts: list[RenderableType] = [_head(seen), Text(), _devices(seen.workers, devices, width)]
    parts += _more(len(seen.workers) - devices, "device")
    parts += [Text(), _jobs(seen, jobs, width)]
    parts += _more(len(seen.jobs) - jobs, "job")
    if note:
        parts += [Text(), text(note, "dim")]
    return Group(*parts)


def _head(seen: ClusterView) -> RenderableType:
    ready = [w for w in seen.workers if w.state == "ready"]
    words = [f"{len(ready):,} of {count(len(seen.workers), 'device')} ready"]
    if ready:
        words.append(f"{sum(w.utilisation for w in ready) / len(ready):.0%} busy")
    words.append(f"{count(len(seen.jobs), 'job')} under way")
    if others := sum(w.running_other for w in seen.workers):
        words.append(f"{count(others, 'sub-task')} of others")
    head = text("").append("motet", style="bold").append("  " + " · ".join(words))
    return head.append(f"  {seen.url}", style="dim")


def _devices(workers: Sequence[Worker], shown: int, width: int) -> RenderableType:
    if not workers:
        return text("no workers; start some with: motet worker --gpus all", "yellow")
    # Devices that are not ready first, then the busy ones.
    first = sorted(workers, key=lambda w: (w.state == "ready", -w.utilisation, -w.held, w.worker))[:shown]
    return live_table(
        (
            "!device",
            "hardware",
            "!state",
            "!memory",
            "!busy",
            "#backlog",
            "#held",
            "#tokens/s",
            "#rows done",
            "resident",
        ),
        [
            (
                plain(w.worker, 28),
                plain(w.device_name or w.device_kind or "–", 24),
                state(w.state),
                _memory(w),
                meter(w.utilisation),
                seconds(w.backlog_s),
                f"{w.held:,}",
                "–" if w.rate_tokens_s is None else number(w.rate_tokens_s),
                number(w.rows_done),
                plain(", ".join(w.resident), 30),
            )
            for w in sorted(first, key=lambda w: w.worker)
        ],
        drop=("#rows done", "#tokens/s", "hardware", "resident", "!memory", "#held", "#backlog"),
        width=width,
    )


def _memory(worker: Worker) -> Any:
    if not worker.memory_mb:
        return text("–")
    used, all_ = worker.memory_used_mb / 1024, worker.memory_mb / 1024
    return bar(used / all_, 6).append(f" {used:.1f}/{all_:.0f} GiB")


def _jobs(seen: ClusterView, shown: int, width: int) -> RenderableType:
    if not seen.jobs:
        return text("no job is under way", "dim")
    return live_table(
        ("!job", "name", "!state", "#rows", "!done", "#rows/s", "#left", "runs on"),
        [_job(job, seen, width) for job in seen.jobs[:shown]],
        drop=("#rows", "#rows/s", "runs on", "name"),
        width=width,
    )


def _job(job: JobRecord, seen: ClusterView, width: int) -> tuple[Any, ...]:
    progress = Progress.of(job)
    rate = seen.rates.get(job.id) if progress.state == State.OPEN else progress.rate
    return (
        job.id[:13],
        plain(job.name or "–", 28 if width >= 100 else 16),
        state(progress.state),
        f"{progress.rows:,}",
        f"{progress.waiting:,} wait" if progress.grows else meter(progress.share, 10),
        "–" if rate is None else number(rate),
        "–" if progress.eta is None else clock(progress.eta),
        plain(_places(job.id, seen.workers), 40),
    )


def _places(job: str, workers: Sequence[Worker]) -> str:
    """Where a job runs now, with its sub-tasks there; a long list becomes a number."""
    held = [(w.worker, sum(r.subtasks for r in w.running if r.job == job)) for w in workers]
    places = [(worker, n) for worker, n in held if n]
    if len(places) > 3:
        return f"{len(places):,} devices, {count(sum(n for _, n in places), 'sub-task')}"
    return ", ".join(f"{worker} ×{n}" for worker, n in places) or "–"


def _more(hidden: int, noun: str) -> list[RenderableType]:
    return [text(f"and {count(hidden, noun)} more", "dim")] if hidden > 0 else []


# -- following ------------------------------------------------------------------------------------


def look(client: Client, before: ClusterView | None = None) -> ClusterView:
    """Ask the API; ``before``: what it told before, which says how fast open jobs grow. Raises Unreachable,
    Overloaded, Unauthorized.
    """
    under_way = [
        JobRecord.of(job.record)
        for state in (State.OPEN, State.RUNNING, State.LOADING)
        for job in client.jobs(state, _JOBS)
    ]
    now = time.monotonic()
    rates: dict[str, float] = {}
    if before is not None and now > before.at:
        rows = {job.id: job.rows for job in before.jobs}
        growing = (job for job in under_way if job.state == State.OPEN and job.id in rows)
        rates = {job.id: (job.rows - rows[job.id]) / (now - before.at) for job in growing}
    return ClusterView(url=client.url, workers=client.workers(), jobs=under_way, at=now, rates=rates)


def _follow(client: Client, seen: ClusterView, screen: Console) -> None:
    """Redraw each second until q or Ctrl-C; a server that goes away is waited for."""
    from rich.live import Live

    from motet.errors import Overloaded, Unreachable

    note, away_since = "q ends", None
    with _keys() as key, Live(console=screen, screen=True, auto_refresh=False, redirect_stdout=False) as live:
        try:
            while True:
                live.update(frame(seen, width=screen.width, height=screen.height, note=note), refresh=True)
                if key(REDRAW_S) in ("q", "Q", "\x03", "\x04"):
                    break
                try:
                    seen, note, away_since = look(client, seen), "q ends", None
                except (Unreachable, Overloaded):
                    away_since = away_since or time.monotonic()
                    gone = clock(time.monotonic() - away_since)
                    note = f"the server does not answer ({gone}); this is what it said last · trying again · q ends"
        except KeyboardInterrupt:
            pass
    # The screen is given back as it was; what was seen last stays on it.
    screen.print(frame(seen, width=screen.width))


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key and returns it, or "". Keys are not echoed meanwhile."""

    def wait(wait_s: float) -> str:
        time.sleep(wait_s)
        return ""

    if sys.platform == "win32" or not sys.stdin.isatty():
        # Nothing to type at; Ctrl-C still ends it.
        yield wait
        return
    import select
    import termios
    import tty

    typed = sys.stdin.fileno()
    kept = termios.tcgetattr(typed)

    def key(wait_s: float) -> str:
        ready, _, _ = select.select([typed], [], [], wait_s)
        return os.read(typed, 1).decode(errors="replace") if ready else ""

    tty.setcbreak(typed)
    try:
        yield key
    finally:
        termios.tcsetattr(typed, termios.TCSADRAIN, kept)
