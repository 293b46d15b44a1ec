"""Posting: one request to a stranger's server, bounded in all that it may take, over a connection to a checked address.

No client library: they follow redirects, take proxies from the environment, and look the name up a second time.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import lru_cache

import h11

from scheduler.webhooks.addresses import Destination, RefusedAddress, resolved_addresses, target

#: Seconds from the look-up of the name to the end of the answer. Longer: a silent receiver takes a place for longer.
#: Shorter: one that works before it answers is told again.
TIMEOUT_S = 10.0
#: Seconds for one of a host's addresses to take the connection, so that the next is tried in time.
_CONNECT_S = 4.0
#: Addresses of a host that are tried.
_MOST_ADDRESSES = 3
#: Bytes of an answer that are read; nothing is done with them.
MOST_REPLY_BYTES = 64 * 1024


class NotTaken(Exception):
    """A message that its receiver did not take: why, in words."""


async def post(
    url: str, headers: Mapping[str, str], body: bytes, *, allowed: frozenset[str] = frozenset(), ca: str = ""
) -> int:
    """Send it; the status of the answer, 200 to 299. Raises NotTaken, never anything else that the receiver can cause."""
    try:
        to = target(url, allowed)
        async with asyncio.timeout(TIMEOUT_S):
            status = await _status(to, _head(to, headers, body), body, ca)
    except RefusedAddress as refused:
        raise NotTaken(f"refused: {refused}") from None
    except TimeoutError:
        raise NotTaken(f"no answer in {TIMEOUT_S:.0f} s") from None
    except ssl.SSLCertVerificationError as error:
        raise NotTaken(f"its certificate is not trusted: {error.verify_message}") from None
    except ssl.SSLError:
        raise NotTaken("no TLS there") from None
    except (OSError, EOFError) as error:
        raise NotTaken(f"not reached: {type(error).__name__}") from None
    except h11.RemoteProtocolError:
        raise NotTaken("the answer was no HTTP") from None
    if 300 <= status < 400:
        raise NotTaken(f"status {status}; redirects are not followed")
    if not 200 <= status < 300:
        raise NotTaken(f"status {status}")
    return status


def _head(to: Destination, headers: Mapping[str, str], body: bytes) -> h11.Request:
    every = {
        "Host": to.host_header,
        "User-Agent": "motet-webhooks",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    return h11.Request(method="POST", target=to.path, headers=list(every.items()))


async def _status(to: Destination, head: h11.Request, body: bytes, ca: str) -> int:
    reader, writer = await _connection(to, ca)
    try:
        wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_REPLY_BYTES)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(wire.send(event) or b"")
        await writer.drain()
        return await _read(reader, wire)
    finally:
        # Not closed in order: a receiver may take its time to say goodbye.
        writer.transport.abort()


async def _connection(to: Destination, ca: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to one of the addresses that were checked; TLS and certificate are those of the name."""
    addresses = await resolved_addresses(to)
    trust = await asyncio.to_thread(_trust, ca) if to.tls else None
    last: Exception = OSError()
    for address in addresses[:_MOST_ADDRESSES]:
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await asyncio.open_connection(
                    address, to.port, ssl=trust, server_hostname=to.host if to.tls else None
                )
        except (OSError, TimeoutError) as error:
            last = error
    raise last


async def _read(reader: asyncio.StreamReader, wire: h11.Connection) -> int:
    status = taken = 0
    while True:
        match wire.next_event():
            case h11.NEED_DATA:
                raw = await reader.read(16 * 1024)
                taken += len(raw)
                if status and (taken > MOST_REPLY_BYTES or not raw):
                    return status
                if taken > MOST_REPLY_BYTES:
                    raise h11.RemoteProtocolError("an endless head")
                wire.receive_data(raw)
            case h11.Response(status_code=code):
                status = code
            case h11.EndOfMessage() | h11.ConnectionClosed():
                if not status:
                    raise EOFError
                return status


@lru_cache(4)
def _trust(ca: str) -> ssl.SSLContext:
    """Certificates that are trusted: the system's, and those in the file ``ca``."""
    trust = ssl.create_default_context()
    if ca:
        trust.load_verify_locations(cafile=ca)
    trust.set_alpn_protocols(["http/1.1"])
    return trust
