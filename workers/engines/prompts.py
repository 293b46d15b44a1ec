"""What a language model is told: the messages of a task, in the order in which most of them is shared. Pure.

Each message is a list of parts; a part is fixed where it is the same for every row of the task. Templates name fields
and are never code; a row's text is data, whatever it looks like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from motet.labels import LABEL_CHARACTERS, MOST_LABELS, labels_flaw
from motet.protocol.columns import CellError
from motet.templates import placeholders, render

#: Between text and instruction.
GAP = "\n\n"
#: What stands for the text where a label's likelihood without any text is asked for.
NOTHING = "N/A"
#: The labels that a row brought, beside the template that lists them.
OWN_LABELS = "own_labels"
#: What stands for the logarithm of nothing, which JSON cannot hold: as OpenAI tells it.
_NEVER = -9999.0
ROLES = ("system", "user", "assistant")
BAD_MESSAGES = CellError(
    "bad_messages",
    'the dialogue is no list of {"role": "user" | "assistant" | "system", "content": text}; expected one that ends '
    "with a user's message",
)


@dataclass(frozen=True, slots=True)
class TextRun:
    """A run of text within a message."""

    text: str
    #: The same for every row of its task.
    fixed: bool


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a dialogue."""

    role: str
    parts: tuple[TextRun, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class BadMessages(Exception):
    """A row's dialogue cannot be read."""


class BadLabels(Exception):
    """A row's own labels are none to choose from."""

    def __init__(self, listed: str, flaw: str) -> None:
        self.cell = CellError(
            "bad_labels",
            f"{listed} is {flaw}; expected a list of 1 to {MOST_LABELS:,} different texts of up to "
            f"{LABEL_CHARACTERS} characters; mend the row",
        )
        super().__init__(self.cell.message)


def row_spec(spec: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """A task's spec with what the row says of its options for itself, and its own labels. Raises BadLabels."""
    if isinstance(listed := spec.get("labels"), str):
        labels = json.loads(fields[listed])
        if flaw := labels_flaw(labels):
            raise BadLabels(listed, flaw)
        return {**spec, OWN_LABELS: labels}
    template = spec.get("options")
    if not template:
        return spec
    own: dict[str, Any] = json.loads(render(template, fields) or "{}")
    return {**spec, **own}


def counted(
    text: str, finish: str, spent: tuple[int, int, int], likelihoods: Sequence[Any] | None = None
) -> dict[str, Any]:
    """The answer of a task whose rows have options of their own. ``spent``: tokens of the prompt, of them cached ones,
    and tokens written. ``likelihoods``: of each token [its text, its logarithm, the likeliest ones there [[text, logarithm],
    …]]; None where they are not told."""
    told = {} if likelihoods is None else {"logprobs": list(likelihoods)}
    return {"text": text, "finish": finish, "usage": list(spent), **told}


def told_logp(logp: float) -> float:
    """The logarithm of a token's share as answers hold it."""
    return round(max(logp, _NEVER), 6)


def messages_of(spec: Mapping[str, Any], text: str, fields: Mapping[str, str]) -> list[Message]:
    """The messages of a task (``Task.to_json``) for one row, to be answered by the assistant.

    ``text``: its rendered shared input. ``fields``: what its other templates name. Raises BadMessages.
    """
    system = _parts(spec.get("system", ""), fields)
    said = [Message("system", system)] if system else []
    if spec["kind"] == "chat":
        turns = dialogue(text)
        return [*(said if turns[0].role != "system" else ()), *turns]
    about, instruction = (TextRun(text, False),), _parts(instruction_of(spec), fields)
    if spec.get(OWN_LABELS) and not spec.get("question"):
        instruction = tuple(replace(part, fixed=False) for part in instruction)
    gap = (TextRun(GAP, True),)
    if not instruction:
        order: tuple[TextRun, ...] = about
    elif spec.get("first") == "instruction":
        order = (*instruction, *gap, *about)
    else:
        order = (*about, *gap, *instruction)
    return [*said, Message("user", order)]


def labels_of(spec: Mapping[str, Any]) -> list[str]:
    """The labels to choose from: the row's own, or those of every row."""
    return list(spec.get(OWN_LABELS) or spec["labels"])


def instruction_of(spec: Mapping[str, Any]) -> str:
    """The template of what a task asks: its own words, or those that its kind brings along."""
    if spec["kind"] != "choose":
        return str(spec.get("prompt", ""))
    labels = labels_of(spec)
    words = f"{', '.join(labels[:-1])} or {labels[-1]}" if len(labels) > 1 else labels[0]
    asked = f"Which of these fits best: {words}? Answer with one of them."
    # Labels are no templates: their braces are theirs.
    return str(spec.get("question") or asked.replace("{", "{{").replace("}", "}}"))


def dialogue(raw: str) -> list[Message]:
    """Messages out of JSON, each with one part. Raises BadMessages."""
    try:
        turns = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadMessages from None
    if not isinstance(turns, list) or not turns:
        raise BadMessages
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise BadMessages
    if turns[-1]["role"] != "user":
        raise BadMessages
    return [Message(turn["role"], (TextRun(turn["content"], False),)) for turn in turns]


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat servers and chat templates take them."""
    return [{"role": message.role, "content": message.text} for message in messages]


def _parts(template: str, fields: Mapping[str, str]) -> tuple[TextRun, ...]:
    """A rendered template: what stands before its first name is the same for every row.

    A space before the name goes with it, since tokenizers make one token of a space and the word behind it.
    """
    names = placeholders(template)
    if not names:
        return (TextRun(render(template, fields), True),) if template else ()
    plain = template.replace("{{", "\0\0").replace("}}", "\0\0")
    head = template[: len(plain.partition("{")[0])].rstrip()
    rest = TextRun(render(template[len(head) :], fields), False)
    return (TextRun(render(head, fields), True), rest) if head else (rest,)
