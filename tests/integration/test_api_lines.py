"""Connections of a real server: too many, too slow, or never read. Nobody else notices, and who is refused is told when to come back."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from scheduler.api import line
from tests.integration.api_house import House, a_house, house

__all__ = ["house"]


@contextmanager
def connected(house: House) -> Iterator[socket.socket]:
    url = httpx.URL(house.url)
    with socket.create_connection((url.host, url.port or 0), timeout=10) as made:
        yield made


def is_established(one: socket.socket) -> bool:
    """Whether the other side has not hung up, as the kernel has it: nothing is read."""
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\1"


def read_to_end(one: socket.socket) -> bytes:
    found = b""
    try:
        while piece := one.recv(1 << 20):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_a_connection_too_many_is_told_when_to_come_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "most_connections", lambda: 3)
    house.call("GET", "/healthz")
    with connected(house), connected(house), connected(house) as one_more:
        time.sleep(0.05)
        one_more.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
        head, _, body = read_to_end(one_more).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 2" in head.lower()
        assert b"too many connections to this server; come back in a moment" in body
        assert house.call("GET", "/healthz").status_code == 200
    time.sleep(0.05)
    with connected(house) as again:
        again.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert read_to_end(again).startswith(b"HTTP/1.1 200 ")


def test_a_request_too_many_is_told_when_to_come_back_and_probes_pass(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = house.open()["id"]
    monkeypatch.setattr(line, "MAX_UNDER_WAY", 1)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(house.call, "GET", f"/v1/jobs/{job}", params={"wait_s": 0.6, "version": 1})
        time.sleep(0.2)
        refused = house.call("GET", f"/v1/jobs/{job}")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
        assert refused.headers["Retry-After"] == "2"
        assert house.call("GET", "/healthz").status_code == 200
        assert waiting.result(10).status_code == 200
    assert house.call("GET", f"/v1/jobs/{job}").status_code == 200


def test_who_never_reads_is_let_go_of_and_holds_nobody_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_READS_S", 0.3)
    raw = bytes(24 << 20)
    sha256 = hashlib.sha256(raw).hexdigest()
    assert house.call("PUT", f"/v1/blobs/{sha256}", token="admin", content=raw).status_code == 201
    with connected(house) as deaf:
        request = f"GET /v1/blobs/{sha256} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {house.tokens['admin']}\r\n\r\n"
        deaf.sendall(request.encode())
        until = time.monotonic() + 10
        while is_established(deaf) and time.monotonic() < until:
            assert house.call("GET", "/healthz").status_code == 200
        assert len(read_to_end(deaf)) < len(raw)


def test_half_a_request_is_not_waited_for_for_ever(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "KEEP_ALIVE_S", 0.4)
    with a_house(database_url, tmp_path) as house, connected(house) as silent, connected(house) as slow:
        began = time.monotonic()
        for byte in b"GET /healthz HT":
            slow.sendall(bytes([byte]))
            time.sleep(0.01)
        assert read_to_end(slow) == read_to_end(silent) == b""
        assert time.monotonic() - began < 2
