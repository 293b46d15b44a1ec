"""One attempt on its way through the executor: its rows, the answers so far, and the outcome at the end."""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from motet.protocol.columns import TRUNCATED, CellError, Column, little_endian
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment, Outcome, Spent, TaskOrder, Usage, bytes_read, texts_of
from workers.engine import PLACES, Consumed, Pass, Prepared
from workers.run.assemble import assemble
from workers.run.batching import longest_first

#: Options of a task that mean nothing to an engine: the same model pass answers tasks that differ in them.
_NOT_FOR_ENGINES = frozenset(
    {"model", "artefact", "input", "about", "messages", "too_long", "numerics", "conditional", "when"}
)
#: And one that counts what is read, which a pass has in common; a language model is asked to write so many.
_READ = frozenset({"max_tokens"})

TOO_LONG = CellError(
    "too_long", "the input has more tokens than are read, and the task says too_long='error'"
)

CONTEXT_LENGTH = CellError(
    "context_length",
    "the prompt has more tokens than the model's context, and the task says too_long='error'",
)


@dataclass(frozen=True, slots=True)
class PassKey:
    """Rows of equal keys may share a micro-batch, whatever job they belong to."""

    #: Digest of the trunk.
    model: str
    format: str
    max_tokens: int
    #: What the tasks ask of the engine, each once, in a fixed order.
    asks: tuple[str, ...]


#: A model in one numeric format: digest of its trunk, and the format.
ModelKey = tuple[str, str]


class Stage(Enum):
    """Where an attempt is. WAITING → STAGED → PREPARING → READY."""

    #: Its model's files are being fetched.
    WAITING = "waiting"
    #: The files are here; the model may have to be loaded.
    STAGED = "staged"
    #: Its rows are being tokenised; its model must stay.
    PREPARING = "preparing"
    #: Its rows wait for the device.
    READY = "ready"


@dataclass(slots=True, eq=False)
class Work:
    """One attempt. After ``submit`` only the executor changes it."""

    order: Assignment
    key: PassKey
    #: The tasks as engines see them: named by what they ask.
    tasks: tuple[TaskOrder, ...]
    #: Task name -> what it asks.
    asks: Mapping[str, str]
    #: Arrival, as a number that rises.
    arrived: int
    stage: Stage = Stage.WAITING
    #: Rows that wait for the device: longest first, or as they came.
    rows: list[Prepared] = field(default_factory=list)
    #: Its rows bring prompts of their own, and come with those side by side that begin alike: they stay so.
    in_order: bool = False
    #: Rows that have neither an answer nor an error yet.
    unanswered: int = 0
    answers: list[tuple[Sequence[int], Mapping[str, Column]]] = field(default_factory=list)
    errors: dict[int, CellError] = field(default_factory=dict)
    truncated: set[int] = field(default_factory=set)
    usage: Usage = field(default_factory=Usage)
    #: What was asked -> row -> tokens in, of them cached, tokens out, seconds; of language models.
    spent: dict[str, dict[int, Consumed]] = field(default_factory=dict)
    #: Set when the outcome is on the stream, or when nobody waits for one any more.
    finished: threading.Event = field(default_factory=threading.Event)
    #: What its rows were prepared for, and are let in with.
    pass_: Pass | None = None
    #: Sha256 -> bytes of the media that its rows refer to, from their arrival until the rows are prepared.
    media: Mapping[str, bytes] = field(default_factory=dict)
    #: What must be in memory for it, its heads aside.
    model: ModelKey = field(init=False)

    def __post_init__(self) -> None:
        self.model = (self.key.model, self.key.format)

    @classmethod
    def of(cls, order: Assignment, in_format: str, arrived: int) -> Work:
        """A fresh attempt that will run in ``in_format``."""
        tasks, asks = _asked(order.tasks)
        key = PassKey(order.model.digest, in_format, order.max_tokens, tuple(task.name for task in tasks))
        return cls(
            order=order,
            key=key,
            tasks=tasks,
            asks=asks,
            arrived=arrived,
            unanswered=len(order.texts),
            usage=Usage(
                text_bytes=sum(
                    bytes_read(len(t.encode("utf-8", "replace")), order.max_tokens) for t in order.texts
                ),
                format=in_format,
            ),
        )

    @property
    def ids(self) -> dict[str, int]:
        """What logs know it by."""
        return {"subtask": self.order.subtask, "attempt": self.order.attempt}

    @property
    def interactive(self) -> bool:
        return self.order.interactive

    @property
    def exclusive(self) -> bool:
        """It is suspected of killing its process, and runs with nothing beside it."""
        return self.order.exclusive

    @property
    def loaded_for(self) -> bool:
        """A model was loaded for it, and it has not run yet."""
        return self.usage.load_s > 0 and not self.answers

    @property
    def heads(self) -> list[TaskOrder]:
        """Tasks with a head or an artefact of their own, each once."""
        return [task for task in self.tasks if task.manifest.is_beside]

    @property
    def tokens_waiting(self) -> int:
        """Tokens of the rows that wait for the device. Any thread may ask."""
        return sum(row.length for row in self.rows.copy())

    def predicted_s(self, rows: Sequence[int]) -> float:
        """Seconds of these rows by what the scheduler predicts of all: by their number, or by their length if more."""
        texts = self.order.texts
        size = sum(len(texts[row]) for row in rows) / max(1, sum(map(len, texts)))
        return self.order.predicted_s * max(len(rows) / len(texts), size)

    def prepared(self, rows: Sequence[Prepared | CellError], *, streamed: bool = False) -> None:
        """Take the tokenised rows. Rows that no task wants any more never reach the device.

        ``streamed``: they will go in one by one, so that none has to be as long as its neighbours.
        """
        ready = []
        for position, row in enumerate(rows):
            if isinstance(row, CellError):
                self.lose(position, row)
                continue
            if row.truncated:
                self.truncated.add(row.row)
            if row.truncated and all(_refuses(task) for task in self.order.tasks):
                self.lose(row.row, _too_long(self.order.tasks[0]))
                continue
            ready.append(row)
        self.in_order = streamed and len(self.tasks) == 1 and bool(self.tasks[0].spec.get("options"))
        self.wait_again(ready)
        self.stage = Stage.READY

    def wait_again(self, rows: Sequence[Prepared]) -> None:
        """Rows that are to go in before those that wait, as far as their order goes."""
        waiting = [*rows, *self.rows]
        self.rows = waiting if self.in_order else longest_first(waiting)

    def lose(self, row: int, error: CellError) -> None:
        """A row that will have no answer."""
        self.errors[row] = error
        self.unanswered -= 1

    def take(self, rows: Sequence[Prepared], answers: Mapping[str, Column]) -> None:
        """The answers of a step for these rows, by what was asked."""
        self.answers.append(([row.row for row in rows], answers))
        self.unanswered -= len(rows)

    def charge(self, rows: Sequence[Prepared], computed_tokens: int, busy_s: float) -> None:
        """Count its share of a micro-batch that brought answers."""
        u, lengths = self.usage, [row.length for row in rows]
        self.usage = replace(
            u,
            tokens=u.tokens + sum(lengths),
            computed_tokens=u.computed_tokens + computed_tokens,
            micro_batches=u.micro_batches + 1,
            busy_s=u.busy_s + busy_s,
            squares=u.squares + sum([length * length for length in lengths]),
        )

    def charge_consumed(self, row: Prepared, spent: Mapping[str, Consumed]) -> None:
        """Count what a row that left a language model consumed."""
        for ask, one in spent.items():
            self.spent.setdefault(ask, {})[row.row] = one
        computed = sum(tokens_in - cached for tokens_in, cached, _, _ in spent.values())
        self.charge([row], computed, sum(seconds for *_, seconds in spent.values()))

    def charge_load(self, load_s: float) -> None:
        self.usage = replace(self.usage, load_s=self.usage.load_s + load_s)

    def outcome(self, worker: str, boot: str) -> Outcome:
        """What it reports once no row is unanswered."""
        try:
            columns = {task.name: self._column(task) for task in self.order.tasks}
            told = self._spent()
        except Exception as error:  # noqa: BLE001 - answers of a stranger's engine that do not fit each other
            why = ("engine", f"its answers do not fit each other: {type(error).__name__}")
            return self.failure(worker, boot, why, refused="")
        return self._outcome(worker, boot, verdict="done", columns=columns, spent=told)

    def _spent(self) -> dict[str, Spent]:
        """By task. Of two tasks that ask the same, the second one finds all of it done."""
        told: dict[str, Spent] = {}
        seen: set[str] = set()
        for task in self.order.tasks if self.spent else ():
            ask = self.asks[task.name]
            rows = [self.spent.get(ask, {}).get(row, (0, 0, 0, 0.0)) for row in range(len(self.order.texts))]
            if ask in seen:
                rows = [(tokens_in, tokens_in, 0, 0.0) for tokens_in, *_ in rows]
            seen.add(ask)
            read, cached, written, seconds = zip(*rows, strict=True)
            told[task.name] = Spent(
                little_endian(array("I", read)),
                little_endian(array("I", cached)),
                little_endian(array("I", written)),
                little_endian(array("f", seconds)),
            )
        return told

    def failure(self, worker: str, boot: str, error: tuple[str, str], *, refused: str) -> Outcome:
        """What it reports when it cannot run at all. ``refused``: digest of the model that cannot be loaded here."""
        return self._outcome(worker, boot, verdict="failed", error=error, refused=refused)

    def _outcome(self, worker: str, boot: str, **what: Any) -> Outcome:
        o = self.order
        return Outcome(
            subtask=o.subtask,
            attempt=o.attempt,
            nonce=o.nonce,
            worker=worker,
            boot=boot,
            usage=self.usage,
            **what,
        )

    def _cut(self, task: TaskOrder) -> set[int]:
        """Rows that were cut for this task. Of those that hold several texts the engine says so itself."""
        said = {
            rows[i]
            for rows, columns in self.answers
            for i, status in enumerate(columns[self.asks[task.name]].status)
            if status & TRUNCATED
        }
        return self.truncated | said

    def _column(self, task: TaskOrder) -> Column:
        refused = dict.fromkeys(self._cut(task), _too_long(task)) if _refuses(task) else {}
        kind = task.column_kind
        return assemble(
            kind,
            len(self.order.texts),
            [(rows, columns[self.asks[task.name]]) for rows, columns in self.answers],
            {**refused, **self.errors},
            frozenset(self.truncated),
            dim=task.manifest.vector_dim(task.spec) if kind == "vector" else 0,
            dtype=task.spec.get("dtype", "fp32") if kind == "vector" else "",
        )


#: What tasks ask, by their identity and with them: of the sub-tasks of a pass that follow each other they are the same.
_ASKED_KEPT = 64
_known_asks: dict[int, tuple[tuple[TaskOrder, ...], tuple[TaskOrder, ...], Mapping[str, str]]] = {}


def _asked(tasks: tuple[TaskOrder, ...]) -> tuple[tuple[TaskOrder, ...], Mapping[str, str]]:
    """What an engine is asked, each once and under a name for what it asks, in order of these; task name -> that name."""
    known = _known_asks.get(id(tasks))
    if known is None:
        if len(_known_asks) >= _ASKED_KEPT:
            _known_asks.clear()
        texts = texts_of(tasks)
        placed = [_placed(task, texts) for task in tasks]
        asks = {task.name: ask_of(task) for task in placed}
        each = {asks[task.name]: replace(task, name=asks[task.name]) for task in placed}
        known = _known_asks[id(tasks)] = tasks, tuple(each[ask] for ask in sorted(each)), asks
    return known[1:]


def _placed(task: TaskOrder, texts: Sequence[str]) -> TaskOrder:
    """The task, with the places of its texts among those of its pass where the trunk reads several."""
    if len(texts) < 2:
        return task
    read = task.spec["input"]
    places = [texts.index(text) for text in ([read] if isinstance(read, str) else read)]
    return replace(task, spec={**task.spec, PLACES: places})


def ask_of(task: TaskOrder) -> str:
    """What a task asks of its engine: the model that answers it, and the options that shape the answer."""
    known = _NOT_FOR_ENGINES if task.manifest.answers == "text" else _NOT_FOR_ENGINES | _READ
    options = {k: v for k, v in task.spec.items() if k not in known}
    text = json.dumps([task.manifest.digest, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def format_for(order: Assignment, device_formats: Sequence[str]) -> str:
    """The numeric format a pass runs in: fp32, or the first one that all its models passed and the device is fast at."""
    if order.numerics == "exact":
        return "fp32"
    models: list[Manifest] = [order.model, *(task.manifest for task in order.tasks)]
    allowed = [f for f in device_formats if all(f in model.formats for model in models)]
    return allowed[0] if allowed else "fp32"


def _refuses(task: TaskOrder) -> bool:
    """It wants an error for a row that is too long, not a cut row."""
    return task.spec.get("too_long") == "error"


def _too_long(task: TaskOrder) -> CellError:
    return CONTEXT_LENGTH if task.manifest.answers == "text" else TOO_LONG
