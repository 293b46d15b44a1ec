"""Merge: parts of a column, in whatever order they came, into one column in row order. Pure, numpy.

Sealing calls ``merge`` once per (block, task).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.protocol.columns import (
    ERROR,
    LAYOUT,
    OK,
    RETURNED,
    SKIPPED,
    STATE_MASK,
    CellError,
    Column,
    Kind,
    is_storable_json,
)
from motet.states import Skip

_SKIPS = frozenset(Skip)
_DTYPES = {"h": "<i2", "i": "<i4", "f": "<f4", "d": "<f8", "B": "u1"}
Positions = npt.NDArray[np.int64]


class BadColumn(Exception):
    """An outcome's column does not fit its sub-task: of another kind, length or set of labels."""


@dataclass(frozen=True, slots=True)
class AnswersPart:
    """Answers for some rows of a block: ``rows[i]`` is the offset in the block of the column's row i."""

    rows: Positions
    column: Column


def check(
    column: Column, *, kind: str, n_rows: int, n_labels: int, dim: int = 0, dtype: str = "fp32"
) -> None:
    """Raise BadColumn unless the column can be the answer of this task for so many rows.

    ``dim`` and ``dtype``: what the task's vectors are; ``n_labels``: 0 where any label code is believed.
    """
    if column.kind != kind:
        raise BadColumn(f"kind {column.kind}, not {kind}")
    if len(column) != n_rows:
        raise BadColumn(f"{len(column)} rows, not {n_rows}")
    if n_labels and "codes" in column.arrays:
        codes = array_of(column, "codes")
        if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= n_labels):
            raise BadColumn(f"a label beyond {n_labels}")
    for name in ("scores", "all", "numbers"):
        if name in column.arrays and not np.isfinite(array_of(column, name)).all():
            raise BadColumn(f"{name} that are not finite")
    every = len(column.arrays.get("all", b""))
    if every and every != 4 * n_rows * n_labels:
        raise BadColumn(f"all scores of another number of labels than {n_labels}")
    states = np.frombuffer(column.status, "u1") & STATE_MASK
    if np.any((states == SKIPPED) | (states == RETURNED)):
        raise BadColumn("a worker can neither skip nor return a row")
    if kind == "vector" and np.any(states == OK) and (column.dim, column.dtype) != (dim, dtype):
        raise BadColumn(f"vectors of {column.dim} x {column.dtype}, not {dim} x {dtype}")
    if kind == "json":
        _check_json(column)
    unanswered = np.flatnonzero(states == ERROR)
    if set(unanswered.tolist()) - set(column.errors):
        raise BadColumn("an error without its reason")


def _check_json(column: Column) -> None:
    raw = column.arrays.get("bytes", b"")
    for lo, hi in pairwise(array_of(column, "offsets").tolist()):
        if hi > lo and not is_storable_json(raw[lo:hi]):
            raise BadColumn("a value that is not JSON, or that Postgres does not take")


def returned_rows(columns: Mapping[int, Column], but: Mapping[int, Collection[int]]) -> Positions:
    """Positions whose answer is not final in some column: a retriable error, or marked as returned.

    ``but``: number of a column -> positions in it whose answers nobody asks for.
    """
    found: set[int] = set()
    for number, column in columns.items():
        here = {i for i, e in column.errors.items() if e.retriable}
        states = np.frombuffer(column.status, "u1") & STATE_MASK
        here.update(np.flatnonzero(states == RETURNED).tolist())
        found |= here.difference(but.get(number, ()))
    return np.array(sorted(found), dtype=np.int64)


def mark_returned(column: Column, positions: Positions) -> Column:
    """The same column with these rows marked: they count for nothing and are left out of the merge."""
    if not positions.size:
        return column
    status = np.frombuffer(column.status, "u1").copy()
    status[positions] = RETURNED
    gone = set(positions.tolist())
    return Column(
        kind=column.kind,
        status=status.tobytes(),
        arrays=column.arrays,
        errors={i: e for i, e in column.errors.items() if i not in gone},
        dim=column.dim,
        dtype=column.dtype,
    )


def errors_column(kind: Kind, errors: Sequence[CellError]) -> Column:
    """A column in which every row is an error, or skipped where its class is a reason to skip."""
    n = len(errors)
    arrays: dict[str, bytes] = {}
    for name, code in LAYOUT[kind]:
        if name == "offsets":
            arrays[name] = np.zeros(n + 1, "<i4").tobytes()
        elif name not in ("all", "vectors") and not _variable(kind):
            arrays[name] = np.zeros(n, _DTYPES[code]).tobytes()
        elif name == "vectors":
            arrays[name] = b""
    return Column(
        kind=kind,
        status=bytes(SKIPPED if e.error in _SKIPS else ERROR for e in errors),
        arrays=arrays,
        errors=dict(enumerate(errors)),
        dim=0,
        dtype="fp32" if kind == "vector" else "",
    )


def merge(
    kind: Kind,
    n_rows: int,
    parts: Sequence[AnswersPart],
    *,
    absent: Mapping[int, CellError],
    skipped: Mapping[int, CellError] | None = None,
) -> Column:
    """One column of ``n_rows`` rows in row order.

    ``absent`` names rows that were never worked on, being broken on arrival, ``skipped`` those that another task left
    without what they need. Asserts that every row is answered exactly once: a hole or an overlap here would be a broken
    invariant, not bad input.
    """
    skipped = skipped or {}
    assert not absent.keys() & skipped.keys(), "a row that came broken waited for an answer"
    status = np.full(n_rows, RETURNED, "u1")
    errors: dict[int, CellError] = {**absent, **skipped}
    status[list(absent)] = ERROR
    status[list(skipped)] = SKIPPED
    final = [_final(p) for p in parts]
    for part in final:
        assert (status[part.rows] == RETURNED).all(), "a row was answered twice"
        status[part.rows] = np.frombuffer(part.column.status, "u1")
        for i, e in part.column.errors.items():
            errors[int(part.rows[i])] = e
    assert not (status == RETURNED).any(), "a row was not answered"
    dim = max((p.column.dim for p in final), default=0)
    dtype = next((p.column.dtype for p in final if p.column.dim), "fp32" if kind == "vector" else "")
    arrays = (
        _merge_variable(kind, n_rows, final)
        if _variable(kind)
        else _merge_fixed(kind, n_rows, final, dim, dtype)
    )
    return Column(kind=kind, status=status.tobytes(), arrays=arrays, errors=errors, dim=dim, dtype=dtype)


def array_of(column: Column, name: str) -> npt.NDArray[Any]:
    """One of a column's arrays, without a copy."""
    code = dict(LAYOUT[column.kind])[name]
    return np.frombuffer(column.arrays.get(name, b""), _DTYPES[code])


def _final(part: AnswersPart) -> AnswersPart:
    """The part without its returned rows."""
    keep = np.flatnonzero((np.frombuffer(part.column.status, "u1") & STATE_MASK) != RETURNED)
    if keep.size == len(part.column):
        return part
    return AnswersPart(part.rows[keep], _pick(part.column, keep))


def _pick(column: Column, keep: Positions) -> Column:
    """These rows of a column, in this order."""
    n = len(column)
    arrays: dict[str, bytes] = {}
    chosen = keep
    if _variable(column.kind):
        offsets = array_of(column, "offsets").astype(np.int64)
        counts = np.diff(offsets)[keep]
        chosen = _spread(offsets[:-1][keep], counts)
        arrays["offsets"] = np.concatenate(([0], np.cumsum(counts))).astype("<i4").tobytes()
    for name, code in LAYOUT[column.kind]:
        raw = column.arrays.get(name, b"")
        if name == "offsets":
            continue
        if name in ("all", "vectors"):
            width = len(raw) // n if n else 0
            arrays[name] = np.frombuffer(raw, "u1").reshape(n, width)[keep].tobytes() if width else b""
        else:
            arrays[name] = np.frombuffer(raw, _DTYPES[code])[chosen].tobytes()
    places = {int(k): i for i, k in enumerate(keep)}
    return Column(
        kind=column.kind,
        status=np.frombuffer(column.status, "u1")[keep].tobytes(),
        arrays=arrays,
        errors={places[i]: e for i, e in column.errors.items() if i in places},
        dim=column.dim,
        dtype=column.dtype,
    )


def _merge_fixed(
    kind: Kind, n_rows: int, parts: Sequence[AnswersPart], dim: int, dtype: str
) -> dict[str, bytes]:
    arrays: dict[str, bytes] = {}
    for name, code in LAYOUT[kind]:
        if name in ("all", "vectors"):
            arrays[name] = _merge_wide(name, n_rows, parts, dim * (4 if dtype == "fp32" else 2))
            continue
        merged = np.zeros(n_rows, _DTYPES[code])
        for part in parts:
            merged[part.rows] = array_of(part.column, name)
        arrays[name] = merged.tobytes()
    return arrays


def _merge_wide(name: str, n_rows: int, parts: Sequence[AnswersPart], vector_bytes: int) -> bytes:
    """Arrays of a fixed number of bytes per row; a part whose rows all failed may have none."""
    widths = {len(p.column.arrays.get(name, b"")) // len(p.column) for p in parts if len(p.column)} - {0}
    width = max(widths, default=vector_bytes if name == "vectors" else 0)
    merged = np.zeros((n_rows, width), "u1")
    for part in parts:
        raw = np.frombuffer(part.column.arrays.get(name, b""), "u1")
        if raw.size:
            merged[part.rows] = raw.reshape(len(part.column), width)
    return merged.tobytes()


def _merge_variable(kind: Kind, n_rows: int, parts: Sequence[AnswersPart]) -> dict[str, bytes]:
    counts = np.zeros(n_rows, np.int64)
    for part in parts:
        counts[part.rows] = np.diff(array_of(part.column, "offsets"))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    arrays = {"offsets": offsets.astype("<i4").tobytes()}
    for name, code in LAYOUT[kind]:
        if name == "offsets":
            continue
        if name == "all":
            arrays[name] = _merge_wide(name, n_rows, parts, 0)
            continue
        merged = np.zeros(int(offsets[-1]), _DTYPES[code])
        for part in parts:
            merged[_spread(offsets[:-1][part.rows], counts[part.rows])] = array_of(part.column, name)
        arrays[name] = merged.tobytes()
    return arrays


def _spread(starts: Positions, counts: Positions) -> Positions:
    """Indices of consecutive runs: starts[0], starts[0]+1, …, counts[0] of them, then the next run."""
    total = int(counts.sum())
    if not total:
        return np.zeros(0, np.int64)
    before = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return np.repeat(starts - before, counts) + np.arange(total)


def _variable(kind: Kind) -> bool:
    return LAYOUT[kind][0][0] == "offsets"
