"""JSON Schemas that answers are to keep: checked when a job is opened, by the libraries that will hold answers to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from motet.errors import Problem
from motet.tasks import Task, short


def schema_problems(tasks: Mapping[str, Task]) -> list[Problem]:
    """What is wrong with the schemas of these tasks."""
    return [
        Problem(
            f"tasks.{name}.schema",
            got,
            expected,
            "see json-schema.org, and docs/http.md for what can be kept",
        )
        for name, task in tasks.items()
        if (schema := getattr(task, "schema", None)) is not None
        for got, expected in _wrong(schema)
    ]


def _wrong(schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what stands there, what was expected), or nothing."""
    # Late: most jobs have no schema.
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "the schema"
        return [(short(f"{where}: {error.message}", 200), "a JSON Schema (draft 2020-12)")]
    except RecursionError:
        return [("a schema that is nested too deep", "a JSON Schema (draft 2020-12)")]
    why = _no_grammar(schema)
    return [(short(why, 200), "a schema that writing can be held to")] if why else []


def _no_grammar(schema: Mapping[str, Any]) -> str:
    """Why no answer can be held to this schema while it is written; "" where it can."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        return str(LLMatcher.validate_grammar(grammar))
    except ValueError as error:
        return str(error)
