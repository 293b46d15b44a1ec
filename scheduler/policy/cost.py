"""Predicted seconds of work, learned online from what devices report. Pure.

A `Rate` is what is known of one trunk on one kind of device in one numeric class: seconds from rows, tokens and
squared lengths, fitted to relative errors by recursive least squares in its Kalman form (Haykin, Adaptive Filter
Theory, ch. 10; reference: performance 4.1). A device that is slower than its kind has a `pace` of its own; loading is apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

from motet.protocol.manifest import Manifest

#: (trunk, device name, numeric class). Where a trunk's passes differ in what a row costs: ``trunk:shape``.
RateKey = tuple[str, str, str]
#: Seconds of a sub-task, a row, a token, a squared length.
Coefficients = tuple[float, float, float, float]
#: (model digest, device name).
LoadKey = tuple[str, str]

#: Before anything was learned: English text under a word-piece tokenizer.
PRIOR_BYTES_PER_TOKEN = 4.0
#: Bytes of the reference to a picture that stand in its row: of hundreds of tokens, whatever the picture.
PICTURE_BYTES = 48.0
_LEAST_RATIO = 0.001
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
_NOISE_VARIANCE = NOISE**2
#: After so many outcomes a prediction is no guess any more.
_MEASURED = 3
#: Weight of a new observation of a pace, of a load time, and of a bytes-to-tokens ratio.
_PACE_WEIGHT, _LOAD_WEIGHT, _RATIO_WEIGHT = 0.12, 0.5, 0.3
#: An outcome that is so far off its prediction tells of another pace, not of noise, and counts for more.
_PACE_FAR_OFF, _PACE_JUMP, _FARTHEST = 2.5, 0.5, 4.0
#: Each observation draws a pace this much back to 1, so that a kind's rate and its devices' paces cannot drift apart.
_PACE_LEAK = 0.02
PACE_RANGE = (0.5, 8.0)
#: As its kind, never seen.
_NO_PACE = (1.0, 0)


class Workload(NamedTuple):
    """What costs time: rows, their tokens, and the sum of their squared lengths in tokens."""

    rows: float
    tokens: float
    squares: float


class Price(NamedTuple):
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


class Rate(NamedTuple):
    """What was learned of one trunk on one kind of device. ``observed`` gives the next one."""

    #: Seconds of a sub-task, a row, a token, a squared length; none is negative.
    coefficients: Coefficients
    #: Their covariance, row by row: exactly symmetric.
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

    @property
    def measured(self) -> bool:
        """Predictions rest on outcomes enough to hold a device to them."""
        return self.observations >= _MEASURED

    def seconds(self, work: Workload) -> float:
        """Predicted seconds of one sub-task."""
        start, row, token, square = self.coefficients
        rows, tokens, squares = work
        return start + row * rows + token * tokens + square * squares

    def price(self, pace: float = 1.0, bytes_per_token: float = 0.0) -> Price:
        """In bytes, which are known before rows are tokenised. ``bytes_per_token``: the job's own; 0: not known."""
        start, row, token, square = self.coefficients
        ratio = bytes_per_token or self.bytes_per_token
        return Price(start * pace, row * pace, token / ratio * pace, square / (ratio * ratio) * pace)

    def observed(self, work: Workload, seconds: float, text_bytes: float = 0.0) -> Rate:
        """Learn from one sub-task at the pace of its kind. Errors count relative to what was predicted."""
        rows, tokens, squares = work
        if tokens <= 0 or seconds <= 0 or not isfinite(seconds):
            return self
        # Spelled out from here on: this runs for each outcome.
        c, p, n, ratio, each = (
            self.coefficients,
            self.covariance,
            self.observations,
            self.bytes_per_token,
            self.tokens_per_row,
        )
        c0, c1, c2, c3 = c
        expected = c0 + c1 * rows + c2 * tokens + c3 * squares
        if expected < 1e-9:
            expected = 1e-9
        y = seconds / expected
        if n < _YOUNG and not 1 / _FAR_OFF < y < _FAR_OFF:
            # The guess was wrong by a factor, and so were all its parts.
            known = min(c0, seconds / 2)
            factor = (seconds - known) / max(1e-12, expected - c0)
            c = (known, c1 * factor, c2 * factor, c3 * factor)
            p = _doubt(c)
        else:
            # Relative to what was predicted: then a long sub-task counts no more than a short one.
            x0, x1, x2, x3 = 1 / expected, rows / expected, tokens / expected, squares / expected
            p00, p01, p02, p03, _, p11, p12, p13, _, _, p22, p23, _, _, _, p33 = p
            p0 = p00 * x0 + p01 * x1 + p02 * x2 + p03 * x3
            p1 = p01 * x0 + p11 * x1 + p12 * x2 + p13 * x3
            p2 = p02 * x0 + p12 * x1 + p22 * x2 + p23 * x3
            p3 = p03 * x0 + p13 * x1 + p23 * x2 + p33 * x3
            scale = _NOISE_VARIANCE + x0 * p0 + x1 * p1 + x2 * p2 + x3 * p3
            step = (y - 1) / scale
            c0, c1, c2, c3 = c0 + p0 * step, c1 + p1 * step, c2 + p2 * step, c3 + p3 * step
            c0, c1 = c0 if c0 > 0.0 else 0.0, c1 if c1 > 0.0 else 0.0
            c2, c3 = c2 if c2 > 0.0 else 0.0, c3 if c3 > 0.0 else 0.0
            c = (c0, c1, c2, c3)
            # What was learned of their proportions stays; that all of them change together is always possible. (With
            # an ordinary forgetting factor doubt grows without bound in whatever the data do not tell, and sub-tasks
            # are cut to like seconds: they do not tell rows from tokens, nor either from a constant.)
            q0, q1, q2 = p0 / scale, p1 / scale, p2 / scale
            d0, d1, d2 = _DRIFT * c0, _DRIFT * c1, _DRIFT * c2
            p01, p02, p03 = p01 - q0 * p1 + d0 * c1, p02 - q0 * p2 + d0 * c2, p03 - q0 * p3 + d0 * c3
            p12, p13, p23 = p12 - q1 * p2 + d1 * c2, p13 - q1 * p3 + d1 * c3, p23 - q2 * p3 + d2 * c3
            p = (
                p00 - q0 * p0 + d0 * c0, p01, p02, p03,
                p01, p11 - q1 * p1 + d1 * c1, p12, p13,
                p02, p12, p22 - q2 * p2 + d2 * c2, p23,
                p03, p13, p23, p33 - p3 * p3 / scale + _DRIFT * c3 * c3,
            )  # fmt: skip
        weight = 1.0 if n == 0 else _RATIO_WEIGHT
        if text_bytes > 0:
            seen = text_bytes / tokens
            ratio += weight * ((seen if seen > _LEAST_RATIO else _LEAST_RATIO) - ratio)
        each += weight * (tokens / (rows if rows > 1.0 else 1.0) - each)
        return Rate(c, p, ratio, each, n + 1)


@dataclass
class Rates:
    """All that was learned. ``observe`` and ``loaded`` learn; the rest predicts."""

    learned: dict[RateKey, Rate] = field(default_factory=dict)
    #: Worker -> its seconds for what takes its kind one second, and how often that was seen.
    paces: dict[str, tuple[float, int]] = field(default_factory=dict)
    #: Seconds that loading a model took.
    loads: dict[LoadKey, float] = field(default_factory=dict)

    def of(
        self,
        key: RateKey,
        *,
        device_kind: str,
        parameters: int,
        bytes_per_token: float = PRIOR_BYTES_PER_TOKEN,
    ) -> Rate:
        """The rate under this key; where it is unknown a prior, with another device's bytes-to-tokens ratio, or else this.

        Of a trunk whose passes are of many shapes another shape's rate is a better guess than its parameters.
        """
        known = self.learned.get(key)
        if known is not None:
            return known
        trunk, _, shape = key[0].partition(":")
        alike = ((k, rate) for k, rate in self.learned.items() if k[0].partition(":")[0] == trunk)
        if shape and (other := [rate for k, rate in alike if k[1:] == key[1:]]):
            best = max(other, key=lambda rate: rate.observations)
            return best._replace(covariance=_doubt(best.coefficients), observations=0)
        ratios = (rate.bytes_per_token for k, rate in self.learned.items() if k[0].partition(":")[0] == trunk)
        flops = _PRIOR_FLOPS.get(device_kind, _PRIOR_FLOPS["cpu"])
        return Rate.prior(2 * (parameters or _PRIOR_PARAMETERS) / flops, next(ratios, bytes_per_token))

    def pace(self, worker: str) -> float:
        """How many times slower than its kind a worker is; 1 until something else was seen."""
        return self.paces.get(worker, _NO_PACE)[0]

    def load_s(self, model: str, device: str, *, weights_bytes: float) -> float:
        """Seconds that loading a model takes on a kind of device."""
        known = self.loads.get((model, device))
        return _PRIOR_LOAD_S + weights_bytes / _PRIOR_LOAD_BYTES_PER_S if known is None else known

    def observe(
        self, key: RateKey, worker: str, prior: Rate, work: Workload, seconds: float, text_bytes: float = 0.0
    ) -> None:
        """Learn from one accepted outcome that loaded nothing. ``prior``: where nothing was learned before."""
        rate = self.learned.get(key, prior)
        pace, seen = self.paces.get(worker, _NO_PACE)
        expected = rate.seconds(work) * pace
        if rate.observations >= _YOUNG // 4 and expected > 0 and seconds > 0:
            off = seconds / expected
            if off > _FARTHEST:
                off = _FARTHEST
            weight = _PACE_JUMP if off > _PACE_FAR_OFF or off < 1 / _PACE_FAR_OFF else _PACE_WEIGHT
            # The mean, not that of the logarithms, which noise drags down.
            pace = (pace * (1 + weight * (off - 1))) ** (1 - _PACE_LEAK)
            least, most = PACE_RANGE
            pace = least if pace < least else most if pace > most else pace
            self.paces[worker] = (pace, seen + 1)
        self.learned[key] = rate.observed(work, seconds / pace, text_bytes)

    def loaded(self, key: LoadKey, seconds: float) -> None:
        """Learn from one load."""
        known = self.loads.get(key, seconds)
        self.loads[key] = known + _LOAD_WEIGHT * (seconds - known)


def learned_as(key: str, model: Manifest) -> str:
    """The name under which the speed of a pass is learned that loads this model; ``key``: its own name, or ""."""
    return key or model.trunk or model.digest


def _doubt(coefficients: Coefficients) -> tuple[float, ...]:
    """The covariance of a guess: each part may as well be nothing, or twice as much."""
    flat = [0.0] * 16
    flat[0] = _START_DOUBT_S**2
    for i in (1, 2, 3):
        flat[5 * i] = coefficients[i] ** 2
    return tuple(flat)
