"""Values: what a field of a row may hold, its plain text in a template, and what makes it none. Stdlib only.

A value is null, bool, int (64 bits), float, decimal, date, time, text, a list or object of these, or a medium
(motet.media.medium). Client, server and worker read it by this module, so that a value has one text wherever a template is
filled.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TypeAlias

from motet.media.medium import Medium

#: Lists and objects are whole values: ``clean`` has looked at all that is in them.
Value: TypeAlias = (
    "bool | int | float | Decimal | date | time | str | list[Any] | dict[str, Any] | Medium | None"
)

#: What a field may hold, for messages.
EXPECTED = "text, a number, a date, a time, true, false, null, or a list or object of these"
#: Lists and objects inside each other at most. A deeper value could overflow the stack of a process that reads it.
MAX_DEPTH = 32
#: Whole numbers are from -_MAX_INT to _MAX_INT - 1: what msgpack, Arrow and Postgres hold.
_MAX_INT = 2**63

#: The type of a column, by the Python type of its values. "datetime" stands beside "date", though it is a subclass.
_TYPES: Mapping[type, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    Decimal: "decimal",
    datetime: "datetime",
    date: "date",
    time: "time",
    str: "text",
    list: "list",
    dict: "object",
    Medium: "medium",
}
#: Every type that a column may be told to have: values of one type and nulls, nulls alone, or several types.
COLUMN_TYPES = frozenset({*_TYPES.values(), "null", "mixed"})


class NoValue(ValueError):
    """A field holds no value. ``got`` and ``expected`` are words for people, without a word of the user's text."""

    def __init__(self, got: str, expected: str = EXPECTED, remedy: str = "") -> None:
        super().__init__(got)
        self.got = got
        self.expected = expected
        #: How to mend it; "" where the row can only be left out or the value replaced.
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Mark:
    """Stands for a value that a parser refuses, and says in words which it was."""

    words: str

    def __repr__(self) -> str:
        return self.words


class Doubled(dict[str, Any]):
    """An object of JSON in which some keys stand twice; the last value of each is kept."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        #: The keys that stand twice.
        self.doubled = frozenset(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a reader of JSON makes of the pairs of an object."""
    whole = dict(pairs)
    return whole if len(whole) == len(pairs) else Doubled(pairs)


def text_flaw(text: str) -> str | None:
    """What keeps a text from being stored, in words, or None."""
    if "\0" in text:
        return "a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "a lone surrogate"
    return None


def clean(value: object, depth: int = 0) -> Value:
    """The value as one of the plain types, what numpy, pandas and subclasses bring included. Raises NoValue."""
    kind = type(value)
    if value is None or kind is bool:
        return value  # type: ignore[return-value]
    if isinstance(value, Doubled):
        raise NoValue("an object in which a key stands twice", "each key once")
    if kind not in _TYPES:
        value = _plain(value)
        kind = type(value)
    if isinstance(value, str):
        if words := text_flaw(value):
            mend = (
                "remove the NUL characters (bytes of value 0)"
                if "NUL" in words
                else "save the source as UTF-8"
            )
            raise NoValue(words, "text without NUL" if "NUL" in words else "text that UTF-8 can hold", mend)
    elif isinstance(value, int):
        if not -_MAX_INT <= value < _MAX_INT:
            raise NoValue("an int beyond 64 bits", "a number of 64 bits", "make it text or a float")
    elif isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise NoValue("NaN" if math.isnan(value) else "an infinite number", "a number or null")
    elif isinstance(value, datetime | time):
        _iso(value)
    elif kind is Medium:
        if depth:
            raise NoValue("a picture inside a list or an object", "a picture as a field of its own")
    elif isinstance(value, list | dict):
        if depth == MAX_DEPTH:
            raise NoValue(f"a value nested deeper than {MAX_DEPTH}", "a flatter one")
        if isinstance(value, list):
            return [clean(one, depth + 1) for one in value]
        return {_key(key): clean(one, depth + 1) for key, one in value.items()}
    return value  # type: ignore[return-value]


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise NoValue("an object whose key is no text", "keys of text")
    return str(clean(key))


def _iso(value: datetime | time) -> str:
    try:
        return value.isoformat()
    except Exception as error:  # noqa: BLE001 - a stranger's time zone
        raise NoValue(f"a time whose zone fails ({type(error).__name__})") from None


def _plain(value: Any) -> Value:
    """A value of another type as one of the plain types, not yet looked into. Raises NoValue."""
    if isinstance(value, Mark):
        raise NoValue(value.words)
    if type(value).__name__ in ("NaTType", "NAType"):  # of pandas
        return None
    for plain in (str, int, float, Decimal):
        if isinstance(value, plain):
            return str.__str__(value) if plain is str else plain(value)
    if hasattr(value, "to_pydatetime"):  # a Timestamp of pandas, which is a datetime as well
        if value.nanosecond:
            raise NoValue("a time in nanoseconds", "microseconds at most", "round it")
        return value.to_pydatetime()  # type: ignore[no-any-return]
    if isinstance(value, datetime):
        return datetime.fromisoformat(_iso(value))
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # an array or a scalar of numpy
        return _of_numpy(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise NoValue(kind_of(value))


def _of_numpy(value: Any) -> Value:
    if value.dtype.kind == "M":
        exact = value
        if not isinstance(value.tolist(), date | list) or "ns" in value.dtype.str:
            value = value.astype("datetime64[us]")
        if not ((value == exact) | (value != value)).all():
            raise NoValue("a time in nanoseconds", "microseconds at most", "round it")
    plain = value.tolist()
    if type(plain) not in _TYPES and plain is not None:
        raise NoValue(kind_of(plain))
    return plain  # type: ignore[no-any-return]


def kind_of(value: object) -> str:
    """What a value is, in words, and never the value: it may be as private as a text."""
    if value is None:
        return "null (None)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    name = type(value).__name__
    return f"a value of type {name if name.isprintable() and len(name) <= 40 else 'of a long name'}"


def plain_text(value: Value) -> str:
    """The text that stands for a value in a template; ``clean`` has seen it.

    Null is no text at all, numbers are as Python writes them, dates ISO 8601, a list is joined with ", ", an object is
    its shortest JSON, and a medium a reference to it. Lists and objects inside a list are JSON, and a null there is ``null``.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Medium):
        return value.text
    if isinstance(value, list):
        return ", ".join([one if isinstance(one, str) else _json(one, quoted=False) for one in value])
    return _json(value, quoted=False)


def json_value(value: Value) -> bool | int | float | str | None:
    """A value as JSON for people: what has no type there, and what has several, is its text."""
    return value if value is None or isinstance(value, bool | int | float | str) else plain_text(value)


def _json(value: Any, *, quoted: bool = True) -> str:
    """The shortest JSON of a value. A decimal is a number as it was written; a date is a text, quoted where JSON is."""
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ",".join([_json(one) for one in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([f"{_json(key)}:{_json(one)}" for key, one in value.items()]) + "}"
    if isinstance(value, date | time):
        return f'"{value.isoformat()}"' if quoted else value.isoformat()
    return repr(value) if isinstance(value, float) else str(value)


def column_type(values: Sequence[Value]) -> str:
    """The one type of a column's values, nulls aside: "null" where there are none, "mixed" where there are several."""
    found = {*map(type, values)} - {type(None)}
    return _TYPES[found.pop()] if len(found) == 1 else "mixed" if found else "null"


def is_text(values: Sequence[Value]) -> bool:
    """Every value is a text: no null and no other type."""
    return {*map(type, values)} <= {str}


def byte_lengths(values: Sequence[Value]) -> list[int]:
    """UTF-8 bytes of each value's text."""
    texts: Sequence[Any] = values
    try:
        # Most texts are ASCII, which each knows of itself: nothing is encoded to count its bytes.
        return [len(text) if text.isascii() else len(text.encode()) for text in texts]
    except AttributeError:
        return byte_lengths(list(map(plain_text, values)))
