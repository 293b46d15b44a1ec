"""Typed arrays in Postgres' binary format, both ways, so that no cell becomes a Python object on its way.

As text, arrays took more than half of the time in which an aggregator seals labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

#: Struct code -> big-endian type, its size, and the oids of the element and of the array.
_TYPES = {
    "h": (">i2", 2, 21, 1005),
    "i": (">i4", 4, 23, 1007),
    "q": (">i8", 8, 20, 1016),
    "f": (">f4", 4, 700, 1021),
    "d": (">f8", 8, 701, 1022),
}
#: Dimensions, nulls, type; then of one dimension, its length and first index.
_EMPTY_BYTES, _HEAD_BYTES = 12, 20


@dataclass(frozen=True, slots=True)
class Elements:
    """Numbers as a parameter: psycopg sends them as an array of the type that the struct code names."""

    code: str
    values: npt.NDArray[Any]


def flat(raw: bytes, code: str) -> bytes:
    """Elements of a one-dimensional array without NULLs, from Postgres' binary format, little-endian end to end."""
    kind, size, _, _ = _TYPES[code]
    if len(raw) == _EMPTY_BYTES:
        return b""
    elements = np.frombuffer(raw, _element(kind), offset=_HEAD_BYTES)
    assert int.from_bytes(raw[:4], "big") == 1, "an array of more dimensions"
    assert (elements["size"] == size).all(), "an array that holds NULL"
    return elements["value"].astype(kind.replace(">", "<")).tobytes()


def _element(kind: str) -> np.dtype[Any]:
    return np.dtype([("size", ">i4"), ("value", kind)])


class _ElementsDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Elements) -> Buffer:
        kind, size, element, _ = _TYPES[obj.code]
        n = len(obj.values)
        if not n:
            return np.array([0, 0, element], ">i4").tobytes()
        elements = np.empty(n, _element(kind))
        elements["size"], elements["value"] = size, obj.values
        return np.array([1, 0, element, n, 1], ">i4").tobytes() + elements.tobytes()

    # One Python type stands for four of Postgres: psycopg asks for the dumper of each by its code.
    def get_key(self, obj: Elements, format: Any) -> Any:  # noqa: A002 - psycopg's own name
        return (self.cls, obj.code)

    def upgrade(self, obj: Elements, format: Any) -> Dumper:  # noqa: A002 - psycopg's own name
        dumper = _ElementsDumper(self.cls)
        dumper.oid = _TYPES[obj.code][3]
        return dumper


psycopg.adapters.register_dumper(Elements, _ElementsDumper)
