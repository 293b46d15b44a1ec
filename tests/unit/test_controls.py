"""Workers are told what they do not know: not that an attempt is over which they have ended themselves."""

from __future__ import annotations

from motet.protocol.transport import MemoryTransport
from motet.protocol.wire import Beat, Control
from scheduler.controls import Controls

HOLDS = Beat(worker="w", boot="b", seq=1, held=((1, 1), (2, 1)))
BOTH = {(1, 1), (2, 1)}


def told(controls: Controls, transport: MemoryTransport, leased: set[tuple[int, int]], now: float) -> object:
    transport.controls.clear()
    controls.tell(1, {"w": HOLDS}, leased, frozenset(), now)
    return transport.controls.get("w")


def test_an_attempt_that_its_worker_ended_is_told_only_to_one_that_goes_on_naming_it() -> None:
    transport = MemoryTransport()
    controls = Controls(transport)
    controls.due.add("w")
    assert told(controls, transport, BOTH, 0.0) == Control(epoch=1)
    controls.ended("w", (1, 1), 0.25)
    controls.due.add("w")
    assert told(controls, transport, {(2, 1)}, 0.5) is None
    assert told(controls, transport, {(2, 1)}, 3.0) is None
    assert told(controls, transport, {(2, 1)}, 3.5) == Control(epoch=1, drop=((1, 1),))


def test_an_attempt_that_ended_otherwise_is_told_at_once() -> None:
    transport = MemoryTransport()
    controls = Controls(transport)
    controls.ended("w", (1, 1), 0.0)
    controls.due.add("w")
    assert told(controls, transport, set(), 0.25) == Control(epoch=1, drop=((2, 1),))
