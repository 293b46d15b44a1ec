"""The messages that cross a process border. Frozen, versioned; ids and counts in Celery, the rest beside it.

Payloads (`Assignment`) and outcomes are msgpack under zstd. Reading checks form and raises `BadMessage`; a
reader drops and counts such a message, it never guesses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack

from motet.columns import Column, storable
from motet.manifest import Manifest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Major of the protocol: a worker of another major gets no work. It grows when a message changes its meaning, or
#: loses or gains a field that a reader cannot do without. Anything else is a minor change and needs no number:
#: a reader passes over fields that it does not know, and takes the default of those that are not there.
PROTOCOL = 1
#: Decoded payloads beyond this are refused: a guard against bombs, far above any real sub-task.
MAX_DECODED_BYTES = 1 << 30


class BadMessage(Exception):
    """A message that is not what its sender should have sent: torn, forged or of another version."""


def pack(value: object) -> bytes:
    """Msgpack under zstd (level 1: faster than the network, a third of the size)."""
    return zstd.compress(msgpack.packb(value, use_bin_type=True), 1)


def unpack(raw: bytes) -> Any:
    """The opposite of ``pack``. Raises BadMessage, never anything else."""
    try:
        size = zstd.get_frame_info(raw).decompressed_size
        if size is None or size > MAX_DECODED_BYTES:
            raise BadMessage(f"payload claims {size} bytes")
        plain = zstd.ZstdDecompressor().decompress(raw, size)
        return msgpack.unpackb(plain, strict_map_key=False)
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001 - any stranger's bytes: every decoder error means the same thing
        raise BadMessage(f"cannot decode {len(raw)} bytes: {type(error).__name__}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOrder:
    """One task inside a sub-task: its spec, and the model (a head, or the trunk itself) that answers it."""

    name: str
    #: ``Task.to_json()``.
    spec: Mapping[str, Any]
    manifest: Manifest


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
    #: Rendered input of each row, one text per row.
    texts: tuple[str, ...]
    #: Nothing may run beside it: it is suspected of killing its process.
    exclusive: bool = False
    interactive: bool = False
    #: Seconds of work that the scheduler predicts, loading apart.
    predicted_s: float = 0.0

    @property
    def key(self) -> tuple[int, int]:
        return (self.subtask, self.attempt)

    def encode(self) -> bytes:
        return pack(
            {
                "v": PROTOCOL,
                "subtask": self.subtask,
                "attempt": self.attempt,
                "nonce": self.nonce,
                "job": self.job,
                "tenant": self.tenant,
                "pass_kind": self.pass_kind,
                "model": self.model.to_json(),
                "numerics": self.numerics,
                "max_tokens": self.max_tokens,
                "tasks": [
                    {"name": t.name, "spec": dict(t.spec), "manifest": t.manifest.to_json()}
                    for t in self.tasks
                ],
                "texts": list(self.texts),
                "exclusive": self.exclusive,
                "interactive": self.interactive,
                "predicted_s": self.predicted_s,
            }
        )

    @classmethod
    def decode(cls, raw: bytes) -> Assignment:
        """Raises BadMessage."""
        wire = unpack(raw)
        with _believing():
            _same_version(wire)
            return cls(
                subtask=int(wire["subtask"]),
                attempt=int(wire["attempt"]),
                nonce=str(wire["nonce"]),
                job=str(wire["job"]),
                tenant=str(wire["tenant"]),
                pass_kind=str(wire["pass_kind"]),
                model=Manifest.from_json(wire["model"]),
                numerics=wire["numerics"],
                max_tokens=int(wire["max_tokens"]),
                tasks=tuple(
                    TaskOrder(name=t["name"], spec=t["spec"], manifest=Manifest.from_json(t["manifest"]))
                    for t in wire["tasks"]
                ),
                texts=tuple(wire["texts"]),
                exclusive=bool(wire.get("exclusive", False)),
                interactive=bool(wire.get("interactive", False)),
                predicted_s=float(wire.get("predicted_s", 0.0)),
            )


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
    #: ``bytes_read`` of the texts, for the bytes-to-tokens ratio.
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

    def encode(self) -> bytes:
        u = self.usage
        return pack(
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
            }
        )

    @classmethod
    def decode(cls, raw: bytes) -> Outcome:
        """Raises BadMessage."""
        wire = unpack(raw)
        with _believing():
            _same_version(wire)
            if wire["verdict"] not in ("done", "failed"):
                raise ValueError(f"verdict {wire['verdict']!r}")
            usage = wire["usage"]
            return cls(
                subtask=int(wire["subtask"]),
                attempt=int(wire["attempt"]),
                nonce=str(wire["nonce"]),
                worker=str(wire["worker"]),
                boot=str(wire["boot"]),
                verdict=wire["verdict"],
                columns={str(name): Column.from_wire(c) for name, c in wire["columns"].items()},
                error=(storable(error[0]), storable(error[1])) if (error := wire.get("error")) else None,
                refused=str(wire.get("refused", "")),
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
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a worker says each second. A beat is alive when (boot, seq) has changed; its clock is never read.

    ``worker``, ``boot``, ``seq`` and ``protocol`` are said alike by every major, for that is how one is told.
    """

    worker: str
    #: Random per process start.
    boot: str
    seq: int
    protocol: int = PROTOCOL
    #: Of the installed package, for people.
    version: str = ""
    host: str = ""
    pid: int = 0
    #: ``starting`` says that the process before it is gone; it takes no work yet.
    state: Literal["starting", "ready", "draining"] = "ready"
    #: ``cuda`` or ``cpu``; the name people know, such as "NVIDIA H200".
    device_kind: str = "cpu"
    device_name: str = ""
    memory_mb: int = 0
    memory_used_mb: int = 0
    #: Busy share of the device in the last second, 0 to 1.
    utilisation: float = 0.0
    #: Formats this device is fast at, beside fp32.
    formats: tuple[str, ...] = ()
    #: Entry points of ``motet.engines`` that are installed here.
    engines: tuple[str, ...] = ()
    #: Digests of the models in memory now.
    resident: tuple[str, ...] = ()
    #: Seconds of predicted work held here and not yet done.
    backlog_s: float = 0.0
    #: Attempts held: taken from the queue, outcome not yet on the stream.
    held: tuple[tuple[int, int], ...] = ()
    #: Rows done since boot.
    rows_done: int = 0

    def encode(self) -> bytes:
        return msgpack.packb(  # type: ignore[no-any-return]
            {name: getattr(self, name) for name in self.__slots__}, use_bin_type=True
        )

    @classmethod
    def decode(cls, raw: bytes) -> Beat:
        """Raises BadMessage. Fields of a newer minor are passed over, those that an older one lacks are their defaults."""
        with _believing():
            wire = msgpack.unpackb(raw)
            return cls(**{name: _BEAT_FIELDS[name](wire[name]) for name in cls.__slots__ if name in wire})


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value))


def _keys(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(s), int(a)) for s, a in value)


def _finite(value: Any) -> float:
    """A number that JSON can hold: one worker's NaN must not spoil the list of all of them."""
    return float(value) if math.isfinite(float(value)) else 0.0


_BEAT_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "worker": str,
    "boot": str,
    "seq": int,
    "protocol": int,
    "version": str,
    "host": str,
    "pid": int,
    "state": str,
    "device_kind": str,
    "device_name": str,
    "memory_mb": int,
    "memory_used_mb": int,
    "utilisation": _finite,
    "formats": _words,
    "engines": _words,
    "resident": _words,
    "backlog_s": _finite,
    "held": _keys,
    "rows_done": int,
}


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
        with _believing():
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
        with _believing():
            wire = msgpack.unpackb(raw)
            return cls(
                boot=str(wire["boot"]),
                rows={(int(s), int(a)): tuple(map(int, r)) for s, a, r in wire["rows"]},
            )


@contextmanager
def _believing() -> Iterator[None]:
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
