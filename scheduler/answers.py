"""Answers as text: what stands in a template where another task's answer is named. Pure.

A label is its name, labels are joined with commas, a number is as Python writes it, what was generated is its text, a
JSON string is its own text, and any other JSON value stands in its shortest form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from motet.protocol.columns import Column, values

_WRITTEN = frozenset({"generate", "chat"})


def as_texts(column: Column, spec: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """The answer of each row as text; "" where there is none. ``spec``: of the task whose column this is."""
    written = spec.get("kind") in _WRITTEN and spec.get("schema") is None
    return ["" if value is None else _text(column.kind, value, written) for value in values(column, labels)]


def _text(kind: str, value: Any, written: bool) -> str:
    match kind:
        case "label":
            return str(value[0])
        case "labels":
            # With every score asked for the pairs come with them.
            pairs = value[0] if isinstance(value, tuple) else value
            return ", ".join(str(label) for label, _ in pairs)
        case "number":
            return repr(value)
    if written and isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
