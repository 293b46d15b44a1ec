"""Rows are made ready away from the device's thread, while it runs others: tokenised once, in order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from motet.protocol.columns import CellError
from motet.protocol.logs import event
from workers.engine import DeviceBroken, Engine, OutOfMemory, Pass, Prepared
from workers.run.media import given
from workers.run.stream import Stream
from workers.run.work import ModelKey, Work

log = logging.getLogger(__name__)

NO_MEMORY = CellError("out_of_memory", "there was no memory to prepare this row", retriable=True)
NO_DEVICE = CellError("engine", "the device was lost", retriable=True)


class Preparing:
    """The attempts that are prepared now, and the quiet that a suspect of killing its process needs beside it."""

    def __init__(
        self,
        changed: threading.Condition,
        spawn: Callable[[Callable[[], None], bool], object],
        stream_for: Callable[[Work], Stream | None],
        ready: Callable[[Work, Sequence[Prepared | CellError]], None],
        broken: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stream_for``: where an attempt's rows will go, asked under ``changed``; None where nobody waits any more.
        ``ready``: takes the rows, under no lock. ``broken``: the device is lost."""
        self._changed, self._spawn, self._stream_for, self._ready = changed, spawn, stream_for, ready
        self._broken, self._clock = broken, clock
        #: Since when each of them is prepared.
        self._under_way: dict[Work, float] = {}
        self._quiet = False

    def soon(self, works: Iterable[Work]) -> None:
        """Prepare these on other threads; bulk does not go before what somebody waits for."""
        for work in works:
            self._spawn(partial(self._prepare_beside, work), work.interactive)

    def now(self, work: Work) -> None:
        """Prepare a suspect on this thread, with nothing beside it."""
        with self.nothing_beside():
            self._prepare(work)

    def models(self) -> set[ModelKey]:
        """Those that rows are prepared for now. Under the lock."""
        return {work.model for work in self._under_way}

    def longest_s(self) -> float:
        """How long one has been prepared already. Any thread may ask."""
        began = list(self._under_way.values())
        return self._clock() - min(began) if began else 0.0

    @contextmanager
    def nothing_beside(self) -> Iterator[None]:
        """Nothing is prepared meanwhile: a death inside is the fault of what runs inside."""
        with self._changed:
            self._quiet = True
            self._changed.wait_for(lambda: not self._under_way)
        try:
            yield
        finally:
            with self._changed:
                self._quiet = False
                self._changed.notify_all()

    def _prepare_beside(self, work: Work) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._quiet)
            self._under_way[work] = self._clock()
        try:
            self._prepare(work)
        finally:
            with self._changed:
                del self._under_way[work]
                self._changed.notify_all()

    def _prepare(self, work: Work) -> None:
        with self._changed:
            stream = self._stream_for(work)
        if stream is not None:
            rows = self._prepared(work, stream)
            # An engine has taken what it needs of them.
            work.media = {}
            self._ready(work, rows)

    def _prepared(self, work: Work, stream: Stream) -> Sequence[Prepared | CellError]:
        order = work.order
        work.pass_ = pass_ = Pass(
            stream.handle,
            work.tasks,
            work.key.max_tokens,
            order.fields,
            order.indices,
            order.tenant,
            order.lease,
            deltas=bool(order.say),
            values=order.values,
        )
        values = given(order.values, work.media)
        lost = {i: value for i, value in enumerate(values) if isinstance(value, CellError)}
        if not lost:
            return self._asked(stream.engine, replace(pass_, values=values), order.texts)
        kept = [i for i in range(len(order.texts)) if i not in lost]
        rows = self._asked(
            stream.engine, _of_rows(replace(pass_, values=values), kept), [order.texts[i] for i in kept]
        )
        moved = {i: _moved(row, i) for i, row in zip(kept, rows, strict=True)}
        return [lost[i] if i in lost else moved[i] for i in range(len(order.texts))]

    def _asked(self, engine: Engine, pass_: Pass, texts: Sequence[str]) -> Sequence[Prepared | CellError]:
        """The rows as the engine prepares them, together or else one by one."""
        if not texts:
            return []
        try:
            return _together(engine, pass_, texts)
        except DeviceBroken:
            self._broken()
        except Exception as error:  # noqa: BLE001 - a stranger's engine, or a tokenizer's panic
            event(log, "preparing failed", logging.WARNING, error=type(error).__name__)
            try:
                return [_alone(engine, pass_, row, text) for row, text in enumerate(texts)]
            except DeviceBroken:
                self._broken()
        return [NO_DEVICE] * len(texts)


def _together(engine: Engine, pass_: Pass, texts: Sequence[str]) -> Sequence[Prepared | CellError]:
    try:
        rows = engine.prepare(pass_, texts)
    except (KeyboardInterrupt, SystemExit, OutOfMemory, DeviceBroken):
        raise
    except BaseException as error:  # noqa: BLE001
        # A panic in Rust is a BaseException; it is no reason to end.
        raise RuntimeError(type(error).__name__) from None
    if len(rows) != len(texts):
        raise ValueError(f"{len(rows)} rows prepared of {len(texts)}")
    if not all(map(_in_place, rows, range(len(texts)))):
        raise ValueError("rows prepared under other rows' numbers")
    return rows


def _in_place(row: Any, place: int) -> bool:
    if isinstance(row, Prepared):
        return row.row == place and isinstance(row.length, int) and row.length >= 0
    return isinstance(row, CellError)


def _alone(engine: Engine, pass_: Pass, row: int, text: str) -> Prepared | CellError:
    try:
        (prepared,) = _together(engine, _of_rows(pass_, [row]), [text])
    except DeviceBroken:
        raise
    except OutOfMemory:
        return NO_MEMORY
    except Exception as error:  # noqa: BLE001 - this row is the one at fault
        return CellError("engine", type(error).__name__)
    return _moved(prepared, row)


def _of_rows(pass_: Pass, rows: Sequence[int]) -> Pass:
    """The pass with what these rows bring along, in this order."""
    return replace(
        pass_,
        fields={name: [column[i] for i in rows] for name, column in pass_.fields.items()},
        indices=[pass_.indices[i] for i in rows] if pass_.indices else (),
        values=[pass_.values[i] for i in rows] if pass_.values else (),
    )


def _moved(row: Prepared | CellError, place: int) -> Prepared | CellError:
    return replace(row, row=place) if isinstance(row, Prepared) else row
