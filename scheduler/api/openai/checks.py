"""Checks of single values of a request, each refused by its place. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from motet.protocol.values import text_flaw
from motet.tasks import short
from scheduler.api.openai.refusals import DoorError

_SCHEMA_BYTES = 64 * 1024

#: Token ids -> their text, by a model's own tokenizer. Raises DoorError.
Decoded = Callable[[Sequence[int]], str]


def texts(name: str, value: Any, decoded: Decoded, most: int) -> tuple[str, ...]:
    """A text or a list of token ids, or a list of either."""
    many = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not many or len(many) > most:
        raise wrong(name, value, f"a text, token ids, or a list of up to {most:,} of either")
    texts = [decoded(one) if _is_ids(one) else one for one in many]
    if not all(isinstance(one, str) and one for one in texts):
        raise wrong(
            name, value, f"a text that is not empty, token ids, or a list of up to {most:,} of either"
        )
    return tuple(texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def whole_number(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, value, f"a whole number from {least:,} to {most:,}")
    return value


def number(
    body: Mapping[str, Any], name: str, least: float, most: float, *, above: bool = False
) -> float | None:
    """``above``: the least is not reached."""
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most
        or (above and value == least)
    ):
        expected = f"above {least:g}, up to {most:g}" if above else f"from {least:g} to {most:g}"
        raise wrong(name, value, f"a number {expected}")
    return float(value)


def one_of(body: Mapping[str, Any], name: str, words: Sequence[str]) -> str:
    """The word that is said; the first one where none is."""
    value = body.get(name)
    if value is None:
        return words[0]
    if not isinstance(value, str) or value not in words:
        raise wrong(name, value, f"one of {', '.join(words)}")
    return value


def wrong(where: str, got: Any, expected: str) -> DoorError:
    """What stands there is told by its type, never by its words: they may be as private as a text."""
    if got is None:
        code, told = "missing_required_parameter", "nothing"
    else:
        code, told = "invalid_value", short(got) if isinstance(got, bool | int | float) else _kind(got)
    return DoorError(f"{where}: got {told}; expected {expected}", param=where, code=code)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"a text of {len(value):,} characters" + (
            f" with {flaw}" if (flaw := text_flaw(value)) else ""
        )
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"a value of type {type(value).__name__}"


def asked_schema(form: Any, where: str) -> Mapping[str, Any] | None:
    """The JSON Schema that an answer shall keep; None where any text will do.

    ``where``: the parameter that says it. Chats name a schema in an object of its own, responses beside its type.
    """
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            named, place = form, f"{where}.schema"
            if "schema" not in form:
                named, place = form.get("json_schema"), f"{where}.json_schema.schema"
            said = named.get("schema") if isinstance(named, Mapping) else None
            if isinstance(said, Mapping) and len(json.dumps(said)) <= _SCHEMA_BYTES:
                return said
            raise wrong(place, said, f"a JSON Schema of up to {_SCHEMA_BYTES // 1024} KiB")
    raise wrong(where, kind, 'an object of type "text", "json_object" or "json_schema"')


def flag(body: Mapping[str, Any], name: str, where: str = "") -> bool:
    """``where``: the object that it stands in, with a dot."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{where}{name}", value, "true or false")
    return value is True
