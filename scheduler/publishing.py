"""Publishing: payloads of leased sub-tasks are built, packed and sent. Where steps are full, by a process of its own.

That process, `python -m scheduler publish`, is the leader's child: it decides nothing, reads Postgres and writes Redis,
while the leader leases the next sub-tasks. Orders and answers go over one socket as msgpack, each behind its length; it
ends where the socket does, also when the leader was killed. What it may have sent is sent again: twice is harmless.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from motet.protocol import traces
from motet.protocol.transport import SchedulerTransport, TransportLost
from scheduler.payloads import Payloads
from scheduler.policy.carve import Carved, Range
from scheduler.store.database import StoreUnavailable
from scheduler.store.leases import Leased

log = logging.getLogger(__name__)

#: Sub-tasks whose payloads are built before they are sent. More: more texts are in memory at once.
_BUILT_AT_ONCE = 64
#: Seconds that the leader waits for an answer. Longer: a process that is frozen costs it the lead. Shorter: what waits for
#: Redis is sent twice.
_PATIENCE_S = 3.0
#: Seconds for a process whose line was closed to end by itself, before it is killed.
_LAST_S = 0.5
#: Seconds from the start of a process that died to the next one's: one that cannot live must not keep a core busy.
_AGAIN_S = 10.0
_LENGTH_BYTES = 4
_ERRORS = {error.__name__: error for error in (TransportLost, StoreUnavailable)}


def publish(transport: SchedulerTransport, payloads: Payloads, leased: Sequence[Leased]) -> None:
    """Send these sub-tasks to their workers. Raises TransportLost and StoreUnavailable."""
    for some in (leased[i : i + _BUILT_AT_ONCE] for i in range(0, len(leased), _BUILT_AT_ONCE)):
        began = time.time()
        transport.publish_all(payloads.assignments(some))
        for item in some:
            _trace_sent(item, began)


def _trace_sent(item: Leased, began: float) -> None:
    traces.add(
        item.job,
        traces.SEND,
        began,
        subtask=item.subtask,
        attempt=item.attempt,
        pass_number=item.pass_number,
        worker=item.worker,
        rows=item.carved.rows,
        bytes=item.carved.bytes,
        predicted_s=item.predicted_s,
    )


class Publisher:
    """The leader's side of the process. One order is under way at a time."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """``settings``: of its environment, beside those of ours."""
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._ready = False
        self._started_at = float("-inf")
        self._under_way: Sequence[Leased] = ()

    def want(self, now: float) -> None:
        """Start the process, unless it runs or has died a moment ago. Nobody waits until it is ready."""
        if self._process is None and now >= self._started_at + _AGAIN_S:
            self._started_at = now
            self._line, theirs = socket.socketpair()
            self._line.settimeout(_PATIENCE_S)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "scheduler", "publish"],
                    stdin=theirs.fileno(),
                    env={**os.environ, **self._settings},
                )

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return None if self._process is None else self._process.pid

    def begin(self, leased: Sequence[Leased]) -> bool:
        """Have these sent. False: the process is not there, or not ready. Nothing else may be under way."""
        if not self._is_ready():
            return False
        assert not self._under_way, "an order is under way"
        assert self._line is not None
        try:
            tell(self._line, [_written(item) for item in leased])
        except OSError:
            self.close()
            return False
        self._under_way = leased
        return True

    def end(self) -> Sequence[Leased]:
        """Wait for the order that is under way. Those of which nobody knows whether they were sent, for the process died.

        Raises TransportLost and StoreUnavailable where it met them.
        """
        leased, self._under_way = self._under_way, ()
        if not leased:
            return ()
        assert self._line is not None
        try:
            error = hear(self._line)
        except OSError:
            self.close()
            return leased
        if error:
            raise _ERRORS[error]("as told by the process that publishes")
        return ()

    def close(self) -> None:
        """End the process. What is under way may be sent or not."""
        process, self._process, line, self._line = self._process, None, self._line, None
        self._ready, self._under_way = False, ()
        if line is not None:
            line.close()
        if process is not None:
            try:
                process.wait(_LAST_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.info("the process that publishes has ended", extra={"status": process.returncode})

    def _is_ready(self) -> bool:
        if not self._ready and self._line is not None and select.select([self._line], [], [], 0.0)[0]:
            try:
                hear(self._line)
                self._ready = True
            except OSError:
                self.close()
        return self._ready


def serve(line: socket.socket, transport: SchedulerTransport, payloads: Payloads) -> None:
    """Publish what is ordered, until the leader closes the line or is gone."""
    tell(line, "")
    while True:
        try:
            order = hear(line)
        except OSError:
            return
        error = ""
        try:
            publish(transport, payloads, [_read(item) for item in order])
        except (TransportLost, StoreUnavailable) as trouble:
            error = type(trouble).__name__
        try:
            tell(line, error)
        except OSError:
            return


def tell(line: socket.socket, message: object) -> None:
    """One message. Raises OSError."""
    body = msgpack.packb(message)
    line.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)


def hear(line: socket.socket) -> Any:
    """The next message. Raises OSError, also where the line was closed."""
    return msgpack.unpackb(_exactly(line, int.from_bytes(_exactly(line, _LENGTH_BYTES), "big")))


def _exactly(line: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = line.recv(min(size, 1 << 18))
        if not part:
            raise ConnectionResetError("the line was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _written(item: Leased) -> list[Any]:
    """What publishing reads of a leased sub-task."""
    c = item.carved
    return [
        item.subtask,
        item.attempt,
        item.nonce,
        item.worker,
        item.job,
        item.pass_number,
        item.predicted_s,
        item.measured,
        [(r.block, r.lo, r.hi, r.bytes) for r in c.ranges],
        c.todo,
        c.exclusive,
    ]


def _read(item: Sequence[Any]) -> Leased:
    subtask, attempt, nonce, worker, job, pass_number, predicted_s, measured, ranges, todo, exclusive = item
    return Leased(
        subtask=subtask,
        attempt=attempt,
        nonce=nonce,
        worker=worker,
        job=job,
        pass_number=pass_number,
        carved=Carved(ranges=tuple(Range(*r) for r in ranges), todo=todo, exclusive=exclusive),
        predicted_s=predicted_s,
        measured=measured,
    )
