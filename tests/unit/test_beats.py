"""A beat of which nothing is new that the leader acts on keeps its object; every other one is read. A look costs what is new."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.transport.beats import KnownBeat, NewestBeats, read_beat
from motet.protocol.wire import FOR_PEOPLE, Beat

BEAT = Beat(worker="w", boot="b", seq=1, device_name="d", held=((1, 1),))
#: Another value of each field.
OTHERS = {
    "boot": "c",
    "seq": 2**40,
    "protocol": 4,
    "version": "2",
    "host": "h",
    "pid": 7,
    "state": "draining",
    "device_kind": "cuda",
    "device_name": "e",
    "memory_mb": 9,
    "memory_used_mb": 8,
    "gpus": 2,
    "spreads": ("encoder",),
    "utilisation": 0.5,
    "formats": ("bf16",),
    "engines": ("encoder",),
    "resident": ("digest",),
    "backlog_s": 1.5,
    "held": ((1, 1), (2, 1)),
    "left": ((1, 1),),
    "rows_done": 1,
}


def known(beat: Beat) -> KnownBeat:
    found = read_beat("w", beat.encode(), None)
    assert found is not None
    return found


def changed(**change: object) -> Beat:
    return replace(BEAT, **change)  # type: ignore[arg-type]


@given(st.integers(-(2**63), 2**63), st.integers(-(2**63), 2**63))
def test_another_number_alone_keeps_the_beat(before: int, after: int) -> None:
    first = known(changed(seq=before))
    beat = first.beat
    second = read_beat("w", changed(seq=after).encode(), first)
    assert second is not None
    assert second.beat is beat
    assert second.whole() == changed(seq=after)
    assert second.raw == changed(seq=after).encode()


def test_every_field_is_for_people_or_read_anew() -> None:
    assert {field.name for field in fields(Beat)} == {"worker", *OTHERS}
    for name, value in OTHERS.items():
        found = read_beat("w", changed(**{name: value}).encode(), known(BEAT))
        assert found is not None
        assert found.whole() == changed(**{name: value}), name
        assert found.beat == (BEAT if name in FOR_PEOPLE else changed(**{name: value})), name


def test_what_was_said_before_is_no_part_of_what_is_said_now() -> None:
    first = known(changed(**OTHERS))
    found = read_beat("w", BEAT.encode(), first)
    assert found is not None
    assert found.beat == BEAT
    old = {"worker": "w", "boot": "b", "seq": 3}  # of a minor that knew no other fields
    found = read_beat("w", msgpack.packb(old), first)
    assert found is not None
    assert found.beat == Beat(worker="w", boot="b", seq=3)


@pytest.mark.parametrize("seq", [1.5, "1", None, [1], True])
def test_what_is_no_number_is_no_other_number(seq: object) -> None:
    wire = {name: getattr(BEAT, name) for name in Beat.__slots__} | {"seq": seq}
    assert not known(BEAT).becomes(msgpack.packb(wire))


def test_what_is_no_beat_of_the_worker_is_none() -> None:
    raw = BEAT.encode()
    for wrong in (b"", b"\xff", raw[:-3], raw + b"1", b"\x93abc", changed(worker="v").encode()):
        assert read_beat("w", wrong, known(BEAT)) is None


def test_a_look_tells_what_is_new_since_the_last_one() -> None:
    newest = NewestBeats()
    names = ["u", "v", "w"]
    said = [replace(BEAT, worker=name).encode() for name in names]
    assert newest.take_in(names, said) == {"u", "v", "w"}
    first = dict(newest.beats)
    assert newest.take_in(names, list(said)) == frozenset()
    said[1] = replace(BEAT, worker="v", seq=2).encode()
    assert newest.take_in(names, [said[0], said[1], None]) == {"v"}
    assert newest.beats == {"u": first["u"], "v": first["v"]}
    assert newest.beats["v"] is first["v"]
    assert newest.whole()["v"].seq == 2
    assert newest.silent() == ["w"]
    # Others come, and one that cannot be read; who comes back is new again.
    assert newest.take_in(["a", "t", "w"], [b"\xff", replace(BEAT, worker="t").encode(), said[2]]) == {
        "t",
        "w",
    }
    assert newest.beats.keys() == {"t", "w"}
    assert newest.silent() == []
    assert newest.take_in(names, said) == {"u", "v"}
