"""Carve: cut the next sub-task out of a pass, for the device that asks, at the last moment. Pure.

A pass' waiting rows are pieces (rows that came back) and the uncarved ends of its blocks. Rows of a block are
in length order, so that neighbours are of like length; a sub-task takes them in that order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

#: A sub-task is never shorter than this, unless nothing more is there: below it messages cost too much.
MIN_S = 0.25
#: Rows of one sub-task at most, whatever they cost: bounds a payload and what one death repeats.
MAX_ROWS = 8192
MAX_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Range:
    """Rows [lo, hi) of a block's order, and their UTF-8 bytes."""

    block: int
    lo: int
    hi: int
    bytes: int

    def __len__(self) -> int:
        return self.hi - self.lo


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that came back."""

    id: int
    range: Range
    todo: int
    tries: int = 0
    deaths: int = 0
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class OpenBlock:
    """A block that a pass has not carved to its end."""

    number: int
    cursor: int
    n: int
    #: Which of the job's tasks are to be computed here, as a bit mask.
    todo: int
    #: ``cumulative[i]``: bytes of the first i rows in order; n + 1 numbers.
    cumulative: Sequence[int]

    def bytes_between(self, lo: int, hi: int) -> int:
        return self.cumulative[hi] - self.cumulative[lo]


@dataclass(frozen=True, slots=True)
class Carved:
    """One sub-task, cut but not leased."""

    ranges: tuple[Range, ...]
    todo: int
    #: Pieces used up by it, by id.
    pieces: tuple[int, ...] = ()
    tries: int = 0
    deaths: int = 0
    exclusive: bool = False

    @property
    def rows(self) -> int:
        return sum(map(len, self.ranges))

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.ranges)


@dataclass
class Frontier:
    """Where a pass stands: its pieces and uncarved blocks. ``carve`` eats from it."""

    pieces: list[Piece] = field(default_factory=list)
    blocks: list[OpenBlock] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.pieces and not self.blocks


def size_s(cap_s: float, remaining_s: float, devices: int) -> float:
    """Seconds of work for the next sub-task: half of a fair share of what remains, so that all end together.

    Capped factoring (Hummel, Schonberg, Flynn, CACM 1992; reference: performance 4.2).
    """
    return max(MIN_S, min(cap_s, remaining_s / (2 * max(1, devices))))


def carve(frontier: Frontier, budget_bytes: float) -> Carved | None:
    """Cut about ``budget_bytes`` of rows, at least one. Eats from the frontier; None where nothing waits.

    Pieces go first: their blocks are waited for. A piece that is exclusive, or was tried before, goes alone.
    """
    if frontier.pieces:
        return _from_pieces(frontier, budget_bytes)
    if frontier.blocks:
        return _from_blocks(frontier, budget_bytes)
    return None


def _from_pieces(frontier: Frontier, budget_bytes: float) -> Carved:
    first = frontier.pieces.pop(0)
    taken = [first]
    if not (first.exclusive or first.tries or first.deaths):
        size, rows = first.range.bytes, len(first.range)
        for other in list(frontier.pieces):
            fits = (
                size + other.range.bytes <= min(budget_bytes, MAX_BYTES)
                and rows + len(other.range) <= MAX_ROWS
            )
            blameless = not (other.exclusive or other.tries or other.deaths)
            if fits and blameless and other.todo == first.todo:
                taken.append(other)
                frontier.pieces.remove(other)
                size, rows = size + other.range.bytes, rows + len(other.range)
    return Carved(
        ranges=tuple(p.range for p in taken),
        todo=first.todo,
        pieces=tuple(p.id for p in taken),
        tries=first.tries,
        deaths=first.deaths,
        exclusive=first.exclusive,
    )


def _from_blocks(frontier: Frontier, budget_bytes: float) -> Carved:
    todo = frontier.blocks[0].todo
    left_bytes, left_rows = min(budget_bytes, MAX_BYTES), MAX_ROWS
    ranges: list[Range] = []
    while frontier.blocks and frontier.blocks[0].todo == todo and left_rows > 0:
        block = frontier.blocks[0]
        # The furthest cut whose bytes fit; at least one row, so that a long row is never stuck.
        fitting = bisect_right(block.cumulative, block.cumulative[block.cursor] + left_bytes) - 1
        hi = min(block.n, block.cursor + left_rows, max(fitting, block.cursor + (0 if ranges else 1)))
        if hi <= block.cursor:
            break
        cut = Range(block.number, block.cursor, hi, block.bytes_between(block.cursor, hi))
        ranges.append(cut)
        left_bytes, left_rows = left_bytes - cut.bytes, left_rows - len(cut)
        if hi < block.n:
            frontier.blocks[0] = OpenBlock(block.number, hi, block.n, block.todo, block.cumulative)
            break
        frontier.blocks.pop(0)
    return Carved(ranges=tuple(ranges), todo=todo)
