"""A plan as a graph in the terminal: passes, what each shares, and which of them wait for whose answers.

Plain functions from passes to lines no wider than they may be; motet.cli.show prints them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from motet.words import count

if TYPE_CHECKING:
    from rich.text import Text

    from motet.messages.jobs import PlannedPass

#: With less room than this behind a pass' name, its tasks go into the next line.
_ROOM = 22
_BETWEEN = " · "


def graph(passes: Sequence[PlannedPass], width: int) -> list[Text]:
    """The passes as a tree, each below the last one that it waits for.

    A pass may wait for answers of several passes: all their names stand on its branch.
    """
    roots = [number for number in range(len(passes)) if _waits_for(passes, number) is None]
    lines: list[Text] = []
    for place, number in enumerate(roots):
        last = place == len(roots) - 1
        fork = "─" if len(roots) == 1 else "┬" if place == 0 else "└" if last else "├"
        lead = f"{'rows' if place == 0 else '    '} {fork}▶ "
        lines += _branch(passes, number, lead, f"     {' ' if last else '│'}  ", width)
    return lines


def worth_drawing(passes: Sequence[PlannedPass]) -> bool:
    """Whether there is more to see than tasks beside each other: one that waits, or prompts."""
    return any(p.needs or p.first for p in passes)


def shared(planned: PlannedPass) -> str:
    """What the pass reads once for several answers, and what that saves; "" for nothing."""
    percent = int(100 * planned.saved)
    if percent < 1:
        return ""
    if planned.first == "instruction":
        what = "instruction first, one prefill for all rows"
    elif len(planned.tasks) == 1:
        what = "a common beginning, read once"
    else:
        what = f"one {'prefill' if planned.first else 'forward pass'} for {count(len(planned.tasks), 'task')}"
    return f"{what}: {percent} % of tokens saved"


def _waits_for(passes: Sequence[PlannedPass], number: int) -> int | None:
    """The last pass whose answers this one reads, None where it reads no answers."""
    needs = set(passes[number].needs)
    return max((n for n, p in enumerate(passes) if n != number and needs & {*p.tasks}), default=None)


def _branch(passes: Sequence[PlannedPass], number: int, lead: str, behind: str, width: int) -> Iterator[Text]:
    """A pass, and below it those that wait for it. ``behind`` continues ``lead`` in the lines that follow."""
    below = [n for n in range(len(passes)) if _waits_for(passes, n) == number]
    yield from _node(passes[number], number, lead, behind + ("│" if below else " "), width)
    for place, child in enumerate(below):
        last = place == len(below) - 1
        names = _BETWEEN.join(passes[child].needs)
        label = _cut(names, max(8, width - len(behind) - _ROOM - 6))
        yield from _branch(
            passes,
            child,
            f"{behind}{'└' if last else '├'}─ {label} ─▶ ",
            behind + ("   " if last else "│  "),
            width,
        )


def _node(planned: PlannedPass, number: int, lead: str, behind: str, width: int) -> Iterator[Text]:
    """``pass 0  model  task · task   what is shared``, in as many lines as that takes."""
    from rich.text import Text

    model = planned.model.partition("@")[0]
    line = Text(lead, no_wrap=True, overflow="ellipsis").append(f"pass {number}", style="bold")
    line.append(f"  {_cut(model, max(8, width - len(line) - 2))}")
    if width - len(line) - 2 < min(_ROOM, len(_BETWEEN.join(planned.tasks))):
        yield line
        line = Text(behind + "   ", no_wrap=True, overflow="ellipsis")
    else:
        line.append("  ")
    at, room = len(line), max(8, width - len(line))
    further = behind + " " * (at - len(behind))
    for place, words in enumerate(_folded(planned.tasks, room)):
        if place:
            yield line
            line = Text(further, no_wrap=True, overflow="ellipsis")
        line.append(words, style="cyan")
    note = shared(planned)
    if note and len(line) + 3 + len(note) <= width:
        line.append("   ").append(note, style="green")
        note = ""
    yield line
    # On lines of its own, a sentence begins as far left as it needs.
    if note:
        indent = further if room >= len(note) else behind + "   "
        for words in textwrap.wrap(note, max(8, width - len(indent))):
            yield Text(indent, no_wrap=True, overflow="ellipsis").append(words, style="green")


def _folded(names: Sequence[str], room: int) -> Iterator[str]:
    """Names with dots between them, in lines of at most ``room`` characters."""
    line, dot = "", _BETWEEN.rstrip()
    for place, name in enumerate(names):
        end = 0 if place == len(names) - 1 else len(dot)
        longer = f"{line}{_BETWEEN}{name}" if line else name
        if line and len(longer) + end > room:
            yield line + dot
            longer = name
        line = _cut(longer, room - end)
    yield line


def _cut(words: str, room: int) -> str:
    return words if len(words) <= room else words[: room - 1] + "…"
