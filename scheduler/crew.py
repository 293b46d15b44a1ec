"""The crew: live workers as of their newest beats, whose beat says something new, and what beats say of leases."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from operator import attrgetter
from typing import NamedTuple

from motet.protocol.transport import Heard, SchedulerTransport
from motet.protocol.wire import Beat, acted_on, of_itself
from scheduler.policy.liveness import Watch
from scheduler.store.leases import Held, LeaseKey

#: What of a beat decides which models a worker can ever run.
_can_run = attrgetter("engines", "device_kind", "device_name", "memory_mb", "gpus", "spreads", "formats")


class Changed(NamedTuple):
    """Workers of which something is new."""

    #: That came, went, or say something new.
    workers: set[str]
    #: Those of them of which more is new than which attempts they hold.
    themselves: set[str]


class Crew:
    """What the leader heard of all workers."""

    def __init__(self, dead_s: float) -> None:
        self._watch = Watch(dead_s)
        #: Newest beat of every live worker.
        self.live: dict[str, Beat] = {}

    def hear(self, heard: Heard, now: float) -> Changed:
        """Take in the newest beats."""
        before, self.live = self.live, self._watch.see(heard.beats, now, heard.renewed)
        themselves = set() if before.keys() == self.live.keys() else before.keys() ^ self.live.keys()
        changed = set(themselves)
        for name in heard.renewed:
            old, new = before.get(name), self.live.get(name)
            if old is new or old is None or new is None or acted_on(old) == acted_on(new):
                continue
            changed.add(name)
            if of_itself(old) != of_itself(new):
                themselves.add(name)
        return Changed(changed, themselves)


def one_of_each_kind(beats: Mapping[str, Beat], too: Collection[str]) -> dict[str, Beat]:
    """Of workers that can run the same models one, and each of those in ``too``."""
    kinds = {_can_run(beat): name for name, beat in beats.items()}
    return {name: beats[name] for name in sorted({*kinds.values(), *too}) if name in beats}


def seen_alive(
    transport: SchedulerTransport,
    live: Mapping[str, Beat],
    held: Mapping[LeaseKey, Held],
    asked: Container[LeaseKey],
) -> tuple[set[LeaseKey], set[LeaseKey]]:
    """Leases whose attempt a live worker holds, or, of those that are ``asked``, whose message waits in its queue.

    And those among them that wait at a worker that drains: it takes no more, so they are better off elsewhere.
    """
    seen: set[LeaseKey] = set()
    unseen: dict[str, set[LeaseKey]] = {}
    for key, h in held.items():
        beat = live.get(h.worker)
        if beat is None or beat.boot != h.boot:
            continue
        if key in beat.held:
            seen.add(key)
        elif key in asked or beat.state == "draining":
            unseen.setdefault(h.worker, set()).add(key)
    waiting: set[LeaseKey] = set()
    for name, queue in transport.queued_at(unseen).items():
        queued = unseen[name] & queue
        seen |= queued
        if live[name].state == "draining":
            waiting |= queued
    return seen, waiting


def another_boot(held: Held, live: Mapping[str, Beat]) -> bool:
    """Another process beats in the place of the one that held this lease."""
    return held.worker in live and live[held.worker].boot != held.boot


def left_behind(held: Mapping[LeaseKey, Held], live: Mapping[str, Beat]) -> set[LeaseKey]:
    """Those whose worker says that they came there and cannot run: the payload was lost, or cannot be read."""
    beats = ((name, live.get(name)) for name in {h.worker for h in held.values()})
    return {
        key
        for name, beat in beats
        if beat is not None
        for key in beat.left
        if (h := held.get(key)) is not None and (h.worker, h.boot) == (name, beat.boot)
    }


def draining(workers: Collection[str], live: Mapping[str, Beat]) -> set[str]:
    """Those that drain: what waits there is to come back."""
    return {name for name in workers if (beat := live.get(name)) is not None and beat.state == "draining"}
