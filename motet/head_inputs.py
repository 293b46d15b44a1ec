"""What a head reads of a row: one text or several, and numbers beside them. Pure.

A head that was trained on more than one text, or on numbers, holds the templates and names in its manifest. A task
that says nothing else reads these; the client asks for them before it reads the rows, and the API before it plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from motet.errors import Problem
from motet.protocol.manifest import Manifest
from motet.tasks import Headed, Reading, Task
from motet.words import count

#: What a task says that says nothing of what it reads.
UNSAID = Reading.__dataclass_fields__["input"].default
_FLAGS = {"true": 1.0, "false": 0.0}


def number_in(text: str) -> float | None:
    """The number that a value's plain text is, true and false as 1 and 0; None of no text, as null has none.

    Raises ValueError where it is no finite number.
    """
    said = text.strip()
    if not said:
        return None
    number = _FLAGS[said] if said in _FLAGS else float(said)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def leaves_input_to_head(task: Task) -> bool:
    """Whether the head that answers it may say what it reads."""
    return isinstance(task, Headed) and (task.input == UNSAID or task.numbers is None)


def as_trained(task: Task, model: Manifest) -> Task:
    """The task with what its head was trained on, where it says nothing else."""
    if not isinstance(task, Headed) or not (model.inputs or model.numbers):
        return task
    return replace(
        task,
        input=model.inputs if task.input == UNSAID else task.input,
        numbers=model.numbers or None if task.numbers is None else task.numbers,
    )


def all_as_trained(tasks: Mapping[str, Task], models: Mapping[str, Manifest]) -> dict[str, Task]:
    """The tasks of a job. ``models``: by the names that tasks give them."""
    return {
        name: as_trained(task, models[task.model]) if task.model in models else task
        for name, task in tasks.items()
    }


def input_problems(name: str, task: Task, model: Manifest) -> list[Problem]:
    """What a task gives its model to read that this one does not read. ``task`` is ``as_trained``."""
    if not isinstance(task, Headed):
        return []
    problems = []
    texts, numbers = max(1, len(model.inputs)), len(model.numbers)
    remedy = (
        f"leave it out to read {_inputs_in_words(model)}"
        if model.inputs or model.numbers
        else "give one template"
    )
    if len(task.texts) != texts:
        got = f"{count(len(task.texts), 'text')} for {model.ref}, which reads {count(texts, 'text')}"
        problems.append(Problem(f"tasks.{name}.input", got, count(texts, "template"), remedy))
    if len(task.numbers or ()) != numbers:
        given = count(len(task.numbers or ()), "number")
        got = f"{given} for {model.ref}, which reads {count(numbers, 'number') if numbers else 'none'}"
        expected = count(numbers, "name") if numbers else "nothing"
        remedy = remedy if numbers else "leave it out, or train a head on numbers"
        problems.append(Problem(f"tasks.{name}.numbers", got, expected, remedy))
    return problems


def _inputs_in_words(model: Manifest) -> str:
    return " and ".join((*model.inputs, *model.numbers))
