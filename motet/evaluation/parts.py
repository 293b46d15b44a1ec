"""The task and the part of its answers that a name such as ``risk.score`` or ``films.best[0].id`` means. Pure."""

from __future__ import annotations

from collections.abc import Collection

from motet.errors import InvalidJob
from motet.tasks import short
from motet.templates import Selector, is_placeholder, resolved


def task_and_path(name: str, tasks: Collection[str]) -> tuple[str, tuple[Selector, ...]] | None:
    """The task that is named, and the way to the part of its answer, as in templates; None where no task has this name.

    Raises InvalidJob for a path that is none.
    """
    if name in tasks:
        return name, ()
    if is_placeholder(name) and (meant := resolved(name, tasks)).name in tasks:
        return meant.name, meant.steps
    if any(name.startswith((f"{task}.", f"{task}[")) for task in tasks):
        raise InvalidJob.of(
            "tasks",
            f"the path {short(name)!r}",
            "keys and places",
            "write them as in risk.score or films[0].id",
        )
    return None
