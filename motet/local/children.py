"""Child processes that never outlive their parent: started, watched, stopped and always reaped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from motet.errors import SetupError

#: A log that has grown beyond this is set aside, as ``<name>.log.1``: see ``rotate``, and whenever its process starts.
LOG_BYTES = 8 * 1024 * 1024

#: Set in the environment of motet's processes, and so in that of all their descendants.
MARK = "MOTET_RUN"

_PR_SET_PDEATHSIG = 1
#: Looked up here because little may be done between fork and exec.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Child:
    """One supervised program. It can be started again after it ended.

    On Linux the kernel tells the child when this process dies, also by ``kill -9``; a child with children of its
    own passes that on by the same means. The kernel looks at the *thread* that called ``start``: let that be one
    which lasts as long as the child.
    Each child leads its own session, so Ctrl-C reaches only the parent, which then stops its children in order.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        feed: bytes = b"",
        farewell: signal.Signals = signal.SIGTERM,
        orphaned: signal.Signals | None = None,
    ) -> None:
        self.name = name
        self._command = [str(part) for part in command]
        self._env = env
        #: Takes stdout and stderr; None leaves them as they are here.
        self.log = log
        self._cwd = cwd
        #: The user id to run as, for root; None keeps the own one.
        self._user = user
        #: Written to stdin, for what must be neither in ``ps`` nor on disk.
        self._feed = feed
        #: Asks it to end.
        self._farewell = farewell
        #: The kernel's message to it when this process dies; the same unless given.
        self._orphaned = orphaned or farewell
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or before it was started; minus the signal's number if a signal ended it."""
        return self._process.poll() if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, keep: Sequence[int] = ()) -> None:
        """Start the program. Raises SetupError if it is missing or may not be run.

        ``keep``: file descriptors that it inherits, under the same numbers."""
        self.stop(0)
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(_open_log(self.log)) if self.log else None
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._env,
                    cwd=self._cwd,
                    stdin=subprocess.PIPE if self._feed else subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    user=self._user,
                    group=group_of(self._user),
                    extra_groups=no_groups(self._user),
                    preexec_fn=partial(follow, os.getpid(), self._orphaned) if _prctl else None,
                    pass_fds=keep,
                )
            except OSError as error:
                raise SetupError(f"{self.name}: cannot run {self._command[0]}: {error.strerror}") from None
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write(self._feed)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end and return the exit code, or None if it still runs after ``timeout_s``."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        return self.exit_code

    def stop(self, grace_s: float) -> None:
        """Ask it to end; after ``grace_s`` kill it and what is left of its process group. Harmless if it has ended."""
        if self._process is None:
            return
        if self.alive and grace_s > 0:
            self._process.send_signal(self._farewell)
            self.wait(grace_s)
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def tail(self, lines: int = 15) -> str:
        """The end of its log, for a message to the user."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16_384))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])


def follow(parent: int, orphaned: signal.Signals) -> None:
    """Have the kernel send us that signal when our parent dies. Linux only; a change of user would undo it."""
    if _prctl:
        _prctl(_PR_SET_PDEATHSIG, int(orphaned))
    if os.getppid() != parent:  # it died before the kernel knew our wish
        os._exit(1)


def rotate(log: Path) -> None:
    """Set a log that has grown beyond LOG_BYTES aside, as ``<name>.log.1``, while its process goes on writing to it.

    By copying and emptying, which is safe because logs are opened for appending; a line that comes in between is
    lost. Never raises: a full disk costs the copy, not the process.
    """
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            with contextlib.suppress(OSError):
                shutil.copyfile(log, f"{log}.1")
            os.truncate(log, 0)


def group_of(user: int | None) -> int | None:
    """The own group of a user, for ``subprocess``; None stays None."""
    return None if user is None else pwd.getpwuid(user).pw_gid


def no_groups(user: int | None) -> list[int] | None:
    """The further groups of a user other than ours, for ``subprocess``: none at all."""
    return None if user is None else []


def evict(find: Callable[[], set[int]], patience_s: float) -> None:
    """Wait until the processes that ``find`` names have ended; from ``patience_s`` on, kill them."""
    began = time.monotonic()
    while pids := find():
        waited = time.monotonic() - began
        if waited > patience_s + 10:
            raise SetupError(
                f"processes {sorted(pids)} of an earlier run do not end; end them, then start again"
            )
        for pid in pids if waited >= patience_s else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(mark: str) -> set[int]:
    """The processes that were started with ``MARK=mark``, and their descendants. Linux only."""
    wanted = f"{MARK}={mark}".encode()
    return _processes(lambda proc: wanted in (proc / "environ").read_bytes().split(b"\0"))


def working_in(folder: Path, program: str) -> set[int]:
    """The processes of ``program`` whose working directory is ``folder``. Linux only."""
    return _processes(
        lambda proc: (proc / "comm").read_text().strip() == program and (proc / "cwd").samefile(folder)
    )


def _processes(match: Callable[[Path], bool]) -> set[int]:
    found = set()
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if match(proc):
                found.add(int(proc.name))
    return found - {os.getpid()}


def _open_log(log: Path) -> BinaryIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(f"{log}.1")
    return log.open("ab")
