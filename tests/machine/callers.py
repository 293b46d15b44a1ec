"""Callers of open jobs, and two processes of the API that land their asks and tell them their answers.

A caller repeats its ask, under the same key, until it has been told; it believes what it is told first for ever.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import Conflict, NotFound, Problem
from motet.protocol.columns import OK, STATE_MASK, Column, cut
from scheduler.blocks import IncomingPart
from scheduler.merge import array_of
from scheduler.store import dropping, feeds, landing
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.feeds import LandedAsk, NewAsk
from scheduler.store.landing import LoadingJob
from tests.machine.stage import Broken, Crash, Stage

APIS = ("api0", "api1")
LANDING_FAULTS = ("crash before", "crash after", "away before", "away after")
#: What holds the lock of a job, and what waits for it meanwhile.
RACES = ("the same key", "other keys", "a key and a close", "a close and a key")
#: A transaction waits for a lock of another one after so many seconds at most, or it waits for none.
_WAITS_S = 2.0
_KEYS = text("SELECT job_id, key FROM ask")
_KEPT = text("SELECT job_id, number FROM block")
_WAITING = text("""
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'""")


@dataclass(eq=False)
class Asked:
    """One caller's rows under its key."""

    job: UUID
    key: bytes
    rows: tuple[str | Problem, ...]
    #: (block, place in it, first row of the block), as this caller was told first.
    place: tuple[int, int, int] | None = None
    #: (row among its own, task) -> the answer, as this caller was told first.
    answer: dict[tuple[int, str], Any] | None = None
    #: Its key stands for other rows, or the job takes none any more.
    refused: bool = False
    #: It may be given up: late, or abandoned. And it was: its key is free.
    drop: bool = False
    gone: bool = False

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(repr([r if isinstance(r, str) else r.got for r in self.rows]).encode()).digest()


@dataclass
class OpenJob:
    """An open job as its callers know it."""

    loading: LoadingJob
    tasks: tuple[str, ...]
    #: Somebody has asked that it be closed.
    closing: bool = False
    serial: int = 0
    #: (key, digest of rows) -> these rows.
    rows: dict[tuple[bytes, bytes], tuple[str | Problem, ...]] = field(default_factory=dict)


class Callers:
    """All callers of a play, at two processes of the API."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.jobs: dict[UUID, OpenJob] = {}
        self.asks: list[Asked] = []

    def opened(self, job: UUID, tasks: Sequence[str]) -> None:
        with self._stage.taps["machine"].transaction() as connection:
            tenant = connection.execute(
                text("SELECT tenant_id FROM job WHERE id = :job"), {"job": job}
            ).scalar_one()
            self.jobs[job] = OpenJob(landing.loading(connection, tenant, job), tuple(tasks))

    def forget(self, job: UUID) -> None:
        """It was deleted."""
        self.jobs.pop(job, None)
        self.asks = [a for a in self.asks if a.job != job]

    def forget_blocks(self, job: UUID, blocks: Collection[int]) -> None:
        """They are gone with their keys: whoever asks with one of these again asks anew."""
        self.asks = [a for a in self.asks if a.job != job or a.place is None or a.place[0] not in blocks]

    # -- moves

    def new(self, job: UUID, rows: int, special: int = 20, *, drop: bool = False) -> Asked:
        """A caller with 1 to 3 rows; of them one kills (``special`` odd) or came broken (even)."""
        there = self.jobs[job]
        texts: list[str | Problem] = []
        for i in range(rows % 3 + 1):
            serial, there.serial = there.serial, there.serial + 1
            words = f"o{serial:03d}{'x' * (serial * 7 % 23)}"
            if i == special // 2:
                texts.append(f"{words}!" if special % 2 else Problem("text", words, "text", "remove it"))
            else:
                texts.append(words)
        return self._known(Asked(job, f"{job}/{len(self.asks)}".encode(), tuple(texts), drop=drop))

    def other_rows(self, asked: Asked) -> Asked:
        """Another caller, that uses the key of this one for other rows."""
        other = self.new(asked.job, 0)
        other.key = asked.key
        return self._known(other)

    def again(self, asked: Asked) -> Asked:
        """The same rows under the same key, by another caller."""
        return self._known(Asked(asked.job, asked.key, asked.rows))

    def _known(self, asked: Asked) -> Asked:
        self.jobs[asked.job].rows[asked.key, asked.digest] = asked.rows
        if asked not in self.asks:
            self.asks.append(asked)
        return asked

    def land(self, api: str, asks: Sequence[Asked], fault: str = "", due_s: float | None = None) -> None:
        """As a process of the API lands them: again under the same keys, where nobody knows what became of it."""
        tap = self._stage.taps[api]
        tap.arm(0, fault)
        left = list(asks)
        try:
            while left:
                try:
                    with tap.transaction() as connection:
                        landed, stored = self._store(connection, left, due_s)
                except StoreUnavailable:
                    continue
                self._tell_places(left, landed)
                left = [] if stored else [a for a in left if a.key not in {one.key for one in landed}]
        except (Crash, NotFound):
            pass
        except Conflict:
            for asked in left:
                if self._place_of(asked.key) is not None:
                    raise Broken(f"13: key {asked.key!r} has landed, and is refused") from None
                asked.refused = True
        except Broken:
            raise
        except Exception as error:  # noqa: BLE001 - such as two rows of one number
            raise Broken(
                f"13: asks neither landed nor were refused: {type(error).__name__}: {error}"
            ) from None
        finally:
            tap.arm()

    def close(self, api: str, job: UUID, fault: str = "") -> None:
        there, tap = self.jobs[job], self._stage.taps[api]
        there.closing = True
        tap.arm(0, fault)
        try:
            with tap.transaction() as connection:
                landing.close_job(connection, there.loading.tenant, job)
        except (StoreUnavailable, Crash, NotFound):
            pass
        finally:
            tap.arm()

    def race(self, first: str, second: str, job: UUID, how: int) -> None:
        """Two at once: one does its work and has not committed yet, when the other one comes."""
        kind = RACES[how % len(RACES)]
        here = self.new(job, 0)
        there = self.again(here) if kind == "the same key" else self.new(job, 0)
        late: Callable[[], None] = lambda: self.land(second, [there])  # noqa: E731 - one of two
        if kind == "a key and a close":
            late = lambda: self.close(second, job)  # noqa: E731
        landed: list[LandedAsk] = []
        self._stage.taps[first].arm()
        try:
            with self._stage.taps[first].transaction() as connection:
                if kind == "a close and a key":
                    self.jobs[job].closing = True
                    landing.close_job(connection, self.jobs[job].loading.tenant, job)
                else:
                    landed, _ = self._store(connection, [here])
                wait = _Meanwhile(late, self._stage.taps["machine"])
        except (Conflict, NotFound):
            here.refused = True
            late()
            return
        wait.end()
        self._tell_places([here], landed)

    def _store(
        self, connection: Connection, asks: Sequence[Asked], due_s: float | None = None
    ) -> tuple[list[LandedAsk], bool]:
        loading = self.jobs[asks[0].job].loading
        new = [NewAsk(key=a.key, digest=a.digest, n_rows=len(a.rows)) for a in asks]
        part = _part(loading, [r for a in asks for r in a.rows])
        return feeds.land_asks(connection, loading, part, new, due_s=due_s)

    def _tell_places(self, asks: Sequence[Asked], landed: Sequence[LandedAsk]) -> None:
        by_key = {one.key: one for one in landed}
        for asked in asks:
            one = by_key.get(asked.key)
            if one is None:
                continue
            if one.digest != asked.digest:
                asked.refused = True
                continue
            place = (one.block, one.lo, one.first_row)
            if (before := self._place_of(asked.key)) not in (None, place):
                raise Broken(f"13: key {asked.key!r} stood at {before}, and stands at {place}")
            asked.place = place

    def _place_of(self, key: bytes) -> tuple[int, int, int] | None:
        return next((a.place for a in self.asks if a.key == key and a.place and not a.gone), None)

    # -- giving up

    def abandon(self, api: str, asked: Asked, fault: str = "") -> None:
        """A process of the API gives up the block of an ask. Twice is harmless."""
        assert asked.place is not None
        tap = self._stage.taps[api]
        tap.arm(0, fault)
        try:
            with tap.transaction() as connection:
                dropping.abandon(connection, asked.job, [asked.place[0]])
        except (StoreUnavailable, Crash):
            pass
        finally:
            tap.arm()

    def note_gone(self) -> None:
        """See whose keys are free by now: only what may be given up loses its key."""
        with self._stage.taps["machine"].transaction() as connection:
            known = {(job, bytes(key)) for job, key in connection.execute(_KEYS)}
            kept = {(job, number) for job, number in connection.execute(_KEPT)}
        droppable = {(a.job, a.place) for a in self.asks if a.drop}
        for asked in self.asks:
            if asked.place is None or asked.gone or asked.refused or (asked.job, asked.key) in known:
                continue
            if (asked.job, asked.place[0]) not in kept:
                continue  # it went from the front
            if (asked.job, asked.place) not in droppable:
                raise Broken(f"13: key {asked.key!r} is free, and nobody gave it up")
            asked.gone = True

    # -- answers

    def listen(self, api: str) -> None:
        """Tell all callers whose block is answered."""
        waiting = [a for a in self.asks if a.place is not None and a.answer is None]
        for job in sorted({a.job for a in waiting}):
            mine = [a for a in waiting if a.job == job]
            with self._stage.taps[api].transaction() as connection:
                found = feeds.look(connection, job, sorted({a.place[0] for a in mine if a.place}))
            for asked in mine:
                assert asked.place is not None
                block, lo, _ = asked.place
                if block in found.answered:
                    self._tell(asked, found.answered[block], lo)

    def _tell(self, asked: Asked, columns: Any, lo: int) -> None:
        names = self.jobs[asked.job].tasks
        asked.answer = {
            (i, names[number]): answer
            for number, column in columns.items()
            for i, answer in enumerate(answers_of(cut(column, lo, lo + len(asked.rows))))
        }
        lacking = {(i, task) for i in range(len(asked.rows)) for task in names} - asked.answer.keys()
        if lacking:
            raise Broken(f"15: key {asked.key!r} was answered without {sorted(lacking)}")
        same = [a for a in self.asks if a.key == asked.key and a.place == asked.place]
        told = [a.answer for a in same if a.answer is not None]
        if any(answer != asked.answer for answer in told):
            raise Broken(f"15: key {asked.key!r} was answered by {told}")


class _Meanwhile:
    """Something that another process does: begun, and waiting for a lock or over, when this is made."""

    def __init__(self, work: Callable[[], None], database: Database) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until = time.monotonic() + _WAITS_S
        while self._thread.is_alive() and time.monotonic() < until:
            with database.transaction() as connection:
                if connection.execute(_WAITING).scalar_one():
                    break
            time.sleep(0.001)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again by ``end``
            self._error = error

    def end(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _part(loading: LoadingJob, rows: Sequence[str | Problem]) -> IncomingPart:
    values = {"text": lambda r: r, "who": who_of, "amount": amount_of}
    return IncomingPart(
        columns={
            name: ["" if isinstance(r, Problem) else values[name](r) for r in rows] for name in loading.asked
        },
        bad={i: ("bad_row", r.got) for i, r in enumerate(rows) if isinstance(r, Problem)},
    )


def who_of(words: str) -> str:
    """Whose row of a job with state it is: of one of two, two serial numbers each."""
    return "ab"[int(words[1:4]) // 2 % 2]


def amount_of(words: str) -> int:
    return len(words)


def answers_of(column: Column) -> list[Any]:
    """Of each row its code, or the class of its error."""
    codes = array_of(column, "codes").tolist()
    return [codes[i] if s & STATE_MASK == OK else column.errors[i].error for i, s in enumerate(column.status)]
