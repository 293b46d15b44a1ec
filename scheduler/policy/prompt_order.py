"""What a language model's prompt says first, and under what name its speed is learned. Pure.

Text first: the tasks of a row share the text's prefill. Instruction first: the rows of a task share the instruction's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from motet.tasks import Chat, Choose, Extract, Generate, Prompted, Task
from motet.templates import placeholders, resolved
from scheduler.policy.cost import PRIOR_BYTES_PER_TOKEN

#: UTF-8 bytes of a text, and of another task's answer, before anything is known of either.
PRIOR_TEXT_BYTES = 1000.0
ANSWER_BYTES = 60
#: The instruction comes first only where that saves this share of all tokens: else the text does, as people expect.
_WORTHWHILE = 0.05


def first_of(
    tasks: Sequence[Prompted], mean_bytes: Mapping[str, float], answers: frozenset[str]
) -> Literal["text", "instruction"]:
    """What stands in front in the prompts of tasks about one text: whatever saves more tokens.

    ``mean_bytes``: field -> UTF-8 bytes in a row. ``answers``: names that are other tasks.
    """
    text = template_bytes(tasks[0].about, mean_bytes, answers) / PRIOR_BYTES_PER_TOKEN
    instructions = [constant_bytes(instruction(task)) / PRIOR_BYTES_PER_TOKEN for task in tasks]
    # The system message comes before either: tasks with different ones have nothing in common behind it.
    by_system = Counter(task.system for task in tasks)
    saved_by_text = sum(n - 1 for n in by_system.values()) * text
    saved_by_instruction = sum(instructions)
    every_token = len(tasks) * text + sum(len(instruction(t).encode()) for t in tasks) / PRIOR_BYTES_PER_TOKEN
    if saved_by_instruction > max(saved_by_text, _WORTHWHILE * every_token):
        return "instruction"
    return "text"


def instruction(task: Prompted) -> str:
    """The template of what is asked about the text."""
    if isinstance(task, Choose):
        return task.question or (task.labels if isinstance(task.labels, str) else " ".join(task.labels))
    return task.prompt if isinstance(task, Generate | Extract) else ""


def template_bytes(template: str, mean_bytes: Mapping[str, float], answers: frozenset[str]) -> float:
    """UTF-8 bytes of a rendered template, about."""
    written = placeholders(template)
    own = len(template.encode()) - sum(len(one.encode()) + 2 for one in written)
    names = [resolved(one, answers).name for one in written]
    return own + sum(
        ANSWER_BYTES if name in answers else mean_bytes.get(name, PRIOR_TEXT_BYTES) for name in names
    )


def constant_bytes(template: str) -> int:
    """UTF-8 bytes of a template up to where rows begin to differ."""
    plain = template.replace("{{", "\0").replace("}}", "\0")
    return len(plain.partition("{")[0].encode())


def rate_key(trunk: str, tasks: Sequence[Task]) -> str:
    """The name under which the speed of such a pass is learned.

    What a row costs beside the tokens of its text depends on how much is asked and written. Sizes count by powers of
    two: so a new wording goes on from what was learned, and the names stay few.
    """
    shape = sorted(
        (
            task.kind,
            _power_of_two(getattr(task, "max_tokens", 0)),
            _power_of_two(len(instruction(task).encode())) if isinstance(task, Prompted) else 0,
            # Where rows bring their own labels nobody knows how many before.
            len(task.fixed_labels) if isinstance(task, Choose) else 0,
            # Thoughts are most of what is written; a task without them keeps the name that it had.
            *(["thinks"] if task.thinking and not isinstance(task, Choose) else []),
        )
        for task in tasks
        if isinstance(task, Generate | Chat | Choose | Extract)
    )
    return f"{trunk}:{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]}"


def _power_of_two(n: int) -> int:
    return (n - 1).bit_length() if n > 0 else -1
