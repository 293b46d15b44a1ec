"""Liveness is a change of (boot, seq), by the leader's own clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest

from motet.protocol.envelope import BadMessage, pack, unwrap
from motet.protocol.manifest import Manifest
from motet.protocol.wire import PROTOCOL, Assignment, Beat, Control, Outcome
from scheduler.policy.capability import barred
from scheduler.policy.liveness import Watch, attuned, drops, speaks


def beat(seq: int, *, boot: str = "b", **kw: object) -> Beat:
    return Beat(worker="w", boot=boot, seq=seq, **kw)  # type: ignore[arg-type]


def test_a_beat_that_does_not_change_dies_after_dead_s() -> None:
    watch = Watch(dead_s=4)
    assert "w" in watch.see({"w": beat(1)}, 0.0)
    assert "w" in watch.see({"w": beat(1)}, 2.0)
    assert "w" in watch.see({"w": beat(1)}, 3.9)
    assert "w" not in watch.see({"w": beat(1)}, 4.0)
    assert "w" in watch.see({"w": beat(2)}, 4.5)


def test_a_restarted_worker_is_alive_though_its_count_begins_again() -> None:
    watch = Watch(dead_s=4)
    watch.see({"w": beat(7)}, 0.0)
    assert "w" in watch.see({"w": beat(7, boot="c")}, 9.0)


def test_a_draining_worker_and_one_of_another_protocol_get_no_work() -> None:
    live = {"a": beat(1), "b": beat(1, state="draining"), "c": beat(1, protocol=PROTOCOL + 1)}
    assert {name for name, b in live.items() if barred(b) is None} == {"a"}


def test_a_worker_that_an_operator_drained_gets_no_work_whatever_it_says() -> None:
    live = {"a": beat(1), "b": beat(1)}
    assert {name for name, b in live.items() if barred(b, drained=name == "b") is None} == {"a"}


def test_a_worker_is_told_again_until_it_does_what_the_flag_says() -> None:
    ready, draining = beat(1), beat(1, state="draining")
    assert [attuned(b, drain) for b in (ready, draining) for drain in (False, True)] == [
        True,
        False,
        False,
        True,
    ]


def test_an_attempt_without_a_lease_is_dropped() -> None:
    assert drops(beat(1, held=((1, 1), (2, 1))), {(1, 1)}) == ((2, 1),)


def test_nobody_is_late_because_the_leader_could_not_listen() -> None:
    watch = Watch(dead_s=4)
    watch.see({"w": beat(1)}, 0.0)
    assert "w" in watch.see({"w": beat(1)}, 20.0)
    assert "w" in watch.see({"w": beat(1)}, 21.9)
    assert "w" not in watch.see({"w": beat(1)}, 23.8) or watch.see({"w": beat(1)}, 24.0) == {}


# -- versions: another minor is understood, another major is told apart

MODEL = Manifest(name="m", version="1", engine="encoder", answers="label")
ASSIGNMENT = Assignment(
    subtask=1,
    attempt=1,
    nonce="n",
    job="j",
    tenant="t",
    pass_kind="encoder m",
    model=MODEL,
    numerics="fast",
    max_tokens=0,
    tasks=(),
    texts=("a",),
)
OUTCOME = Outcome(subtask=1, attempt=1, nonce="n", worker="w", boot="b", verdict="done")


def said(message: Beat | Control) -> dict[str, Any]:
    return dict(msgpack.unpackb(message.encode()))


@pytest.mark.parametrize(
    "message", [beat(3, held=((1, 2),), engines=("encoder",)), Control(epoch=1, drain=True)]
)
def test_fields_of_a_newer_minor_are_passed_over(message: Beat | Control) -> None:
    newer = said(message) | {"mood": "fine", "nested": {"a": [1]}}
    assert type(message).decode(msgpack.packb(newer)) == message


@pytest.mark.parametrize("message", [ASSIGNMENT, OUTCOME], ids=lambda m: type(m).__name__)
def test_a_newer_minor_may_add_to_payloads_and_outcomes(message: Assignment | Outcome) -> None:
    newer = unwrap(message.encode()) | {"mood": "fine"}
    if isinstance(message, Outcome):
        newer["usage"] = [*newer["usage"], 7]
    assert type(message).decode(pack(newer)) == message


def test_what_an_older_minor_does_not_say_is_its_default() -> None:
    whole = said(beat(3))
    for name in (f.name for f in dataclasses.fields(Beat) if f.name not in ("worker", "boot", "seq")):
        less = {k: v for k, v in whole.items() if k != name}
        assert Beat.decode(msgpack.packb(less)) == beat(3), name
    assert Beat.decode(msgpack.packb({"worker": "w", "boot": "b", "seq": 3})) == beat(3)
    assert Control.decode(msgpack.packb({"epoch": 4})) == Control(epoch=4)
    less = {
        k: v
        for k, v in unwrap(ASSIGNMENT.encode()).items()
        if k not in ("exclusive", "interactive", "predicted_s")
    }
    assert Assignment.decode(pack(less)) == ASSIGNMENT
    less = {k: v for k, v in unwrap(OUTCOME.encode()).items() if k not in ("refused", "error")}
    assert Outcome.decode(pack(less)) == OUTCOME


@pytest.mark.parametrize("name", ["worker", "boot", "seq"])
def test_a_beat_that_does_not_say_who_beats_is_none(name: str) -> None:
    with pytest.raises(BadMessage):
        Beat.decode(msgpack.packb({k: v for k, v in said(beat(3)).items() if k != name}))


def test_another_major_is_told_by_its_beat_and_its_other_messages_are_refused() -> None:
    other = Beat.decode(msgpack.packb({"worker": "w", "boot": "b", "seq": 1, "protocol": PROTOCOL + 1}))
    assert not speaks(other)
    assert barred(other) == "incompatible"
    for message in (ASSIGNMENT, OUTCOME):
        with pytest.raises(BadMessage, match=f"protocol {PROTOCOL + 1}"):
            type(message).decode(pack(unwrap(message.encode()) | {"v": PROTOCOL + 1}))
