"""Micro-batches: which rows run together, under a token budget and a time limit that are learned. Pure.

Rows of like length together, the longest first, so that little is padding and a lack of memory shows early;
the budget is found by doubling (reference: performance 4.6). Nothing here reads a clock: seconds come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

#: Where the search for the budget starts: the best size measured for one CPU core, and for a GPU the size
#: below which launching kernels costs more than running them.
START_TOKENS = {"cpu": 1024, "cuda": 16_384}
#: What starting a micro-batch costs, in tokens, before it was measured: its share of that first budget.
OVERHEAD_SHARE = 1 / 16
#: No budget grows beyond this, whatever it gains.
MOST_TOKENS = 1 << 20
#: No micro-batch has more rows than this.
MOST_ROWS = 4096
#: The first micro-batch of a model whose cost nobody knows: small, since a row may take seconds.
PROBE_TOKENS, PROBE_ROWS = 512, 8
#: Longest micro-batch while somebody waits interactively. Starting one costs a CPU core 5 ms: cuts of 50 ms lose 4 %
#: of its throughput, cuts of 100 ms 1 % (MiniLM, fp32). A GPU starts one sooner, and its budgets are shorter anyway.
INTERACTIVE_CUT_S = {"cpu": 0.1, "cuda": 0.05}
#: The same of rows for which somebody waits: their sub-task is answered whole, so that cuts only make it later. What is
#: believed of short micro-batches may be far too long, and cuts of 0.1 s are then cuts of one row, which confirm it.
INTERACTIVE_TURN_S = 2.0
#: Longest micro-batch at any time: the first interactive row after a quiet while waits for one of those. A CPU core
#: gains nothing from longer ones (1,024 tokens 0.2 s; 2,048 tokens 0.4 s and no faster).
LONGEST_S = 0.25
#: The same of a step of a language model. Writing the answers under way takes a CPU core a tenth of a second, however
#: many tokens of prompts run beside it: in steps of a quarter of a second that is nearly half of its time.
LONGEST_STEP_S = {"cpu": 0.6, "cuda": 0.25}

#: Micro-batches that must have filled a budget before it is judged.
SAMPLES = 4
#: Share of the budget that a micro-batch must fill to count.
FILLED = 0.75
#: Doubling goes on while it gains this much.
GAIN = 1.05
#: Weight that the past keeps at each observation of seconds.
MEMORY = 0.9
#: What was made smaller for lack of memory grows again after so many steps that filled it; after twice as many where it
#: was too large once more, up to the second number: where memory stays short, one step in thousands fails.
PATIENCE, LONGEST_PATIENCE = 64, 4096
#: A step of fewer tokens than this would need hardly less memory.
LEAST_TOKENS = 256


class Sized(Protocol):
    @property
    def length(self) -> int: ...


SizedRow = TypeVar("SizedRow", bound=Sized)


def longest_first(rows: Sequence[SizedRow]) -> list[SizedRow]:
    """Sort by length, longest first; rows of one length keep their order."""
    return sorted(rows, key=lambda row: -row.length)


def fitting(
    rows: Sequence[SizedRow], *, tokens: int, max_rows: int = MOST_ROWS, overhead_tokens: float = 0.0
) -> int:
    """How many of the leading rows, sorted longest first, to run as one micro-batch: at least one.

    As many as fit into ``tokens`` with padding; fewer where the cut wastes less. A micro-batch costs what its padded
    tokens cost and ``overhead_tokens`` more, so the best cut has the most real tokens for that. With 0 nothing
    is known of the overhead, and the budget is filled.
    """
    if not rows:
        return 0
    longest = max(1, rows[0].length)
    most = min(len(rows), max(1, min(max_rows, tokens // longest)))
    if not overhead_tokens:
        return most
    best, best_worth, real = 1, 0.0, 0
    for count in range(1, most + 1):
        real += rows[count - 1].length
        worth = real / (overhead_tokens + longest * count)
        if worth >= best_worth:
            best, best_worth = count, worth
    return best


def pack(rows: Sequence[SizedRow], *, tokens: int, max_rows: int = MOST_ROWS) -> list[list[SizedRow]]:
    """Cut rows into micro-batches, longest first: ``longest * count <= tokens``, or one row alone."""
    waiting = longest_first(rows)
    batches = []
    while waiting:
        count = fitting(waiting, tokens=tokens, max_rows=max_rows)
        batches.append(waiting[:count])
        waiting = waiting[count:]
    return batches


def padded_tokens(rows: Sequence[Sized]) -> int:
    """Tokens that are computed when these rows run as one micro-batch."""
    return max((row.length for row in rows), default=0) * len(rows)


@dataclass(frozen=True, slots=True)
class Budget:
    """The learned number of tokens of a micro-batch, for one model in one format on one device."""

    tokens: int
    #: Best tokens per second seen at ``tokens``, over ``seen`` micro-batches that filled it.
    rate: float = 0.0
    seen: int = 0
    #: The level below, and its rate; None at the first level.
    below: tuple[int, float] | None = None
    #: The search has ended.
    settled: bool = False
    #: Tokens that are known to fit into memory, once something did not.
    ceiling: int | None = None
    #: What it was before memory was short: it grows up to that again.
    before: int | None = None
    #: Micro-batches that must fill it before it grows again.
    patience: int = PATIENCE
    #: It has grown again, and may prove too large.
    grown: bool = False

    def observed(self, padded: int, tokens: int, seconds: float) -> Budget:
        """Learn from one micro-batch. The best of a level counts: neighbours on the machine only ever slow us."""
        if padded < FILLED * self.tokens or seconds <= 0:
            return self
        if self.settled:
            return self if self.before is None else self._recovering(self.before)
        level = replace(self, rate=max(self.rate, tokens / seconds), seen=self.seen + 1)
        return level if level.seen < SAMPLES else level._judged()

    def out_of_memory(self, padded: int) -> Budget:
        """Remember that ``padded`` tokens did not fit: half of them is the most until many micro-batches did."""
        ceiling = max(1, min(padded // 2, self.ceiling or padded))
        before = max(self.tokens, self.before or 0)
        patience = min(2 * self.patience, LONGEST_PATIENCE) if self.grown else self.patience
        return Budget(
            min(self.tokens, ceiling), ceiling=ceiling, settled=True, before=before, patience=patience
        )

    def _recovering(self, before: int) -> Budget:
        if self.seen + 1 < self.patience:
            return replace(self, seen=self.seen + 1)
        tokens = min(2 * self.tokens, before)
        return replace(
            self,
            tokens=tokens,
            ceiling=None,
            seen=0,
            before=before if tokens < before else None,
            grown=True,
        )

    def _judged(self) -> Budget:
        if self.below is None or self.rate >= GAIN * self.below[1]:
            doubled = 2 * self.tokens
            if doubled > MOST_TOKENS or (self.ceiling is not None and doubled > self.ceiling):
                return replace(self, settled=True)
            return Budget(doubled, below=(self.tokens, self.rate), ceiling=self.ceiling)
        best = self.tokens if self.rate >= self.below[1] else self.below[0]
        return replace(self, tokens=best, settled=True)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a micro-batch by its padded tokens: ``fixed + each * tokens``, from sums that fade.

    Both terms are needed: with the ratio alone, interactive micro-batches of a few tokens would make bulk look
    a hundred times dearer than it is on a GPU.
    """

    count: float = 0.0
    t: float = 0.0
    s: float = 0.0
    tt: float = 0.0
    ts: float = 0.0
    #: The two terms, by these sums.
    fixed: float = 0.0
    each: float = 0.0

    @property
    def known(self) -> bool:
        return self.t > 0

    def observed(self, tokens: int, seconds: float) -> Cost:
        """Learn from one micro-batch. What came before the first one twice as fast was a cold start: forget it."""
        kept = 0.0 if self.known and seconds < self.seconds(tokens) / 2 else MEMORY
        sums = (
            kept * self.count + 1,
            kept * self.t + tokens,
            kept * self.s + seconds,
            kept * self.tt + tokens * tokens,
            kept * self.ts + tokens * seconds,
        )
        return Cost(*sums, *_terms(*sums))

    @property
    def overhead_tokens(self) -> float | None:
        """What starting a micro-batch costs, in tokens that could run meanwhile; None while nothing tells."""
        return self.fixed / self.each if self.fixed > 0 and self.each > 0 else None

    def seconds(self, tokens: int) -> float:
        """Predicted seconds of one micro-batch; 0 while nothing is known."""
        return self.fixed + self.each * tokens

    def backlog_s(self, tokens: int) -> float:
        """Predicted seconds of this many tokens in micro-batches like the recent ones; 0 while nothing is known."""
        return tokens * self.s / self.t if self.known else 0.0

    def tokens_in(self, seconds: float) -> int:
        """Tokens of a micro-batch that takes this long; at least 1. Only when ``known``.

        Longer where more than half of it would be its start: a function that asks another server once a batch
        would else be run row by row, and nobody would wait less.
        """
        wanted_s = max(seconds - self.fixed, self.fixed)
        return max(1, int(wanted_s / self.each)) if self.each > 0 else MOST_TOKENS


def _terms(count: float, t: float, s: float, tt: float, ts: float) -> tuple[float, float]:
    """(fixed, each) of the line through what was observed; through zero where that tells too little."""
    if t <= 0:
        return 0.0, 0.0
    mean_t, mean_s, ratio = t / count, s / count, s / t
    variance = tt / count - mean_t * mean_t
    if variance < (0.25 * mean_t) ** 2:
        return 0.0, ratio
    each = (ts / count - mean_t * mean_s) / variance
    fixed = mean_s - each * mean_t
    return (fixed, each) if each > 0 and fixed > 0 else (0.0, ratio)


@dataclass(slots=True)
class Pace:
    """How fast one model runs here in one format, and how much of it at once. It outlives the model in memory."""

    budget: Budget
    cost: Cost = field(default_factory=Cost)

    def observed(self, padded: int, tokens: int, seconds: float) -> None:
        """Learn from one step."""
        self.cost = self.cost.observed(padded, seconds)
        self.budget = self.budget.observed(padded, tokens, seconds)


def limit(
    budget: Budget,
    cost: Cost,
    device_kind: str,
    *,
    interactive_waits: bool,
    waited_for: bool = False,
    longest_s: float = LONGEST_S,
) -> tuple[int, int]:
    """Most tokens and rows of the next micro-batch. ``waited_for``: it is made of the rows that somebody waits for.

    The budget; cut short while somebody waits for others, to ``longest_s`` at any time, and to a probe while the
    cost is unknown.
    """
    if not cost.known:
        return min(budget.tokens, PROBE_TOKENS), PROBE_ROWS
    if waited_for:
        longest_s = INTERACTIVE_TURN_S
    elif interactive_waits:
        longest_s = INTERACTIVE_CUT_S[device_kind]
    return min(budget.tokens, cost.tokens_in(longest_s)), MOST_ROWS


def overhead_tokens(cost: Cost, device_kind: str) -> float:
    """What a micro-batch costs beside its tokens, for `fitting`: as measured, not far below the guess before."""
    guess = OVERHEAD_SHARE * START_TOKENS[device_kind]
    return max(guess / 4, cost.overhead_tokens or guess)
