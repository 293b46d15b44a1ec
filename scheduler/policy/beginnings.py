"""Which rows begin alike, of rows in the order of their texts, and how such rows stay side by side. Pure.

A language model computes a beginning once for the rows that it holds together, and a prefix cache keeps it for those that
come soon: so rows that share one are neighbours, and no sub-task parts them (carve.py). Rows form a tree by what they have in
common: texts under one system message, prompts about one text (Liu et al., Optimizing LLM Queries in Relational Workloads,
MLSys 2025, order the rows of a table by it; SGLang, 2024, the requests that wait).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Characters that rows must have in common beyond what those around them share, to stay side by side: about two blocks of
#: a prefix cache. Less: rows lose their order by length for a beginning that is computed faster than it is kept.
LEAST_ALIKE = 128
#: Rows of a group that no sub-task parts, at most. More: where all rows of a job share something, its last sub-tasks are
#: too long to end together.
MOST_TOGETHER = 32


@dataclass(slots=True)
class _Family:
    """Rows [first, last] that have so many more characters in common than with the rows around them."""

    first: int
    last: int
    alike: int
    #: Rows that are in no family within it, and these families.
    members: list[int | _Family] = field(default_factory=list)
    #: Bytes of its longest row.
    longest: int = 0

    @property
    def rows(self) -> int:
        return self.last - self.first + 1


def side_by_side(alike: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """(the rows in the order in which they are to be worked on, the rows at which groups begin that are not parted).

    ``alike``: characters that each row has in common with the row before it. ``sizes``: bytes of each row. Those that
    begin alike are neighbours; among equals of one beginning the longest go first, ties in row order.
    """
    root = _families(alike, sizes)
    order: list[int] = []
    begins: list[int] = []
    waiting: list[tuple[int | _Family, bool]] = [(root, False)]
    while waiting:
        member, together = waiting.pop()
        first = member if isinstance(member, int) else member.first
        whole = isinstance(member, int) or (member is not root and member.rows <= MOST_TOGETHER)
        if whole and not together:
            begins.append(first)
        if isinstance(member, int):
            order.append(member)
            continue
        in_order = sorted(
            member.members, key=lambda one: -(sizes[one] if isinstance(one, int) else one.longest)
        )
        waiting += [(one, together or whole) for one in reversed(in_order)]
    return order, sorted(begins)


def bounds(order: Sequence[int], begins: Sequence[int]) -> list[int]:
    """Where groups begin in an order of some of the rows, ascending from 0; [] where each row stands alone.

    ``begins``: as `side_by_side` tells; [] where nothing is known.
    """
    if not begins or not order:
        return []
    group_of, group = [], -1
    starts = {*begins}
    for row in range(max(order) + 1):
        group += row in starts
        group_of.append(group)
    found = [at for at, row in enumerate(order) if at == 0 or group_of[row] != group_of[order[at - 1]]]
    return found if len(found) < len(order) else []


def _families(alike: Sequence[int], sizes: Sequence[int]) -> _Family:
    """All rows, as a tree of those families that have LEAST_ALIKE characters more in common than the one around them."""
    root = _Family(0, len(sizes) - 1, 0)
    inside = [root]
    nested = _intervals(alike, len(sizes))
    at = 0
    for row, size in enumerate(sizes):
        while at < len(nested) and nested[at][0] == row:
            _, last, shared = nested[at]
            if shared >= inside[-1].alike + LEAST_ALIKE:
                inside.append(_Family(row, last, shared))
            at += 1
        inside[-1].members.append(row)
        inside[-1].longest = max(inside[-1].longest, size)
        while len(inside) > 1 and inside[-1].last == row:
            ended = inside.pop()
            inside[-1].members.append(ended)
            inside[-1].longest = max(inside[-1].longest, ended.longest)
    return root


def _intervals(alike: Sequence[int], n: int) -> list[tuple[int, int, int]]:
    """(first, last, characters) of all runs of two rows or more that have more in common than with those around them, an
    outer one before those within it: the intervals of longest common prefixes (Abouelhoda et al., 2004)."""
    found: list[tuple[int, int, int]] = []
    begun: list[tuple[int, int]] = []  # (first, characters), ever more characters
    for row in range(1, n + 1):
        shared = alike[row] if row < n else 0
        first = row - 1
        while begun and begun[-1][1] > shared:
            first, characters = begun.pop()
            found.append((first, row - 1, characters))
        if shared and (not begun or begun[-1][1] < shared):
            begun.append((first, shared))
    return sorted(found, key=lambda one: (one[0], -one[1]))
