"""A plain Python function as an engine: ``inputs -> values``, one JSON value per input.

    def shout(texts: list[str]) -> list[str]:
        return [text.upper() for text in texts]

registered as an entry point of the group ``motet.engines``. An input is the rendered text; where the task's whole input
is one field (``input="{age}"``), it is the field's value with its type. A function that takes one input and returns one
value says so with an attribute: ``shout.per_row = True``. What a task says in ``params`` is given as keyword arguments,
and the data of its ``artefact`` as the keyword argument of that name: ``def rank(rows, *, k=10, artefact=None)``. The
function may keep both, and must not change them. It runs in the worker's process: it is code that the operator installed,
never a user's.
"""

from __future__ import annotations

import inspect
import itertools
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.protocol.columns import ERROR, OK, CellError, Column, is_storable_json, little_endian
from motet.protocol.manifest import Manifest
from motet.protocol.values import Value
from motet.protocol.wire import TaskOrder
from workers.engine import OutOfMemory, Pass, Prepared
from workers.engines.artefacts import read_artefact

#: A function's handle: digest of each artefact beside it -> its data.
Artefacts = dict[str, Any]


class FunctionEngine:
    """Runs one function. Values that are not strict JSON (NaN, bytes, own classes) are errors of their row."""

    def __init__(self, function: Callable[..., Any], *, engine: str = "", origin: str = "") -> None:
        """``engine``: its entry point. ``origin``: package and version, so that an upgrade changes the digest."""
        self._function = function
        self._engine = engine or getattr(function, "__name__", "function")
        self._origin = origin or self._engine
        self._per_row = bool(getattr(function, "per_row", False))

    def describe(self, name: str, version: str) -> Manifest:
        return Manifest(
            name=name,
            version=version,
            engine=self._engine,
            answers="json",
            deterministic=bool(getattr(self._function, "deterministic", True)),
            keywords=_keywords(self._function),
            source={"function": self._origin},
        )

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return 0

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Artefacts:
        return {}

    def attach(self, handle: Artefacts, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if task.manifest.digest not in handle:
            handle[task.manifest.digest] = read_artefact(files)

    def detach(self, handle: Artefacts, digest: str) -> None:
        handle.pop(digest, None)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        return [Prepared(row, 1, False, value) for row, value in enumerate(pass_.values or texts)]

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        inputs = [row.inputs for row in batch]
        try:
            return {
                task.name: json_column(self._values(inputs, _arguments(task, pass_.handle)))
                for task in pass_.tasks
            }
        except MemoryError:
            raise OutOfMemory from None

    def unload(self, handle: Artefacts) -> None:
        handle.clear()

    def _values(self, inputs: list[Value], arguments: Mapping[str, Any]) -> Sequence[Any]:
        if self._per_row:
            return [self._value(one, arguments) for one in inputs]
        values = self._function(inputs, **arguments)
        if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != len(inputs):
            raise TypeError(f"{self._engine} must return one value per text")
        return values

    def _value(self, one: Value, arguments: Mapping[str, Any]) -> Any:
        try:
            return self._function(one, **arguments)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the row's own error
            return CellError("engine", type(error).__name__)


def _arguments(task: TaskOrder, artefacts: Artefacts | None) -> dict[str, Any]:
    """The keyword arguments of a task."""
    arguments = dict(task.spec.get("params") or {})
    if task.manifest.answers == "artefact":
        arguments["artefact"] = (artefacts or {})[task.manifest.digest]
    return arguments


def _keywords(function: Callable[..., Any]) -> dict[str, bool]:
    """The keyword arguments that a function names behind its input -> whether it must be given them."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # it is written in C, and tells nothing
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one.name: one.default is one.empty for one in parameters if one.kind in named}


def json_column(values: Sequence[Any]) -> Column:
    """A column of kind json. A CellError among the values, or a value that is not strict JSON, is that row's error."""
    return written_column(
        [value if isinstance(value, CellError) else _strict_json(value) for value in values]
    )


def written_column(bodies: Sequence[bytes | CellError]) -> Column:
    """A column of kind json, of values that are written as JSON already."""
    errors = {row: body for row, body in enumerate(bodies) if isinstance(body, CellError)}
    whole = [b"" if isinstance(body, CellError) else body for body in bodies]
    offsets = array("i", itertools.accumulate(map(len, whole), initial=0))
    return Column(
        kind="json",
        status=bytes(ERROR if row in errors else OK for row in range(len(bodies))),
        arrays={"offsets": little_endian(offsets), "bytes": b"".join(whole)},
        errors=errors,
    )


def _strict_json(value: object) -> bytes | CellError:
    try:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        body = b""
    if not is_storable_json(body):
        return CellError("bad_value", f"the function returned {type(value).__name__}, not a JSON value")
    return body
