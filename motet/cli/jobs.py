"""Commands on jobs: submit, plan, jobs, results, cancel, rm. What follows a job is in motet.cli.watch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from motet.cli.show import (
    PositiveNumber,
    as_json,
    connect,
    console,
    find_job,
    plan_line,
    plan_picture,
    program,
    put_json,
    put_table,
    result_table,
)
from motet.states import LIVE, REACHED, State
from motet.words import count

if TYPE_CHECKING:
    from motet.job import Job

#: Rows of a table without --limit.
_TABLE_ROWS = 20
_FORMATS = {".parquet": "to_parquet", ".jsonl": "to_jsonl", ".ndjson": "to_jsonl", ".csv": "to_csv"}
#: A comma that ends an option: another one's name and = follow it.
_NEXT_OPTION = re.compile(r",(?=[a-z_]+=)")

task_option = click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME=KIND:MODEL[,OPTION=VALUE…]",
    help="A task to ask of every row; give it several times. Kinds and options: see below.",
)
TASKS_HELP = """\b
Tasks:
  topic=classify:MODEL                      a label; also number, embed,
                                            entities, function
  mood=choose:LLM,labels='glad|sad|angry'   the likeliest of your labels
  gist=generate:LLM,prompt='Sum it up.'     a text
  form=extract:LLM,schema=@form.json        JSON that keeps the schema
  best=rank:MODEL                           the list {documents} by how well each
                                            answers {query}, the best first
  answer=chat:LLM                           the next message of {messages}
MODEL and LLM are NAME (the newest), NAME@VERSION or NAME@ALIAS: see `motet models`.

\b
Options behind the model, as NAME=VALUE:
  input='{subject} {body}'   what classify and the like read; {text} otherwise
  about='{subject} {body}'   the same of generate, choose and extract
  query='{question}' documents='{pages}'       the same of rank
  min_score=0.5 otherwise=unsure               of classify: what it says when no label is sure
  inputs='mood|age' params='{"k": 9}' artefact=NAME     what a function is given
  question= system=          further words for the language model
  max_tokens= stop='a|b' temperature= seed=    what it writes, and how
  thinking=true|false|null                     before that; null: as it likes
  when="mood == 'angry'"     of every kind: on which rows it runs
A text that begins with @ is read from that file: prompt=@reply.txt.
A prompt may name another task, as {mood}: it waits for that answer.
docs/tasks.md tells of every option.

"""


def duration(context: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Seconds of ``90s``, ``15m``, ``2h``, ``30d`` or ``1w``. Raises BadParameter."""
    if value is None:
        return None
    from motet.folds import duration_s

    seconds = duration_s(value)
    if not seconds:
        raise click.BadParameter(f"got {value!r}; expected a number and a unit, such as 90s, 15m, 2h or 30d")
    return seconds


bad_rows_option = click.option(
    "--bad-rows",
    type=click.Choice(["refuse", "error"]),
    default="refuse",
    show_default=True,
    help="What a row without text in a field does: refuse the job and list such rows, or give error cells to the tasks "
    "that read the field.",
)


def priority_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--priority",
        type=click.Choice(["interactive", "normal", "bulk"]),
        default=default,
        show_default=True,
    )


def media_options(command: Callable[..., None]) -> Callable[..., None]:
    """--media-root and --media-size."""
    size = click.option(
        "--media-size",
        type=click.IntRange(0),
        default=512,
        show_default=True,
        metavar="PIXELS",
        help="Pictures whose longer side has more are made smaller before they are sent; 0 sends them as they are.",
    )
    root = click.option(
        "--media-root",
        type=click.Path(exists=True, file_okay=False),
        metavar="FOLDER",
        help="Where paths of pictures are opened. Without it no path of a row is.",
    )
    return root(size(command))


thumbs_option = click.option(
    "--media-thumbs", is_flag=True, help="Send pictures in small as well, for the page of the job's rows."
)
notify_option = click.option(
    "--notify-when",
    metavar="CONDITION",
    help='Tell webhooks of each row for which this holds, such as "risk > 0.4".',
)


@click.command(
    epilog=TASKS_HELP
    + """\b
Examples:
  motet submit tickets.jsonl --task topic=classify:news-topics --task vector=embed:all-MiniLM-L6-v2
  motet submit mails.csv --task mood=classify:review-sentiment,input='{subject} {body}' --out moods.parquet
  motet submit tickets.jsonl --task mood=choose:qwen3-0.6b,labels='glad|sad|angry' \\
      --task reply=generate:qwen3-0.6b,prompt='Write a reply to a {mood} customer.',max_tokens=120"""
)
@click.argument("file")
@task_option
@click.option("--name", default="", help="A name to find the job by.")
@priority_option("normal")
@click.option("--reuse/--no-reuse", default=True, show_default=True, help="Take answers of earlier jobs.")
@bad_rows_option
@click.option(
    "--deadline",
    callback=duration,
    metavar="2h",
    help="Fail if it has not ended by then; what is done stays.",
)
@click.option(
    "--retention-days",
    type=PositiveNumber(),
    metavar="DAYS",
    help="Delete it so long after its end, or sooner where the server keeps jobs no longer.",
)
@notify_option
@media_options
@thumbs_option
@click.option("--key", help="Submitting again with the same key gives the same job, or resumes its upload.")
@click.option("--wait", is_flag=True, help="Wait until the job has ended; fail if it fails.")
@click.option("--out", metavar="FILE", help="Wait, and write the rows to a .parquet, .jsonl or .csv file.")
@as_json
def submit(
    file: str,
    tasks: Sequence[str],
    name: str,
    priority: Any,
    reuse: bool,
    bad_rows: Any,
    deadline: float | None,
    retention_days: float | None,
    notify_when: str | None,
    media_root: str | None,
    media_size: int,
    media_thumbs: bool,
    key: str | None,
    wait: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Send the rows of FILE and start a job; print its id.

    FILE is .jsonl, .ndjson, .csv, .tsv, .txt (each also with .gz) or .parquet. Only the fields that tasks read
    are sent: {text}, unless a task's options name others. A file is read whole or refused with the line: where a quote
    is never closed, say, whatever --bad-rows says.
    """
    specs = parse_tasks(tasks)
    export = _exporter(out) if out else None
    with connect() as client:
        job = client.submit(
            file,
            specs,
            name=name,
            priority=priority,
            reuse=reuse,
            bad_rows=bad_rows,
            deadline_s=deadline,
            retention_days=retention_days,
            notify_when=notify_when,
            key=key,
            media_root=media_root,
            media_size=media_size or None,
            media_thumbs=media_thumbs,
        )
        if not as_json:
            click.echo(job.id)
        if export and out:
            rows = export(job, out)
            click.echo(f"{rows:,} rows in {out}", err=True)
        elif wait:
            job.wait()
        if as_json:
            put_json(job.refresh().record)
        elif wait or out:
            progress = job.progress
            click.echo(str(progress), err=True)
            if progress.error:
                click.echo(f"what went wrong, row by row: {program()} results {job.id}", err=True)
        elif sys.stderr.isatty():
            click.echo(f"it runs; follow it with: {program()} watch {job.id}", err=True)


@click.command(
    epilog=TASKS_HELP
    + """\b
Example:
  motet plan tickets.jsonl --task topic=classify:news-topics --task mood=classify:review-sentiment"""
)
@click.argument("file")
@task_option
@priority_option("normal")
@bad_rows_option
@media_options
@as_json
def plan(
    file: str,
    tasks: Sequence[str],
    priority: Any,
    bad_rows: Any,
    media_root: str | None,
    media_size: int,
    as_json: bool,
) -> None:
    """Show what a job would run, without running it.

    Tasks that share a model's weights are answered by one pass, prompts about one text by one prefill; a task that
    names another one waits for it in a later pass. Totals are estimates from a sample of FILE.
    """
    specs = parse_tasks(tasks)
    with connect() as client:
        planned = client.plan(
            file,
            specs,
            priority=priority,
            bad_rows=bad_rows,
            media_root=media_root,
            media_size=media_size or None,
        )
    if as_json:
        put_json(planned.record)
        return
    out = console()
    out.print(plan_picture(planned, width=out.width))
    click.echo(plan_line(planned))
    if planned.truncated_rows:
        click.echo(f"~{planned.truncated_rows:,} rows are longer than their model reads")
    if planned.seconds is not None:
        click.echo(f"~{planned.seconds:,.1f} s on the devices that are there now")


@click.command(
    epilog="""\b
Examples:
  motet jobs
  motet jobs --state running --json"""
)
@click.option("--state", type=click.Choice([state.value for state in REACHED]))
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@as_json
def jobs(state: Any, limit: int, as_json: bool) -> None:
    """List jobs, newest first. Written: tokens that language models wrote, where any did."""
    with connect() as client:
        found = [job.record for job in client.jobs(state, limit)]
    if as_json:
        put_json(found)
        return
    skipped = ["#skipped"] if any(job["cells"]["skipped"] for job in found) else []
    written = ["#written"] if any(_written(job) for job in found) else []
    put_table(
        ("!job", "name", "state", "#rows", "tasks", "#cells", "#errors", *skipped, *written, "created"),
        (
            (
                job["id"],
                job["name"],
                job["state"],
                f"{job['rows']:,}",
                ", ".join(job["tasks"]),
                _cells(job),
                f"{job['cells']['error']:,}",
                *(f"{job['cells']['skipped']:,}" for _ in skipped),
                *(f"{_written(job):,}" for _ in written),
                job["created"][:19].replace("T", " "),
            )
            for job in found
        ),
        empty="no jobs; submit one with: motet submit FILE --task …",
        drop=("created", "tasks", *written, "#rows", "#errors"),
    )


@click.command(
    epilog="""\b
Examples:
  motet results 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57 --limit 5
  motet results 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57 --format csv > rows.csv"""
)
@click.argument("job")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "jsonl", "csv"]),
    help="Default: a table on a terminal, JSON lines in a pipe.",
)
@click.option(
    "--limit", type=click.IntRange(1), help=f"Rows at most. Default: all; {_TABLE_ROWS} in a table."
)
@click.option("--task", "tasks", multiple=True, help="Only this task; give it several times.")
@click.option("--order", type=click.Choice(["row", "done"]), default="row", show_default=True)
@as_json
def results(
    job: str, style: str | None, limit: int | None, tasks: Sequence[str], order: Any, as_json: bool
) -> None:
    """Print the merged rows of JOB, while it runs and to its end. --json is --format jsonl.

    In CSV, text that a spreadsheet would take for a formula gets a ' before it.
    """
    from motet.export import csv_lines, json_lines

    style = "jsonl" if as_json else style or ("table" if sys.stdout.isatty() else "jsonl")
    limit = limit or (_TABLE_ROWS if style == "table" else None)
    with connect() as client:
        found = find_job(client, job)
        rows = islice(found.results(tasks or None, order, check=limit is None), limit)
        if style == "table":
            out = console()
            out.print(result_table(list(rows), width=out.width))
            if limit is not None and found.rows > limit:
                click.echo(f"the first {limit:,} of {found.rows:,} rows; --limit shows more", err=True)
        else:
            for line in json_lines(rows) if style == "jsonl" else csv_lines(rows):
                click.echo(line)


@click.command(
    epilog="""\b
Example:
  motet cancel 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57"""
)
@click.argument("job")
@as_json
def cancel(job: str, as_json: bool) -> None:
    """End JOB. Rows that are done stay; submitting it again goes on where it was."""
    with connect() as client:
        ended = find_job(client, job).cancel()
        if as_json:
            put_json(ended.record)
        else:
            click.echo(str(ended.progress))


@click.command(
    epilog="""\b
Examples:
  motet rm 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57
  motet rm --finished --older-than 30d
  motet rm --finished --older-than 7d --yes --json"""
)
@click.argument("jobs", nargs=-1, metavar="[JOB…]")
@click.option("--finished", is_flag=True, help="Every job that has succeeded, failed or been cancelled.")
@click.option(
    "--older-than",
    callback=duration,
    metavar="30d",
    help="With --finished: only those that ended so long ago.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@as_json
def rm(jobs: Sequence[str], finished: bool, older_than: float | None, yes: bool, as_json: bool) -> None:
    """Remove jobs and their results for good.

    Those that are named and still run are cancelled first. On a terminal it asks before; in a script, --finished
    needs --yes. MOTET_RETENTION_DAYS lets the server do this by itself.
    """
    if bool(jobs) == finished:
        raise click.UsageError("name the jobs to remove, or give --finished for all that have ended")
    if older_than is not None and not finished:
        raise click.UsageError("--older-than goes with --finished; a job that is named is removed anyway")
    with connect() as client:
        named = {job.id: job for job in (find_job(client, job) for job in jobs)}
        found = (
            [job for job in client.jobs() if _ended_before(job, older_than)]
            if finished
            else [*named.values()]
        )
        if found and not yes:
            _ask_to_remove(found, finished)
        removed = [job.id for job in found if _removed(job)]
    if as_json:
        put_json({"removed": removed})
    elif finished:
        click.echo(f"{len(removed):,} removed")


def _ended_before(job: Job, age_s: float | None) -> bool:
    """Whether it has ended, and that at least so long ago by this machine's clock."""
    from datetime import UTC, datetime

    ended = job.record["finished"]
    if not ended:
        return False
    return age_s is None or (datetime.now(UTC) - datetime.fromisoformat(ended)).total_seconds() >= age_s


def _ask_to_remove(found: Sequence[Job], selected: bool) -> None:
    """Say what will be gone, and ask. Raises Abort; UsageError where nobody is there to answer."""
    if not sys.stdin.isatty():
        if selected:
            raise click.UsageError(f"this removes {count(len(found), 'job')}; say --yes to do it in a script")
        return
    running = sum(job.record["state"] in LIVE for job in found)
    rows = sum(job.rows for job in found)
    words = f"remove {count(len(found), 'job')} with {count(rows, 'row')} and all results"
    click.confirm(words + (f" ({running:,} still running)" if running else ""), abort=True, err=True)


def _removed(job: Job) -> bool:
    """Remove it. False where somebody else, or the server's own retention, was faster."""
    from motet.errors import NotFound

    try:
        job.delete()
    except NotFound:
        return False
    return True


def parse_tasks(specs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task specs from ``NAME=KIND:MODEL[,OPTION=VALUE…]``. Raises UsageError for another form.

    Whether kind, options and values exist is said by motet.tasks, as for any other submission.
    """
    parsed: dict[str, dict[str, Any]] = {}
    for spec in specs:
        head, *options = _NEXT_OPTION.split(spec)
        name, _, what = head.partition("=")
        kind, _, model = what.partition(":")
        if not (name and kind and model):
            raise click.UsageError(
                f"--task {spec!r}: expected NAME=KIND:MODEL, such as topic=classify:news-topics"
            )
        if name in parsed:
            raise click.UsageError(f"--task {name!r} is given twice; names of tasks must differ")
        parsed[name] = {"kind": kind, "model": model}
        for option in options:
            key, _, value = option.partition("=")
            read = _value(name, key, value)
            # Said again, it is the next text of a head on several.
            parsed[name][key] = (
                _behind(parsed[name][key], read) if key == "input" and key in parsed[name] else read
            )
    return parsed


def _behind(before: str | list[str], text: str) -> list[str]:
    return [*([before] if isinstance(before, str) else before), text]


#: Options that are text whatever they look like, and may stand in a file; that are words of one kind; and lists.
_TEXTS = frozenset(
    {"about", "documents", "input", "messages", "prompt", "query", "question", "system", "when"}
)
_WORDS = frozenset({"artefact", "otherwise"})
_LISTS = frozenset({"inputs", "labels", "numbers", "stop"})
#: Options that are numbers with a fraction.
_FRACTIONS = frozenset({"min_score", "temperature"})
#: Options that are JSON, and what of.
_JSON = {"schema": "a JSON Schema", "params": "an object of keyword arguments"}


def _value(task: str, option: str, text: str) -> Any:
    """An option's value. Raises UsageError for a file that cannot be read, and for what is no JSON."""
    where = f"--task {task!r}: {option}"
    if text.startswith("@") and option in (*_TEXTS, *_LISTS, *_JSON):
        text = _read(where, text[1:], lines=option in _LISTS)
    if option in _TEXTS or option in _WORDS:
        return text
    from motet.labels import is_listed

    if option == "labels" and is_listed(text):
        return text
    if option in _LISTS:
        return text.split("|")
    if option in _JSON:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise click.UsageError(
                f"{where}: broken JSON ({error}); expected {_JSON[option]}, or @FILE with one"
            ) from None
    if text in ("true", "false", "null"):
        return json.loads(text)
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if option in _FRACTIONS and re.fullmatch(r"[0-9]{0,3}\.[0-9]{1,9}", text):
        return float(text)
    return text


def _read(where: str, path: str, *, lines: bool) -> str:
    """A file's text without the end of its last line; its ``lines`` as if they were given on the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise click.UsageError(f"{where}: {path!r} cannot be read: {(why or 'an error').lower()}") from None
    return "|".join(filter(None, text.splitlines())) if lines else text


def _exporter(out: str) -> Callable[[Job, str], int]:
    """How to write this file. Raises UsageError before anything is sent, not after the job has run."""
    suffix = os.path.splitext(out)[1].lower()
    if suffix not in _FORMATS:
        raise click.UsageError(f"--out {out!r}: expected a name that ends in {', '.join(_FORMATS)}")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise click.UsageError(f"--out {out!r}: no such folder {os.path.dirname(out)!r}")
    if suffix == ".parquet":
        import importlib.util

        if importlib.util.find_spec("pyarrow") is None:
            raise click.UsageError(
                "--out needs pyarrow for .parquet; pip install 'motet[arrow]', or take .jsonl"
            )
    return lambda job, path: int(getattr(job, _FORMATS[suffix])(path))


def _written(job: Mapping[str, Any]) -> int:
    return int(job["usage"]["tokens_out"])


def _cells(job: Mapping[str, Any]) -> str:
    """Cells that are done, of how many; of an open job, whose rows keep coming, the first alone."""
    cells = job["cells"]
    done = f"{cells['ok'] + cells['error']:,}"
    return done if job["state"] == State.OPEN else f"{done}/{cells['total']:,}"
