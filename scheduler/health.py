"""Whether a process of the scheduler does its work, asked from beside it: ``python -m scheduler health dispatch``.

Each answer rests on what others see of the process, not on its own word, and not on a process id.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping

from motet.errors import MotetError
from motet.protocol.settings import Settings

#: An aggregator reads twice a second; one that commits a very large batch may take this long.
READ_S = 15.0
_API_S = 4.0


class Unwell(MotetError):
    """The process does not do its work. The words say what was seen."""


def check(process: str, settings: Settings) -> str:
    """What is well about ``process`` (api, dispatch, aggregate) of this host. Raises Unwell or SetupError."""
    return _CHECKS[process](settings)


def _api(settings: Settings) -> str:
    """Ready to serve: as ``/readyz``, from the API of this host."""
    host = "127.0.0.1" if settings.api_host in ("0.0.0.0", "::") else settings.api_host
    connection = http.client.HTTPConnection(host, settings.api_port, timeout=_API_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(4096)
    except (OSError, http.client.HTTPException) as error:
        raise Unwell(f"the API does not answer on port {settings.api_port}: {type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise Unwell(f"the API is not ready: {_message(body)}")
    return "the API is ready"


def _dispatch(settings: Settings) -> str:
    """Somebody leads: this dispatcher, or the one that it stands by for."""
    from scheduler.store.database import Database, StoreUnavailable
    from scheduler.store.registry import has_leader

    database = Database(settings.need("database_url").database_url, pool=1)
    try:
        with database.transaction() as connection:
            led = has_leader(connection)
    except StoreUnavailable as error:
        raise Unwell(f"Postgres does not answer: {error}") from None
    finally:
        database.close()
    if not led:
        raise Unwell("no dispatcher leads: the leader's lease has run out, and nobody took it")
    return "a dispatcher leads"


def _aggregate(settings: Settings) -> str:
    """The aggregator of this host asks for outcomes."""
    from motet.protocol.transport import RedisTransport, TransportLost

    transport = RedisTransport(settings.need("redis_url").redis_url)
    try:
        readers = transport.readers()
    except TransportLost as error:
        raise Unwell(f"Redis does not answer: {error}") from None
    finally:
        transport.close()
    host = socket.gethostname()
    silent_s = min((s for name, s in readers.items() if name.startswith(f"{host}:")), default=None)
    if silent_s is None:
        raise Unwell(f"no aggregator of {host} has ever asked for outcomes")
    if silent_s > READ_S:
        raise Unwell(f"the aggregator of {host} last asked for outcomes {silent_s:.0f} s ago")
    return f"the aggregator asked for outcomes {silent_s:.1f} s ago"


_CHECKS: Mapping[str, Callable[[Settings], str]] = {
    "api": _api,
    "dispatch": _dispatch,
    "aggregate": _aggregate,
}
#: What can be asked about.
PROCESSES = tuple(_CHECKS)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "it does not say why"
