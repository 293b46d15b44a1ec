"""Reading the beats of all workers: for the scheduler, and for lookers-on whose rights change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motet.protocol.envelope import BadMessage
from motet.protocol.transport.connection import RedisConnection
from motet.protocol.transport.keys import WORKERS, beat_key, queue_name
from motet.protocol.wire import Beat

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker as a looker-on sees it."""

    beat: Beat
    #: Messages that wait in its queue.
    queued: int


class RedisReader:
    """A looker-on's side of Redis: Flower's, whose rights hold nothing that changes anything."""

    def __init__(self, url: str) -> None:
        self._redis = RedisConnection(url)

    def close(self) -> None:
        self._redis.close()

    def workers(self) -> dict[str, Seen]:
        """Newest beat and length of the queue of every worker that beats. Raises TransportLost."""

        def ask(r: redis.Redis) -> tuple[list[str], list[Any]]:
            names, _ = by_name(r.smembers(WORKERS))
            pipe = r.pipeline(transaction=False)
            for name in names:
                pipe.get(beat_key(name))
                pipe.llen(queue_name(name))
            return names, pipe.execute()

        names, answers = self._redis.call(ask)
        queued = dict(zip(names, answers[1::2], strict=True))
        found = decoded(names, answers[::2])
        return {name: Seen(beat, int(queued[name])) for name, beat in found.items()}


def by_name(members: Any) -> tuple[list[str], list[bytes]]:
    """The workers that ever beat, by name; and members of their set that are no name in UTF-8."""
    names, nameless = [], []
    for member in members:
        try:
            names.append(member.decode())
        except UnicodeDecodeError:
            nameless.append(member)
    return sorted(names), nameless


def decoded(names: Sequence[str], bodies: Iterable[bytes | None]) -> dict[str, Beat]:
    """Worker -> its beat, without those that have none, and without what is no beat of that worker."""
    found: dict[str, Beat] = {}
    for name, body in zip(names, bodies, strict=True):
        try:
            beat = Beat.decode(body or b"")
        except BadMessage:
            continue
        if beat.worker == name:
            found[name] = beat
    return found
