"""The fork server: a process that has imported what every worker needs, so that a worker starts by forking it.

Importing torch, transformers and Celery takes ten seconds; a fork takes some milliseconds, and its pages are shared.
The server does nothing else: it starts no thread, touches no GPU and knows no Redis, so that a copy of it is as good
as a fresh process. What it forks is adopted by the launcher, which watches it like a child that it started itself;
the server's own death harms no worker. See docs/decisions/0008.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.local.children import MARK, Child, follow
from motet.protocol.imports import importing_for_good
from motet.protocol.logs import configure, event

log = logging.getLogger("workers.launch.forkserver")

#: Why a server ended: it holds what must not be copied.
EXIT_UNSAFE = 75
#: Servers that ended by themselves soon after their start, until this launcher does without.
DEATHS, SOON_S = 3, 60.0
#: How long a fork waits to be adopted and let go; afterwards its launcher is gone or has given it up.
ADOPTION_S = 10.0
#: The launcher's word that a fork which said its process id may live.
GO = b"go"
#: Longest request: the environment of a worker.
_REQUEST_BYTES = 1 << 20
_PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """The launcher's side: one server, started again when it dies, and given up where it cannot work."""

    def __init__(self, env: Mapping[str, str], workers: Sequence[str]) -> None:
        """``env``: a worker's environment. ``workers``: names for the command line, for people who read ``ps``."""
        self._env = server_environment(env)
        self._workers = workers
        self._child: Child | None = None
        self._control: socket.socket | None = None
        self._started = 0.0
        self._deaths = 0
        self.usable = adopt_orphans()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def step(self) -> None:
        """Have it running, so that it is warm when it is needed."""
        if not self.usable or (self._child and self._child.alive):
            return
        if self._child:
            lived_s = time.monotonic() - self._started
            self._deaths = self._deaths + 1 if lived_s < SOON_S else 1
            self.usable = self._child.exit_code != EXIT_UNSAFE and self._deaths < DEATHS
            event(
                log,
                "fork server died",
                logging.WARNING,
                exit_code=self._child.exit_code,
                usable=self.usable,
            )
        if self.usable:
            self._start()

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], pulse: socket.socket) -> bool:
        """Ask for a worker, which says on ``pulse`` that it exists. False where it must be started without us."""
        self.step()
        if not self.usable or not self._control:
            return False
        request = json.dumps({"arguments": list(arguments), "env": dict(env)}).encode()
        try:
            socket.send_fds(self._control, [request], [pulse.fileno()])
        except OSError as error:
            event(log, "fork server out of reach", logging.WARNING, error=type(error).__name__)
            return False
        return True

    def stop(self) -> None:
        if self._control:
            self._control.close()
        if self._child:
            self._child.stop(0)

    def _start(self) -> None:
        if self._control:
            self._control.close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(1.0)
        # Each request is one packet.
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST_BYTES)
        with theirs:
            command = [sys.executable, "-P", "-m", "workers.launch.forkserver"]
            command += [str(os.getpid()), str(theirs.fileno()), *self._workers]
            self._child = Child("forkserver", command, env=self._env, orphaned=signal.SIGKILL)
            self._child.start(keep=[theirs.fileno()])
        self._started = time.monotonic()
        event(log, "fork server started", pid=self._child.pid)


def server_environment(env: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment without what is one worker's own or secret, and with what keeps the server copyable."""
    ours = {name: value for name, value in env.items() if not name.startswith("MOTET_") or name == MARK}
    return {
        **ours,
        # numpy's BLAS would start threads when it is imported; torch brings its own.
        "OPENBLAS_NUM_THREADS": "1",
        # Asking whether there is a GPU must not initialise CUDA, which a copy could not use.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def adopt_orphans() -> bool:
    """Make grandchildren whose parent ends this process' children. False where the system cannot."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


# -- from here on in the server's own process


def main(launcher: int, control_fd: int) -> int:
    """Import, then fork a worker for each request that comes on the file descriptor, until the launcher closes its end.

    ``launcher``: its process id. In a worker: its whole life.
    """
    configure("forkserver", "INFO")
    # What was imported stays for ever: collecting it would only copy its pages into every worker.
    with importing_for_good():
        preload()
    if why := uncopyable():
        event(log, "fork server cannot be copied", logging.WARNING, why=why)
        return EXIT_UNSAFE
    event(log, "fork server ready", pid=os.getpid())
    with socket.socket(fileno=control_fd) as control:
        control.set_inheritable(False)
        while True:
            request, fds, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 1)
            if not request:
                return 0
            pulse = socket.socket(fileno=fds[0])
            if _is_worker():
                break
            pulse.close()
    return _live(json.loads(request), pulse, launcher)


def preload() -> None:
    """Import what a worker needs in any case. Never what strangers wrote: their modules may start threads."""
    import celery.app.amqp
    import celery.bin
    import celery.concurrency.thread
    import celery.worker.components
    import celery.worker.consumer  # noqa: F401

    import workers.run.app
    import workers.run.celery_transport  # noqa: F401
    from workers.engines import InstalledEngines

    InstalledEngines().preload()


def uncopyable() -> str:
    """Why this process must not be forked; empty where it may."""
    if len(os.listdir("/proc/self/task")) > 1:
        return "it has threads"
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            # CUDA alone opens it; NVML, which may be copied, does not.
            if str(fd.readlink()).startswith("/dev/nvidia-uvm"):
                return "it has initialised CUDA"
    return ""


def _is_worker() -> bool:
    """Fork twice, so that the launcher adopts what comes of it. True in the new process."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return False
    if os.fork():
        os._exit(0)
    return True


def _live(request: Mapping[str, Any], pulse: socket.socket, launcher: int) -> int:
    """A worker's life, after its launcher has adopted it and let it go."""
    from workers.run import app

    os.setsid()
    give_up = time.monotonic() + ADOPTION_S
    while os.getppid() != launcher:
        if time.monotonic() > give_up:
            return 1
        time.sleep(0.001)
    follow(launcher, signal.SIGKILL)
    pulse.settimeout(ADOPTION_S)
    pulse.send(b"pid %d" % os.getpid())
    if pulse.recv(16) != GO:
        return 1
    os.environ.clear()
    os.environ.update(request["env"])
    show_as("motet", "workers.run.app", *request["arguments"])
    return int(app.main.main([*request["arguments"], f"--pulse={pulse.detach()}"], standalone_mode=False))


def show_as(*words: str) -> None:
    """What ``ps`` shows of this process; as much of it as there was room for the words that it was started with."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        start, end = int(fields[45]), int(fields[46])
        line = b"".join(word.encode() + b"\0" for word in words)[: end - start - 1]
        ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
