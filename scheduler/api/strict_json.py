"""JSON from strangers: what Postgres, UTF-8 or another JSON reader would refuse is found here. Pure.

Values that JSON should not hold (NaN, numbers beyond 64 bits, an object with a key twice) become marks, so that
whoever knows the row or the field can say where they stand; ``flaw`` finds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from motet.protocol.values import MAX_DEPTH, Doubled, Mark, json_object, text_flaw

#: Objects and arrays in one text at most: empty ones cost three bytes to send and sixty to hold.
_MAX_CONTAINERS = 1_000_000
_MAX_INT = 2**63


class BrokenJson(ValueError):
    """Not JSON. ``str()`` says why and where, without a word of the text."""


def loads(raw: bytes | str) -> Any:
    """Parse one JSON text. Raises BrokenJson; anything odd inside it comes back as a mark."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        if len(text) > _MAX_CONTAINERS and text.count("[") + text.count("{") > _MAX_CONTAINERS:
            raise BrokenJson(f"JSON with more than {_MAX_CONTAINERS:,} objects and arrays")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise BrokenJson(f"bytes that are not UTF-8, at byte {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BrokenJson(f"broken JSON ({error.msg}) at {where}") from None
    except RecursionError:
        raise BrokenJson(f"JSON nested deeper than {MAX_DEPTH}") from None


def flaw(value: Any) -> tuple[str, str] | None:
    """(path, words) of the first thing in a parsed value that may not be there, or None.

    Beside marks: nesting beyond MAX_DEPTH, NUL and lone surrogates in any string. The path is for people.
    """
    for path, depth, one in _walk(value):
        words = _words(one, depth)
        if words:
            return path, words
    return None


def _walk(value: Any) -> Iterator[tuple[str, int, Any]]:
    waiting: list[tuple[str, int, Any]] = [("", 1, value)]
    while waiting:
        path, depth, one = waiting.pop()
        yield path, depth, one
        if isinstance(one, dict):
            for key, inner in one.items():
                # A key is a string like any other; its place is that of its object.
                yield path, depth, key
                waiting.append((f"{path}.{key[:64]}" if path else key[:64], depth + 1, inner))
        elif isinstance(one, list):
            waiting.extend((f"{path}[{i}]", depth + 1, inner) for i, inner in enumerate(one))


def _words(one: Any, depth: int) -> str | None:
    if isinstance(one, str):
        return text_flaw(one)
    if isinstance(one, Mark):
        return one.words
    if isinstance(one, Doubled):
        return "a key that stands there twice"
    if isinstance(one, (dict, list)) and depth > MAX_DEPTH:
        return f"JSON nested deeper than {MAX_DEPTH}"
    return None


def _whole_number(digits: str) -> int | Mark:
    # Long digits are never turned into a number: that takes quadratic time.
    number = int(digits) if len(digits) <= 20 else _MAX_INT
    return number if -_MAX_INT <= number < _MAX_INT else Mark("a number beyond 64 bits")


def _number(digits: str) -> float | Mark:
    number = float(digits)
    return number if abs(number) != float("inf") else Mark("a number beyond double precision")


_DECODER = json.JSONDecoder(
    object_pairs_hook=json_object,
    parse_constant=lambda word: Mark("NaN" if word == "NaN" else "an infinite number"),
    parse_int=_whole_number,
    parse_float=_number,
)
