"""`motet watch`: one job while it runs. Rendering is plain functions from what the API told; the loop is at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from motet.cli.drawing import bar, live_table, meter, number, plain, seconds, state, state_style, text
from motet.cli.show import as_json, connect, console, find_job, program
from motet.progress import Progress, clock, instant
from motet.states import ENDED, State
from motet.words import count

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from motet.client import Client
    from motet.job import Job
    from motet.messages.activity import (
        AskCounts,
        DeviceUnderWay,
        ErrorCount,
        JobActivity,
        PassUnderWay,
        RowsUnderWay,
    )
    from motet.messages.jobs import JobRecord, JobUsage

#: How often a terminal is redrawn, and how often at most a pipe gets a line.
REDRAW_S, LINE_S = 1.0, 10.0
#: How long one look may take before the screen says that the server is away.
PATIENCE_S = 5.0
#: Lines of devices and of errors on a screen that has room; the rest is counted.
_DEVICES, _ERRORS = 64, 6


@click.command(
    epilog="""\b
Examples:
  motet watch 0198f2c4
  motet watch 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57 --json | jq .eta
  motet watch 0198f2c4 > log.txt && motet results 0198f2c4 --format csv > rows.csv"""
)
@click.argument("job")
@as_json
def watch(job: str, as_json: bool) -> None:
    """Follow JOB until it has ended; fail if it fails. Ctrl-C leaves it running.

    Shows its passes (tasks that share a model run as one), how fast each device is and how busy, the time that is
    left, tokens that language models wrote, and errors by class; upstream: skipped, since an answer that it reads is
    an error. In a pipe: a line now and then, and a summary at the end. The beginning of an id will do. Of 17+2
    sub-tasks, 17 are done and 2 are open; ◀ stands before the answers that a pass waits for.

    With --json: an object per line each time that something has changed: progress (state, rows, total, ok, error,
    skipped, reused, rate, eta), and passes, devices and errors as in GET /v1/jobs/{id}/activity.
    """
    screen = None if as_json else console()
    live = screen is not None and screen.is_terminal and not screen.is_dumb_terminal
    # On a terminal somebody looks on: they are told soon that the server is away, and it goes on by itself.
    with near() if live else connect() as client:
        found = find_job(client, job)
        with _left_running(found):
            if screen is None:
                _stream(found)
            elif live:
                _follow(found, screen)
            else:
                _report(found, screen)
        found.check()


# -- what is drawn ---------------------------------------------------------------------------------


def picture(facts: JobActivity, *, width: int, height: int = 1000, note: str = "") -> Group:
    """A job as of one moment, from its activity (docs/http.md). ``note`` stands at the end, such as how to leave.

    Nothing is wider than ``width``; devices and errors that do not fit into ``height`` lines are counted.
    """
    from rich.console import Group
    from rich.text import Text

    job, passes, devices, errors = facts.job, facts.passes, facts.devices, facts.errors
    parts: list[RenderableType] = [*_head(facts, width), Text(), _passes(passes, job, width)]
    room = max(0, height - len(passes) - 14 - (1 if note else 0))
    shown_errors = min(len(errors), _ERRORS, max(1, room // 3))
    shown_devices = min(len(devices), _DEVICES, max(1, room - (shown_errors + 3 if errors else 0)))
    if devices:
        parts += [Text(), _devices(devices, shown_devices, width, ended=job.state in ENDED)]
        parts += _more(len(devices) - shown_devices + facts.left_out.devices, "device")
    if errors:
        parts += [Text(), _errors(errors[:shown_errors], width)]
        hidden = len(errors) - shown_errors + facts.left_out.errors
        parts += _more(hidden, "kind of error", "kinds of errors")
    elif job.state in (State.RUNNING, State.SUCCEEDED) and (job.cells.error or job.cells.skipped):
        parts += [Text(), text("errors are told by class once their block is sealed", "dim")]
    if note:
        parts += [Text(), Text(note, style="dim", overflow="ellipsis", no_wrap=True)]
    return Group(*parts)


def _head(facts: JobActivity, width: int) -> Iterator[Text]:
    """Name and state; the bar; cells."""
    from rich.text import Text

    job = facts.job
    progress = Progress.of(job)
    ended = progress.state in ENDED
    name = plain(job.name or "job", max(8, width - 40))
    title = text("").append(name, style="bold")
    title.append("  ").append(progress.state, style=f"bold {state_style(progress.state)}")
    title.append(f" {'in' if ended else 'for'} {clock(facts.now_s)}")
    title.append(f"  {job.id[:13] if width < 100 else job.id}", style="dim")
    yield title
    if progress.grows:
        kept = f" · kept from row {job.first_row:,} on" if job.first_row else ""
        yield text(f"{progress.rows:,} rows so far · {progress.waiting:,} cells wait{kept}")
        if facts.asks is not None:
            yield text(asked(facts.asks.minute))
    else:
        words = [f"{int(100 * progress.share)} %"]
        if progress.rate:
            words.append(f"{number(progress.rate)} rows/s")
        if not ended:
            words.append("starting" if not progress.done else _left(progress.eta))
        line = bar(progress.share, min(40, max(10, width - 36)), done=progress.state == State.SUCCEEDED)
        yield line.append("  ").append(" · ".join(words))
    cells = text(f"{progress.total:,} cells: ")
    cells.append(f"{progress.ok:,} ok", style="green" if progress.ok else "")
    for count_, word, style in (
        (progress.error, "errors", "red"),
        (progress.skipped, "skipped", "yellow"),
        (progress.reused, "reused", "cyan"),
    ):
        if count_:
            cells.append(" · ").append(f"{count_:,} {word}", style=style)
    if lost := job.usage.attempts_lost:
        cells.append(f" · {lost:,} sub-tasks lost and run again", style="yellow")
    yield cells
    if spent := written(job.usage):
        yield Text(spent)
    saved = sum(p.unfused_tokens - p.tokens for p in facts.passes)
    if ended and saved > 0:
        tokens = sum(p.tokens for p in facts.passes)
        yield Text(f"{number(tokens)} tokens read; a pass per task would have read {number(tokens + saved)}")
    if job.reason:
        yield Text(plain(job.reason, width), style="red")


def asked(minute: AskCounts) -> str:
    """The last minute of an open job, over all servers."""
    words = [f"{number(minute.asks_s)} asks/s"]
    if minute.p50_s is not None:
        words.append(f"half of them answered in {instant(minute.p50_s)}, 99 % in {instant(minute.p99_s)}")
    if minute.waiting:
        words.append(f"{minute.waiting:,} rows wait to be stored")
    ended = ((minute.late, "late"), (minute.refused, "refused"), (minute.failed, "failed"))
    words += [f"{n:,} {how}" for n, how in ended if n]
    return " · ".join(words)


def written(usage: JobUsage) -> str:
    """What language models read, found read already and wrote; "" where none did."""
    out, read, cached = usage.tokens_out, usage.tokens, usage.tokens_cached
    if not out and not cached:
        return ""
    words = f"{number(out)} tokens written · {number(read)} read"
    return words + (f", {int(100 * cached / read)} % of them from cache" if cached and read else "")


def _left(eta_s: float | None) -> str:
    return "time left not known yet" if eta_s is None else f"{clock(eta_s)} left"


def _passes(passes: Sequence[PassUnderWay], job: JobRecord, width: int) -> Table:
    """A line per pass: what it answers, which answers it waits for, and how far it is."""
    narrow = width < 90
    needs = {p.tasks: p.needs for p in job.passes}
    return live_table(
        ("pass", "answers", "!", "#rows", "#blocks", "#running", "#tokens"),
        [
            (
                plain(p.kind, 22 if narrow else 36),
                plain(_tasks(p.tasks) + _waits(needs.get(p.tasks, ())), 20 if narrow else 48),
                bar(_share(p.rows), 8 if narrow else 16, done=p.rows.done == p.rows.total > 0),
                f"{p.rows.done:,}/{p.rows.total:,}",
                f"{p.blocks.sealed:,}/{p.blocks.total:,}",
                f"{p.subtasks.open:,}",
                number(p.tokens),
            )
            for p in passes
        ],
        drop=("#tokens", "#running", "answers", "!"),
        width=width,
    )


def _tasks(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} fused: {', '.join(names)}"


def _waits(needs: Sequence[str]) -> str:
    return f" ◀ {', '.join(needs)}" if needs else ""


def _share(rows: RowsUnderWay) -> float:
    return rows.done / rows.total if rows.total else 0.0


def _devices(devices: Sequence[DeviceUnderWay], shown: int, width: int, *, ended: bool) -> Table:
    """A line per device: its rate and share of busy time in this job; how busy it is now, and its backlog."""
    now = () if ended else ("!now", "#backlog")
    return live_table(
        ("!device", "hardware", "state", "#sub-tasks", "#rows", "#tokens/s", "#busy", *now),
        [
            (
                plain(d.worker, 28),
                plain(d.device_name, 24),
                state(d.state),
                f"{d.subtasks:,}" + (f"+{d.open:,}" if d.open else ""),
                f"{d.rows:,}",
                number(d.tokens_s) if d.tokens_s else "–",
                f"{d.share:.0%}",
                *(() if ended else (_now(d.utilisation), seconds(d.backlog_s))),
            )
            # Busy devices first, so that a long list is cut at the idle ones.
            for d in sorted(devices, key=lambda d: (-d.open, -d.rows, d.worker))[:shown]
        ],
        drop=("hardware", "#backlog", "#rows", "#sub-tasks", "#busy", "state"),
        width=width,
    )


def _now(utilisation: float | None) -> Text | str:
    return "–" if utilisation is None else meter(utilisation)


def _errors(errors: Sequence[ErrorCount], width: int) -> Table:
    return live_table(
        ("!errors", "task", "#cells", "#first row", "message"),
        [
            (
                text(plain(e.error, 24), "yellow" if e.error == "upstream" else "red"),
                plain(e.task, 24),
                f"{e.count:,}",
                f"{e.first_row:,}",
                plain(e.message, max(20, width - 64)),
            )
            for e in errors
        ],
        drop=("message", "#first row"),
        width=width,
    )


def _more(hidden: int, noun: str, nouns: str = "") -> list[Text]:
    return [text(f"and {count(hidden, noun, nouns)} more", "dim")] if hidden > 0 else []


# -- following ------------------------------------------------------------------------------------


def near() -> Client:
    """A client that says soon when the server is away, for screens that keep asking."""
    from motet.client import Client
    from motet.http import Address, Http

    return Client.over(Http(Address.find(), timeout_s=PATIENCE_S))


def look(job: Job) -> JobActivity | None:
    """The job's activity, or None from a server that is too old to tell."""
    from motet.messages.activity import JobActivity

    told = _activity_told(job)
    return None if told is None else JobActivity.of(told)


def _activity_told(job: Job) -> Mapping[str, Any] | None:
    from motet.errors import NotFound

    try:
        return job.activity(timeline=0)
    except NotFound:
        job.refresh()  # which says so where it is the job that is gone
        return None


def _follow(job: Job, screen: Console) -> None:
    """Redraw each second until the job has ended; then print its last picture for good."""
    from rich.live import Live

    from motet.errors import Overloaded, Unreachable

    facts = look(job)
    if facts is None:
        job.wait(check=False)
        click.echo(str(job.progress))
        return
    hint = "Ctrl-C leaves it running"
    with Live(console=screen, transient=True, auto_refresh=False, redirect_stdout=False) as live:
        note = hint
        while facts.job.state not in ENDED:
            live.update(picture(facts, width=screen.width, height=screen.height, note=note), refresh=True)
            time.sleep(REDRAW_S)
            try:
                facts, note = look(job) or facts, hint
            except (Unreachable, Overloaded):
                note = f"the server does not answer; this is what it said last · {hint}"
    screen.print(picture(facts, width=screen.width))


def _report(job: Job, screen: Console, now: Callable[[], float] = time.monotonic) -> None:
    """A line now and then, and the last picture; for pipes and logs."""
    due = now()
    for progress in job.watch():
        if progress.state not in ENDED and now() >= due:
            click.echo(str(progress))
            sys.stdout.flush()
            due = now() + LINE_S
    facts = look(job)
    if facts is not None:
        screen.print(picture(facts, width=min(screen.width, 120)))
    elif job.record["state"] == State.SUCCEEDED:
        click.echo(str(job.progress))


def _stream(job: Job) -> None:
    """An object per line and change."""
    import dataclasses
    import json

    from motet.messages.jobs import JobRecord

    said = ""
    for progress in job.watch():
        facts = _activity_told(job)
        told = dataclasses.asdict(Progress.of(JobRecord.of(facts["job"])) if facts else progress)
        if facts:
            told |= {name: facts[name] for name in ("passes", "devices", "errors")}
        line = json.dumps({"job": job.id, **told}, ensure_ascii=False)
        if line != said:
            click.echo(line)
            sys.stdout.flush()
        said = line


@contextmanager
def _left_running(job: Job) -> Iterator[None]:
    """Say on Ctrl-C that the job goes on, and how to come back."""
    try:
        yield
    except KeyboardInterrupt:
        if job.record["state"] not in ENDED:
            click.echo(f"job {job.id} goes on; come back to it with: {program()} watch {job.id}", err=True)
        raise
