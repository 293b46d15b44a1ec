"""Picture files with bytes changed, lost and doubled: each is read or refused, and the process goes on."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from tests.nasty_pictures import mutated, nasty, outcome

MUTATIONS = max(500, int(os.environ.get("FUZZ_ENTRIES", "10000")) // 40)
SEED = int(os.environ.get("FUZZ_SEED", "5"))


def test_changed_pictures_are_read_or_refused_and_nothing_else() -> None:
    dice = np.random.default_rng(SEED)
    files = [one.data for one in nasty().values() if one.size]
    found = Counter(outcome(mutated(files[i % len(files)], dice)).partition(":")[0] for i in range(MUTATIONS))
    assert found.keys() == {"RGB", "bad_image", "too_large"}
