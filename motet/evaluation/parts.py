"""A part of a JSON answer by its path, as in ``risk.score`` or ``films.best[0].id``. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from motet.errors import InvalidJob
from motet.tasks import short

#: Keys of objects and places in lists, from the outside inward; a negative place counts from the end.
PartPath: TypeAlias = "tuple[str | int, ...]"

_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?[0-9]{1,9})\]")
#: What a path leads to where there is nothing.
MISSING = object()


def task_and_path(name: str, tasks: Collection[str]) -> tuple[str, PartPath] | None:
    """The task that is named, and the way to the part of its answer; None where no task has this name.

    A task's name may hold dots: the longest that fits is meant. Raises InvalidJob for a path that is none.
    """
    fits = [task for task in tasks if name == task or (name.startswith(task) and name[len(task)] in ".[")]
    if not fits:
        return None
    task = max(fits, key=len)
    rest, at = name[len(task) :], 0
    path: list[str | int] = []
    while at < len(rest):
        step = _STEP.match(rest, at)
        if step is None:
            raise InvalidJob.of(
                f"tasks.{short(name)}",
                f"the path {short(rest)!r}",
                "keys and places",
                "as in .score or [0].id",
            )
        path.append(step[1] if step[1] is not None else int(step[2]))
        at = step.end()
    return task, tuple(path)


def part(value: Any, path: PartPath) -> Any:
    """What stands there in a JSON value, or MISSING."""
    for step in path:
        leads_on = isinstance(value, Mapping if isinstance(step, str) else list)
        if not leads_on:
            return MISSING
        try:
            value = value[step]
        except LookupError:
            return MISSING
    return value
