"""Which fields of a job hold media: those that tasks of models which read pictures have as their whole input. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from motet.protocol.manifest import Manifest
from motet.tasks import Task
from motet.templates import resolved, sole_placeholder


def media_fields(tasks: Mapping[str, Task], models: Mapping[str, Manifest]) -> frozenset[str]:
    """The fields that must hold a medium. ``models``: by the name of the task; those that are not there read text."""
    found = set()
    for name, task in tasks.items():
        model = models.get(name)
        if model is not None and model.reads != "text":
            field = sole_placeholder(task.shared_input)
            if field is not None and field not in tasks:
                found.add(resolved(field, tasks).name)
    return frozenset(found)
