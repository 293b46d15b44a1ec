"""The launcher: one worker process per device, with mask and thread counts set before anything is imported.

A worker that dies is replaced at once, out of the fork server, and its death is told; one that stands still is
killed. SIGTERM is passed on and waited for; when the launcher itself is killed, the kernel tells its workers, and
they look for themselves too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from motet.errors import SetupError
from motet.local.places import Lock
from motet.protocol.logs import configure, event
from motet.protocol.settings import Settings, cache_folder
from workers.launch.forkserver import ForkServer
from workers.launch.herald import Herald, tell
from workers.launch.process import Process, reap_strays
from workers.launch.pulse import STARTING_SILENCE_S, Pulses

log = logging.getLogger(__name__)

#: A worker that lived shorter than this died right away: something is wrong that a restart does not mend.
QUICK_S = 10.0
BACK_OFF_S = (0.0, 0.5, 1.0, 2.0, 5.0)
#: A drained worker ends by itself; beyond its grace period it gets this long to say goodbye.
FAREWELL_S = 3.0
#: Between two looks at the workers, where nothing happens.
LOOK_S = 0.5
#: What telling of the last deaths may take, when the launcher ends.
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Slot:
    """One device of this host and the worker that will own it."""

    worker: str
    kind: Literal["cpu", "cuda"]
    #: CUDA_VISIBLE_DEVICES of the worker: "" hides all GPUs from a CPU slot.
    mask: str
    #: Threads of one matrix product.
    threads: int
    #: CPU slots of this launcher: they share the host's memory.
    slots: int


def plan_slots(
    *, host: str, cpus: int, gpus: str, visible: Sequence[str], cores: int, threads: int | None = None
) -> list[Slot]:
    """The workers to start: a worker per GPU or group of GPUs of ``gpus`` ("all", "0,1,2+3", ""), and ``cpus`` CPU slots.

    ``visible``: the GPUs that we may use ourselves, as a mask names them; ``gpus`` counts among them, as CUDA
    does. Cores are shared evenly, unless ``threads`` says how many each gets. Raises SetupError.
    """
    groups = _groups(gpus, len(visible))
    count = len(groups) + cpus
    if count == 0:
        raise SetupError("no device to work on; give --cpus N, or --gpus all on a machine with GPUs")
    each = threads or max(1, cores // count)
    name = worker_name(host)
    return [
        *(
            Slot(f"{name}-gpu{'-'.join(map(str, g))}", "cuda", ",".join(visible[i] for i in g), each, 1)
            for g in groups
        ),
        *(Slot(f"{name}-cpu{i}", "cpu", "", each, cpus) for i in range(cpus)),
    ]


def environment(slot: Slot, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a worker's process starts with; all of it must be there before torch is imported."""
    threads = str(slot.threads)
    return {
        **inherited,
        "CUDA_VISIBLE_DEVICES": slot.mask,
        # CUDA's numbers are then those of nvidia-smi and of NVML.
        "CUDA_DEVICE_ORDER": inherited.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Spinning threads beside busy neighbours cost a factor of ten to thirty (models.md 4e).
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use: the inherited mask, or else all that the driver knows."""
    mask = env.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        named = [part.strip() for part in mask.split(",") if part.strip()]
        # CUDA stops reading at the first entry that is no device, such as -1.
        end = next((i for i, part in enumerate(named) if part.startswith("-")), len(named))
        return named[:end]
    try:
        import pynvml

        pynvml.nvmlInit()
        return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # noqa: BLE001 - no library or no driver: no GPUs
        return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]


def worker_name(text: str) -> str:
    """A name that may be part of a Redis key, an ACL pattern and a Prometheus label: [a-z0-9-]. Raises SetupError."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    if not name:
        raise SetupError(f"worker name: got {text!r}; expected letters, digits and -; give one with --name")
    return name[:60]


def restart_delay_s(lived_s: float, quick_deaths: int) -> float:
    """Seconds to wait before the next start: none, unless the worker keeps dying right away."""
    return 0.0 if lived_s >= QUICK_S else BACK_OFF_S[min(quick_deaths, len(BACK_OFF_S) - 1)]


@dataclass(slots=True)
class _Charge:
    """One slot and its process."""

    slot: Slot
    process: Process
    lock: Lock
    #: Of its process, or else of the next one.
    boot: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float = 0.0
    #: When it is to be started; None while it runs.
    due: float | None = 0.0
    quick_deaths: int = 0


class Launcher:
    """Keeps one worker process per slot alive."""

    def __init__(
        self,
        slots: Sequence[Slot],
        settings: Settings,
        env: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        command: Callable[[Slot], Sequence[str]] | None = None,
        tell: Callable[[str, str], None] = lambda worker, boot: None,
        forks: ForkServer | None = None,
    ) -> None:
        """``tell``: says once to the scheduler that ``worker`` now is the process ``boot``. Raises TransportLost.
        ``forks``: starts workers; without it each is a program of its own."""
        self._grace_s, self._clock, self._forks = settings.grace_s, clock, forks
        locks = cache_folder(settings.cache_dir) / "names"
        locks.mkdir(parents=True, exist_ok=True)
        redis = hashlib.sha256(settings.redis_url.encode()).hexdigest()[:12]
        self._charges = [
            _Charge(
                slot,
                Process(slot.worker, (command or _command)(slot), _arguments(slot), environment(slot, env)),
                Lock(locks / f"{slot.worker}-{redis}"),
            )
            for slot in slots
        ]
        self._herald = Herald(tell)
        self._pulses = Pulses()
        self._stopping = False
        #: Becomes readable when a signal arrives.
        self._alarm, self._bell = socket.socketpair()

    def run(self) -> int:
        """Until SIGTERM or SIGINT: keep all workers alive. Then pass it on and wait. Returns 0."""
        self._take_names()
        for end in (self._alarm, self._bell):
            end.setblocking(False)
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # The bell rings only for signals that have a handler.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for charge in self._charges:
            # Whatever an earlier process of this name held is lost: its rows need not wait until we have imported.
            self._herald.announce(charge.slot.worker, charge.boot)
        while not self._stopping:
            self._wait(self.step())
        self._end()
        return 0

    def step(self) -> float:
        """Hear who lives, see who died, end who stands still, start what is due. Returns the seconds to the next look."""
        now = self._clock()
        for charge in self._charges:
            for silence_s in charge.process.listen():
                self._pulses.hear(charge.slot.worker, now, silence_s)
            if charge.due is None and not charge.process.alive:
                self._note_death(charge, now)
        silent = self._pulses.silent(now)
        for charge in self._charges:
            if charge.slot.worker in silent:
                event(log, "worker stands still", logging.ERROR, worker=charge.slot.worker)
                charge.process.signal(signal.SIGKILL)
            if charge.due is not None and charge.due <= now:
                self._start(charge, now)
        if self._forks:
            self._forks.step()
            reap_strays({pid for pid in (self._forks.pid, *(c.process.pid for c in self._charges)) if pid})
        return min((c.due - now for c in self._charges if c.due is not None), default=LOOK_S)

    def _start(self, charge: _Charge, now: float) -> None:
        charge.process.start([f"--boot={charge.boot}"], self._forks)
        charge.started, charge.due = now, None
        self._pulses.hear(charge.slot.worker, now, STARTING_SILENCE_S)
        event(log, "worker started", worker=charge.slot.worker, pid=charge.process.pid, mask=charge.slot.mask)

    def _note_death(self, charge: _Charge, now: float) -> None:
        lived_s = now - charge.started
        delay_s = restart_delay_s(lived_s, charge.quick_deaths)
        charge.quick_deaths = charge.quick_deaths + 1 if lived_s < QUICK_S else 0
        charge.due = now + delay_s
        self._tell_death(charge)
        event(
            log,
            "worker died",
            logging.WARNING,
            worker=charge.slot.worker,
            exit_code=charge.process.exit_code,
            lived_s=round(lived_s, 1),
            restart_s=delay_s,
        )

    def _tell_death(self, charge: _Charge) -> None:
        self._pulses.forget(charge.slot.worker)
        charge.boot = secrets.token_hex(8)
        self._herald.announce(charge.slot.worker, charge.boot)

    def _wait(self, seconds: float) -> None:
        """Until a signal arrives or a worker says something, but no longer."""
        lines: list[socket.socket | int] = [self._alarm]
        lines += [c.process.line for c in self._charges if c.process.line is not None]
        select.select(lines, [], [], max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            self._alarm.recv(4096)

    def _stop(self, number: int, frame: object) -> None:
        if self._stopping:
            # Asked twice: do not wait for anybody.
            self._grace_s = 0.0
        self._stopping = True

    def _end(self) -> None:
        event(log, "stopping", grace_s=self._grace_s)
        if self._forks:
            self._forks.stop()
        for charge in self._charges:
            charge.process.signal(signal.SIGTERM)
        began = self._clock()
        while any(c.process.alive for c in self._charges):
            if self._clock() - began > self._grace_s + (FAREWELL_S if self._grace_s else 0.0):
                break
            for charge in self._charges:
                charge.process.listen()
            self._wait(0.1)
        for charge in self._charges:
            if charge.process.alive:
                event(log, "worker killed", logging.WARNING, worker=charge.slot.worker)
            charge.process.end()
            if charge.process.exit_code:
                # It could not say goodbye.
                self._tell_death(charge)
            charge.lock.release()
        self._herald.finish(LAST_WORDS_S)

    def _take_names(self) -> None:
        """Two processes of one name would empty one queue together: refuse."""
        for charge in self._charges:
            try:
                charge.lock.take()
            except SetupError:
                raise SetupError(
                    f"a worker named {charge.slot.worker} already runs on this machine for the same Redis; "
                    "stop it, or choose another --name"
                ) from None


def launch(*, name: str | None, cpus: int | None, gpus: str | None, threads: int | None) -> int:
    """Start workers on this host and keep them alive until SIGTERM. Raises SetupError."""
    from workers.run.device import cores

    settings = Settings.from_env().need("redis_url", "token")
    configure("launcher", settings.log_level)
    visible = visible_gpus(os.environ)
    if cpus is None and gpus is None:
        gpus = "all"
    slots = plan_slots(
        host=name or socket.gethostname().split(".")[0],
        cpus=cpus or 0,
        gpus=gpus or "",
        visible=visible,
        cores=cores(),
        threads=threads,
    )
    # All slots have as many threads, and what else is one slot's own is set after the fork.
    forks = ForkServer(environment(slots[0], os.environ), [slot.worker for slot in slots])
    return Launcher(slots, settings, os.environ, tell=partial(tell, settings.redis_url), forks=forks).run()


def _groups(gpus: str, visible: int) -> list[tuple[int, ...]]:
    """ "0,2+3" -> [(0,), (2, 3)]; "all" -> each of them. Raises SetupError."""
    if gpus == "all":
        return [(i,) for i in range(visible)]
    if not gpus:
        return []
    expected = f"expected all, or numbers below {visible} such as 0,1,2+3 (+ joins GPUs to one device)"
    if not re.fullmatch(r"\d+(\+\d+)*(,\d+(\+\d+)*)*", gpus):
        raise SetupError(f"--gpus: got {gpus!r}; {expected}")
    groups = [tuple(int(i) for i in group.split("+")) for group in gpus.split(",")]
    flat = [i for group in groups for i in group]
    if len(set(flat)) < len(flat) or max(flat) >= visible:
        raise SetupError(f"--gpus: got {gpus!r}, with {visible} GPUs to be seen here; {expected}, each once")
    return groups


def _command(slot: Slot) -> list[str]:
    # -P: not from the current folder, which may hold another package of that name.
    return [sys.executable, "-P", "-m", "workers.run.app", *_arguments(slot)]


def _arguments(slot: Slot) -> list[str]:
    return [
        slot.worker,
        f"--device={slot.kind}",
        f"--slots={slot.slots}",
        f"--threads={slot.threads}",
        f"--parent={os.getpid()}",
    ]
