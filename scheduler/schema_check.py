"""Whether answers can be held to JSON Schemas, asked in a process of its own: ``python -m scheduler.schema_check``.

A stranger's schema of a few hundred characters may take hours to prepare. So the kernel ends this process when it has
used its share of a core or of memory, whatever it is busy with. In: a list of schemas, as JSON. Out: a line of JSON for
each, as soon as it is known: null, or what is wrong.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from motet.tasks import short

if TYPE_CHECKING:
    from referencing._core import Resolver

#: Seconds of a core for one schema, and for the start of the process half a second of them. The longest list of
#: alternatives takes one. With more, a stranger holds a core for longer; with less, honest schemas are refused.
CPU_S = 4
#: Memory that the process may map. Its start takes a tenth.
MEMORY_MB = 2048
#: Exit code where memory was not enough.
TOO_MUCH = 3
#: Schemas that one value may be held to at the same place: each of them is tried for each such value.
MOST_AT_ONCE = 1000
_JSON_SCHEMA = "a JSON Schema (draft 2020-12)"
_KEEPABLE = "a schema that writing can be held to"


class Wrong(NamedTuple):
    """What is wrong with a schema: what stands there, and what was expected."""

    got: str
    expected: str


def main() -> None:
    memory = MEMORY_MB << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for schema in json.load(sys.stdin):
            used_s = ceil(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (used_s + CPU_S, resource.RLIM_INFINITY))
            print(json.dumps(wrong(schema)), flush=True)
    except MemoryError:
        sys.exit(TOO_MUCH)


def wrong(schema: Mapping[str, Any]) -> Wrong | None:
    """What is wrong with a schema, if anything. It may take for ever to tell."""
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
        found = _too_much_at_once(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "the schema"
        return Wrong(short(f"{where}: {error.message}", 200), _JSON_SCHEMA)
    except RecursionError:
        return Wrong("a schema that is nested too deep, or $refs that are", _JSON_SCHEMA)
    if found is None and (why := _no_grammar(schema)):
        return Wrong(short(why, 200), _KEEPABLE)
    return found


def _no_grammar(schema: Mapping[str, Any]) -> str:
    """Why no answer can be held to this schema while it is written; "" where it can.

    That includes patterns that only a backtracking engine takes, and every keyword that would not be held to.
    """
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        return str(LLMatcher.validate_grammar(grammar))
    except MemoryError:
        raise
    except ValueError as error:
        return str(error)
    except BaseException as panic:  # noqa: BLE001 - a panic in Rust is no Exception
        return f"the library that writing is held by fails on it: {type(panic).__name__}"


# -- what one value is held to


class _Circle(Exception):
    """A schema that holds a value to itself, without going into the value."""


def _too_much_at_once(schema: Mapping[str, Any]) -> Wrong | None:
    """What is wrong where some value would be held to too many schemas at one place."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    whole = DRAFT202012.create_resource(schema)
    registry: Registry[Any] = Registry()
    counts: dict[int, int] = {}

    def held_to(one: Any, resolver: Resolver[Any], above: frozenset[int]) -> int:
        """Schemas that hold a value where this one does, itself included."""
        if id(one) in above:
            raise _Circle
        if id(one) not in counts:
            within = above | {id(one)}
            counts[id(one)] = 1 + sum(held_to(*beside, within) for beside in _in_place(one, resolver))
        return counts[id(one)]

    for one, resolver in _every(schema, registry.with_resource("", whole).resolver_with_root(whole)):
        try:
            n = held_to(one, resolver, frozenset())
        except _Circle:
            return Wrong(
                "a $ref that leads back to itself", "$refs that go into a value before they come back"
            )
        except Unresolvable as error:
            return Wrong(short(f"the $ref {error.ref!r}", 200), "a $ref to a part of the schema itself")
        if n > MOST_AT_ONCE:
            many = f"{n:,}" if n < 10**9 else "billions of"
            return Wrong(f"a value that is held to {many} schemas at once", f"at most {MOST_AT_ONCE}")
    return None


def _in_place(schema: Any, resolver: Resolver[Any]) -> Iterator[tuple[Any, Resolver[Any]]]:
    """Schemas that hold the very value that this one holds."""
    if not isinstance(schema, Mapping):
        return
    resolver = _inside(schema, resolver)
    for key in ("allOf", "anyOf", "oneOf"):
        yield from ((one, resolver) for one in schema.get(key, ()))
    if "$ref" in schema:
        found = resolver.lookup(schema["$ref"])
        yield found.contents, found.resolver


def _every(schema: Any, resolver: Resolver[Any]) -> Iterator[tuple[Any, Resolver[Any]]]:
    """The schema and all that stand in it."""
    from referencing.jsonschema import DRAFT202012

    yield schema, resolver
    if isinstance(schema, Mapping):
        resolver = _inside(schema, resolver)
        for one in DRAFT202012.subresources_of(schema):
            yield from _every(one, resolver)


def _inside(schema: Mapping[str, Any], resolver: Resolver[Any]) -> Resolver[Any]:
    """With the ``$id`` of a schema, if it has one, as the place that its $refs begin at."""
    from referencing.jsonschema import DRAFT202012

    return resolver.in_subresource(DRAFT202012.create_resource(schema)) if "$id" in schema else resolver


if __name__ == "__main__":
    main()
