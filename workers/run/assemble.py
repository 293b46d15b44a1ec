"""The columns of a sub-task, put together from those of its micro-batches, in the sub-task's row order. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from motet.protocol.columns import ERROR, LAYOUT, STATE_MASK, TRUNCATED, CellError, Column, Kind

#: The array that holds as many bytes for every row also in a kind whose other arrays vary.
_PER_ROW = "all"


def assemble(
    kind: Kind,
    rows: int,
    parts: Sequence[tuple[Sequence[int], Column]],
    errors: Mapping[int, CellError],
    truncated: frozenset[int] = frozenset(),
    *,
    dim: int = 0,
    dtype: Literal["fp32", "fp16", ""] = "",
) -> Column:
    """One column over ``rows`` rows. Each part brings the rows at its positions.

    ``errors`` are the rows without an answer, whatever a part says of them; every row is in a part or there.
    ``dim`` and ``dtype`` matter for vectors, where no part may be there to tell.
    """
    status = np.full(rows, 0xFF, np.uint8)
    reasons: dict[int, CellError] = {}
    for positions, part in parts:
        status[list(positions)] = np.frombuffer(part.status, np.uint8)
        reasons.update((positions[i], e) for i, e in part.errors.items())
    for row, error in errors.items():
        status[row] = ERROR
        reasons[row] = error
    if (status == 0xFF).any():
        raise AssertionError(f"{int((status == 0xFF).sum())} of {rows} rows have neither answer nor error")
    cut_rows = [row for row in truncated if status[row] & STATE_MASK != ERROR]
    status[cut_rows] |= TRUNCATED
    return Column(
        kind=kind,
        status=status.tobytes(),
        arrays=_arrays(kind, rows, parts, frozenset(errors), dim, dtype),
        errors=reasons,
        dim=dim if kind == "vector" else 0,
        dtype=dtype if kind == "vector" else "",
    )


def _arrays(
    kind: Kind,
    rows: int,
    parts: Sequence[tuple[Sequence[int], Column]],
    without: frozenset[int],
    dim: int,
    dtype: str,
) -> dict[str, bytes]:
    layout = dict(LAYOUT[kind])
    ragged = "offsets" in layout
    arrays: dict[str, bytes] = {}
    for name, code in layout.items():
        if name == "offsets" or (ragged and name != _PER_ROW):
            continue
        width = dim * (2 if dtype == "fp16" else 4) if name == "vectors" else struct.calcsize(code)
        if name == "all":
            width = max(
                (len(part.arrays.get("all", b"")) // len(part) for _, part in parts if len(part)), default=0
            )
        if width or name != "all":
            arrays[name] = _scattered(name, rows, width, parts, without)
    if ragged:
        arrays.update(_ragged(layout, rows, parts, without))
    return arrays


def _scattered(
    name: str,
    rows: int,
    width: int,
    parts: Sequence[tuple[Sequence[int], Column]],
    without: frozenset[int],
) -> bytes:
    """Rows of ``width`` bytes, each at its position; zeros where a row has no answer."""
    target = np.zeros((rows, width), np.uint8)
    for positions, part in parts:
        target[list(positions)] = np.frombuffer(part.arrays[name], np.uint8).reshape(len(part), width)
    target[sorted(without)] = 0
    return bytes(target)


def _ragged(
    layout: Mapping[str, str],
    rows: int,
    parts: Sequence[tuple[Sequence[int], Column]],
    without: frozenset[int],
) -> dict[str, bytes]:
    """The arrays whose length differs by row, laid end to end in row order, with their offsets."""
    names = [name for name in layout if name != "offsets" and name != _PER_ROW]
    places: list[tuple[Column, int, int] | None] = [None] * rows
    for positions, part in parts:
        offsets = np.frombuffer(part.arrays["offsets"], "<i4")
        for i, row in enumerate(positions):
            if row not in without:
                places[row] = (part, int(offsets[i]), int(offsets[i + 1]))
    lengths = np.array([0 if place is None else place[2] - place[1] for place in places], "<i4")
    arrays = {"offsets": np.concatenate([[0], np.cumsum(lengths)]).astype("<i4").tobytes()}
    for name in names:
        size = struct.calcsize(layout[name])
        arrays[name] = b"".join(
            part.arrays[name][lo * size : hi * size] for part, lo, hi in filter(None, places)
        )
    return arrays
