"""What a forked child must not use of its parent's: connections, threads, locks. They are forgotten right after the fork."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class OfOneProcess(Protocol):
    """A thing that a child may keep, once it has forgotten what belongs to the process that it was forked from."""

    def leave_to_parent(self) -> None:
        """Forget it, without a word to whoever is at its other end."""


#: All such things of this process, as long as they live.
_HERE: weakref.WeakSet[OfOneProcess] = weakref.WeakSet()


def forget_after_fork(thing: OfOneProcess) -> None:
    """Have this thing leave to the parent what is the parent's, in each child that is forked from now on."""
    _HERE.add(thing)


def _leave_all_to_parent() -> None:
    for thing in _HERE:
        thing.leave_to_parent()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_leave_all_to_parent)
