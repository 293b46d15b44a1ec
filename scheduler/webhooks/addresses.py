"""Addresses of webhooks: where motet may connect to on a stranger's word.

A tenant's URL must not reach what only this machine can: the machine itself, its networks, the cloud's metadata. So the
host is looked up once, every address found must be a public one, and the connection goes to one of these very addresses.
An administrator allows hosts of the own network by name (MOTET_WEBHOOK_HOSTS).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

#: Characters of a URL.
MOST_CHARACTERS = 2000
#: Seconds that a name may take to be looked up.
_LOOK_UP_S = 5.0
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")

#: All of IPv4 that is no public host, by IANA's registry of special addresses.
_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # unspecified, "this network"
            "10.0.0.0/8",
            "100.64.0.0/10",  # carriers' networks; a cloud's metadata
            "127.0.0.0/8",
            "168.63.129.16/32",  # a cloud's own host, in public clothes
            "169.254.0.0/16",  # link-local; metadata at 169.254.169.254
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.31.196.0/24",
            "192.52.193.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
#: All public hosts of IPv6 are here, so that ::1, mapped and compatible IPv4, NAT64, link-local, unique-local (metadata at
#: fd00:ec2::254 too) and multicast are not.
_UNICAST_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # Teredo, benchmarks, ORCHID and other protocols
            "2001:db8::/32",
            "2002::/16",  # 6to4: an IPv4 address in it
            "2620:4f:8000::/48",
            "3fff::/20",
        ),
    )
)


class RefusedAddress(ValueError):
    """An address that motet does not connect to: what it is, in words."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL that was understood, and what is sent to its host."""

    tls: bool
    #: A name, or an address without brackets.
    host: str
    port: int
    #: Path and query, as they are sent.
    path: str
    #: An administrator allowed this host.
    allowed: bool

    @property
    def host_header(self) -> str:
        """The host as the header Host says it."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return shown if self.port == (443 if self.tls else 80) else f"{shown}:{self.port}"


def target(url: str, allowed: frozenset[str] = frozenset()) -> Destination:
    """Understand a webhook's URL. ``allowed``: hosts, or host:port, that an administrator allows. Raises RefusedAddress."""
    if len(url) > MOST_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise RefusedAddress(f"characters that no URL has, or more than {MOST_CHARACTERS:,} of them")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise RefusedAddress("no URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise RefusedAddress("no URL of the form https://host/path")
    if "@" in parts.netloc:
        raise RefusedAddress("a URL with a user or a password in it")
    if parts.fragment:
        raise RefusedAddress("a URL with a fragment (#)")
    host = _host(host)
    tls = parts.scheme == "https"
    port = (443 if tls else 80) if port is None else port
    if not port:
        raise RefusedAddress("port 0")
    known = not allowed.isdisjoint({host, f"{host}:{port}"})
    if not tls and not known:
        raise RefusedAddress("http without TLS")
    path = parts.path or "/"
    return Destination(tls, host, port, f"{path}?{parts.query}" if parts.query else path, known)


def _host(host: str) -> str:
    """A host that has one meaning everywhere: an address in its usual form, or a name. Raises RefusedAddress."""
    if "%" in host:
        raise RefusedAddress("an address with a zone, or a name with a %")
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    labels = host.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        # 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to some.
        raise RefusedAddress("an address in an odd form")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise RefusedAddress("no name of a host")
    return host


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host of the public internet."""
    found = ipaddress.ip_address(address)
    match found:
        case IPv4Address():
            return not any(found in network for network in _NOT_PUBLIC_4)
        case IPv6Address():
            return found in _UNICAST_6 and not any(found in network for network in _NOT_PUBLIC_6)


async def resolved_addresses(to: Destination) -> list[str]:
    """The addresses of a host, now: all of them public, or the host allowed. Raises RefusedAddress."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_LOOK_UP_S):
            found = await loop.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError):
        raise RefusedAddress("a host that is not found") from None
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    if not addresses:
        raise RefusedAddress("a host that is not found")
    # One address that is not public is enough: the name may be made to change between two looks.
    if not to.allowed and not all(map(is_public, addresses)):
        raise RefusedAddress("a host of a private or special network")
    return addresses
