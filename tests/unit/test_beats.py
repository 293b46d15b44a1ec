"""A beat of which nothing but its number is new is known without being read; every other one is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.transport.beats import KnownBeat, read_beat
from motet.protocol.wire import Beat

BEAT = Beat(worker="w", boot="b", seq=1, device_name="d", held=((1, 1),))


def known(beat: Beat) -> KnownBeat:
    found = read_beat("w", beat.encode(), None)
    assert found is not None
    return found


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_another_number_alone_keeps_the_beat(before: int, after: int) -> None:
    first = known(replace(BEAT, seq=before))
    second = read_beat("w", replace(BEAT, seq=after).encode(), first)
    assert second is not None
    assert second.beat is first.beat
    assert second.whole() == replace(BEAT, seq=after)
    assert second.raw == replace(BEAT, seq=after).encode()


@pytest.mark.parametrize(
    "change", [{"boot": "c"}, {"held": ()}, {"device_name": "e"}, {"rows_done": 1}, {"state": "draining"}]
)
def test_anything_else_that_changes_is_read(change: dict[str, object]) -> None:
    beat = replace(BEAT, seq=2, **change)  # type: ignore[arg-type]
    found = read_beat("w", beat.encode(), known(BEAT))
    assert found is not None
    assert found.beat == beat


def test_what_is_no_beat_of_the_worker_is_none() -> None:
    raw = BEAT.encode()
    for wrong in (b"", b"\xff", raw[:-3], raw + b"1", replace(BEAT, worker="v").encode()):
        assert read_beat("w", wrong, known(BEAT)) is None
