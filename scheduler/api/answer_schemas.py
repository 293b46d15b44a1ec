"""JSON Schemas that answers are to keep: checked when a job is opened, by the libraries that will hold answers to them.

The libraries run in a process of their own (``scheduler.schema_check``), which may be ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from threading import BoundedSemaphore
from typing import Any

from motet.errors import Overloaded, Problem
from motet.tasks import Task
from scheduler import schema_check
from scheduler.api.resources import Recent
from scheduler.schema_check import CPU_S, MEMORY_MB, TOO_MUCH, Wrong

#: What was found of the schemas that were checked last: a schema comes again with each job of its kind.
_verdicts: Recent[str, tuple[Wrong, ...]] = Recent(1024)
#: Checks at a time, so that others' requests keep their cores.
_checks = BoundedSemaphore(2)
#: Seconds after which the machine has no time for a check, and the client is asked to come back.
_PATIENCE_S = 30.0
_TOO_MUCH = Wrong(
    f"a schema that takes more than {CPU_S} s or {MEMORY_MB:,} MB to prepare",
    "a schema with fewer alternatives and fewer allOf",
)
_LIBRARY = "x-guidance"
_SELF_MADE_RULES = Wrong(
    f"{_LIBRARY}, which tells the library that holds answers to a schema what not to check",
    f"a schema without {_LIBRARY}",
)


def schema_problems(tasks: Mapping[str, Task]) -> list[Problem]:
    """What is wrong with the schemas of these tasks. Raises Overloaded where there is no time to tell."""
    schemas = {
        name: schema for name, task in tasks.items() if (schema := getattr(task, "schema", None)) is not None
    }
    texts = {name: json.dumps(schema) for name, schema in schemas.items() if not _names(schema, _LIBRARY)}
    verdicts = _verdicts_on(list(dict.fromkeys(texts.values())))
    return [
        Problem(
            f"tasks.{name}.schema",
            wrong.got,
            wrong.expected,
            "see json-schema.org, and docs/http.md for what can be kept",
        )
        for name in schemas
        for wrong in (verdicts.get(texts[name], ()) if name in texts else (_SELF_MADE_RULES,))
    ]


def _names(schema: Any, key: str) -> bool:
    """Whether an object anywhere in the schema has this key."""
    if isinstance(schema, Mapping):
        return key in schema or any(_names(one, key) for one in schema.values())
    return isinstance(schema, list) and any(_names(one, key) for one in schema)


def _verdicts_on(schemas: Sequence[str]) -> dict[str, tuple[Wrong, ...]]:
    """What is wrong with each of them; those behind one that takes too long are not looked at."""
    known = {schema: found for schema in schemas if (found := _verdicts.get(schema)) is not None}
    if fresh := [schema for schema in schemas if schema not in known]:
        known |= zip(fresh, _checked(fresh), strict=False)
    for schema, found in known.items():
        _verdicts.put(schema, found)
    return known


def _checked(schemas: Sequence[str]) -> list[tuple[Wrong, ...]]:
    if not _checks.acquire(timeout=_PATIENCE_S):
        raise Overloaded("too many schemas are checked at once; come back in a moment", _PATIENCE_S)
    try:
        told = subprocess.run(
            # Neither the folder that we were started in nor our secrets are any business of it.
            [sys.executable, "-P", "-m", schema_check.__name__],
            env={name: value for name, value in os.environ.items() if not name.startswith("MOTET_")}
            | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            input=f"[{','.join(schemas)}]".encode(),
            capture_output=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Overloaded("no time to check a schema; come back in a moment", _PATIENCE_S) from None
    finally:
        _checks.release()
    found: list[tuple[Wrong, ...]] = [
        () if line == b"null" else (Wrong(*json.loads(line)),) for line in told.stdout.splitlines()
    ]
    if told.returncode == TOO_MUCH or told.returncode < 0:
        return [*found, (_TOO_MUCH,)]
    if len(found) < len(schemas):
        raise RuntimeError(f"the check of a schema ended with {told.returncode}")
    return found
