"""The messages that cross a process border. Frozen, versioned; ids and counts in Celery, the rest beside it.

Payloads (`Assignment`) and outcomes travel in envelopes. Reading checks form and raises `BadMessage`; a
reader drops and counts such a message, it never guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import Any, Literal

import msgpack

from motet.protocol.columns import Column, Kind, storable, typed
from motet.protocol.envelope import BadMessage, packed_plain, unwrap, wrap, wrap_packed
from motet.protocol.manifest import Manifest, column_kind
from motet.protocol.values import Value, plain_text

#: Major of the protocol: a worker of another major gets no work. It grows when a message changes its meaning, or
#: loses or gains a field that a reader cannot do without. Anything else is a minor change and needs no number:
#: a reader passes over fields that it does not know, and takes the default of those that are not there.
PROTOCOL = 3
#: The header in which a worker names the lease that it works under: ``<subtask>.<attempt>.<nonce>``.
LEASE_HEADER = "Motet-Lease"


def marks_between(marks: Mapping[int, tuple[str, str]], lo: int, hi: int) -> dict[int, tuple[str, str]]:
    """Those of the rows from ``lo`` on and before ``hi``, counted from ``lo``."""
    return {offset - lo: why for offset, why in marks.items() if lo <= offset < hi}


def by_reason(marks: Mapping[int, tuple[str, str]]) -> list[list[Any]]:
    """Offset -> (class, message) as it travels and is stored: ``[[class, message, [offset, …]], …]``, each reason once."""
    offsets: dict[tuple[str, str], list[int]] = {}
    for offset in sorted(marks):
        offsets.setdefault(marks[offset], []).append(offset)
    return [[*why, of] for why, of in offsets.items()]


def by_offset(reasons: Iterable[Sequence[Any]]) -> dict[int, tuple[str, str]]:
    """The opposite of ``by_reason``, for what was checked before."""
    return {
        int(offset): (str(error), str(message)) for error, message, offsets in reasons for offset in offsets
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOrder:
    """One task inside a sub-task: its spec, and the model (a head, or the trunk itself) that answers it."""

    name: str
    #: ``Task.to_json()``.
    spec: Mapping[str, Any]
    manifest: Manifest

    @property
    def column_kind(self) -> Kind:
        return column_kind(self.spec, self.manifest.answers)


def texts_of(tasks: Iterable[TaskOrder]) -> tuple[str, ...]:
    """The templates of the texts that a trunk reads apart for these tasks, in order of first use.

    (): their input is no text, or it is read otherwise, as by functions and language models.
    """
    found: dict[str, None] = {}
    for task in tasks:
        if task.spec["kind"] == "function":
            return ()
        read = task.spec.get("input", ())
        found |= dict.fromkeys([read] if isinstance(read, str) else read)
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A leased sub-task on its way to a worker: one attempt, with all the worker needs to run it."""

    subtask: int
    attempt: int
    #: Random per attempt; an outcome without it is not believed.
    nonce: str
    job: str
    tenant: str
    #: Name of the pass kind, as Flower shows it: never an id.
    pass_kind: str
    #: The trunk (or whole model) that is loaded; its ``engine`` runs the pass.
    model: Manifest
    numerics: Literal["fast", "exact"]
    #: Tokens read per row, special ones included; 0: the model's own limit.
    max_tokens: int
    tasks: tuple[TaskOrder, ...]
    #: Rendered input of each row, one text per row. Where heads read several texts of it, all of these behind each other;
    #: the worker renders each by ``fields``.
    texts: tuple[str, ...]
    #: What the texts stand for, where the whole input is one field that is not text alone, and a function reads it; or
    #: that holds media, and a model reads them.
    values: tuple[Value, ...] = ()
    #: What other templates of the tasks name (fields of the row, answers of other tasks) -> a text per row. And the
    #: template of labels that each row brings (``{candidates}``, with its braces) -> JSON per row.
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Index in the job of each row; only where a task draws its answers, or its text is told as it is written.
    indices: tuple[int, ...] = ()
    #: Channel of the API process to which text is told as it is written (`Said`); "": nobody listens.
    say: str = ""
    #: Nothing may run beside it: it is suspected of killing its process.
    exclusive: bool = False
    interactive: bool = False
    #: Seconds of work that the scheduler predicts, loading apart.
    predicted_s: float = 0.0
    #: That rests on outcomes of such devices, and is no guess.
    measured: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return (self.subtask, self.attempt)

    @property
    def lease(self) -> str:
        """What LEASE_HEADER says of it."""
        return f"{self.subtask}.{self.attempt}.{self.nonce}"

    def encode(self) -> bytes:
        # One map, packed in two halves: the one that is alike in all sub-tasks of a pass is packed once.
        own = packed_plain(
            {
                "subtask": self.subtask,
                "attempt": self.attempt,
                "nonce": self.nonce,
                "job": self.job,
                # The texts follow from the values.
                "texts": [] if self.values else list(self.texts),
                "values": list(self.values),
                "fields": {name: list(texts) for name, texts in self.fields.items()},
                "indices": list(self.indices),
                "say": self.say,
                "exclusive": self.exclusive,
                "interactive": self.interactive,
                "predicted_s": self.predicted_s,
                "measured": self.measured,
            }
        )
        return wrap_packed(_joined(_order_of(self), own))

    @classmethod
    def decode(cls, raw: bytes) -> Assignment:
        """Raises BadMessage."""
        wire = unwrap(raw)
        with _as_bad_message():
            _same_version(wire)
            model, tasks = _ordered(wire["model"], wire["tasks"])
            return cls(
                subtask=int(wire["subtask"]),
                attempt=int(wire["attempt"]),
                nonce=str(wire["nonce"]),
                job=str(wire["job"]),
                tenant=str(wire["tenant"]),
                pass_kind=str(wire["pass_kind"]),
                model=model,
                numerics=wire["numerics"],
                max_tokens=int(wire["max_tokens"]),
                tasks=tasks,
                texts=tuple(map(plain_text, wire["values"])) if wire.get("values") else tuple(wire["texts"]),
                values=tuple(wire.get("values", ())),
                fields={str(name): tuple(texts) for name, texts in wire.get("fields", {}).items()},
                indices=tuple(map(int, wire.get("indices", ()))),
                say=str(wire.get("say", "")),
                exclusive=bool(wire.get("exclusive", False)),
                interactive=bool(wire.get("interactive", False)),
                predicted_s=float(wire.get("predicted_s", 0.0)),
                measured=bool(wire.get("measured", False)),
            )


#: Models and tasks that were read lately, by their names: of the next sub-task of their pass they are the same objects.
_ORDERS_READ = 64
_read: dict[tuple[str, ...], tuple[Any, Any, Manifest, tuple[TaskOrder, ...]]] = {}


def _ordered(model: Any, tasks: Any) -> tuple[Manifest, tuple[TaskOrder, ...]]:
    """What a sub-task runs, of its wire form."""
    names = (str(model["name"]), *(str(t["name"]) for t in tasks))
    known = _read.get(names)
    if known is not None and known[0] == model and known[1] == tasks:
        return known[2:]
    if len(_read) >= _ORDERS_READ:
        _read.clear()
    *_, read, ordered = _read[names] = (
        model,
        tasks,
        Manifest.from_json(model),
        tuple(
            TaskOrder(name=t["name"], spec=t["spec"], manifest=Manifest.from_json(t["manifest"]))
            for t in tasks
        ),
    )
    return read, ordered


#: What is alike in all sub-tasks of a pass, packed, with that which it was made of: by the identity of its parts, since
#: a manifest has no hash. So many are kept, for few passes are sent at a time.
_ORDERS_KEPT = 256
_orders: dict[tuple[object, ...], tuple[Assignment, bytes]] = {}


def _order_of(a: Assignment) -> bytes:
    """The tasks and models of an assignment, packed."""
    key = (id(a.model), id(a.tasks), a.tenant, a.pass_kind, a.numerics, a.max_tokens)
    known = _orders.get(key)
    if known is None:
        if len(_orders) >= _ORDERS_KEPT:
            _orders.clear()
        packed = packed_plain(
            {
                "v": PROTOCOL,
                "tenant": a.tenant,
                "pass_kind": a.pass_kind,
                "model": a.model.to_json(),
                "numerics": a.numerics,
                "max_tokens": a.max_tokens,
                "tasks": [
                    {"name": t.name, "spec": dict(t.spec), "manifest": t.manifest.to_json()} for t in a.tasks
                ],
            }
        )
        # Kept with the parts, so that no other object takes their identity; without the texts.
        known = _orders[key] = (replace(a, texts=(), values=(), fields={}, indices=()), packed)
    return known[1]


def _joined(*maps: bytes) -> bytes:
    """Maps of different keys, each of fewer than 16 and packed, as one."""
    #: Msgpack's fixmap says in the lower half of its only byte how many entries follow; map 16 in two bytes of its own.
    entries = sum(packed[0] & 0x0F for packed in maps)
    return b"\xde" + entries.to_bytes(2, "big") + b"".join(packed[1:] for packed in maps)


#: UTF-8 bytes that a token stands for, at the most that is counted on.
_BYTES_PER_TOKEN = 5


def bytes_read(size: int, max_tokens: int) -> int:
    """Of a text's UTF-8 bytes those that a model reads which cuts it after ``max_tokens`` (0: never).

    Both sides count work by it: a document of a thousand pages costs no more than its first one.
    """
    return min(size, _BYTES_PER_TOKEN * max_tokens) if max_tokens else size


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an attempt consumed. Counts are exact; seconds are the worker's monotonic clock."""

    #: Tokens of the rows, after truncation, special ones included.
    tokens: int = 0
    #: Tokens computed, padding included.
    computed_tokens: int = 0
    #: ``bytes_read`` of the texts: the worker's guess of its work before it has tokenised them.
    text_bytes: int = 0
    micro_batches: int = 0
    #: Seconds that the device worked for this attempt.
    busy_s: float = 0.0
    #: Seconds spent loading models for it.
    load_s: float = 0.0
    #: The numeric format it ran in: "fp32", "bf16" ….
    format: str = "fp32"
    #: Sum over the rows of (a row's tokens)²: what attention costs.
    squares: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """What one task of a language model consumed for each row of an attempt, as little-endian arrays."""

    #: uint32: tokens of the prompt; of them, those that were computed for another task or row already; tokens written.
    tokens_in: bytes
    tokens_cached: bytes
    tokens_out: bytes
    #: float32: seconds of the device, its share of each step.
    seconds: bytes

    def __len__(self) -> int:
        return len(self.tokens_in) // 4

    def to_wire(self) -> list[bytes]:
        return [self.tokens_in, self.tokens_cached, self.tokens_out, self.seconds]

    @classmethod
    def from_wire(cls, wire: Sequence[bytes]) -> Spent:
        """Raises ValueError where it is none."""
        arrays = [bytes(raw) for raw in wire]
        if len(arrays) != 4 or len({len(raw) for raw in arrays}) != 1 or len(arrays[0]) % 4:
            raise ValueError("four arrays of one length")
        seconds = typed("f", arrays[3])
        if any(not 0 <= s < 1e7 for s in seconds) or any(
            max(typed("I", raw), default=0) >> 31 for raw in arrays[:3]
        ):
            raise ValueError("more than one attempt can have used")
        return cls(*arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one attempt reports: an answer per row and task, or why there is none."""

    subtask: int
    attempt: int
    nonce: str
    worker: str
    boot: str
    #: ``done``: columns hold every row. ``failed``: the attempt as a whole (``error`` says why); rows return.
    verdict: Literal["done", "failed"]
    #: Task name -> column over the sub-task's rows, in its order.
    columns: Mapping[str, Column] = field(default_factory=dict)
    #: Class of the failure and words for people: ("missing_payload", "…"), ("cannot_load", "…").
    error: tuple[str, str] | None = None
    #: Digest of the model that cannot be loaded on this worker, now or ever; "" for any other failure.
    refused: str = ""
    usage: Usage = field(default_factory=Usage)
    #: Task name -> what it consumed of a language model, row by row; empty for any other pass.
    spent: Mapping[str, Spent] = field(default_factory=dict)

    def encode(self) -> bytes:
        u = self.usage
        return wrap(
            {
                "v": PROTOCOL,
                "subtask": self.subtask,
                "attempt": self.attempt,
                "nonce": self.nonce,
                "worker": self.worker,
                "boot": self.boot,
                "verdict": self.verdict,
                "columns": {name: c.to_wire() for name, c in self.columns.items()},
                "error": list(self.error) if self.error else None,
                "refused": self.refused,
                "usage": [
                    u.tokens,
                    u.computed_tokens,
                    u.text_bytes,
                    u.micro_batches,
                    u.busy_s,
                    u.load_s,
                    u.format,
                    u.squares,
                ],
                "spent": {name: s.to_wire() for name, s in self.spent.items()},
            }
        )

    @classmethod
    def decode(cls, raw: bytes) -> Outcome:
        """Raises BadMessage."""
        wire = unwrap(raw)
        with _as_bad_message():
            _same_version(wire)
            if wire["verdict"] not in ("done", "failed"):
                raise ValueError(f"verdict {wire['verdict']!r}")
            usage = wire["usage"]
            return cls(
                subtask=_count(wire["subtask"], most=1 << 63),
                attempt=_count(wire["attempt"], most=1 << 15),
                nonce=str(wire["nonce"]),
                worker=str(wire["worker"]),
                boot=str(wire["boot"]),
                verdict=wire["verdict"],
                columns={str(name): Column.from_wire(c) for name, c in wire["columns"].items()},
                error=(storable(error[0]), storable(error[1])) if (error := wire.get("error")) else None,
                refused=storable(wire.get("refused", ""), 200),
                usage=Usage(
                    tokens=_count(usage[0]),
                    computed_tokens=_count(usage[1]),
                    text_bytes=_count(usage[2]),
                    micro_batches=_count(usage[3]),
                    busy_s=_seconds(usage[4]),
                    load_s=_seconds(usage[5]),
                    format=storable(usage[6], 20),
                    squares=_count(usage[7], most=1 << 60) if len(usage) > 7 else 0,
                ),
                spent={str(name): Spent.from_wire(s) for name, s in wire.get("spent", {}).items()},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Text that one attempt wrote for a row, on its way to whoever reads along. It may be lost; it is never stored."""

    job: str
    #: Index in the job.
    row: int
    task: str
    #: Sub-task and number of the attempt: a row that is written anew is of a higher one.
    attempt: tuple[int, int]
    #: Characters of the answer before this text.
    begins: int
    text: str


def encode_said(words: Iterable[Said]) -> bytes:
    """What is said at one moment to one process of the API."""
    return wrap([PROTOCOL, [[s.job, s.row, s.task, *s.attempt, s.begins, s.text] for s in words]])


def decode_said(raw: bytes) -> list[Said]:
    """Raises BadMessage."""
    wire = unwrap(raw)
    with _as_bad_message():
        version, words = wire
        _same_version({"v": version})
        return [
            Said(
                job=str(job),
                row=_count(row, most=1 << 63),
                task=str(task),
                attempt=(_count(subtask, most=1 << 63), _count(attempt, most=1 << 15)),
                begins=_count(begins),
                text=str(text),
            )
            for job, row, task, subtask, attempt, begins, text in words
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a worker says each second. A beat is alive when (boot, seq) has changed; its clock is never read.

    ``worker``, ``boot``, ``seq`` and ``protocol`` are said alike by every major, for that is how one is told.
    """

    worker: str
    #: Random per process start.
    boot: str
    protocol: int = PROTOCOL
    #: ``starting`` says that the process before it is gone; it takes no work yet.
    state: Literal["starting", "ready", "draining"] = "ready"
    #: ``cuda`` or ``cpu``; the name people know, such as "NVIDIA H200".
    device_kind: str = "cpu"
    device_name: str = ""
    #: Of a group of GPUs the memory of all of them.
    memory_mb: int = 0
    #: GPUs of the group; 1 of a single device. An engine uses the first one alone, unless it is among ``spreads``.
    gpus: int = 1
    #: Engines that lay a model out over all GPUs of the group, an equal part on each.
    spreads: tuple[str, ...] = ()
    #: Formats this device is fast at, beside fp32.
    formats: tuple[str, ...] = ()
    #: Entry points of ``motet.engines`` that are installed here.
    engines: tuple[str, ...] = ()
    #: Digests of the models in memory now.
    resident: tuple[str, ...] = ()
    #: Attempts held: taken from the queue, outcome not yet on the stream.
    held: tuple[tuple[int, int], ...] = ()
    #: Attempts that came here and cannot run, since their payload is missing or unreadable; said for 30 s.
    left: tuple[tuple[int, int], ...] = ()

    # The rest is `FOR_PEOPLE`, but that another number is a sign of life. It is written last: what is before it is mostly
    # what it was.
    seq: int
    #: Of the installed package.
    version: str = ""
    host: str = ""
    pid: int = 0
    memory_used_mb: int = 0
    #: Busy share of the device in the last second, 0 to 1.
    utilisation: float = 0.0
    #: Seconds of predicted work held here and not yet done.
    backlog_s: float = 0.0
    #: Rows done since boot.
    rows_done: int = 0

    def encode(self) -> bytes:
        return msgpack.packb(  # type: ignore[no-any-return]
            {name: getattr(self, name) for name in self.__slots__}, use_bin_type=True
        )

    @classmethod
    def decode(cls, raw: bytes, before: Beat | None = None) -> Beat:
        """Raises BadMessage. Fields of a newer minor are passed over, those that an older one lacks are their defaults.

        ``before``: an earlier beat of the worker, which is returned itself where this one is new in nothing but what is
        `FOR_PEOPLE`. Where attempts alone are new too, what is for people is that of before as well.
        """
        with _as_bad_message():
            wire = msgpack.unpackb(raw, use_list=False)
            if before is None or not wire.keys() >= _ACTED_ON or _of_itself_in(wire) != of_itself(before):
                return cls(**{name: _BEAT_FIELDS[name](wire[name]) for name in cls.__slots__ if name in wire})
            held, left = wire["held"], wire["left"]
            if (held, left) == (before.held, before.left):
                return before
            return before._holding(_keys(held), _keys(left))

    def _holding(self, held: tuple[tuple[int, int], ...], left: tuple[tuple[int, int], ...]) -> Beat:
        """The same with other attempts: of ten thousand workers thousands say so in a second, and `replace` takes twice as
        long."""
        beat = object.__new__(Beat)
        for name in Beat.__slots__:
            object.__setattr__(beat, name, getattr(self, name))
        object.__setattr__(beat, "held", held)
        object.__setattr__(beat, "left", left)
        return beat


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value))


def _gpus(value: Any) -> int:
    """A number to divide by."""
    return max(1, int(value))


def _keys(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(s), int(a)) for s, a in value)


def _finite(value: Any) -> float:
    """A number that JSON can hold: one worker's NaN must not spoil the list of all of them."""
    return float(value) if math.isfinite(float(value)) else 0.0


def _name(value: Any) -> str:
    """What goes into Postgres with a lease: one worker's NUL must not stop the leader."""
    return storable(value, 200)


_BEAT_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "worker": _name,
    "boot": _name,
    "seq": int,
    "protocol": int,
    "version": _name,
    "host": _name,
    "pid": int,
    "state": str,
    "device_kind": _name,
    "device_name": _name,
    "memory_mb": int,
    "memory_used_mb": int,
    "gpus": _gpus,
    "spreads": _words,
    "utilisation": _finite,
    "formats": _words,
    "engines": _words,
    "resident": _words,
    "backlog_s": _finite,
    "held": _keys,
    "left": _keys,
    "rows_done": int,
}


#: Fields of a beat by which the leader decides nothing. They are new in every beat of a worker that works.
FOR_PEOPLE = Beat.__slots__[Beat.__slots__.index("seq") :]
_ACTED_ON = dict.fromkeys(Beat.__slots__[: -len(FOR_PEOPLE)]).keys()
#: The values of all other fields.
acted_on = attrgetter(*_ACTED_ON)
_OF_ITSELF = [name for name in _ACTED_ON if name not in ("held", "left")]
#: Of these the values of fields that tell of the worker, whatever it holds.
of_itself = attrgetter(*_OF_ITSELF)
_of_itself_in = itemgetter(*_OF_ITSELF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What the leader tells a worker, read at each beat. Only the newest counts."""

    epoch: int
    #: Attempts to stop: cancelled, lost, or done elsewhere.
    drop: tuple[tuple[int, int], ...] = ()
    drain: bool = False

    def encode(self) -> bytes:
        return msgpack.packb(  # type: ignore[no-any-return]
            {"epoch": self.epoch, "drop": self.drop, "drain": self.drain}
        )

    @classmethod
    def decode(cls, raw: bytes) -> Control:
        """Raises BadMessage."""
        with _as_bad_message():
            wire = msgpack.unpackb(raw)
            return cls(
                epoch=int(wire["epoch"]),
                drop=_keys(wire.get("drop", ())),
                drain=bool(wire.get("drain", False)),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Evidence for poison: the rows (positions in the sub-task) of the micro-batch that runs now, by attempt."""

    boot: str
    rows: Mapping[tuple[int, int], tuple[int, ...]]

    def encode(self) -> bytes:
        return msgpack.packb(  # type: ignore[no-any-return]
            {"boot": self.boot, "rows": [[s, a, list(r)] for (s, a), r in self.rows.items()]}
        )

    @classmethod
    def decode(cls, raw: bytes) -> Running:
        """Raises BadMessage."""
        with _as_bad_message():
            wire = msgpack.unpackb(raw)
            return cls(
                boot=str(wire["boot"]),
                rows={(int(s), int(a)): tuple(map(int, r)) for s, a, r in wire["rows"]},
            )


@contextmanager
def _as_bad_message() -> Iterator[None]:
    """Turn whatever a malformed message provokes into BadMessage."""
    try:
        yield
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001 - any stranger's bytes
        # The class alone: the message of a ValueError repeats what it was given.
        raise BadMessage(type(error).__name__) from None


def _count(value: Any, most: int = 1 << 40) -> int:
    """A number of things that one attempt can have used."""
    if not 0 <= int(value) < most:
        raise ValueError
    return int(value)


def _seconds(value: Any) -> float:
    """Seconds that one attempt can have taken. NaN is refused by the comparison."""
    if not 0 <= float(value) < 1e7:
        raise ValueError
    return float(value)


def _same_version(wire: Mapping[str, Any]) -> None:
    if wire["v"] != PROTOCOL:
        raise BadMessage(f"protocol {wire['v']}; this process speaks {PROTOCOL}")
