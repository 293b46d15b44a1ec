"""The command ``motet explain``: why a job waits, and when it will be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from motet.cli.drawing import plain, seconds
from motet.cli.show import as_json, connect, console, find_job, put_json, table

if TYPE_CHECKING:
    from motet.messages.explanation import Beside, Cannot, Explanation, PassExplained

#: Names of workers in a table before the others are counted.
_NAMES = 3
#: Characters of a sentence: a worker's own words may be long.
_LONGEST = 500


@click.command(
    epilog="""\b
Examples:
  motet explain 0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57
  motet explain 0198f2c4 --json | jq .eta.p90_s"""
)
@click.argument("job")
@as_json
def explain(job: str, as_json: bool) -> None:
    """Say why JOB waits, or when it is done.

    The first line answers; below it: what else waits for the same workers, who can run each pass and who cannot.
    Times are what the scheduler's own policy comes to when it is run ahead ten times: half of them end by p50,
    nine of ten by p90.
    """
    with connect() as client:
        told = find_job(client, job).explain()
    if as_json:
        put_json(told)
        return
    out = console()
    out.print(plain(told.says, _LONGEST), style="bold")
    for note in told.notes:
        out.print(plain(note, _LONGEST))
    if told.passes:
        out.print(_passes(told))
    if told.beside:
        out.print(
            table(
                ("beside it", "your jobs", "#work", "#jobs of others", "#work of others"),
                (_beside(b) for b in told.beside),
            )
        )


def _passes(told: Explanation) -> object:
    return table(
        ("pass", "#waiting", "#under way", "#done", "on", "can load", "cannot"),
        (
            (
                p.kind,
                f"{p.rows.waiting + p.rows.later:,}",
                f"{p.rows.open:,}",
                f"{p.rows.done:,}",
                _on(p),
                ", ".join(f"{c.workers:,} × {c.device_name or '?'}, {seconds(c.load_s)}" for c in p.can_load)
                or "–",
                "; ".join(map(_cannot, p.cannot)) or "–",
            )
            for p in told.passes
        ),
    )


def _on(p: PassExplained) -> str:
    """Who holds its model, or loads it."""
    words = [*p.resident_on[:_NAMES]]
    if p.resident > _NAMES:
        words.append(f"{p.resident - _NAMES:,} more")
    words += [f"{one.worker} (loads, {seconds(one.left_s)})" for one in p.loading[:_NAMES]]
    if p.loads > _NAMES:
        words.append(f"{p.loads - _NAMES:,} more load it")
    return ", ".join(words) or "nobody"


def _cannot(c: Cannot) -> str:
    words = {
        "too_small": f"needs {c.need_mb or 0:,} MB, has {c.have_mb or 0:,}",
        "refused": "could not load it",
    }
    return f"{c.workers:,}: {words.get(c.why, c.why.replace('_', ' '))}"


def _beside(b: Beside) -> tuple[str, ...]:
    names = ", ".join(r.name or r.job[:8] for r in b.own[:_NAMES])
    more = f" and {b.own_jobs - _NAMES:,} more" if b.own_jobs > _NAMES else ""
    return (
        b.priority,
        f"{names}{more}" or "–",
        seconds(b.own_s) if b.own_jobs else "–",
        f"{b.other_jobs:,}",
        seconds(b.other_s) if b.other_jobs else "–",
    )
