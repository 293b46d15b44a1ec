"""Merged rows as the user meets them: ``Row`` and ``Cell``, views of a block's columns.

A block arrives as typed arrays and stays so: a column is decoded when its first cell is asked for, and a
``Cell`` is two references. The arrays' format is motet.protocol.columns'.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from motet.errors import SetupError
from motet.protocol.columns import (
    LAYOUT,
    OK,
    STATE_MASK,
    STATES,
    TRUNCATED,
    CellError,
    Column,
    Kind,
    sized,
    values,
)
from motet.protocol.envelope import BadMessage, unpack
from motet.protocol.values import Value

if TYPE_CHECKING:
    import numpy
    import numpy.typing

#: A row's cursor counts so many for each finished block before its own: more than rows of any block of an open job.
CURSORS_A_BLOCK = 10_000
#: Struct code and bytes of a vector's element.
_ELEMENT = {"fp32": ("f", 4), "fp16": ("e", 2)}


def writes_text(spec: Mapping[str, Any]) -> bool:
    """Whether cells of the task with this spec hold ``{"text": …, "finish": …}``: Generate without schema, Chat."""
    return spec.get("kind") in ("generate", "chat") and not spec.get("schema")


class Span(NamedTuple):
    """One entity: where it stands in the rendered input, in code points, what it is, and how sure that is."""

    start: int
    end: int
    label: str
    score: float


class Answers:
    """A column with its labels: one task's answers in a block, decoded once and only if asked for."""

    __slots__ = ("_decoded", "chosen", "column", "every", "labels", "written")

    def __init__(
        self,
        column: Column,
        labels: Sequence[str] = (),
        *,
        every: bool = False,
        written: bool = False,
        chosen: bool = False,
    ) -> None:
        self.column = column
        self.labels = labels
        #: The task asked for every label's score.
        self.every = every
        #: The values are texts of a language model, each with how it ended.
        self.written = written
        #: The values are labels that each row brought: ``{"label": …, "score": …}``, and ``scores``.
        self.chosen = chosen
        self._decoded: list[Any] | None = None

    @classmethod
    def to(cls, spec: Mapping[str, Any], column: Column) -> Answers:
        """The answers to the task with this spec, as a job's record tells it."""
        chosen = spec.get("kind") == "choose" and column.kind == "json"
        return cls(
            column,
            () if chosen else spec.get("labels") or (),
            every=bool(spec.get("scores")),
            written=writes_text(spec),
            chosen=chosen,
        )

    @property
    def kind(self) -> Kind:
        """What the answers look like to a reader: labels that rows brought are labels, though their column is JSON."""
        return "label" if self.chosen else self.column.kind

    def decoded(self, offset: int) -> Any:
        """The plain value at a row, in the form of ``motet.protocol.columns.values``; None where it is not ok."""
        if self._decoded is None:
            plain = values(self.column, self.labels)
            self._decoded = list(map(_pair, plain) if self.chosen else plain)
        return self._decoded[offset]

    def vector_bytes(self, offset: int) -> memoryview:
        """The bytes of one vector, not copied."""
        size = self.column.dim * _ELEMENT[self.column.dtype][1]
        return memoryview(self.column.arrays["vectors"])[offset * size : (offset + 1) * size]


def _pair(chosen: Mapping[str, Any] | None) -> Any:
    """A label that its row brought, in the form of any other label."""
    if chosen is None:
        return None
    pair = (chosen["label"], chosen["score"])
    return pair if chosen.get("scores") is None else (*pair, chosen["scores"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Contiguous rows of a job with the answers of the tasks that were asked for."""

    number: int
    #: Index in the job of its first row.
    first_row: int
    rows: int
    #: The place of this block among the finished ones; None before it is known.
    done: int | None
    answers: Mapping[str, Answers]
    #: Fold of an open job -> what each row was given.
    state: Mapping[str, Sequence[Value]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Row]:
        return (Row(self, offset) for offset in range(self.rows))

    @classmethod
    def from_wire(cls, frame: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> Block:
        """Build from a frame of ``GET /v1/jobs/{id}/results`` and the specs of the tasks asked for, in order.

        Raises ValueError where it is not one.
        """
        rows, columns = int(frame["rows"]), frame["columns"]
        answers = {
            task: Answers.to(spec, Column.from_wire(columns[task]))
            for task, spec in tasks.items()
            if task in columns
        }
        if any(len(a.column) != rows for a in answers.values()):
            raise ValueError("a column of another length than its block")
        state = frame.get("state") or {}
        if any(len(values) != rows for values in state.values()):
            raise ValueError("state of another length than its block")
        done = frame.get("done")
        return cls(
            number=int(frame["block"]),
            first_row=int(frame["first_row"]),
            rows=rows,
            done=None if done is None else int(done),
            answers=answers,
            state=state,
        )

    @classmethod
    def empty(cls, tasks: Mapping[str, Mapping[str, Any]]) -> Block:
        """A block without rows, of the types that all blocks of these tasks have.

        Raises SetupError where the server does not tell them.
        """
        answers = {task: Answers.to(spec, _empty(spec)) for task, spec in tasks.items()}
        return cls(number=0, first_row=0, rows=0, done=None, answers=answers)


def _empty(spec: Mapping[str, Any]) -> Column:
    """A column without rows, of the type that a job's record tells of a task."""
    told = spec.get("column")
    if not told:
        raise SetupError(
            "the server is older than this client and does not tell the types of answers; update it"
        )
    offsets = {"offsets": bytes(4)} if LAYOUT[told["kind"]][0][0] == "offsets" else {}
    empty = {name: b"" for name, _ in LAYOUT[told["kind"]]}
    column = Column(kind=told["kind"], status=b"", arrays=empty | offsets)
    return sized(column, told.get("dim", 0), told.get("dtype", ""))


class Row(Mapping[str, "Cell"]):
    """The merged answers for one input: a mapping of task name to ``Cell``.

    ``row["topic"]`` raises KeyError, naming the tasks that there are, for one that there is not.
    """

    __slots__ = ("_block", "_offset")

    def __init__(self, block: Block, offset: int) -> None:
        self._block = block
        self._offset = offset

    @property
    def index(self) -> int:
        """The row's place in the job, from 0."""
        return self._block.first_row + self._offset

    @property
    def cursor(self) -> int | None:
        """Where ``Feed.rows(after=cursor)`` goes on behind this row; None of a row that did not come from there."""
        done, offset = self._block.done, self._offset + 1
        if done is None:
            return None
        return done * CURSORS_A_BLOCK if offset == len(self._block) else (done - 1) * CURSORS_A_BLOCK + offset

    @property
    def state(self) -> dict[str, Value]:
        """What the row of an open job with state was given of the rows before it, by name (docs/live.md)."""
        return {name: values[self._offset] for name, values in self._block.state.items()}

    @property
    def errors(self) -> dict[str, CellError]:
        """Task -> why it has no answer here; empty for a row that is whole."""
        return {task: cell.error for task, cell in self.items() if cell.error is not None}

    @property
    def ok(self) -> bool:
        """True where every task has answered."""
        return all(cell.ok for cell in self.values())

    def __getitem__(self, task: str) -> Cell:
        try:
            return Cell(self._block.answers[task], self._offset)
        except KeyError:
            raise KeyError(f"no task {task!r} here; there are {', '.join(self._block.answers)}") from None

    def __contains__(self, task: object) -> bool:
        return task in self._block.answers

    def __iter__(self) -> Iterator[str]:
        return iter(self._block.answers)

    def __len__(self) -> int:
        return len(self._block.answers)

    def __repr__(self) -> str:
        cells = ", ".join(f"{task}: {cell}" for task, cell in self.items())
        return f"<Row {self.index} {cells}>"


class Cell:
    """The answer of one task for one row.

    ``str(cell)`` is the label or the text where there is one, and a cell equals its value:
    ``row["topic"] == "sport"``.
    A cell without an answer has ``value`` None and says why in ``error``; reading it never raises.
    """

    __slots__ = ("_offset", "answers")

    def __init__(self, answers: Answers, offset: int) -> None:
        #: The column that it is a view of.
        self.answers = answers
        self._offset = offset

    @property
    def kind(self) -> str:
        """What answers look like: ``label``, ``labels``, ``number``, ``vector``, ``spans`` or ``json``.

        A text is JSON as well: a cell whose ``finish`` is not None holds one.
        """
        return self.answers.kind

    @property
    def status(self) -> str:
        """``ok``, ``error`` or ``skipped``."""
        return STATES[self._state]

    @property
    def ok(self) -> bool:
        return self._state == OK

    @property
    def truncated(self) -> bool:
        """True where the input was cut to what the model reads."""
        return bool(self.answers.column.status[self._offset] & TRUNCATED)

    @property
    def error(self) -> CellError | None:
        """Why there is no answer; None where there is one."""
        if self.ok:
            return None
        return self.answers.column.errors.get(self._offset) or CellError(self.status, "")

    @property
    def value(self) -> Any:
        """The answer as plain data, or None where there is none.

        Classify and Choose: the label; multi-label: a list of (label, score). Number: a float. Embed: a list of
        floats. Entities: a list of Span. Generate and Chat: the text. Extract, and Generate with a schema: the JSON
        value. Function: what the function returned. Rank: a list of {"index", "score"}.
        """
        if not self.ok:
            return None
        match self.answers.kind:
            case "vector":
                return self.vector
            case "label":
                return self._plain[0]
            case "labels":
                return self._pairs
            case "spans":
                return [Span(*span) for span in self._plain]
            case _:
                return self._plain["text"] if self.answers.written else self._plain

    @property
    def finish(self) -> str | None:
        """How a text ended: ``stop``, or ``length`` where ``max_tokens`` were not enough; None for all else."""
        return str(self._plain["finish"]) if self.ok and self.answers.written else None

    @property
    def label(self) -> str | None:
        """The winning label; of several the surest; None where there is none."""
        match self.answers.kind:
            case "label" if self.ok:
                return str(self._plain[0])
            case "labels" if self.ok and self._pairs:
                return str(max(self._pairs, key=lambda pair: pair[1])[0])
            case _:
                return None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels given: one for a single-label task, any number for a multi-label one."""
        if self.answers.column.kind == "labels" and self.ok:
            return tuple(label for label, _ in self._pairs)
        return (self.label,) if self.label is not None else ()

    @property
    def score(self) -> float | None:
        """How sure the winning label is, 0 to 1; None where the answer has no score."""
        match self.answers.kind:
            case "label" if self.ok:
                return float(self._plain[1])
            case "labels" if self.ok and self._pairs:
                return float(max(score for _, score in self._pairs))
            case _:
                return None

    @property
    def scores(self) -> dict[str, float] | None:
        """Every label's score where the task asked for them (``scores=True``), else None."""
        if not self.ok or not (self.answers.chosen or self.answers.column.arrays.get("all")):
            return None
        plain = self._plain[-1]
        return plain if isinstance(plain, dict) else None

    @property
    def vector(self) -> list[float] | None:
        """The vector of an Embed task as floats, or None."""
        column = self.answers.column
        if not self.ok or column.kind != "vector":
            return None
        code, _ = _ELEMENT[column.dtype]
        return list(struct.unpack(f"<{column.dim}{code}", self.answers.vector_bytes(self._offset)))

    def numpy(self) -> numpy.typing.NDArray[numpy.floating[Any]]:
        """The vector as a read-only array of its own type, float16 or float32, not copied.

        Raises TypeError where the cell holds no vector.
        """
        column = self.answers.column
        if not self.ok or column.kind != "vector":
            raise TypeError(f"got a cell of kind {column.kind} that is {self.status}; expected a vector")
        import numpy

        code, _ = _ELEMENT[column.dtype]
        return numpy.frombuffer(self.answers.vector_bytes(self._offset), dtype=f"<{code}")

    @property
    def _state(self) -> int:
        return self.answers.column.status[self._offset] & STATE_MASK

    @property
    def _plain(self) -> Any:
        return self.answers.decoded(self._offset)

    @property
    def _pairs(self) -> list[tuple[str, float]]:
        plain = self._plain
        return plain[0] if isinstance(plain, tuple) else plain  # type: ignore[no-any-return]

    def __str__(self) -> str:
        if self.error is not None:
            why = self.error.error
            return f"<{self.status}>" if why == self.status else f"<{self.status}: {why}>"
        match self.answers.kind:
            case "label":
                return str(self._plain[0])
            case "labels":
                return ", ".join(self.labels)
            case "number":
                return f"{self._plain:g}"
            case "vector":
                return f"<{self.answers.column.dim} × {self.answers.column.dtype}>"
            case "spans":
                return ", ".join(f"{span.label}[{span.start}:{span.end}]" for span in self.value)
            case _:
                plain = self.value
                return plain if self.answers.written else json.dumps(plain, ensure_ascii=False)

    def __repr__(self) -> str:
        return f"<Cell {self}>"

    def __format__(self, spec: str) -> str:
        return format(self.value if isinstance(self.value, float) and spec else str(self), spec)

    def __float__(self) -> float:
        if isinstance(self.value, float):
            return self.value
        raise TypeError(
            f"got a cell of kind {self.answers.column.kind} that is {self.status}; expected a number"
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Cell):
            return (self.status, self.value, self.error) == (other.status, other.value, other.error)
        return self.ok and bool(self.value == other)

    def __hash__(self) -> int:
        return hash(self.value)


def read_frames(body: bytes) -> Iterator[Mapping[str, Any]]:
    """The frames of a whole results answer. Raises BadMessage where the body is torn or no such stream."""
    return frames_in((body,))


def frames_in(pieces: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    """The frames of an answer as its pieces arrive: each 4 bytes of length, big-endian, then zstd of msgpack.

    Raises BadMessage where the pieces together are torn or no such stream.
    """
    rest = b""
    for piece in pieces:
        rest, at = rest + piece, 0
        while at + 4 <= len(rest) and at + 4 + (size := int.from_bytes(rest[at : at + 4], "big")) <= len(
            rest
        ):
            frame = unpack(rest[at + 4 : at + 4 + size])
            if not isinstance(frame, dict):
                raise BadMessage("a frame that is no mapping")
            yield frame
            at += 4 + size
        rest = rest[at:]
    if rest:
        raise BadMessage(_torn(rest))


def _torn(rest: bytes) -> str:
    if len(rest) < 4:
        return "a results stream that ends within a length"
    return f"a results stream that ends {int.from_bytes(rest[:4], 'big') + 4 - len(rest)} bytes early"
