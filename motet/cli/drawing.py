"""What screens that follow something are drawn with: tables that fit, bars, states in their colours, short numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from motet.cli.show import cut
from motet.states import State
from motet.words import visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

#: Words are cut down to this before a column is left out.
_WORDS = 14

_STATES = {
    "ready": "green",
    State.OPEN: "cyan",
    State.RUNNING: "cyan",
    State.SUCCEEDED: "green",
    State.LOADING: "yellow",
    "draining": "yellow",
}
_STATES |= {"drained": "yellow", "starting": "yellow", State.CANCELLED: "yellow"}


def live_table(
    columns: Sequence[str], rows: Sequence[Sequence[Text | str]], *, drop: Sequence[str], width: int
) -> Table:
    """A table no wider than ``width``: columns of ``drop`` go in its order, then the widest words are cut.

    A column whose name begins with ``#`` holds numbers, one with ``!`` what is not cut.
    """
    from rich.table import Table

    def natural(column: int) -> int:
        return max([len(columns[column].lstrip("#!")), *(len(row[column]) for row in rows)])

    def least(column: int) -> int:
        return natural(column) if columns[column][:1] in ("#", "!") else min(natural(column), _WORDS)

    kept = list(range(len(columns)))
    for name in drop:
        if sum(least(i) + 2 for i in kept) - 2 <= width:
            break
        if name in columns:
            kept.remove(columns.index(name))
    widths = {i: natural(i) for i in kept}
    over = sum(widths.values()) + 2 * (len(kept) - 1) - width
    for _ in range(over):
        widest = max(kept, key=lambda i: (widths[i] > least(i), widths[i]))
        widths[widest] -= 1
    built = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for i, wide in widths.items():
        name = columns[i]
        built.add_column(
            name.lstrip("#!"),
            justify="right" if name.startswith("#") else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=max(1, wide),
        )
    for row in rows:
        built.add_row(*(text(cell) if isinstance(cell, str) else cell for cell in (row[i] for i in kept)))
    return built


def bar(share: float, cells: int, *, done: bool = False) -> Text:
    """A bar of so many characters."""
    full = min(cells, int(cells * max(0.0, share) + 1e-9))
    return (
        text("")
        .append("━" * full, style="green" if done else "cyan")
        .append("─" * (cells - full), style="dim")
    )


def meter(share: float, cells: int = 6) -> Text:
    """A short bar with its percentage."""
    return bar(round(share, 2), cells).append(f" {min(share, 9.99):4.0%}")


def state(word: str) -> Text:
    """A state in its colour."""
    return text(word, state_style(word))


def state_style(word: str) -> str:
    return _STATES.get(word, "red")


def number(value: float) -> str:
    """``950``, ``12.3 k``, ``4.5 M``: three digits are enough for what changes all the time."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if limit == 1e4 else limit):,.1f}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def plain(words: str, limit: int) -> str:
    """Somebody's words in one line, cut at ``limit``; control characters made visible."""
    return visible(cut(words, max(2, limit)))


def text(words: str, style: str = "") -> Text:
    """Words that are taken as they are: no markup in them counts."""
    from rich.text import Text

    return Text(words, style=style, no_wrap=True, overflow="ellipsis")
