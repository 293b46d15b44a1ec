"""Templates: text in which ``{name}`` stands for a field of the row or another task's answer. Stdlib only.

``{name}`` may go on to a part: ``{event.kind}`` of an answer that is an object, ``{topic.score}`` of a label,
``{who[0]}`` of a list, ``{messages[-7:]}`` of a dialogue, ``{customer[city]}`` of a field that is an object. A part that
is not there is no text. ``{{`` and ``}}`` are braces. Only names are replaced: no attributes, no formats, no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from motet.protocol.values import Value, plain_text

#: What names a field or a task. Dots belong to it: whether ``a.b`` is a name or a part of ``a`` is said by ``resolved``.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
#: What a template is cut at: doubled braces and placeholders.
_PARTS = re.compile(r"(\{\{|\}\}|\{[^{}]*\})")
_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_.-]{0,63})(?P<steps>(?:\[[^\[\]]+\]|\.[A-Za-z_][A-Za-z0-9_-]*)*)\Z"
)
_STEP = re.compile(r"\[(?P<inside>[^\[\]]+)\]|\.(?P<key>[A-Za-z_][A-Za-z0-9_-]*)")
_INDEX = re.compile(r"-?\d{1,9}\Z")
_SLICE = re.compile(r"(?P<first>-?\d{1,9})?:(?P<last>-?\d{1,9})?\Z")

#: A key of an object, a place in a list (negative: from its end), or [first, last) of a list.
Selector: TypeAlias = "str | int | slice"


@dataclass(frozen=True, slots=True)
class Reference:
    """What a placeholder means: all of a field or an answer, or a part of it."""

    name: str
    steps: tuple[Selector, ...] = ()


def placeholders(template: str) -> tuple[str, ...]:
    """What stands between braces in a template, in order of first use. ``{{`` and ``}}`` are literal braces."""
    return tuple(dict.fromkeys(uses(template)))


def uses(template: str) -> list[str]:
    """The same placeholders, each as often as it stands there."""
    return _PLACEHOLDER.findall(template.replace("{{", "").replace("}}", ""))


def sole_placeholder(template: str) -> str | None:
    """The placeholder that is the whole of a template: its values may go without a text. None where there is more."""
    whole = _PLACEHOLDER.fullmatch(template)
    return whole[1] if whole else None


def is_well_formed(text: str) -> bool:
    """Every brace belongs to a placeholder that can be read, or is doubled."""
    bare = _PLACEHOLDER.sub("", text.replace("{{", "").replace("}}", ""))
    return "{" not in bare and "}" not in bare and all(is_placeholder(one) for one in placeholders(text))


def is_placeholder(written: str) -> bool:
    """A name, or a part of what has one."""
    found = _REFERENCE.match(written)
    return found is not None and all(
        step["inside"] is None
        or _INDEX.match(step["inside"])
        or _SLICE.match(step["inside"])
        or NAME.match(step["inside"])
        for step in _STEP.finditer(found["steps"])
    )


def resolved(written: str, answers: Collection[str]) -> Reference:
    """What a placeholder means where these names are other tasks' answers.

    Of a dotted name the longest beginning that is such a task is the answer, and the rest a part of it; where none is,
    the whole name is a field's.
    """
    name, steps = _parsed(written)
    if name in answers or not answers:
        return Reference(name, steps)
    head, keys = name, list[str]()
    while "." in head:
        head, _, key = head.rpartition(".")
        keys.insert(0, key)
        if head in answers and all(keys):
            return Reference(head, (*keys, *steps))
    return Reference(name, steps)


@lru_cache(1024)
def _parsed(written: str) -> tuple[str, tuple[Selector, ...]]:
    """A placeholder that ``is_placeholder`` as its name and what follows it."""
    found = _REFERENCE.match(written)
    if found is None:
        # A name from before parts could be named, or an empty one: itself.
        return written, ()
    return found["name"], tuple(_step(one) for one in _STEP.finditer(found["steps"]))


def _step(found: re.Match[str]) -> Selector:
    if found["key"] is not None:
        return found["key"]
    inside = found["inside"]
    if _INDEX.match(inside):
        return int(inside)
    if between := _SLICE.match(inside):
        first, last = between["first"], between["last"]
        return slice(None if first is None else int(first), None if last is None else int(last))
    return inside


def part_of(value: Any, steps: tuple[Selector, ...]) -> Any:
    """The part of a value that the steps lead to; None where there is none.

    A dialogue that a chat reads too is stored as the JSON of its messages: it is read as the list that it is.
    """
    for step in steps:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, Mapping) else None
            continue
        if isinstance(value, str):
            value = _list_in(value)
        if not isinstance(value, list):
            return None
        if isinstance(step, slice):
            value = value[step]
        else:
            value = value[step] if -len(value) <= step < len(value) else None
    return value


def _list_in(text: str) -> Any:
    try:
        return json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return None


def text_of(value: Any) -> str:
    """The text that stands for a value or a part of one: as ``plain_text``, and messages a line each: ``user: …``."""
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return "\n".join([f"{one['role']}: {one['content']}" for one in value])
    if _is_message(value):
        return f"{value['role']}: {value['content']}"
    return plain_text(value)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and isinstance(value["role"], str)
        and isinstance(value["content"], str)
    )


def render(template: str, row: Mapping[str, Value]) -> str:
    """Fill a template: ``row`` holds the value of each placeholder, as it is written. Raises KeyError where it lacks one.

    A row's text is data: braces inside it are never looked at again.
    """
    if template == "{text}":
        return plain_text(row["text"])
    return "".join([plain_text(row[piece]) if is_name else piece for piece, is_name in _pieces(template)])


def with_names(template: str, change: Callable[[str], str]) -> str:
    """The same template with what ``change`` makes of each placeholder between its braces."""
    return "".join(
        f"{{{change(piece[1:-1])}}}" if _PLACEHOLDER.fullmatch(piece) else piece
        for piece in _PARTS.split(template)
    )


@lru_cache(256)
def _pieces(template: str) -> tuple[tuple[str, bool], ...]:
    """A template as literal texts and placeholders, in order; True stands beside a placeholder."""
    parts = _PARTS.split(template)
    return tuple(
        (p[0], False)
        if p in ("{{", "}}")
        else (p[1:-1], True)
        if len(p) > 1 and p[0] == "{" and p[-1] == "}"
        else (p, False)
        for p in parts
    )


def filled(template: str, row: Mapping[str, Any], answers: Collection[str] = ()) -> str:
    """``render`` of a row by field and answer: parts are taken from their values. Raises KeyError as it does."""
    if template == "{text}":
        return plain_text(row["text"])
    return render(template, {one: _text_in(one, row, answers) for one in placeholders(template)})


def _text_in(written: str, row: Mapping[str, Any], answers: Collection[str]) -> str:
    value = value_in(written, row, answers)
    return text_of(value) if resolved(written, answers).steps else plain_text(value)


def value_in(written: str, row: Mapping[str, Any], answers: Collection[str] = ()) -> Any:
    """What a placeholder leads to in a row by field and answer. Raises KeyError where the row lacks it."""
    meant = resolved(written, answers)
    return part_of(row[meant.name], meant.steps)
