"""What commands print: tables for people, JSON for programs, and the client that they print from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from motet.client import Client
    from motet.job import Plan
    from motet.results import Row

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def connect(*, admin: bool = False) -> Client:
    """A client of the server that the environment names; ``admin`` with the administrator's token."""
    from motet.client import Client
    from motet.http import Address, Http

    return Client.over(Http(Address.find(admin=admin)))


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


def put_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print a table; a column whose name begins with ``#`` holds numbers. ``empty`` is said without rows."""
    built = table(columns, rows)
    if built.row_count:
        console().print(built)
    else:
        click.echo(empty, err=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of plain cells; control characters in them are made visible."""
    from rich import box
    from rich.table import Table

    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        numbers = name.startswith("#")
        built.add_column(
            name.removeprefix("#"),
            justify="right" if numbers else "left",
            no_wrap=numbers,
            overflow="ellipsis",
        )
    for row in rows:
        built.add_row(*(_visible(cell) for cell in row))
    return built


def plan_table(plan: Plan) -> Table:
    """The passes of a plan: which tasks each answers, and what a pass per task would have read."""
    return table(
        ("pass", "tasks", "model", "#tokens", "#with a pass per task", "#seconds"),
        (
            (
                p.kind,
                ", ".join(p.tasks),
                p.model,
                f"~{p.tokens:,}",
                f"~{p.unfused_tokens:,}",
                "–" if p.seconds is None else f"~{p.seconds:,.1f}",
            )
            for p in plan.passes
        ),
    )


def plan_line(plan: Plan) -> str:
    """The plan in a line: ``4 tasks → 1 pass over 3,000 rows, ~84,000 tokens instead of ~336,000``."""
    from motet.job import count

    line = f"{count(plan.tasks, 'task')} → {count(len(plan.passes), 'pass', 'passes')} over {count(plan.rows, 'row')}"
    line += f", ~{plan.tokens:,} tokens"
    return line + (f" instead of ~{plan.unfused_tokens:,}" if plan.unfused_tokens > plan.tokens else "")


def result_table(rows: Sequence[Row], texts: Sequence[str] | None = None, *, width: int = 120) -> Table:
    """Merged rows: a line per row, a column per task, scores beside labels.

    ``texts`` are the inputs by row index; they get what the answers leave of ``width`` characters.
    """
    tasks = list(rows[0]) if rows else []
    answers = [[_with_score(row, task) for task in tasks] for row in rows]
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
        ["#row", "text", *tasks],
        (
            [f"{row.index:,}", _cut(texts[row.index], limit), *line]
            for row, line in zip(rows, answers, strict=True)
        ),
    )


def _with_score(row: Row, task: str) -> str:
    cell = row[task]
    text = _cut(str(cell), 60)
    if cell.kind == "label" and cell.score is not None:
        text += f" {cell.score:.2f}"
    return text + (" (cut)" if cell.truncated else "")


def _cut(text: str, limit: int) -> str:
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _visible(cell: object) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(cell))


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
