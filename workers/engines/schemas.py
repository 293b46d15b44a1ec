"""Whether an answer keeps its JSON Schema, told within a bounded number of steps.

An answer is a stranger's, or a model's that follows one, and so is its schema. So patterns are matched by llguidance,
which takes time in proportion to the text, and never by Python's ``re``, which may take for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

#: Keywords that are held against one answer at most. With more, a schema holds a core for longer than two seconds; with
#: less, an honest answer of many thousand values counts as one that breaks its schema.
MOST_CHECKS = 100_000
#: Patterns that are kept ready.
_PATTERNS = 256
_left: ContextVar[int] = ContextVar("checks left")


class _Unclear(Exception):
    """It cannot be told whether the answer keeps its schema; the words say why, and hold nothing of either."""


def violation(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What of the schema a value breaks, and where, without a word of it; None where it keeps it."""
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    _left.set(MOST_CHECKS)
    try:
        # An empty registry: what is not in the schema is not asked of the network.
        _validator()(schema, registry=Registry()).validate(value)
    except jsonschema.ValidationError as error:
        where = "/".join(str(step) if isinstance(step, int) else "…" for step in error.absolute_path)
        return f"it breaks {error.validator!r} of the schema at /{where}"
    except _Unclear as unclear:
        return str(unclear)
    except RecursionError:
        return "it is nested too deep to be checked"
    except Unresolvable:
        return "a $ref of the schema names nothing in it"
    return None


@cache
def _validator() -> Any:
    """jsonschema's validator with its keywords counted, and those that match patterns replaced."""
    from jsonschema import Draft202012Validator, validators

    ours = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    every = {name: _counted(check) for name, check in {**Draft202012Validator.VALIDATORS, **ours}.items()}
    return validators.extend(Draft202012Validator, every)


#: (validator, the keyword's value, what it is held against, the schema that it stands in) -> errors.
_Check = Callable[[Any, Any, Any, Mapping[str, Any]], Iterator[Any] | None]


def _counted(check: _Check) -> _Check:
    def counted(validator: Any, argument: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
        left = _left.get() - 1
        _left.set(left)
        if left < 0:
            raise _Unclear("it takes too long to hold it against the schema; simplify the schema")
        yield from check(validator, argument, value, schema) or ()

    return counted


def _pattern(validator: Any, pattern: str, value: Any, _: Mapping[str, Any]) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(value, "string") and not _matches(pattern, value):
        yield ValidationError("another form")


def _pattern_properties(
    validator: Any, by_pattern: Mapping[str, Any], value: Any, _: Mapping[str, Any]
) -> Iterator[Any]:
    if validator.is_type(value, "object"):
        for pattern, schema in by_pattern.items():
            for name, one in value.items():
                if _matches(pattern, name):
                    yield from validator.descend(one, schema, path=name, schema_path=pattern)


def _additional_properties(
    validator: Any, extra: Any, value: Any, schema: Mapping[str, Any]
) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(value, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, one in value.items():
        if name in named or any(_matches(pattern, name) for pattern in patterns):
            continue
        if extra is False:
            yield ValidationError("another property")
            return
        yield from validator.descend(one, extra, path=name)


def _matches(pattern: str, text: str) -> bool:
    """Whether a pattern of a schema is found in a text, as the library says that writes answers by it."""
    matcher = _matcher(pattern).deep_copy()
    raw = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    # Each byte is a token of its own.
    taken = matcher.try_consume_tokens(list(raw))
    if matcher.is_error():
        raise _Unclear("a pattern of the schema takes too long to match")
    return bool(taken == len(raw) and matcher.is_accepting())


@lru_cache(_PATTERNS)
def _matcher(pattern: str) -> Any:
    """At the beginning of a JSON string in which the pattern is to be found."""
    from llguidance import LLMatcher

    string = json.dumps({"type": "string", "pattern": pattern})
    matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_json_schema(string), log_level=0)
    if matcher.is_error():
        raise _Unclear("a pattern of the schema cannot be matched without trying again and again")
    return matcher


@cache
def _bytes() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
