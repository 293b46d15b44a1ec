"""One worker's side of Redis: its beat, its payloads, its outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from motet.protocol.envelope import BadMessage
from motet.protocol.transport.connection import RedisConnection
from motet.protocol.transport.keys import (
    OUTCOMES,
    WORKERS,
    beat_key,
    control_key,
    payload_key,
    queue_name,
    running_key,
    say_channel,
)
from motet.protocol.wire import Beat, Control, Running

if TYPE_CHECKING:
    import redis

#: Seconds after which a beat that is not renewed expires, and its worker is forgotten.
_BEAT_EXPIRES_S = 60


class RedisWorkerTransport:
    """One worker's side of Redis."""

    def __init__(self, url: str, worker: str) -> None:
        self._redis = RedisConnection(url)
        self._worker = worker

    def close(self) -> None:
        self._redis.close()

    def beat(self, beat: Beat) -> Control | None:
        def say(r: redis.Redis) -> bytes | None:
            pipe = r.pipeline(transaction=False)
            pipe.set(beat_key(self._worker), beat.encode(), ex=_BEAT_EXPIRES_S)
            pipe.sadd(WORKERS, self._worker)
            pipe.get(control_key(self._worker))
            return pipe.execute()[2]  # type: ignore[no-any-return]

        return _control(self._redis.call(say))

    def hear(self) -> Control | None:
        return _control(self._redis.call(lambda r: r.get(control_key(self._worker))))

    def say(self, words: Sequence[tuple[str, bytes]]) -> None:
        def publish(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=False)
            for api, body in words:
                pipe.publish(say_channel(api), body)
            pipe.execute()

        self._redis.call(publish)

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        return self._redis.call(lambda r: r.get(payload_key(self._worker, subtask, attempt)))  # type: ignore[no-any-return]

    def mark_running(self, running: Running | None) -> None:
        key = running_key(self._worker)
        if running is None:
            self._redis.call(lambda r: r.delete(key))
        else:
            self._redis.call(lambda r: r.set(key, running.encode(), ex=3600))

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        def send(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=True)
            pipe.xadd(OUTCOMES, {"s": subtask, "a": attempt, "m": outcome})
            pipe.delete(payload_key(self._worker, subtask, attempt))
            pipe.execute()

        self._redis.call(send)

    def probe(self, what: Literal["queue", "outcomes"]) -> int:
        """How many wait in its own queue, or on the stream of outcomes. For ``motet doctor``, which tries its rights."""
        if what == "queue":
            return int(self._redis.call(lambda r: r.llen(queue_name(self._worker))))
        return int(self._redis.call(lambda r: r.xlen(OUTCOMES)))


def _control(raw: bytes | None) -> Control | None:
    try:
        return Control.decode(raw) if raw else None
    except BadMessage:
        return None
