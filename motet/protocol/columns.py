"""Columns: the answers of one task for a run of rows, as flat typed arrays. Stdlib only.

One format from the engine to the client: engines fill columns, outcomes carry them, sealing merges them,
the API streams them and the client reads them. Arrays are little-endian bytes, so nothing is parsed per row.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["label", "labels", "number", "vector", "spans", "json"]

#: Row states in ``Column.status``. The low four bits are the state, TRUNCATED is a mark beside it.
OK, ERROR, SKIPPED, RETURNED = 0, 1, 2, 3
STATE_MASK = 0x0F
#: The input was cut to the model's length.
TRUNCATED = 0x10
STATES = ("ok", "error", "skipped", "returned")
#: Every byte that a status may hold, and how each loses its mark: whole statuses are looked at, not row by row.
_KNOWN = bytes(state | mark for state in (OK, ERROR, SKIPPED, RETURNED) for mark in (0, TRUNCATED))
_WITHOUT_MARK = bytes(byte & STATE_MASK for byte in range(256))

#: Typed arrays of each kind, as (name, struct code). A variable-length kind starts with ``offsets`` (n + 1 long).
LAYOUT: Mapping[str, tuple[tuple[str, str], ...]] = {
    # code of the winning label, its score; ``all`` holds n x L scores where every score was asked for
    "label": (("codes", "h"), ("scores", "f"), ("all", "f")),
    "labels": (("offsets", "i"), ("codes", "h"), ("scores", "f"), ("all", "f")),
    "number": (("numbers", "d"),),
    # n x dim of fp32 or fp16; nothing where no row is ok
    "vector": (("vectors", "B"),),
    # code points of the rendered input
    "spans": (("offsets", "i"), ("starts", "i"), ("ends", "i"), ("codes", "h"), ("scores", "f")),
    # UTF-8 JSON values laid end to end
    "json": (("offsets", "i"), ("bytes", "B")),
}


@dataclass(frozen=True, slots=True)
class CellError:
    """Why a cell has no answer. ``message`` never holds a user's text."""

    #: Stable and low in number: ``too_long``, ``bad_row``, ``poison``, ``out_of_memory``, ``engine`` ….
    error: str
    message: str
    #: True where another attempt may succeed; such a row comes back as a piece until its tries are spent.
    retriable: bool = False

    def to_wire(self) -> list[Any]:
        return [self.error, self.message, self.retriable]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> CellError:
        return cls(storable(wire[0]), storable(wire[1]), bool(wire[2]))


def storable(words: object, limit: int = 500) -> str:
    """Words of a stranger as text that Postgres takes: bounded, without NUL."""
    return str(words)[:limit].replace("\0", "\ufffd")


#: NUL as JSON spells it, and not a backslash that is spelled out before a ``u0000``.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def is_storable_json(raw: bytes) -> bool:
    """Whether these bytes are one JSON value that Postgres takes as well: no NaN, no NUL, no lone surrogate."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False
    return _NUL.search(raw) is None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The answers of one task for ``len(status)`` rows."""

    kind: Kind
    #: One byte per row: a state, with TRUNCATED beside it.
    status: bytes
    #: Name -> little-endian array, as LAYOUT says. Rows that are not ok hold zeros, or nothing where lengths vary.
    arrays: Mapping[str, bytes] = field(default_factory=dict)
    #: Row position -> why it is not ok. Sparse.
    errors: Mapping[int, CellError] = field(default_factory=dict)
    #: Vectors only: length of one, and its element type. The length is 0 where no row is ok and nobody has told it yet.
    dim: int = 0
    dtype: Literal["fp32", "fp16", ""] = ""

    def __len__(self) -> int:
        return len(self.status)

    def to_wire(self) -> dict[str, Any]:
        """As msgpack-able data."""
        return {
            "kind": self.kind,
            "status": self.status,
            "arrays": dict(self.arrays),
            "errors": {i: e.to_wire() for i, e in self.errors.items()},
            "dim": self.dim,
            "dtype": self.dtype,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Column:
        """Rebuild and check. Raises ValueError where lengths or types do not agree (a forged or torn message)."""
        kind, status = wire["kind"], wire["status"]
        if kind not in LAYOUT or not isinstance(status, bytes):
            raise ValueError(f"column of unknown kind {kind!r}")
        arrays = wire["arrays"]
        if not isinstance(arrays, dict) or not all(isinstance(a, bytes) for a in arrays.values()):
            raise ValueError("column arrays are not bytes")
        column = cls(
            kind=kind,
            status=status,
            arrays=arrays,
            errors={int(i): CellError.from_wire(e) for i, e in dict(wire["errors"]).items()},
            dim=int(wire["dim"]),
            dtype=wire["dtype"],
        )
        column.check()
        return column

    def check(self) -> None:
        """Raise ValueError unless every array is as long as LAYOUT and the status demand."""
        n = len(self.status)
        names = {name for name, _ in LAYOUT[self.kind]}
        if set(self.arrays) - names:
            raise ValueError(
                f"column of kind {self.kind} has unknown arrays {sorted(set(self.arrays) - names)}"
            )
        if self.status.translate(None, _KNOWN):
            raise ValueError("column has an unknown row state")
        if any(not 0 <= i < n for i in self.errors):
            raise ValueError("column error outside its rows")
        count = n
        if "offsets" in names:
            offsets = typed("i", self.arrays.get("offsets", b"")).tolist()
            if len(offsets) != n + 1 or offsets[0] != 0 or offsets != sorted(offsets):
                raise ValueError("column offsets are not n + 1 ascending numbers from 0")
            count = offsets[-1]
        for name, code in LAYOUT[self.kind]:
            size = len(self.arrays.get(name, b""))
            if name == "offsets":
                continue
            if name == "all":
                if size and (n == 0 or size % (4 * n)):
                    raise ValueError("column of all scores is not n x labels")
            elif name == "vectors":
                width = 4 if self.dtype == "fp32" else 2
                if self.dtype not in ("fp32", "fp16") or (
                    size != n * self.dim * width and (size or self.counts()[0])
                ):
                    raise ValueError("column of vectors is not n x dim")
            elif size != count * struct.calcsize(f"<{code}"):
                raise ValueError(f"column array {name} holds {size} bytes for {count} entries")

    def counts(self) -> tuple[int, int, int, int]:
        """Rows that are ok, error, skipped, returned."""
        states = self.status.translate(_WITHOUT_MARK)
        return states.count(OK), states.count(ERROR), states.count(SKIPPED), states.count(RETURNED)


def sized(column: Column, dim: int, dtype: Literal["fp32", "fp16", ""]) -> Column:
    """The same column, told what its vectors are where it does not know: no row of it is ok then."""
    return column if column.dim or column.kind != "vector" else replace(column, dim=dim, dtype=dtype)


def typed(code: str, raw: bytes) -> array[Any]:
    """Little-endian bytes as an array of the struct code, whatever this machine's byte order."""
    values = array(code)
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def little_endian(values: array[Any]) -> bytes:
    """The bytes of an array as columns hold them."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def cut(column: Column, lo: int, hi: int) -> Column:
    """Rows [lo, hi) of a column, as a column."""
    if (lo, hi) == (0, len(column)):
        return column
    layout = dict(LAYOUT[column.kind])
    arrays: dict[str, bytes] = {}
    first, last = lo, hi
    if "offsets" in layout:
        offsets = typed("i", column.arrays["offsets"])
        first, last = offsets[lo], offsets[hi]
        arrays["offsets"] = little_endian(array("i", (end - first for end in offsets[lo : hi + 1])))
    for name, raw in column.arrays.items():
        if name in ("all", "vectors"):
            width = len(raw) // len(column)
            arrays[name] = raw[lo * width : hi * width]
        elif name != "offsets":
            size = struct.calcsize(f"<{layout[name]}")
            arrays[name] = raw[first * size : last * size]
    return Column(
        kind=column.kind,
        status=column.status[lo:hi],
        arrays=arrays,
        errors={i - lo: e for i, e in column.errors.items() if lo <= i < hi},
        dim=column.dim,
        dtype=column.dtype,
    )


def values(column: Column, labels: Sequence[str] = ()) -> Iterator[Any]:
    """The plain values of a column in row order; None where a row is not ok.

    label -> (label, score) or (label, score, {label: score}); labels -> the same as lists of (label, score);
    number -> float; vector -> list of floats; spans -> list of (start, end, label, score); json -> any value.
    """
    a = {name: typed(code, column.arrays.get(name, b"")) for name, code in LAYOUT[column.kind] if code != "B"}
    n = len(column)
    width = len(a["all"]) // n if n and "all" in a else 0
    for i in range(n):
        if column.status[i] & STATE_MASK != OK:
            yield None
            continue
        lo, hi = (a["offsets"][i], a["offsets"][i + 1]) if "offsets" in a else (i, i + 1)
        every = dict(zip(labels, a["all"][i * width : (i + 1) * width], strict=False)) if width else None
        match column.kind:
            case "label":
                pair = (labels[a["codes"][i]], a["scores"][i])
                yield pair if every is None else (*pair, every)
            case "labels":
                pairs = [(labels[a["codes"][j]], a["scores"][j]) for j in range(lo, hi)]
                yield pairs if every is None else (pairs, every)
            case "number":
                yield a["numbers"][i]
            case "vector":
                size = column.dim * (4 if column.dtype == "fp32" else 2)
                raw = column.arrays["vectors"][i * size : (i + 1) * size]
                yield list(struct.unpack(f"<{column.dim}{'f' if column.dtype == 'fp32' else 'e'}", raw))
            case "spans":
                yield [
                    (a["starts"][j], a["ends"][j], labels[a["codes"][j]], a["scores"][j])
                    for j in range(lo, hi)
                ]
            case "json":
                yield json.loads(column.arrays["bytes"][lo:hi])
