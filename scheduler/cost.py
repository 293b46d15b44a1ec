"""Predicted seconds of work, from what was learned. Pure.

One number per (trunk, device, numeric class) for now: seconds per token, an exponentially weighted mean
over outcomes. The seam is final: whoever asks gets seconds for bytes on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Before anything was learned: English text under a word-piece tokenizer.
PRIOR_BYTES_PER_TOKEN = 4.0
#: Before anything was learned: 2 operations a parameter and token, at half of what a modest device does. Too low
#: a guess costs a few short sub-tasks; too high a guess makes the first one long.
_PRIOR_FLOPS = {"cpu": 1e11, "cuda": 4e13}
_PRIOR_PARAMETERS = 25_000_000
#: Weight of a new observation against all that came before.
LEARNING_RATE = 0.3


@dataclass(frozen=True, slots=True)
class Rate:
    """What was learned of one trunk on one kind of device."""

    seconds_per_token: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Rates:
    """All that was learned, by (trunk, device name, numeric class)."""

    learned: Mapping[tuple[str, str, str], Rate]

    def of(self, key: tuple[str, str, str], *, device_kind: str, parameters: int) -> Rate:
        """The rate under this key; where it is unknown a prior, with another device's bytes-to-tokens ratio."""
        known = self.learned.get(key)
        if known is not None:
            return known
        ratios = (rate.bytes_per_token for (trunk, _, _), rate in self.learned.items() if trunk == key[0])
        flops = _PRIOR_FLOPS.get(device_kind, _PRIOR_FLOPS["cpu"])
        return Rate(2 * (parameters or _PRIOR_PARAMETERS) / flops, next(ratios, PRIOR_BYTES_PER_TOKEN))
