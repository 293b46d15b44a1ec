"""The processes below this one: what CPU they took, and that none of them is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None).prctl


@contextlib.contextmanager
def own_children() -> Iterator[None]:
    """Become the subreaper of all that is started from here on, and leave none of it behind, also after SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        evict(patience_s=0)


def end_with_parent() -> None:
    """Between fork and exec: SIGTERM when the parent is killed, so that the child still cleans up."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants() -> dict[tuple[int, int], float]:
    """All processes below this one, by id and start, with their own CPU seconds so far."""
    children: dict[int, list[int]] = {}
    found: dict[int, tuple[tuple[int, int], float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            spent = int(fields[11]) + int(fields[12])
            found[pid] = ((pid, int(fields[19])), spent / os.sysconf("SC_CLK_TCK"))
    below = [os.getpid()]
    for pid in below:
        below += children.get(pid, ())
    return dict(found[pid] for pid in below[1:])


def reaped_s() -> float:
    """CPU seconds of the descendants that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def evict(patience_s: float) -> None:
    """Wait until all descendants have ended, and kill them after ``patience_s``; none is left behind."""
    end = time.monotonic() + patience_s
    while descendants():
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() >= end:
            for pid, _ in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
