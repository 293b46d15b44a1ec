"""LISTEN: processes that hear what transactions have told when they committed. It is a hint only."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

import psycopg

from scheduler.store.database import EVENTS, JOB, WORK, Database
from scheduler.store.words import EVERYTHING, SILENCE, Words, heard


@dataclass
class Listener:
    """Waits for words, on a connection of its own. While the connection is lost words are missed, and that is said."""

    database: Database
    _connection: psycopg.Connection[tuple[object, ...]] | None = None

    def wait(self, timeout_s: float) -> Words:
        """What was said since the last time; at most ``timeout_s`` is waited for it."""
        try:
            if self._connection is None:
                self._connection = psycopg.connect(
                    self.database.libpq_url, autocommit=True, connect_timeout=3
                )
                self._connection.execute(f"LISTEN {WORK}")
                # What was said before we listened is not repeated.
                return EVERYTHING
            return heard(note.payload for note in self._connection.notifies(timeout=timeout_s, stop_after=1))
        except (psycopg.Error, OSError):
            self.close()
            time.sleep(min(timeout_s, 0.5))
            return SILENCE

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def job_changes(libpq_url: str) -> AsyncIterator[UUID | None]:
    """Ids of jobs as they change, for ever; None once, when listening has begun. Raises psycopg.Error.

    The connection is its own: LISTEN belongs to a session.
    """
    async with aclosing(_payloads(libpq_url, JOB, "motet-watch")) as payloads:
        async for payload in payloads:
            try:
                yield None if payload is None else UUID(payload)
            except ValueError:
                continue


async def event_hints(libpq_url: str) -> AsyncIterator[None]:
    """One for each time that events were written, and one when listening has begun. Raises psycopg.Error."""
    async with aclosing(_payloads(libpq_url, EVENTS, "motet-webhooks")) as payloads:
        async for _ in payloads:
            yield None


async def _payloads(libpq_url: str, channel: str, name: str) -> AsyncGenerator[str | None, None]:
    """What is said on a channel, for ever; None once, when listening has begun. ``name``: the connection's, in Postgres."""
    connection = await psycopg.AsyncConnection.connect(
        libpq_url, autocommit=True, connect_timeout=3, application_name=name
    )
    async with connection:
        await connection.execute(f"LISTEN {channel}")
        yield None
        async for note in connection.notifies():
            yield note.payload
