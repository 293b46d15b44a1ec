"""Commands on open jobs: open, ask, tail, close (docs/live.md)."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from io import TextIOWrapper
from queue import Queue
from typing import TYPE_CHECKING, Any, TextIO

import click

from motet.cli.jobs import (
    TASKS_HELP,
    bad_rows_option,
    media_options,
    notify_option,
    parse_tasks,
    priority_option,
    task_option,
    thumbs_option,
)
from motet.cli.show import PositiveNumber, as_json, connect, console, program, put_json, result_table

if TYPE_CHECKING:
    from motet.feed import AskedRow, Feed
    from motet.results import Row

#: Lines of `motet ask JOB -` that are read ahead of the answers. More: memory; fewer: requests carry fewer rows.
_AHEAD = 1024

#: A fold on the command line; a comma inside braces belongs to a name.
_FOLD = re.compile(r"(?P<name>[^=\s]+)\s*=\s*(?P<kind>[a-z]+)\((?P<options>.*)\)")
_NEXT_OPTION = re.compile(r",(?![^{]*\})")

_within = click.option(
    "--within",
    "within_s",
    type=click.FloatRange(0, 3600, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long for an answer.",
)


@click.command(
    "open",
    epilog=TASKS_HELP
    + """\b
State, what the rows of a key before a row come to, as a field of it:
  n_week='count(key={customer_id}, window=7d)'   how many rows
  spent='sum({amount}, key={customer_id})'       also mean, max, last
  trend='ewm({amount}, key={customer_id}, half_life=1d)'
Further options: window=90s|15m|24h|7d, at={time}.

\b
Example:
  motet open --name risk --task topic=classify:news-topics --task vector=embed:all-MiniLM-L6-v2
  motet ask risk "My card was charged twice."
""",
)
@task_option
@click.option("--name", required=True, help="What it is called by `motet ask`, `tail` and `close`.")
@click.option(
    "--state",
    "folds",
    multiple=True,
    metavar="NAME=FOLD",
    help="A field that holds what the rows of a key before it come to; give it several times. See below.",
)
@priority_option("interactive")
@bad_rows_option
@click.option(
    "--keep-days",
    type=PositiveNumber(),
    metavar="DAYS",
    help="Delete each row so long after it was answered.  [default: 7]",
)
@click.option(
    "--retention-days",
    type=PositiveNumber(),
    metavar="DAYS",
    help="Delete it so long after its end, or sooner where the server keeps jobs no longer.",
)
@notify_option
@as_json
def open_(
    tasks: Sequence[str],
    name: str,
    folds: Sequence[str],
    priority: Any,
    bad_rows: Any,
    keep_days: float | None,
    retention_days: float | None,
    notify_when: str | None,
    as_json: bool,
) -> None:
    """Open a job that answers rows as they come; print its id.

    It takes rows until it is closed. The same again gives the same job.
    """
    specs = parse_tasks(tasks)
    with connect() as client:
        feed = client.open(
            specs,
            name=name,
            priority=priority,
            bad_rows=bad_rows,
            keep_days=keep_days,
            retention_days=retention_days,
            state=_parse_state(folds),
            notify_when=notify_when,
        )
        if as_json:
            put_json(feed.job.record)
            return
        click.echo(feed.job.id)
        if sys.stderr.isatty():
            click.echo(f'it is open; ask it with: {program()} ask {name} "…"', err=True)


def _parse_state(folds: Sequence[str]) -> dict[str, dict[str, str]] | None:
    """Specs of ``n_week=count(key={customer_id}, window=7d)``; what they say is checked with the tasks."""
    specs: dict[str, dict[str, str]] = {}
    for told in folds:
        found = _FOLD.fullmatch(told.strip())
        if found is None or found["name"] in specs:
            raise click.BadParameter(
                f"got {told!r}; expected each name once, as n_week='count(key={{customer_id}}, window=7d)'",
                param_hint="--state",
            )
        specs[found["name"]] = {"kind": found["kind"]}
        for option in _NEXT_OPTION.split(found["options"]) if found["options"].strip() else ():
            key, equals, value = option.partition("=")
            # The field that is folded stands first, without a name.
            name, value = (key, value) if equals and "{" not in key else ("value", option)
            specs[found["name"]][name.strip()] = value.strip()
    return specs or None


@click.command(
    epilog="""\b
Examples:
  motet ask risk "My card was charged twice."
  motet ask risk '{"subject": "Refund", "body": "Where is it?"}' --key ticket-81
  motet ask letters "Where is my refund?" --stream reply
  tail -f tickets.log | motet ask risk -"""
)
@click.argument("job")
@click.argument("row")
@click.option("--key", help="Names the row for ever: asked again with it, it is found and not done twice.")
@click.option(
    "--stream",
    "task",
    metavar="TASK",
    help="Print this task's text as it is written. Ctrl-C gives the row up.",
)
@_within
@media_options
@thumbs_option
@as_json
def ask(
    job: str,
    row: str,
    key: str | None,
    task: str | None,
    within_s: float,
    media_root: str | None,
    media_size: int,
    media_thumbs: bool,
    as_json: bool,
) -> None:
    """Ask an open JOB one ROW, or many; print the answers.

    JOB is a name or an id. ROW is a text, or a JSON object of fields. With - for ROW, each line of the input is one,
    and its answer a line of JSON, in order and as soon as it is there; a line that is refused is answered by
    {"error": …}, and the command fails at the end.
    """
    from motet.export import json_row

    if row == "-" and key is not None:
        raise click.UsageError("--key names one row; of many lines each has a key of its own")
    if task is not None and (row == "-" or as_json):
        raise click.UsageError("--stream prints the text of one row; without it come lines and JSON")
    with (
        connect() as client,
        client.feed(
            job, media_root=media_root, media_size=media_size or None, media_thumbs=media_thumbs
        ) as feed,
    ):
        if row == "-":
            if not _ask_lines(feed, _lines(sys.stdin), within_s):
                raise click.ClickException("some lines have no answer; their lines say why")
            return
        if task is not None:
            _print_as_written(feed, _row(row), task, key, within_s)
            return
        answer = feed.ask(_row(row), within_s=within_s, key=key)
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(json_row(answer), ensure_ascii=False))
    else:
        out = console()
        out.print(result_table([answer], width=out.width))


def _print_as_written(feed: Feed, row: AskedRow, task: str, key: str | None, within_s: float) -> None:
    with feed.stream(row, task=task, within_s=within_s, key=key) as deltas:
        for delta in deltas:
            click.echo(f"\n{delta}" if delta.reset else str(delta), nl=False)
            sys.stdout.flush()
    click.echo()
    cell = deltas.row[task] if deltas.row is not None else None
    if cell is not None and cell.error is not None:
        raise click.ClickException(f"{task}: {cell.error.error}: {cell.error.message}")


def _row(line: str) -> AskedRow:
    """A line as a row: an object where it looks like one, else the text itself."""
    if line.lstrip().startswith("{"):
        from motet.sources import parse_json

        try:
            found = parse_json(line)
        except (ValueError, RecursionError):
            return line
        if isinstance(found, dict):
            return found
    return line


def _lines(file: TextIO) -> TextIO:
    """The file, of whose lines those that are no UTF-8 hold lone surrogates: each is refused alone, where it is checked."""
    if isinstance(file, TextIOWrapper):
        file.reconfigure(encoding="utf-8", errors="surrogateescape")
    return file


def _ask_lines(feed: Feed, lines: Iterable[str], within_s: float) -> bool:
    """Ask every line and print the answers, in order and as they come; whether all have one."""
    from motet.errors import MotetError
    from motet.export import json_row

    answers: Queue[Future[Row] | None] = Queue(_AHEAD)

    def ask_on() -> None:
        try:
            for text in lines:
                if line := text.rstrip("\r\n"):
                    answers.put(_asked(feed, line, within_s))
        except Exception as error:  # noqa: BLE001 - it is raised where the answers are printed
            answers.put(_failed(error))
        answers.put(None)

    # It may wait for a line that never comes: the program ends without it.
    threading.Thread(target=ask_on, daemon=True).start()
    all_answered = True
    while (answer := answers.get()) is not None:
        try:
            told = json_row(answer.result())
        except MotetError as error:
            told, all_answered = {"error": str(error)}, False
        _put_line(told)
    return all_answered


def _asked(feed: Feed, line: str, within_s: float) -> Future[Row]:
    from motet.errors import MotetError

    try:
        return feed.put(_row(line), within_s=within_s)
    except MotetError as error:
        return _failed(error)


def _failed(error: Exception) -> Future[Row]:
    failed: Future[Row] = Future()
    failed.set_exception(error)
    return failed


def _put_line(told: Mapping[str, Any]) -> None:
    click.echo(json.dumps(told, ensure_ascii=False))
    sys.stdout.flush()


@click.command(
    epilog="""\b
Examples:
  motet tail risk
  motet tail risk --after 170003 >> risk.jsonl"""
)
@click.argument("job")
@click.option(
    "--after",
    type=click.IntRange(0),
    default=0,
    metavar="CURSOR",
    help="Go on behind the row of this cursor. Default: from the first one.",
)
@click.option("--skip-gone", is_flag=True, help="Pass over rows behind it that are no longer kept.")
@as_json
def tail(job: str, after: int, skip_gone: bool, as_json: bool) -> None:
    """Print the rows of an open JOB as they are done.

    Every row, whoever asked it: a line of JSON each, with its cursor. It goes on until the job ends; Ctrl-C leaves that
    open. JOB is a name or an id.
    """
    from motet.export import json_row

    with connect() as client:
        for row in client.feed(job).rows(after, skip_gone=skip_gone):
            _put_line({"cursor": row.cursor, **json_row(row)})


@click.command(
    epilog="""\b
Example:
  motet close risk"""
)
@click.argument("job")
@as_json
def close(job: str, as_json: bool) -> None:
    """Let an open JOB take no more rows.

    It succeeds when the rows it has are answered. JOB is a name or an id.
    """
    with connect() as client:
        closed = client.feed(job).close()
        if as_json:
            put_json(closed.record)
        else:
            click.echo(str(closed.progress))
