"""Predicted seconds of work, learned online from what devices report. Pure.

A `Rate` is what is known of one trunk on one kind of device in one numeric class: seconds from rows, tokens and
squared lengths, fitted to relative errors by recursive least squares in its Kalman form (Haykin, Adaptive Filter
Theory, ch. 10; reference: performance 4.1). A device that is slower than its kind has a `pace` of its own; loading is apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

#: (trunk, device name, numeric class).
RateKey = tuple[str, str, str]
#: Seconds of a sub-task, a row, a token, a squared length.
Coefficients = tuple[float, float, float, float]
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

#: Relative noise of one outcome; how much all coefficients may change together from one to the next, as a variance: about
#: thirty outcomes are remembered; and the doubt in the seconds of a sub-task as such.
NOISE, _DRIFT, _START_DOUBT_S = 0.3, 8e-5, 0.01
#: While so few outcomes were seen one that is far off overrules all before it.
_YOUNG, _FAR_OFF = 20, 2.0
#: Weight of a new observation of a pace, of a load time, and of a bytes-to-tokens ratio.
_PACE_WEIGHT, _LOAD_WEIGHT, _RATIO_WEIGHT = 0.12, 0.5, 0.3
#: An outcome that is so far off its prediction tells of another pace, not of noise, and counts for more.
_PACE_FAR_OFF, _PACE_JUMP, _FARTHEST = 2.5, 0.5, 4.0
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
    coefficients: Coefficients
    #: Their covariance, row by row.
    covariance: tuple[float, ...]
    bytes_per_token: float = PRIOR_BYTES_PER_TOKEN
    tokens_per_row: float = _PRIOR_TOKENS_PER_ROW
    observations: int = 0

    @classmethod
    def prior(cls, seconds_per_token: float, bytes_per_token: float = PRIOR_BYTES_PER_TOKEN) -> Rate:
        """A guess that the first outcomes overrule. A row costs as much as four tokens, a length of 4,096 doubles it."""
        guess = (_PRIOR_START_S, 4 * seconds_per_token, seconds_per_token, seconds_per_token / 4096)
        return cls(guess, _doubt(guess), bytes_per_token)

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
        c, p = self.coefficients, self.covariance
        expected = max(self.seconds(work), 1e-9)
        y = seconds / expected
        if self.observations < _YOUNG and not 1 / _FAR_OFF < y < _FAR_OFF:
            # The guess was wrong by a factor, and so were all its parts.
            known = min(c[0], seconds / 2)
            factor = (seconds - known) / max(1e-12, expected - c[0])
            c = (known, c[1] * factor, c[2] * factor, c[3] * factor)
            p = _doubt(c)
        else:
            # Relative to what was predicted: then a long sub-task counts no more than a short one.
            x = (1 / expected, work.rows / expected, work.tokens / expected, work.squares / expected)
            px = [p[i] * x[0] + p[i + 1] * x[1] + p[i + 2] * x[2] + p[i + 3] * x[3] for i in (0, 4, 8, 12)]
            scale = NOISE**2 + x[0] * px[0] + x[1] * px[1] + x[2] * px[2] + x[3] * px[3]
            step = (y - self.seconds(work) / expected) / scale
            c = (
                max(0.0, c[0] + px[0] * step),
                max(0.0, c[1] + px[1] * step),
                max(0.0, c[2] + px[2] * step),
                max(0.0, c[3] + px[3] * step),
            )
            # What was learned of their proportions stays; that all of them change together is always possible. (With
            # an ordinary forgetting factor doubt grows without bound in whatever the data do not tell, and sub-tasks
            # are cut to like seconds: they do not tell rows from tokens, nor either from a constant.)
            p = _after(p, px, scale, c)
        weight = 1.0 if self.observations == 0 else _RATIO_WEIGHT
        ratio = self.bytes_per_token
        if text_bytes > 0:
            ratio += weight * (max(0.1, text_bytes / work.tokens) - ratio)
        return Rate(
            c,
            p,
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
            off = min(_FARTHEST, seconds / expected)
            weight = _PACE_JUMP if off > _PACE_FAR_OFF or off < 1 / _PACE_FAR_OFF else _PACE_WEIGHT
            # The mean, not that of the logarithms, which noise drags down.
            grown = (pace * (1 + weight * (off - 1))) ** (1 - _PACE_LEAK)
            pace = min(most, max(least, grown))
            self.paces[worker] = (pace, seen + 1)
        self.learned[key] = rate.observed(work, seconds / pace, text_bytes)

    def loaded(self, key: LoadKey, seconds: float) -> None:
        """Learn from one load."""
        known = self.loads.get(key, seconds)
        self.loads[key] = known + _LOAD_WEIGHT * (seconds - known)


def _after(p: Sequence[float], px: Sequence[float], scale: float, c: Coefficients) -> tuple[float, ...]:
    """The covariance after an observation, and after a while: exactly symmetric."""
    (a, b, e, f), (s, t, u, v) = px, c
    aa, ab, ae, af = (
        p[i] - a * x / scale + _DRIFT * s * y for i, x, y in ((0, a, s), (1, b, t), (2, e, u), (3, f, v))
    )
    bb, be, bf = (p[i] - b * x / scale + _DRIFT * t * y for i, x, y in ((5, b, t), (6, e, u), (7, f, v)))
    ee, ef = (p[i] - e * x / scale + _DRIFT * u * y for i, x, y in ((10, e, u), (11, f, v)))
    ff = p[15] - f * f / scale + _DRIFT * v * v
    return (aa, ab, ae, af, ab, bb, be, bf, ae, be, ee, ef, af, bf, ef, ff)


def _doubt(coefficients: Coefficients) -> tuple[float, ...]:
    """The covariance of a guess: each part may as well be nothing, or twice as much."""
    flat = [0.0] * 16
    flat[0] = _START_DOUBT_S**2
    for i in (1, 2, 3):
        flat[5 * i] = coefficients[i] ** 2
    return tuple(flat)
