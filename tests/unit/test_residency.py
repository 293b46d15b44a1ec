"""Which model gives way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.residency import NeverFits, Resident, evictions


def held(*models: tuple[str, int]) -> list[Resident[str]]:
    """Models in memory, the least recently used first."""
    return [Resident(name, mb, float(i)) for i, (name, mb) in enumerate(models)]


def test_nothing_is_evicted_where_there_is_room() -> None:
    assert evictions(held(("a", 40)), 50, 100, ()) == []


def test_the_least_recently_used_goes_first_and_only_as_many_as_needed() -> None:
    assert evictions(held(("old", 40), ("mid", 40), ("new", 20)), 30, 100, ()) == ["old"]
    assert evictions(held(("old", 40), ("mid", 40), ("new", 20)), 70, 100, ()) == ["old", "mid"]


def test_what_is_in_use_stays_however_old() -> None:
    assert evictions(held(("old", 40), ("mid", 40), ("new", 20)), 30, 100, {"old"}) == ["mid"]


def test_it_must_wait_while_the_room_is_in_use() -> None:
    assert evictions(held(("a", 60), ("b", 30)), 50, 100, {"a"}) is None


def test_a_model_larger_than_all_memory_never_fits() -> None:
    with pytest.raises(NeverFits, match="needs 101 MB, models may hold 100 MB"):
        evictions([], 101, 100, ())


@given(
    st.lists(st.integers(1, 50), max_size=8),
    st.integers(0, 120),
    st.integers(50, 120),
    st.sets(st.integers(0, 7)),
)
def test_evictions_make_room_and_never_touch_what_is_in_use(
    sizes: list[int], need: int, budget: int, in_use: set[int]
) -> None:
    models = [Resident(i, mb, float(i % 3)) for i, mb in enumerate(sizes)]
    try:
        chosen = evictions(models, need, budget, in_use)
    except NeverFits:
        assert need > budget
        return
    kept = [m for m in models if chosen is None or m.key not in chosen]
    if chosen is None:
        assert need + sum(m.memory_mb for m in models if m.key in in_use) > budget
    else:
        assert not set(chosen) & in_use
        assert need + sum(m.memory_mb for m in kept) <= budget
