"""Answers of other tasks as a later one reads them: as text in a template, as values in a function's dict. Pure.

As text a label is its name, labels are joined with commas, a number is as Python writes it, what was generated is its
text, a JSON string is its own text, and any other JSON value stands in its shortest form. As a value a label is
``{"label", "score"}``, and ``{"scores"}`` where all were asked for; labels are a list of these; a span is ``{"text",
"label", "score", "start", "end"}``; a vector is a list of floats; what was generated is ``{"text", "finish"}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from motet.protocol.columns import Column, values
from motet.templates import Selector, part_of, text_of

_WRITTEN = frozenset({"generate", "chat"})


def as_texts(column: Column, spec: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """The answer of each row as text; "" where there is none. ``spec``: of the task whose column this is."""
    of = _told_key(spec)
    return ["" if value is None else _text(column.kind, value, of) for value in values(column, labels)]


def _told_key(spec: Mapping[str, Any]) -> str:
    """What a JSON value of the task says in short stands under this key; "": it is all of it."""
    if spec.get("kind") == "choose":
        return "label"
    return "text" if spec.get("kind") in _WRITTEN and spec.get("schema") is None else ""


def _text(kind: str, value: Any, of: str) -> str:
    match kind:
        case "label":
            return str(value[0])
        case "labels":
            # With every score asked for the pairs come with them.
            pairs = value[0] if isinstance(value, tuple) else value
            return ", ".join(str(label) for label, _ in pairs)
        case "number":
            return repr(value)
    if of and isinstance(value, dict) and of in value:
        value = value[of]
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def as_values(column: Column, labels: Sequence[str], inputs: Sequence[str] = ()) -> list[Any]:
    """The answer of each row as a plain value; None where there is none.

    ``inputs``: what the task read in each row, where that is known: spans are given their text then.
    """
    found = []
    for i, value in enumerate(values(column, labels)):
        read = inputs[i] if inputs else None
        found.append(None if value is None else _value(column.kind, value, read))
    return found


def _value(kind: str, value: Any, read: str | None) -> Any:
    match kind:
        case "label":
            label, score, *every = value
            return {"label": label, "score": score} | ({"scores": every[0]} if every else {})
        case "labels":
            pairs = value[0] if isinstance(value, tuple) else value
            return [{"label": label, "score": score} for label, score in pairs]
        case "spans":
            return [
                {
                    "text": None if read is None else read[start:end],
                    "label": label,
                    "score": score,
                    "start": start,
                    "end": end,
                }
                for start, end, label, score in value
            ]
    return value


def told(value: Any, kind: str, spec: Mapping[str, Any]) -> Any:
    """What a value (``as_values``) says in short: the name of a label, the names of labels, the text of what was written."""
    match kind:
        case "label" if value is not None:
            return value["label"]
        case "labels" if value is not None:
            return [one["label"] for one in value]
    of = _told_key(spec)
    return value[of] if of and isinstance(value, dict) and of in value else value


def part_text(kind: str, value: Any, steps: tuple[Selector, ...]) -> str:
    """A part of a value (``as_values``) as text: of a span its text, of a label its name; "" where it is not there."""
    part = part_of(value, steps)
    word = {"spans": "text", "labels": "label"}.get(kind)
    if word and isinstance(part, dict):
        part = part.get(word)
    elif word and isinstance(part, list):
        part = [one.get(word) if isinstance(one, dict) else one for one in part]
    return text_of(part)
