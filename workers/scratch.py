"""Folders for a while, which nobody has to tidy up after a process that was killed: the next one does."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "motet-scratch-"


def folder(kind: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, removed on leaving it, like those that ended processes of this user have left."""
    _tidy(Path(tempfile.gettempdir()))
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-{kind}-", ignore_cleanup_errors=True)


def _tidy(place: Path) -> None:
    with contextlib.suppress(OSError):
        for left in place.glob(f"{_PREFIX}*"):
            pid = left.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdigit() and left.stat().st_uid == os.getuid() and not _lives(int(pid)):
                shutil.rmtree(left, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
