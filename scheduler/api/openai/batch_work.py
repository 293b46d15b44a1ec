"""Who brings batches further: two threads of each API process, each with one batch at a time.

A batch is owned for a while by whoever works on it. What a process leaves behind that was killed is taken over by another
one, or by itself when it is back, and done again from the last step that was committed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from motet.errors import Conflict, InvalidJob, Overloaded
from motet.protocol.transport import TransportLost
from scheduler.api.openai.batch_load import check_tasks, load
from scheduler.api.openai.batch_output import write_files
from scheduler.api.openai.lines import Find, TokenReaders, survey
from scheduler.api.openai.naming import decoder
from scheduler.api.refusals import Unavailable
from scheduler.api.resources import Resources
from scheduler.store.batches import NotMine, Owned, find_batch, take_batch
from scheduler.store.database import StoreUnavailable
from scheduler.store.doors import shut_idle_doors
from scheduler.store.files import expire_files
from scheduler.store.registry import Registered, find_models
from scheduler.store.tables.doors import BatchState

log = logging.getLogger(__name__)

#: Batches that a process works on at a time. One: a large file holds up the small ones behind it; more: requests wait.
BATCHES_AT_ONCE = 2
#: Seconds for which a batch is owned without a sign of its owner. Longer: after a crash it lies still for longer.
#: Shorter: an owner that was merely slow loses it, and the work is done twice.
_OWNED_S = 20.0
_SIGN_S = 5.0
#: How often a process looks for batches, in seconds; a new one is looked at at once by the process that took it.
_LOOK_S = 1.0
#: Seconds until a batch is tried again that no room was found for.
_AGAIN_S = 2.0
#: A batch that ended so many processes or attempts is given up.
_MOST_TRIES = 8
#: Open jobs behind doors are closed when nobody asked there for so long, and files that expired are forgotten.
DOOR_IDLE_S = 86_400.0
_TIDY_S = 60.0


class _Stopping(Exception):
    """The process is about to end."""


class BatchWorker:
    """Works on one batch at a time. ``step`` runs in a thread."""

    def __init__(self, use: Resources, owner: str | None = None) -> None:
        self._use = use
        self._owner = owner or secrets.token_hex(8)

    async def run(self) -> None:
        """For ever."""
        tidied = time.monotonic()
        while True:
            self._use.batch_waits.clear()
            try:
                busy = await asyncio.to_thread(self.step)
                if time.monotonic() - tidied > _TIDY_S:
                    tidied = time.monotonic()
                    await asyncio.to_thread(self.tidy)
            except StoreUnavailable:
                busy = False
            except Exception as error:
                log.error("working on batches failed", exc_info=error)
                busy = False
            if not busy:
                try:
                    await asyncio.wait_for(self._use.batch_waits.wait(), _LOOK_S)
                except TimeoutError:
                    continue

    def tidy(self) -> None:
        """Close doors that nobody uses, and forget files whose time is over."""
        with self._use.database.transaction() as connection:
            shut_idle_doors(connection, DOOR_IDLE_S)
        with self._use.database.transaction() as connection:
            expire_files(connection)

    def step(self) -> bool:
        """Bring one batch further. False: none waits. Raises StoreUnavailable."""
        with self._use.database.transaction() as connection:
            owned = take_batch(connection, self._owner, _OWNED_S)
        if owned is None:
            return False
        try:
            self._work(owned)
        except NotMine:
            pass
        except (_Stopping, Overloaded):
            with self._use.database.transaction() as connection:
                owned.leave(connection, _AGAIN_S)
        except (StoreUnavailable, TransportLost, Unavailable) as trouble:
            log.warning("batch waits", extra={"batch": owned.batch.id, "trouble": type(trouble).__name__})
        except Exception as error:
            log.error("batch failed", exc_info=error, extra={"batch": owned.batch.id})
        return True

    def _work(self, owned: Owned) -> None:
        batch = owned.batch
        if batch.tries > _MOST_TRIES:
            self._fail(
                owned, "internal", "the server failed on this batch again and again; its log says more"
            )
            return
        path = self._use.blobs.find(batch.input_sha256)
        if path is None:
            self._fail(owned, "file_not_found", "the file of this batch is gone")
            return
        find, reads = self._models(owned)
        goes_on = self._signs(owned)
        if batch.state == "validating" and (batch.job_state is None or batch.job_state == "loading"):
            self._load(owned, path, find, reads, goes_on)
        else:
            self._finish(owned, path, find, reads, goes_on)

    def _load(
        self, owned: Owned, path: Path, find: Find, reads: TokenReaders, goes_on: Callable[[], None]
    ) -> None:
        found = survey(
            path,
            find,
            reads,
            max_row_bytes=self._use.settings.max_row_bytes,
            max_tasks=self._use.settings.max_tasks,
            goes_on=goes_on,
            check_tasks=partial(check_tasks, self._use),
        )
        with self._use.database.transaction() as connection:
            if found.errors:
                owned.end(connection, "failed", errors=found.errors)
                return
            owned.checked(connection, found.lines, found.models, beside=any(found.kinds.values()))
        try:
            load(self._use, owned, path, found, find, reads, goes_on)
        except Conflict as conflict:
            # Its job was ended by someone, or by its deadline; or a model was removed.
            with self._use.database.transaction() as connection:
                now = find_batch(connection, owned.batch.tenant_id, owned.batch.id)
            if now.job_state is None:
                self._fail(owned, "conflict", str(conflict))
            else:
                self._finish(Owned(now, owned.owner), path, find, reads, goes_on)
        except InvalidJob as invalid:
            self._fail(owned, "invalid_value", str(invalid))

    def _finish(
        self, owned: Owned, path: Path, find: Find, reads: TokenReaders, goes_on: Callable[[], None]
    ) -> None:
        batch = owned.batch
        if not batch.lines:
            # Cancelled before its lines were known.
            with self._use.database.transaction() as connection:
                owned.end(connection, "cancelled" if batch.state == "cancelling" else "failed")
            return
        state = _final_state(owned)
        if batch.state in ("validating", "in_progress"):
            with self._use.database.transaction() as connection:
                owned.finalizing(connection)
                owned = Owned(find_batch(connection, batch.tenant_id, batch.id), owned.owner)
            goes_on = self._signs(owned)
        why = batch.job_reason or "its job is gone"
        errors = [_fault("job_failed", why)] if state == "failed" else None
        write_files(self._use, owned, path, find, reads, state, errors, goes_on)
        log.info("batch ended", extra={"batch": batch.id, "state": state, "lines": batch.lines})

    def _fail(self, owned: Owned, code: str, message: str) -> None:
        with self._use.database.transaction() as connection:
            owned.end(connection, "failed", errors=[_fault(code, message)])

    def _models(self, owned: Owned) -> tuple[Find, TokenReaders]:
        """Models by the names in lines, each looked up once; those that were fixed before stay what they are."""
        fixed = owned.batch.models or {}
        known: dict[str, Registered | None] = {}

        def find(name: str) -> Registered | None:
            if name not in known:
                ref = fixed.get(name, name)
                with self._use.database.transaction() as connection:
                    known[name] = find_models(connection, [ref]).get(ref) if len(name) <= 200 else None
            return known[name]

        def reads(model: Registered | None) -> Any:
            return decoder(self._use, None if model is None else model.manifest)

        return find, reads

    def _signs(self, owned: Owned) -> Callable[[], None]:
        """What is called while work goes on: says so to the others now and then."""
        said = time.monotonic()

        def goes_on() -> None:
            nonlocal said
            if self._use.bell.stopping:
                raise _Stopping
            if time.monotonic() - said > _SIGN_S:
                said = time.monotonic()
                with self._use.database.transaction() as connection:
                    owned.keep(connection, _OWNED_S)

        return goes_on


def _final_state(owned: Owned) -> BatchState:
    batch = owned.batch
    if batch.state == "cancelling" or batch.job_state == "cancelled":
        return "cancelled"
    if batch.job_state == "succeeded":
        return "completed"
    # The leader says so when it ends a job that is late (store/endings.py).
    return "expired" if (batch.job_reason or "").startswith("its deadline passed") else "failed"


def _fault(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": None}
