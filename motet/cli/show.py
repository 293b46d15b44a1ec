"""What commands print: tables for people, JSON for programs, and the client that they print from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from motet.messages.message import ApiMessage
from motet.words import count, visible

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from motet.client import Client
    from motet.job import Job
    from motet.messages.jobs import Plan
    from motet.results import Row

#: The beginning of a job's id that may stand for it.
_PREFIX = re.compile(r"[0-9a-z-]{4,35}")
#: Width in characters below which a table of results leaves out scores and vectors.
_NARROW = 110
#: Characters that a column of words keeps before other columns are dropped for it.
_WORDS = 18

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Finite(click.ParamType[float]):
    """Refuses NaN and infinity, which click takes for numbers, NaN also where there are bounds."""

    name = "number"
    expected: str

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"got {value!r}; expected {self.expected}", param, ctx)
        return number


class Points(_Finite, click.types.FloatParamType):
    """Points of a figure, such as accuracy."""

    expected = "a finite number of points"


class PositiveNumber(_Finite, click.FloatRange):
    """A finite number above 0, of an option that is left out for none."""

    expected = "a finite number above 0; leave it out for none"

    def __init__(self) -> None:
        super().__init__(0, min_open=True)


def connect(*, admin: bool = False) -> Client:
    """A client of the server that the environment names; ``admin`` with the administrator's token."""
    from motet.client import Client
    from motet.http import Address, Http

    return Client.over(Http(Address.find(admin=admin)))


def find_job(client: Client, job: str) -> Job:
    """The job of this id, or the one whose id alone begins so. Raises NotFound."""
    from motet.errors import NotFound

    try:
        return client.job(job)
    except NotFound:
        found = [one for one in client.jobs() if one.id.startswith(job)] if _PREFIX.fullmatch(job) else []
    if len(found) > 1:
        raise NotFound(f"{len(found):,} jobs have ids that begin with {job}; give more of it")
    if not found:
        raise NotFound(f"no job of this id; see `{program()} jobs`")
    return found[0]


def program() -> str:
    """The command as it can be typed again here: ``motet``, or where it was called, such as ``.venv/bin/motet``."""
    called = sys.argv[0]
    if os.path.basename(called) != "motet" or not os.path.isfile(called):
        return "motet"
    at = os.path.abspath(called)
    if (known := shutil.which("motet")) and os.path.abspath(known) == at:
        return "motet"
    near = os.path.relpath(at)
    return shlex.quote(at if near.startswith("..") else near if os.sep in near else os.path.join(".", near))


def console() -> Console:
    """A console on stdout that takes text as it is. In a pipe it is wide: nobody cuts a table for grep."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 200
    return Console(markup=False, emoji=False, highlight=False, width=wide)


def put_json(value: Any) -> None:
    """Print a value as JSON; dataclasses as objects."""
    click.echo(
        json.dumps(value, ensure_ascii=False, default=_plain, indent=2 if sys.stdout.isatty() else None)
    )


def put_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str, drop: Sequence[str] = ()
) -> None:
    """Print a table of columns as ``table`` takes them. ``empty`` is said without rows.

    On a terminal too narrow for all of it, columns are left out in the order of ``drop``.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    if not lines:
        click.echo(empty, err=True)
        return
    out = console()
    if out.is_terminal:
        columns, lines = fitted(columns, lines, drop, out.width)
    out.print(table(columns, lines))


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], drop: Sequence[str], width: int
) -> tuple[list[str], list[list[str]]]:
    """The columns that fit into ``width`` characters, less those of ``drop``, in its order, that must go."""

    def needed(column: int) -> int:
        name = columns[column]
        widest = max(len(name.strip("#!")), *(len(row[column]) for row in rows))
        return widest if name[0] in "#!" else min(widest, _WORDS)

    kept = list(range(len(columns)))
    for name in drop:
        if sum(needed(i) + 3 for i in kept) - 3 <= width:
            break
        kept.remove(columns.index(name))
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of plain cells; control characters in them are made visible.

    A column whose name begins with ``#`` holds numbers, one with ``!`` what must stay in one line.
    """
    from rich import box
    from rich.table import Table

    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        numbers = name.startswith("#")
        built.add_column(
            name.lstrip("#!"),
            justify="right" if numbers else "left",
            no_wrap=name[0] in "#!",
            overflow="ellipsis",
        )
    for row in rows:
        built.add_row(*(visible(str(cell)) for cell in row))
    return built


def plan_picture(plan: Plan, *, width: int) -> Group:
    """A plan as a graph where tasks wait for others or share prompts, and as a table of its passes."""
    from rich.console import Group
    from rich.text import Text

    from motet.cli.graph import graph, worth_drawing

    if not worth_drawing(plan.passes):
        return Group(plan_table(plan))
    return Group(Text(), *graph(plan.passes, width), plan_table(plan, numbered=True))


def plan_table(plan: Plan, *, numbered: bool = False) -> Table:
    """The passes of a plan: which tasks each answers, and what a pass per task would have read.

    ``numbered``: the tasks are told elsewhere, by the number of the pass.
    """
    estimated = any(p.seconds is not None for p in plan.passes)
    partly = any(p.share < 1 for p in plan.passes)
    writes = any(p.tokens_out for p in plan.passes)
    sees = any(p.pixels for p in plan.passes)
    return table(
        (
            *(["#pass"] if numbered else []),
            "engine",
            "!model",
            *([] if numbered else ["tasks"]),
            *(["#of the rows"] if partly else []),
            *(["#megapixels"] if sees else []),
            "#tokens",
            "#instead of",
            *(["#written ≤"] if writes else []),
            *(["#seconds"] if estimated else []),
        ),
        (
            (
                *([str(number)] if numbered else []),
                # A pass is called by its engine and its model; the model has a column of its own.
                p.kind.partition(" ")[0],
                p.model,
                *([] if numbered else [", ".join(p.tasks)]),
                *([f"~{p.share:.0%}"] if partly else []),
                *([f"~{p.pixels / 1e6:,.1f}" if p.pixels else "–"] if sees else []),
                f"~{p.tokens:,}",
                f"~{p.unfused_tokens:,}",
                *([f"{p.tokens_out:,}"] if writes else []),
                *(["–" if p.seconds is None else f"~{p.seconds:,.1f}"] if estimated else []),
            )
            for number, p in enumerate(plan.passes)
        ),
    )


def plan_line(plan: Plan) -> str:
    """The plan in a line: ``4 tasks → 1 pass over 3,000 rows, ~84,000 tokens instead of ~336,000``."""
    line = f"{count(plan.tasks, 'task')} → {count(len(plan.passes), 'pass', 'passes')} over {count(plan.rows, 'row')}"
    line += f", ~{plan.tokens:,} tokens"
    line += f" instead of ~{plan.unfused_tokens:,}" if plan.unfused_tokens > plan.tokens else ""
    line += f" (of them ~{plan.pixels / 1e6:,.1f} megapixels of pictures)" if plan.pixels else ""
    return line + (f", at most {plan.tokens_out:,} written" if plan.tokens_out else "")


def result_table(rows: Sequence[Row], texts: Sequence[str] | None = None, *, width: int = 120) -> Table:
    """Merged rows: a line per row, a column per task, scores beside labels.

    ``texts`` are the inputs by row index; they get what the answers leave of ``width`` characters. A narrow
    table leaves out scores, and vectors beside other answers, which it only could name.
    """
    narrow = width < _NARROW
    tasks = list(rows[0]) if rows else []
    if narrow:
        tasks = [task for task in tasks if rows[0][task].kind != "vector"] or tasks
    answers = [[_answer(row, task, narrow) for task in tasks] for row in rows]
    if texts is None:
        return table(
            ["#row", *tasks], ([f"{row.index:,}", *line] for row, line in zip(rows, answers, strict=True))
        )
    taken = sum(
        max(len(name), *map(len, column)) + 3
        for name, column in zip(tasks, zip(*answers, strict=True), strict=True)
    )
    limit = max(16, min(60, width - taken - 10))
    return table(
        ["#row", "!text", *tasks],
        (
            [f"{row.index:,}", cut(texts[row.index], limit), *line]
            for row, line in zip(rows, answers, strict=True)
        ),
    )


def _answer(row: Row, task: str, narrow: bool) -> str:
    cell, limit = row[task], 24 if narrow else 60
    if cell.finish is not None:
        # What was written goes on in further lines.
        limit *= 2
    if cell.error is not None and cell.error.message:
        return cut(f"<{cell.error.error}: {cell.error.message}>", limit)
    text = cut(str(cell), limit)
    if cell.kind == "label" and cell.score is not None and not narrow:
        text += f" {cell.score:.2f}"
    if cell.finish == "length" and not narrow:
        text += " (length)"
    return text + (" (cut)" if cell.truncated and not narrow else "")


def cut(text: str, limit: int) -> str:
    """The text in one line, its end replaced by … where it is longer than ``limit``."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _plain(value: object) -> Any:
    if isinstance(value, ApiMessage):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
