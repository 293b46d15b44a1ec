"""Callers who come together: what all of them want to know is looked up once."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from scheduler.api import auth
from scheduler.api.allowance import Allowance
from scheduler.api.auth import authenticated, new_token
from scheduler.api.bell import Bell
from scheduler.api.live import Feeds, ReadyWorkers
from scheduler.api.looks import Looks
from scheduler.api.resources import Recent
from scheduler.store.registry import StoredToken


class Slow:
    """A look that ends when the test lets it end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ends, self.times, self._error = threading.Event(), 0, error

    def __call__(self) -> int:
        self.times += 1
        assert self.ends.wait(5)
        if self._error is not None:
            raise self._error
        return self.times


async def _begun(slow: Slow) -> None:
    while not slow.times:
        await asyncio.sleep(0.001)


def test_all_who_come_while_it_is_looked_are_told_what_is_found_and_the_next_one_looks_anew() -> None:
    async def play() -> None:
        looks, slow = Looks[str, int](), Slow()
        asked = [asyncio.ensure_future(looks.at("a", slow)) for _ in range(20)]
        await _begun(slow)
        assert [looks.under_way(key) for key in "ab"] == [True, False]
        slow.ends.set()
        assert await asyncio.gather(*asked) == [1] * 20
        assert not looks.under_way("a")
        assert await looks.at("a", slow) == 2

    asyncio.run(play())


def test_the_first_who_goes_away_takes_the_look_from_nobody() -> None:
    async def play() -> None:
        looks, slow = Looks[str, int](), Slow()
        first, second = (asyncio.ensure_future(looks.at("a", slow)) for _ in range(2))
        await _begun(slow)
        first.cancel()
        await asyncio.wait({first})
        slow.ends.set()
        assert (first.cancelled(), await second) == (True, 1)

    asyncio.run(play())


def test_a_look_that_fails_says_so_to_all_and_is_forgotten() -> None:
    async def play() -> None:
        looks, slow = Looks[str, int](), Slow(KeyError("away"))
        slow.ends.set()
        found = await asyncio.gather(*(looks.at("a", slow) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in found] == [KeyError] * 3
        assert (slow.times, looks.under_way("a")) == (1, False)

    asyncio.run(play())


def test_callers_who_come_together_with_one_token_have_it_looked_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look for each of them is a thread and a connection to Postgres for each, before the first of them is served."""
    token, looked = new_token(), list[str]()
    stored = StoredToken(
        id=token.id, tenant=uuid.uuid4(), scope="user", secret_sha256=token.digest, revoked=False, expired=False
    )  # fmt: skip

    def find(_: object, id_: str) -> StoredToken | None:
        looked.append(id_)
        return stored if id_ == token.id else None

    @contextmanager
    def transaction() -> Iterator[None]:
        yield

    monkeypatch.setattr(auth, "find_token", find)
    use: Any = SimpleNamespace(
        database=SimpleNamespace(transaction=transaction),
        known_tokens=Recent(8),
        token_looks=Looks(),
        allowance=Allowance(0),
    )

    async def ask(shown: str) -> object:
        headers = [(b"authorization", f"Bearer {shown}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}}
        return await authenticated(Request(scope), use, auth.SUBMITS)

    async def play() -> None:
        identities = await asyncio.gather(*(ask(token.shown) for _ in range(32)))
        assert {one.tenant for one in identities} == {stored.tenant}  # type: ignore[attr-defined]
        # Who is told by another's look is held to the own secret.
        wrong = f"{token.id}.wrong"
        use.known_tokens.drop(token.id)
        good, bad = await asyncio.gather(ask(token.shown), ask(wrong), return_exceptions=True)
        assert (type(good).__name__, type(bad).__name__) == ("Identity", "Unauthorized")

    asyncio.run(play())
    assert looked == [token.id] * 2


def test_callers_who_come_together_have_their_job_read_once() -> None:
    async def play() -> None:
        nothing: Any = None
        feeds, read = Feeds(nothing, Bell("postgresql://nowhere"), ReadyWorkers), list[uuid.UUID]()

        def facts(tenant: uuid.UUID, job: uuid.UUID) -> Any:
            read.append(job)
            return SimpleNamespace(id=job, kinds=("label",)), ()

        feeds._facts = facts  # type: ignore[method-assign]
        tenant, job = uuid.uuid4(), uuid.uuid4()
        found = await asyncio.gather(*(feeds.of(tenant, job) for _ in range(32)))
        assert len({id(feed) for feed in found}) == 1
        assert read == [job]
        feeds.close()

    asyncio.run(play())
