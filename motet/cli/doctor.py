"""The command doctor: what is wrong with this set-up, and what to do about it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from motet.cli.show import as_json, console, put_json

if TYPE_CHECKING:
    from motet.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red"), "skipped": ("–", "dim")}


@click.command(
    epilog="""\b
Examples:
  motet doctor                  this machine, and the server that it knows
  motet doctor --quiet          only what is wrong
  motet doctor --json | jq '.findings[] | select(.state == "fail")'

It looks at this machine (Python, packages, folders, ports, GPUs as torch sees them) and, through MOTET_URL and
MOTET_TOKEN, at the server; with an administrator's token also at the server's Postgres, Redis and disk. On a
host that has MOTET_REDIS_URL or MOTET_DATABASE_URL it tries these as well. It leaves nothing behind."""
)
@click.option("--quiet", is_flag=True, help="Show only what is wrong.")
@as_json
def doctor(quiet: bool, as_json: bool) -> int:
    """Say what is wrong with this set-up, and what to do.

    Ends with 1 where something must be mended: ✗. What is marked ! works, and will hurt some day.
    """
    from motet.doctor.look import everything

    found = everything(os.environ)
    counts = Counter[str](f.state for f in found)
    if as_json:
        put_json({"ok": not counts["fail"], "findings": [f.to_json() for f in found]})
    else:
        _print([f for f in found if f.state in ("warn", "fail")] if quiet else found)
        click.echo(_sum(counts))
    return 1 if counts["fail"] else 0


def _print(found: Sequence[Finding]) -> None:
    """Findings by area, remedies under what is wrong."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for options in ({"no_wrap": True}, {"no_wrap": True}, {"no_wrap": True}, {"overflow": "fold"}):
        grid.add_column(**options)
    areas = dict.fromkeys(f.area for f in found)
    for number, area in enumerate(areas):
        if number:
            grid.add_section()
        shown = area
        for f in (f for f in found if f.area == area):
            mark, style = _MARKS[f.state]
            words = Text(f.what, style="dim" if f.state == "skipped" else "")
            if f.remedy:
                words.append(f"\n→ {f.remedy}", style="bold")
            grid.add_row(Text(shown, style="bold"), Text(mark, style=style), f.name, words)
            shown = ""
    if areas:
        console().print(grid)


def _sum(counts: Counter[str]) -> str:
    if counts["fail"]:
        return f"{counts['fail']} must be mended, {counts['warn']} to look at, {counts['ok']} fine"
    if counts["warn"]:
        return f"nothing must be mended; {counts['warn']} to look at, {counts['ok']} fine"
    return f"all {counts['ok']} fine"
