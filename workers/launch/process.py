"""One worker's process as its launcher sees it: forked or started afresh, heard, watched, ended and reaped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence

from motet.local.children import Child
from workers.launch.forkserver import GO, ForkServer


class Process:
    """The process of one slot. It can be started again after it ended; it is our child, however it was started."""

    def __init__(
        self, name: str, command: Sequence[str], arguments: Sequence[str], env: Mapping[str, str]
    ) -> None:
        """``command``: runs a worker afresh, as the same ``arguments`` do in a fork."""
        self._name, self._command, self._arguments, self._env = name, command, arguments, env
        #: The program, where it was started afresh.
        self._child: Child | None = None
        self._pulse: socket.socket | None = None
        #: Asked of the fork server, and not heard of yet.
        self._awaited = False
        self._pid: int | None = None
        self._exit_code: int | None = None

    @property
    def pid(self) -> int | None:
        """None before it was started, and while a fork has not said that it exists."""
        return self._pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and where it never came to be; minus the signal's number if a signal ended it."""
        return self._exit_code

    @property
    def alive(self) -> bool:
        """Also takes note of its end. What it left behind of its own children is killed then."""
        if self._pid is None or self._exit_code is not None:
            return self._awaited
        if _ended(self._pid):
            # While it is a zombie its number belongs to nobody else.
            _kill_group(self._pid)
            self._exit_code = self._reap(self._pid)
        return self._exit_code is None

    def start(self, more: Sequence[str], forks: ForkServer | None) -> None:
        """Start it with ``more`` arguments. Raises SetupError where its program cannot be run."""
        if self._pulse:
            self._pulse.close()
        self._child, self._pid, self._exit_code = None, None, None
        self._pulse, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pulse.setblocking(False)
        with theirs:
            self._awaited = forks is not None and forks.fork([*self._arguments, *more], self._env, theirs)
            if not self._awaited:
                fd = theirs.fileno()
                command = [*self._command, *more, f"--pulse={fd}"]
                # Not SIGTERM: one that stands still would never take it.
                self._child = Child(self._name, command, env=self._env, orphaned=signal.SIGKILL)
                self._child.start(keep=[fd])
                self._pid = self._child.pid

    @property
    def line(self) -> int | None:
        """File descriptor that becomes readable when it says something; None where nothing will come."""
        return self._pulse.fileno() if self._pulse else None

    def listen(self) -> list[int]:
        """How long it may be silent, as it said in its pulses since the last look, in seconds; oldest first."""
        heard: list[int] = []
        while self._pulse:
            try:
                words = self._pulse.recv(64).split()
            except BlockingIOError:
                break
            except OSError:
                words = []
            match words:
                case [b"pid", number] if self._awaited:
                    self._take_on(int(number))
                case [b"alive", seconds]:
                    heard.append(int(seconds))
                case []:
                    self._hang_up()
        return heard

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it exists. SIGKILL goes to all of its group, and also ends what is not yet heard of."""
        if number == signal.SIGKILL and self._awaited:
            self._hang_up()
        if self._pid is None or self._exit_code is not None:
            return
        if number == signal.SIGKILL:
            _kill_group(self._pid)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def end(self) -> None:
        """Kill it if it still runs, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        while self.alive:
            assert self._pid
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)

    def _take_on(self, pid: int) -> None:
        self._awaited, self._pid = False, pid
        assert self._pulse
        with contextlib.suppress(OSError):
            self._pulse.send(GO)

    def _hang_up(self) -> None:
        """It has closed its end; or we will have nothing of it any more, and a fork that comes too late ends."""
        if self._pulse:
            self._pulse.close()
        self._pulse, self._awaited = None, False

    def _reap(self, pid: int) -> int | None:
        if self._child:
            return self._child.wait()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reap_strays(ours: Collection[int]) -> None:
    """Reap adopted processes that nobody waits for: children of workers that ended. ``ours`` are left to be asked."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in ours:
                return
            os.waitpid(ended.si_pid, 0)


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
