"""Tasks beside a chat: which may be asked there, and what they are called where several sets of them stand in one job. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from motet import conditions, templates
from motet.errors import InvalidJob
from motet.head_inputs import all_as_trained
from motet.protocol.manifest import Manifest
from motet.tasks import Choose, Function, Headed, Task, parse
from motet.templates import resolved
from scheduler.api.openai.checks import wrong
from scheduler.api.openai.refusals import DoorError

#: Name of the task that answers, and the field that tasks beside it read.
ANSWER, TEXT = "answer", "text"
_MOST_TASKS = 16


def asked_tasks(body: Mapping[str, Any], taken: Collection[str]) -> dict[str, Task]:
    """Tasks that are asked beside the chat. ``taken``: names of fields that no task may have.

    Raises DoorError that names the option.
    """
    if body.get("tasks") is None:
        return {}
    try:
        tasks = parse(body["tasks"])
    except InvalidJob as error:
        [first, *_] = error.problems
        raise DoorError(str(error), param=first.field, code="invalid_value") from None
    taken = {ANSWER, TEXT, *taken}
    if len(tasks) > _MOST_TASKS or tasks.keys() & taken:
        named = ", ".join(sorted(taken))
        raise wrong("tasks", body["tasks"], f"up to {_MOST_TASKS} tasks, none of them named {named}")
    _check_reads(tasks, body["tasks"])
    return tasks


def _check_reads(tasks: Mapping[str, Task], written: Mapping[str, Any]) -> None:
    """Raises DoorError for a task that reads what is not there."""
    for name, task in tasks.items():
        # A task's own name means a field.
        known = {ANSWER, TEXT, *tasks} - {name}
        if task.kind == "fit" or set(task.reads(name, {ANSWER, *tasks})) - known:
            expected = f"a task about {{{TEXT}}} (the last message), {{{ANSWER}}} or another task's answer"
            raise wrong(f"tasks.{name}", written[name], expected)


def key_of(tasks: Mapping[str, Task]) -> str:
    """Equal for the same tasks, in whatever order they are written; "" for none."""
    told = {name: task.to_json() for name, task in tasks.items()}
    return json.dumps(told, sort_keys=True) if told else ""


def with_versions(tasks: Mapping[str, Task], models: Mapping[str, Manifest]) -> dict[str, Task]:
    """The tasks with ``name@version`` for each model that they name, and with what their heads were trained to read.

    Those that are not in ``models`` stay as they are. Raises DoorError for a head that was trained on what is not there.
    """
    fixed: dict[str, Task] = {}
    for name, task in all_as_trained(tasks, models).items():
        if task.model in models:
            task = replace(task, model=models[task.model].ref)
        if isinstance(task, Function) and task.artefact and task.artefact in models:
            task = replace(task, artefact=models[task.artefact].ref)
        fixed[name] = task
    _check_reads(fixed, {name: task.to_json() for name, task in fixed.items()})
    return fixed


def is_given_names(tasks: Mapping[str, Task]) -> bool:
    """A function among them is given others' answers by name: then these names must stay."""
    names = {ANSWER, *tasks}
    return any(
        isinstance(task, Function)
        and any(resolved(one, names - {name}).name in names - {name} for one in task.valued)
        for name, task in tasks.items()
    )


def renamed(name: str, task: Task, names: Mapping[str, str]) -> Task:
    """The task of this name, with the new names of the others that it reads. ``names``: old name -> new name."""
    others = {old: new for old, new in names.items() if old != name}

    def change(written: str) -> str:
        meant = resolved(written, others).name
        return others[meant] + written[len(meant) :] if meant in others else written

    return replace(task, **_texts_of(task, change))


def _texts_of(task: Task, change: Callable[[str], str]) -> dict[str, Any]:
    """What of a task names fields and answers, each changed."""
    changed: dict[str, Any] = {}
    for option in task.templates:
        told = getattr(task, option)
        changed[option] = (
            tuple(templates.with_names(one, change) for one in told)
            if isinstance(told, tuple)
            else templates.with_names(told, change)
        )
    if isinstance(task, Headed) and task.numbers:
        changed["numbers"] = tuple(map(change, task.numbers))
    if isinstance(task, Choose) and isinstance(task.labels, str):
        changed["labels"] = templates.with_names(task.labels, change)
    if isinstance(task, Function) and task.inputs:
        changed["inputs"] = tuple(map(change, task.inputs))
    if task.when:
        changed["when"] = conditions.with_names(task.when, change)
    return changed
