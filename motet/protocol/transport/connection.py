"""Connections to Redis that never hang and have one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport.contract import TransportLost

if TYPE_CHECKING:
    import redis


class RedisConnection:
    """A connection pool that turns every connection trouble into TransportLost."""

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._errors = (redis.RedisError, OSError)
        self._refusals = redis.ResponseError
        self.client: redis.Redis = redis.Redis.from_url(
            redis_py_url(url),
            # Without these a half-open connection hangs for ever (reference: reliability 0.4).
            socket_timeout=timeout_s,
            socket_connect_timeout=3,
            health_check_interval=5,
            retry=Retry(NoBackoff(), 1),
        )

    def call(self, act: Callable[[redis.Redis], Any]) -> Any:
        try:
            return act(self.client)
        except self._errors as error:
            raise TransportLost(type(error).__name__) from error

    def exchange(self, commands: Sequence[bytes]) -> list[Any]:
        """Commands as they are written on the wire, all in one round trip: an answer for each, also where it is an error.

        Where the connection breaks all are sent once more, so twice must be harmless. Raises TransportLost.
        """
        pool = self.client.connection_pool

        def send(_: redis.Redis) -> list[Any]:
            connection = pool.get_connection()
            try:
                return connection.retry.call_with_retry(
                    lambda: self._answers(connection, commands),
                    lambda _: connection.disconnect(),  # type: ignore[no-untyped-call]
                )
            finally:
                pool.release(connection)

        return self.call(send)  # type: ignore[no-any-return]

    def _answers(self, connection: Any, commands: Sequence[bytes]) -> list[Any]:
        connection.send_packed_command([b"".join(commands)])
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(connection.read_response())
            except self._refusals as error:
                answers.append(error)
        return answers

    def close(self) -> None:
        self.client.close()


def as_command(*words: bytes) -> bytes:
    """A command as it is written on the wire: redis-py takes five times as long, which counts at thousands a second."""
    return b"*%d\r\n%b" % (len(words), b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))
