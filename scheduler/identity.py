"""Who a process is, so that another one of the same machine can tell whether it is gone.

What a dead process held need not wait until its time has run out: the lead (dispatcher), entries that it read and
did not settle (aggregator). Only the kernel's word counts; of another machine or container nothing is known.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from pathlib import Path

_PROC = Path("/proc")


def own_name() -> str:
    """A name for this process: ``host:pid:machine-start-random``, never used twice."""
    pid = os.getpid()
    return f"{socket.gethostname()}:{pid}:{_machine()}-{_start(pid) or '?'}-{secrets.token_hex(3)}"


def is_gone(name: str) -> bool:
    """Whether the process of this name has certainly ended. False where that cannot be known from here."""
    try:
        _, pid, rest = name.rsplit(":", 2)
        machine, start, _ = rest.split("-")
        return machine == _machine() != "?" and start != "?" and _start(int(pid)) != start
    except (ValueError, OSError):
        return False


def _machine() -> str:
    """This boot of this kernel, and the set of processes that we see of it: a container's is its own. "?": unknown."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text()
        namespace = os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return "?"
    return hashlib.sha256(f"{boot}{namespace}".encode()).hexdigest()[:8]


def _start(pid: int) -> str | None:
    """When a process that can still do something began, in ticks since the boot; None where there is none."""
    try:
        state, *rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else rest[18]
