"""The heartbeat, which also hears the scheduler's control word, and the watchdog, which ends what hangs.

Liveness is progress, not a process id: a worker whose device hangs ends itself, and its launcher starts another.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from motet.distributions import installed
from motet.protocol.logs import event
from motet.protocol.transport import TransportLost, WorkerTransport
from motet.protocol.wire import Beat, Control
from workers.launch.pulse import LOADING_SILENCE_S, SILENCE_S
from workers.run.attempts import Attempts
from workers.run.device import Device
from workers.run.executor import Executor

log = logging.getLogger(__name__)

WATCH_S = 0.5
#: Between beats the control word is read so often, in seconds, while somebody waits for what is held. Longer: what a
#: caller gave up runs on. Shorter: each worker asks Redis more often.
LISTEN_S = 0.2
#: A leader that was replaced is silent by then: an older epoch's word that stands for so long is the true one, and the
#: higher number was never a leader's. Were it the last word of a replaced one, the new one would say its own again.
STANDS_S = 3.0


class Heart:
    """Says each second what this worker is and holds, and does what the newest control word says."""

    def __init__(
        self,
        *,
        worker: str,
        boot: str,
        device: Device,
        engines: tuple[str, ...],
        spreads: tuple[str, ...] = (),
        transport: WorkerTransport,
        attempts: Attempts,
        executor: Executor,
        consume: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``spreads``: those of the engines that use all GPUs of a group for one model. ``consume``: starts or stops
        taking messages from the queue.
        """
        self._worker, self._boot, self._device = worker, boot, device
        self._engines, self._spreads = engines, spreads
        self._transport, self._attempts, self._executor = transport, attempts, executor
        self._consume, self._clock = consume, clock
        #: "" where it runs from a bare folder.
        self._version = installed() or ""
        self._seq = 0
        #: Highest epoch of a leader heard of: an older one has been replaced and is not obeyed.
        self._epoch = -1
        #: The older epoch whose word stands now, and since when.
        self._older: tuple[int, float] | None = None
        self._told_to_drain = False
        self._leaving = False
        self._lost = False
        self._busy = (clock(), 0.0)

    def leave(self) -> None:
        """This process will end: from the next beat on it is draining."""
        self._leaving = True

    def step(self) -> None:
        """One beat. While Redis is away the scheduler hears nothing, and work goes on."""
        self._seq += 1
        try:
            control = self._transport.beat(self.beat())
        except TransportLost:
            if not self._lost:
                event(log, "redis lost", logging.WARNING)
            self._lost = True
            return
        if self._lost:
            event(log, "redis back")
        self._lost = False
        if control is not None:
            self.obey(control)

    def listen(self) -> None:
        """Do what the newest control word says, between two beats."""
        with suppress(TransportLost):
            if (control := self._transport.hear()) is not None:
                self.obey(control)

    def run(self, stopped: threading.Event, every_s: float) -> None:
        next_s = self._clock() + every_s
        while not stopped.wait(max(0.0, min(LISTEN_S, next_s - self._clock()))):
            if self._clock() >= next_s:
                next_s = self._clock() + every_s
                self.step()
            elif self._executor.waited_for():
                self.listen()

    def beat(self) -> Beat:
        """What is true now."""
        return Beat(
            worker=self._worker,
            boot=self._boot,
            seq=self._seq,
            version=self._version,
            host=socket.gethostname(),
            pid=os.getpid(),
            state="draining" if self._leaving or self._told_to_drain else "ready",
            device_kind=self._device.kind,
            device_name=self._device.name,
            memory_mb=self._device.memory_mb,
            memory_used_mb=self._device.memory_used_mb(),
            gpus=self._device.gpus,
            spreads=self._spreads,
            utilisation=self._utilisation(),
            formats=self._device.formats,
            engines=self._engines,
            resident=self._executor.resident(),
            backlog_s=round(self._executor.backlog_s(), 3),
            held=self._attempts.held(),
            left=self._attempts.left(),
            rows_done=self._executor.rows_done,
        )

    def obey(self, control: Control) -> None:
        """Do what a control word says, unless its leader has been replaced. Twice is harmless."""
        if control.epoch < self._epoch and not self._has_stood(control.epoch):
            return
        self._epoch, self._older = control.epoch, None
        self._executor.drop(self._attempts.drop(control.drop))
        if control.drain != self._told_to_drain:
            self._told_to_drain = control.drain
            event(log, "told to drain" if control.drain else "told to work again", epoch=control.epoch)
            self._consume(not control.drain)

    def _has_stood(self, epoch: int) -> bool:
        """Whether the word of an older epoch has stood for so long that no replaced leader can have said it."""
        if self._older is None or self._older[0] != epoch:
            self._older = (epoch, self._clock())
        return self._clock() - self._older[1] >= STANDS_S

    def _utilisation(self) -> float:
        """Busy share of the device since the last beat: the driver's word, or else the executor's."""
        (then, before), now, busy = self._busy, self._clock(), self._executor.busy_s()
        self._busy = (now, busy)
        measured = self._device.utilisation()
        if measured is not None:
            return round(measured, 3)
        return round(min(1.0, max(0.0, (busy - before) / (now - then))), 3) if now > then else 0.0


class Watchdog:
    """Ends the process when the device makes no progress, or when its launcher has died."""

    def __init__(
        self,
        executor: Executor,
        *,
        stuck: Callable[[], None],
        orphaned: Callable[[], None],
        parent: int = 0,
        pulse: Callable[[int], None] = lambda silence_s: None,
    ) -> None:
        """``parent``: the launcher's process id; 0 where nobody launched us. ``pulse``: tells it that we run, and
        how many seconds we may be silent from now."""
        self._executor = executor
        self._stuck, self._orphaned, self._parent, self._pulse = stuck, orphaned, parent, pulse

    def step(self) -> None:
        self._pulse(LOADING_SILENCE_S if self._executor.loading() else SILENCE_S)
        if self._parent and os.getppid() != self._parent:
            self._orphaned()
        if words := self._executor.stuck():
            event(log, "stuck", logging.ERROR, what=words)
            self._stuck()

    def run(self, stopped: threading.Event) -> None:
        while not stopped.wait(WATCH_S):
            self.step()
