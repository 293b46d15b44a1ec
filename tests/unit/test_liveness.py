"""Liveness is a change of (boot, seq), by the leader's own clock."""

from __future__ import annotations

from motet.wire import PROTOCOL, Beat
from scheduler.liveness import Watch, drops, usable


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
    assert set(usable(live)) == {"a"}


def test_an_attempt_without_a_lease_is_dropped() -> None:
    assert drops(beat(1, held=((1, 1), (2, 1))), {(1, 1)}) == ((2, 1),)


def test_nobody_is_late_because_the_leader_could_not_listen() -> None:
    watch = Watch(dead_s=4)
    watch.see({"w": beat(1)}, 0.0)
    assert "w" in watch.see({"w": beat(1)}, 20.0)
    assert "w" in watch.see({"w": beat(1)}, 21.9)
    assert "w" not in watch.see({"w": beat(1)}, 23.8) or watch.see({"w": beat(1)}, 24.0) == {}
