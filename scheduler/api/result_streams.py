"""Merged rows as bytes: frames of msgpack for clients, JSON lines for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.errors import Gone, NotFound
from motet.messages.jobs import JobRecord
from motet.protocol.columns import Column, values
from motet.protocol.envelope import pack
from motet.protocol.values import Value, json_value
from scheduler.api.refusals import CutOff, error_of
from scheduler.store.database import StoreUnavailable
from scheduler.store.results import ReadyBlock, RowOrder, Shown, ShownTask


@dataclass(frozen=True, slots=True)
class Merged:
    """One block with its columns, in the order of the job's tasks."""

    job: Shown
    block: ReadyBlock
    columns: Sequence[Column]
    #: Fold -> what each row was given.
    given: Mapping[str, Sequence[Value]]


@dataclass(frozen=True, slots=True)
class End:
    """The last word of an answer: where to ask on, and whether there is any need to."""

    after: int
    state: str
    complete: bool
    #: Index of the first row from which on all are kept.
    first_row: int = 0
    #: The job as ``GET /v1/jobs/{id}`` tells it, behind the last block of all: that saves a question.
    job: JobRecord | None = None


def frame_stream(pieces: Iterator[Merged | End], order: RowOrder) -> Iterator[bytes]:
    """Frames, with one that ends them. Where Postgres or the job goes away behind a block, it says where to go on.

    Raises StoreUnavailable or NotFound before the first block.
    """
    sent: Merged | None = None
    try:
        for piece in pieces:
            yield as_frame(piece)
            sent = piece if isinstance(piece, Merged) else None
    except (StoreUnavailable, NotFound):
        if sent is None:
            raise
        yield as_frame(End(sent.block.cursor(order), sent.job.state, False, sent.job.first_row))


def line_stream(pieces: Iterator[Merged | End], order: RowOrder) -> Iterator[bytes]:
    """JSON lines. Lines have no end of their own, so those that break off must not look like whole ones.

    Whatever goes wrong behind a block is told in a last line, for readers to whom a proxy shows the end of the
    connection as the end of the body; then CutOff is raised, or the error itself where it is a fault of ours.
    Raises StoreUnavailable or NotFound before the first block.
    """
    sent: Merged | None = None
    try:
        for piece in pieces:
            yield as_lines(piece)
            sent = piece if isinstance(piece, Merged) else None
    except Exception as error:
        if sent is None:
            raise
        yield _last_line(error, sent.block.cursor(order))
        if isinstance(error, StoreUnavailable | NotFound):
            raise CutOff(type(error).__name__) from None
        raise


def _last_line(error: Exception, after: int) -> bytes:
    """Why the lines end before the rows do, in the words of a refusal, and where to go on."""
    said = error_of(error).to_json(sparse=True)
    if not isinstance(error, NotFound) or isinstance(error, Gone):
        said["message"] += f"; there are more rows: ask again with after={after}"
    return json.dumps({"error": said | {"next": after}}, ensure_ascii=False).encode() + b"\n"


def as_frame(piece: Merged | End) -> bytes:
    """A block, or the end, as a frame of docs/http.md."""
    if isinstance(piece, End):
        end = {"end": True, "next": piece.after, "state": piece.state, "complete": piece.complete}
        if piece.first_row:
            end["first_row"] = piece.first_row
        body = pack(end | ({"job": piece.job.to_json()} if piece.job else {}))
    else:
        tasks = zip(piece.job.tasks, piece.columns, strict=True)
        body = pack(
            {
                "block": piece.block.number,
                "first_row": piece.block.first_row,
                "rows": piece.block.n_rows,
                "done": piece.block.done,
                "columns": {t.name: c.to_wire() for t, c in tasks},
                **({"state": dict(piece.given)} if piece.given else {}),
            }
        )
    return framed(body)


def framed(body: bytes) -> bytes:
    """A body behind its length."""
    return len(body).to_bytes(4, "big") + body


def as_lines(piece: Merged | End) -> bytes:
    """The rows of a block as JSON lines; a cell without an answer is null, and told under ``errors``."""
    if isinstance(piece, End):
        return b""
    rows = plain_rows(piece.job.tasks, piece.columns, piece.block.first_row, piece.given)
    return ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n").encode()


def plain_rows(
    tasks: Sequence[ShownTask],
    columns: Sequence[Column],
    first_row: int,
    given: Mapping[str, Sequence[Value]],
) -> list[dict[str, Any]]:
    """The rows of these columns as people read them; a cell without an answer is None, and told under ``errors``."""
    cells = {t.name: [_plain(c, v) for v in values(c, t.labels)] for t, c in zip(tasks, columns, strict=True)}
    rows = []
    for offset in range(len(columns[0])):
        row: dict[str, Any] = {"row": first_row + offset}
        row.update((name, column[offset]) for name, column in cells.items())
        if given:
            row["state"] = {name: json_value(values[offset]) for name, values in given.items()}
        row["errors"] = {
            t.name: {"error": e.error, "message": e.message}
            for t, c in zip(tasks, columns, strict=True)
            if (e := c.errors.get(offset)) is not None
        }
        rows.append(row)
    return rows


def _plain(column: Column, value: Any) -> Any:
    """A cell as people read it: the label; the labels given; a number; a vector; spans; any JSON.

    With every score asked for, a label comes with them.
    """
    if value is None:
        return None
    match column.kind:
        case "label":
            label, *rest = value
            return {"label": label, "score": _finite(rest[0]), "scores": rest[1]} if len(rest) > 1 else label
        case "labels":
            pairs, every = value if isinstance(value, tuple) else (value, None)
            names = [label for label, _ in pairs]
            return names if every is None else {"labels": names, "scores": every}
        case "spans":
            return [{"start": a, "end": b, "label": label, "score": _finite(s)} for a, b, label, s in value]
        case "number":
            return _finite(value)
        case "vector":
            return [_finite(x) for x in value]
        case _:
            return value


def _finite(x: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if math.isfinite(x) else None
