"""Predicted seconds of work, learned online from what devices report. Pure.

A `Rate` is what is known of one trunk on one kind of device in one numeric class: seconds from rows, tokens and
squared lengths, fitted by recursive least squares to relative errors (Haykin, Adaptive Filter Theory, ch. 10;
reference: performance 4.1). A device that is slower than its kind has a `pace` of its own; loading is apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite

#: (trunk, device name, numeric class).
RateKey = tuple[str, str, str]
#: (model digest, device name).
LoadKey = tuple[str, str]

#: Before anything was learned: English text under a word-piece tokenizer.
PRIOR_BYTES_PER_TOKEN = 4.0
#: Before anything was learned: 2 operations a parameter and token, at half of what a modest device does. Too low
#: a guess costs a few short sub-tasks; too high a guess makes the first one long.
_PRIOR_FLOPS = {"cpu": 1e11, "cuda": 4e13}
_PRIOR_PARAMETERS = 25_000_000
_PRIOR_START_S = 0.005
#: Loading a model: reading its files, and waking its engine.
_PRIOR_LOAD_S, _PRIOR_LOAD_BYTES_PER_S = 1.0, 5e8
#: Tokens of a row that a speed in tokens per second is told for, before rows were seen.
_PRIOR_TOKENS_PER_ROW = 64.0

#: Weight that the past keeps at each outcome, and the relative noise of one.
FORGETTING, NOISE = 0.98, 0.3
#: Relative doubt in each coefficient of the prior.
_DOUBT = 10.0
#: While so few outcomes were seen one that is far off opens the mind again.
_YOUNG, _FAR_OFF = 20, 2.0
#: Weight of a new observation of a pace, of a load time, and of a bytes-to-tokens ratio.
_PACE_WEIGHT, _LOAD_WEIGHT, _RATIO_WEIGHT = 0.25, 0.5, 0.3
#: Each observation draws a pace this much back to 1, so that a kind's rate and its devices' paces cannot drift apart.
_PACE_LEAK = 0.02
PACE_RANGE = (0.5, 8.0)


@dataclass(frozen=True, slots=True)
class Work:
    """What costs time: rows, their tokens, and the sum of their squared lengths in tokens."""

    rows: float
    tokens: float
    squares: float


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of one pass on one device: linear in rows, UTF-8 bytes and squared bytes."""

    start_s: float
    per_row: float
    per_byte: float
    per_square: float

    def of(self, rows: float, size: float) -> float:
        """Predicted seconds of ``rows`` rows of like length that have ``size`` bytes together."""
        if rows <= 0:
            return 0.0
        return self.start_s + rows * self.per_row + size * (self.per_byte + self.per_square * size / rows)


@dataclass(frozen=True, slots=True)
class Rate:
    """What was learned of one trunk on one kind of device. ``observed`` gives the next one."""

    #: Seconds of a sub-task, a row, a token, a squared length; none is negative.
    coefficients: tuple[float, float, float, float]
    #: Their covariance, row by row.
    covariance: tuple[float, ...]
    bytes_per_token: float = PRIOR_BYTES_PER_TOKEN
    tokens_per_row: float = _PRIOR_TOKENS_PER_ROW
    observations: int = 0

    @classmethod
    def prior(cls, seconds_per_token: float, bytes_per_token: float = PRIOR_BYTES_PER_TOKEN) -> Rate:
        """A guess that the first outcomes overrule. A row costs as much as four tokens, a length of 4,096 doubles it."""
        guess = (_PRIOR_START_S, 4 * seconds_per_token, seconds_per_token, seconds_per_token / 4096)
        return cls(guess, _diagonal([(_DOUBT * c) ** 2 for c in guess]), bytes_per_token)

    @property
    def seconds_per_token(self) -> float:
        """Of rows as long as those seen lately."""
        _, row, token, square = self.coefficients
        return max(1e-12, token + row / self.tokens_per_row + square * self.tokens_per_row)

    def seconds(self, work: Work) -> float:
        """Predicted seconds of one sub-task."""
        start, row, token, square = self.coefficients
        return start + row * work.rows + token * work.tokens + square * work.squares

    def price(self, pace: float = 1.0, bytes_per_token: float = 0.0) -> Price:
        """In bytes, which are known before rows are tokenised. ``bytes_per_token``: the job's own; 0: not known."""
        start, row, token, square = self.coefficients
        ratio = bytes_per_token or self.bytes_per_token
        return Price(start * pace, row * pace, token / ratio * pace, square / (ratio * ratio) * pace)

    def observed(self, work: Work, seconds: float, text_bytes: float = 0.0) -> Rate:
        """Learn from one sub-task at the pace of its kind. Errors count relative to what was predicted."""
        if work.tokens <= 0 or seconds <= 0 or not isfinite(seconds):
            return self
        c = self.coefficients
        expected = max(self.seconds(work), 1e-9)
        # Relative to what was predicted: then a long sub-task counts no more than a short one.
        x0, x1, x2, x3 = 1 / expected, work.rows / expected, work.tokens / expected, work.squares / expected
        y = seconds / expected
        p = self.covariance
        if self.observations < _YOUNG and not 1 / _FAR_OFF < y < _FAR_OFF:
            p = _diagonal([max(p[5 * i], (_DOUBT * value) ** 2) for i, value in enumerate(c)])
        # The covariance is symmetric: its rows are its columns.
        px = [p[i] * x0 + p[i + 1] * x1 + p[i + 2] * x2 + p[i + 3] * x3 for i in (0, 4, 8, 12)]
        scale = FORGETTING * NOISE**2 + x0 * px[0] + x1 * px[1] + x2 * px[2] + x3 * px[3]
        step = (y - (x0 * c[0] + x1 * c[1] + x2 * c[2] + x3 * c[3])) / scale
        start = max(0.0, c[0] + px[0] * step)
        row = max(0.0, c[1] + px[1] * step)
        token = max(0.0, c[2] + px[2] * step)
        square = max(0.0, c[3] + px[3] * step)
        least = 1e-3 * expected
        most = (
            max(start, least),
            max(row, least / max(1.0, work.rows)),
            max(token, least / work.tokens),
            max(square, least / max(1.0, work.squares)),
        )
        weight = 1.0 if self.observations == 0 else _RATIO_WEIGHT
        ratio = self.bytes_per_token
        if text_bytes > 0:
            ratio += weight * (max(0.1, text_bytes / work.tokens) - ratio)
        return Rate(
            (start, row, token, square),
            _shrunk(p, px, scale, most),
            ratio,
            self.tokens_per_row + weight * (work.tokens / max(1.0, work.rows) - self.tokens_per_row),
            self.observations + 1,
        )


@dataclass
class Rates:
    """All that was learned. ``observe`` and ``loaded`` learn; the rest predicts."""

    learned: dict[RateKey, Rate] = field(default_factory=dict)
    #: Worker -> its seconds for what takes its kind one second, and how often that was seen.
    paces: dict[str, tuple[float, int]] = field(default_factory=dict)
    #: Seconds that loading a model took.
    loads: dict[LoadKey, float] = field(default_factory=dict)

    def of(self, key: RateKey, *, device_kind: str, parameters: int) -> Rate:
        """The rate under this key; where it is unknown a prior, with another device's bytes-to-tokens ratio."""
        known = self.learned.get(key)
        if known is not None:
            return known
        ratios = (rate.bytes_per_token for (trunk, _, _), rate in self.learned.items() if trunk == key[0])
        flops = _PRIOR_FLOPS.get(device_kind, _PRIOR_FLOPS["cpu"])
        return Rate.prior(2 * (parameters or _PRIOR_PARAMETERS) / flops, next(ratios, PRIOR_BYTES_PER_TOKEN))

    def pace(self, worker: str) -> float:
        """How many times slower than its kind a worker is; 1 until something else was seen."""
        return self.paces.get(worker, (1.0, 0))[0]

    def load_s(self, model: str, device: str, *, weights_bytes: float) -> float:
        """Seconds that loading a model takes on a kind of device."""
        known = self.loads.get((model, device))
        return _PRIOR_LOAD_S + weights_bytes / _PRIOR_LOAD_BYTES_PER_S if known is None else known

    def observe(
        self, key: RateKey, worker: str, prior: Rate, work: Work, seconds: float, text_bytes: float = 0.0
    ) -> None:
        """Learn from one accepted outcome that loaded nothing. ``prior``: where nothing was learned before."""
        rate = self.learned.get(key, prior)
        pace, seen = self.paces.get(worker, (1.0, 0))
        expected = rate.seconds(work) * pace
        if rate.observations >= _YOUNG // 4 and expected > 0 and seconds > 0:
            least, most = PACE_RANGE
            off = min(16.0, max(1 / 16, seconds / expected))
            grown = (pace * off**_PACE_WEIGHT) ** (1 - _PACE_LEAK)
            self.paces[worker] = (min(most, max(least, grown)), seen + 1)
        self.learned[key] = rate.observed(work, seconds / pace, text_bytes)

    def loaded(self, key: LoadKey, seconds: float) -> None:
        """Learn from one load."""
        known = self.loads.get(key, seconds)
        self.loads[key] = known + _LOAD_WEIGHT * (seconds - known)


def _diagonal(values: Iterable[float]) -> tuple[float, ...]:
    flat = [0.0] * 16
    for i, value in enumerate(values):
        flat[5 * i] = value
    return tuple(flat)


def _shrunk(
    p: Sequence[float], px: Sequence[float], scale: float, most: Sequence[float]
) -> tuple[float, ...]:
    """The covariance after an observation.

    Rows of one length tell tokens from rows by nothing, so doubt in the difference would grow without bound while
    the past is forgotten: no variance may exceed that of ten times the coefficient.
    """
    variances = [(p[5 * i] - px[i] * px[i] / scale) / FORGETTING for i in range(4)]
    bounds = [(_DOUBT * value) ** 2 for value in most]
    f = [(b / v) ** 0.5 if v > b else 1.0 for v, b in zip(variances, bounds, strict=True)]
    g = [value / FORGETTING for value in f]
    return tuple(
        [(p[4 * i + j] - px[i] * px[j] / scale) * g[i] * f[j] for i in (0, 1, 2, 3) for j in (0, 1, 2, 3)]
    )
