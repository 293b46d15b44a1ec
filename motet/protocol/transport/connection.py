"""Connections to Redis that never hang and have one error."""

from __future__ import annotations

from collections.abc import Callable
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

    def close(self) -> None:
        self.client.close()
