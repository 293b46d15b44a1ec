"""Whose turn it is, by facts alone: no clock, no I/O. Pure.

What somebody waits for interactively goes first, as long as the lane has not had its share (workers/run/lane.py); then rows
that run again to find the one at fault; then the oldest sub-task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from workers.run.stream import Suspects
from workers.run.work import Work


def next_turn(able: Sequence[Work], again: Sequence[Suspects], *, lane_open: bool) -> Work | Suspects | None:
    """Who has the next step, of sub-tasks that can go on, in the order of their arrival, and of rows that run again.

    While the lane is closed nothing interactive, but for a sub-task that a model was just loaded for.
    """
    for work in able:
        if work.interactive and (lane_open or work.loaded_for):
            return work
    for group in again:
        if lane_open or not group.interactive:
            return group
    return next((work for work in able if not work.interactive), None)


def to_prepare(
    staged: Iterable[Work], here: Callable[[Work], bool], whole: Callable[[Work], bool]
) -> Iterator[Work]:
    """The sub-tasks to tokenise now, of those whose files are here: from here on their models stay in memory.

    ``here``: its model is in memory; ``whole``: so are its heads. Not past an older one that waits for another model:
    else its room might never become free. A suspect is prepared at its turn, by itself.
    """
    blocked = False
    for work in staged:
        if whole(work) and not work.exclusive and (work.interactive or not blocked):
            yield work
        blocked = blocked or not here(work)
