"""Carve: cut the next sub-task out of a pass, for the device that asks, at the last moment. Pure.

A pass' waiting rows are pieces (rows that came back) and the uncarved ends of its blocks. Rows of a block are
in length order, so that neighbours are of like length; a sub-task takes them in that order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scheduler.policy.cost import Price

#: A sub-task is never shorter than this, unless nothing more is there: below it messages cost too much.
MIN_S = 0.25
#: Rows of one sub-task at most, whatever they cost: bounds a payload and what one death repeats.
MAX_ROWS = 8192
#: A cut that costs this share of what it may cost is good enough.
_CLOSE = 0.99
#: A piece is split where less than this share of it fits.
_SPLIT = 0.75
#: A block of so many rows that callers wait for is never parted: it is answered when all of it is, so whoever is in it
#: would wait for two workers. As many as an open job lands together.
WHOLE_ROWS = 16
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


def part(r: Range, lo: int, hi: int) -> Range:
    """[lo, hi) of a range; its bytes are the range's, by share of rows (they are of like length)."""
    return Range(r.block, lo, hi, r.bytes * (hi - lo) // max(1, len(r)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that came back."""

    id: int
    range: Range
    todo: int
    tries: int = 0
    deaths: int = 0
    exclusive: bool = False
    #: As of `OpenBlock`.
    alone: bool = False


class OpenBlock(NamedTuple):
    """A block that a pass has not carved to its end."""

    number: int
    cursor: int
    n: int
    #: Which of the job's tasks are to be computed here, as a bit mask.
    todo: int
    #: ``cumulative[i]``: bytes of the first i rows in order; n + 1 numbers.
    cumulative: Sequence[int]
    #: Where groups of rows with a common prefix begin, ascending from 0; empty where rows share nothing.
    bounds: Sequence[int] = ()
    #: Its callers read along, or may give it up: it shares no sub-task with other blocks.
    alone: bool = False

    def bytes_between(self, lo: int, hi: int) -> int:
        return self.cumulative[hi] - self.cumulative[lo]


class Carved(NamedTuple):
    """One sub-task, cut but not leased."""

    ranges: tuple[Range, ...]
    todo: int
    #: Pieces used up by it, by id, and what it left of its only one.
    pieces: tuple[int, ...] = ()
    leftover: Range | None = None
    tries: int = 0
    deaths: int = 0
    exclusive: bool = False

    @property
    def rows(self) -> int:
        return sum([r.hi - r.lo for r in self.ranges])

    @property
    def bytes(self) -> int:
        return sum([r.bytes for r in self.ranges])


@dataclass
class Frontier:
    """Where a pass stands: its pieces and uncarved blocks. ``carve`` eats from it."""

    pieces: list[Piece] = field(default_factory=list)
    blocks: list[OpenBlock] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.pieces and not self.blocks


def size_s(cap_s: float, remaining_s: float, devices: float) -> float:
    """Seconds of work for the next sub-task: half of a fair share of what remains, so that all end together.

    Capped factoring (Hummel, Schonberg, Flynn, CACM 1992; reference: performance 4.2).
    """
    return max(MIN_S, min(cap_s, remaining_s / (2 * max(1, devices))))


def carve(
    frontier: Frontier, budget_s: float, price: Price, *, cap_s: float = 0.0, least: int = 1
) -> Carved | None:
    """Cut about ``budget_s`` seconds of rows, ``least`` if they are there. Eats from the frontier; None where nothing waits.

    Of a second block with no more than ``least`` rows left all are cut, or none.

    Pieces go first: their blocks are waited for. A piece that is exclusive, or was tried before, goes alone and whole;
    of any other that is too long, since it was cut for a faster device, ``Carved.leftover`` is to become a piece.
    Rows with a common prefix stay together up to ``cap_s`` seconds, even beyond the budget.
    """
    if frontier.pieces:
        return _from_pieces(frontier, budget_s, price, least)
    if frontier.blocks:
        return _from_blocks(frontier, budget_s, max(budget_s, cap_s), price, least)
    return None


def _from_pieces(frontier: Frontier, budget_s: float, price: Price, least: int) -> Carved:
    first = frontier.pieces.pop(0)
    taken = [first]
    leftover = None
    if not (first.exclusive or first.tries or first.deaths):
        size, rows = first.range.bytes, len(first.range)
        fitting = max(least, int(rows * budget_s / max(1e-9, price.of(rows, size))))
        if rows > 1 and fitting < _SPLIT * rows:
            middle = first.range.lo + fitting
            taken = [replace(first, range=part(first.range, first.range.lo, middle))]
            leftover = part(first.range, middle, first.range.hi)
        for other in list(frontier.pieces) if leftover is None else ():
            more, longer = rows + len(other.range), size + other.range.bytes
            fits = price.of(more, longer) <= budget_s and longer <= MAX_BYTES and more <= MAX_ROWS
            blameless = not (other.exclusive or other.tries or other.deaths)
            apart = other.range.block != first.range.block and (other.alone or first.alone)
            if fits and blameless and other.todo == first.todo and not apart:
                taken.append(other)
                frontier.pieces.remove(other)
                size, rows = longer, more
    return Carved(
        ranges=tuple(p.range for p in taken),
        todo=first.todo,
        pieces=tuple(p.id for p in taken),
        leftover=leftover,
        tries=first.tries,
        deaths=first.deaths,
        exclusive=first.exclusive,
    )


def _from_blocks(frontier: Frontier, budget_s: float, cap_s: float, price: Price, least: int) -> Carved:
    blocks = frontier.blocks
    todo = blocks[0].todo
    left_s, left_bytes, left_rows = budget_s - price.start_s, MAX_BYTES, MAX_ROWS
    ranges: list[Range] = []
    while blocks and blocks[0].todo == todo and left_rows > 0:
        block = blocks[0]
        if ranges and block.alone:
            break
        lo = block.cursor
        hi = _furthest(block, left_s, left_bytes, left_rows, price)
        if not ranges:
            # At least one row, so that a long row is never stuck.
            hi = max(hi, min(lo + least, block.n))
        if block.bounds and hi < block.n:
            group = _furthest(block, cap_s, left_bytes, left_rows, price, close=1.0)
            hi = _between_groups(block, hi, bool(ranges), max(hi, group))
        if ranges and hi < block.n <= lo + least:
            # It would be parted, and can go whole into the next one.
            break
        if hi <= lo:
            break
        size = block.cumulative[hi] - block.cumulative[lo]
        ranges.append(Range(block.number, lo, hi, size))
        if hi < block.n:
            blocks[0] = block._replace(cursor=hi)
            break
        left_s -= price.of(hi - lo, size) - price.start_s
        left_bytes, left_rows = left_bytes - size, left_rows - (hi - lo)
        blocks.pop(0)
        if block.alone:
            break
    return Carved(ranges=tuple(ranges), todo=todo)


def _furthest(
    block: OpenBlock,
    left_s: float,
    left_bytes: float,
    left_rows: int,
    price: Price,
    close: float = _CLOSE,
) -> int:
    """The furthest cut whose rows fit, or one that uses ``close`` of it; the cursor where not even one row does."""
    lo, n, cumulative = block.cursor, block.n, block.cumulative
    before = cumulative[lo]
    most = min(n, lo + left_rows)
    if cumulative[most] - before > left_bytes:
        most = bisect_right(cumulative, before + left_bytes) - 1
    if most <= lo:
        return lo
    # Price.of without its start, spelled out wherever it is asked.
    _, row, byte, square = price
    rows, size = most - lo, cumulative[most] - before
    more = rows * row + size * (byte + square * size / rows)
    if more <= left_s:
        return most
    # Seconds are nearly proportional to bytes. So the first row tells how many bytes to try; then a straight line between
    # a cut that fits and one that does not hits the mark, or a hundredth beside it. Where that fails, halving gets there.
    fits, cost, beyond, tries = lo, 0.0, most, 0
    size = cumulative[lo + 1] - before
    goal = before + size * left_s / max(1e-12, row + size * (byte + square * size))
    while beyond - fits > 1 and cost < close * left_s:
        tries += 1
        guess = (fits + beyond) // 2 if tries % 4 == 0 else bisect_right(cumulative, goal, fits, beyond) - 1
        if guess <= fits:
            guess = fits + 1
        elif guess >= beyond:
            guess = beyond - 1
        rows, size = guess - lo, cumulative[guess] - before
        asked = rows * row + size * (byte + square * size / rows)
        if asked <= left_s:
            fits, cost = guess, asked
        else:
            beyond, more = guess, asked
        least, most_bytes = cumulative[fits], cumulative[beyond]
        goal = least + (most_bytes - least) * (left_s - cost) / (more - cost)
    return fits


def _between_groups(block: OpenBlock, hi: int, begun: bool, furthest: int) -> int:
    """The last cut up to ``hi`` that parts no group; a first group may reach as far as ``furthest``, and is cut there."""
    whole = block.bounds[bisect_right(block.bounds, hi) - 1]
    if whole > block.cursor or begun:
        return max(whole, block.cursor)
    after = bisect_right(block.bounds, block.cursor)
    end = block.bounds[after] if after < len(block.bounds) else block.n
    return min(end, furthest)
