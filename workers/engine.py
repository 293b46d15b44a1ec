"""The contract between the executor and an engine: load, admit rows, step, unload, and a pure estimate of memory.

Every engine is a stream: rows are let in one by one and leave one by one. An engine that answers a whole batch keeps the
shorter `BatchEngine`, and workers/run/batch_adapter.py makes a stream of it. Either is one file and one entry point of the
group ``motet.engines``; so is a plain function ``texts -> values`` (see workers/engines/function.py). Row errors are
values: one bad row never fails its neighbours. An engine never retries and never talks to Redis.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.values import Value
from motet.protocol.wire import TaskOrder


class OutOfMemory(Exception):
    """The device has no room for this. What runs together is made smaller, and grows again later."""


class DeviceBroken(Exception):
    """The device's context is poisoned (a sticky CUDA error): the process must be replaced."""


class CannotLoad(Exception):
    """The model cannot be loaded here, and never will be: the message says why, without a user's text."""


#: In the spec of a task of a pass whose trunk reads several texts of a row: the places of those that this task reads,
#: among all of them (``motet.protocol.wire.texts_of``). The executor sets it.
PLACES = "places"


@dataclass(frozen=True, slots=True)
class Prepared:
    """One row made ready by the engine: tokenised once, with its true length."""

    #: Position in the sub-task.
    row: int
    #: Tokens that the model will read; 1 where tokens mean nothing. Micro-batches are packed by it.
    length: int
    #: The input was cut.
    truncated: bool
    #: Whatever the engine wants to know of the row: token ids, text ….
    inputs: Any


@dataclass(frozen=True, slots=True)
class Pass:
    """One fused pass: a loaded model, the tasks it answers, and how many tokens are read per row.

    The executor names the tasks anew (two jobs that ask the same thing under other names share a pass), so
    an engine takes a task's name for nothing but the key of its column.
    """

    handle: Any
    tasks: tuple[TaskOrder, ...]
    max_tokens: int
    #: What the rows bring along beside their texts, while they are prepared; see ``Assignment``.
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    indices: Sequence[int] = ()
    #: Whose rows they are: nothing that was computed for one tenant may serve another.
    tenant: str = ""
    #: ``<subtask>.<attempt>.<nonce>`` of the attempt that the rows are prepared for: what proves it to the API.
    lease: str = ""
    #: What is written is told step by step (`Delta`).
    deltas: bool = False
    #: What the texts stand for, where they are more than texts; see ``Assignment``. Of a medium, while rows are prepared,
    #: its bytes: a row whose medium could not be had never reaches the engine.
    values: Sequence[Value | bytes] = ()


#: What one task of a row consumed: tokens of its prompt, of them not computed for it, tokens written, device seconds.
Consumed = tuple[int, int, int, float]


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that left an engine: its answer to each task, and what each of them consumed."""

    ticket: Hashable
    #: Task name -> a column of one row.
    columns: Mapping[str, Column]
    #: By task name.
    spent: Mapping[str, Consumed]


@dataclass(frozen=True, slots=True)
class Together:
    """Rows that left an engine at once and took equal shares of the step."""

    tickets: Sequence[Hashable]
    #: Task name -> a column over the tickets, in their order.
    columns: Mapping[str, Column]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that was written since the last step, of a row whose pass asks for that.

    All deltas of an answer together are its text. Nothing that was told is taken back, so the end of what is written is
    told later. An answer that is not text, such as a value that keeps a schema, has none.
    """

    ticket: Hashable
    task: str
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of an engine did."""

    ended: Sequence[Ended | Together] = ()
    #: Tokens that ran through the model, padding included; 0: there was nothing to do but to wait for others.
    computed_tokens: int = 0
    #: Share of the decode slots that were taken; None where none was asked for.
    occupancy: float | None = None
    deltas: Sequence[Delta] = ()


class Loader(Protocol):
    """What all engines do before a row runs. One instance per worker process.

    One thread, which owns the device, calls every method but ``prepare``; that one is also called by several
    other threads at once, while rows run, and must not touch the device.

    On a group of GPUs an engine loads onto the first one, and only that one's memory counts. An engine that lays its
    models out over all of them, an equal part on each, says so: ``spreads = True``.

    An engine that may take longer than others to load says so: ``longest_load_s``, in seconds. A worker that has loaded
    for longer than that is ended by its watchdog. So is one whose rows inside bring nothing, step after step, for longer
    than a step may take; an engine that asks other machines says how long those may be silent: ``longest_wait_s``.
    """

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        """Predicted memory of the loaded model. Pure."""
        ...

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Any:
        """Load the trunk onto the device ("cpu", "cuda:0") in a numeric format and return its handle.

        ``files``: the model folder's files by relative path; they may vanish after this call. Raises
        CannotLoad, OutOfMemory, DeviceBroken."""
        ...

    def attach(self, handle: Any, task: TaskOrder, files: Mapping[str, Path]) -> None:
        """Load a task's head beside the trunk. Twice is harmless. Raises CannotLoad, OutOfMemory, DeviceBroken."""
        ...

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        """Tokenise every row once, in order. A row that cannot be run is its error; a long one is cut and marked."""
        ...

    def unload(self, handle: Any) -> None:
        """Free the device's memory."""
        ...


@runtime_checkable
class Engine(Loader, Protocol):
    """A stream: rows of several sub-tasks are inside, and so it outlives each of them (reference: performance 4.8)."""

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        """Let a row in. False: there is no room now; ask again after a step. ``urgent`` goes before those that wait.

        A row that is too long for all the room there is, is let in and ends with an error. Where this raises, the row
        waits or ends with the error, and whatever was done for it is undone by ``abort``.
        """
        ...

    def step(self, handle: Any, tokens: int) -> Step:
        """Go on with all rows inside: one token of each that writes, and prefill of at most ``tokens`` in all.

        Raises OutOfMemory, DeviceBroken; then the rows are still inside.
        """
        ...

    def abort(self, handle: Any, tickets: Collection[Hashable]) -> None:
        """Forget these rows, and free their room. Those that are not inside are passed over."""
        ...


@runtime_checkable
class Elastic(Protocol):
    """An engine that is faster with more memory than `memory_mb` tells: a language model has more rows inside."""

    def stretch(self, handle: Any, more_mb: int) -> bool:
        """From now on a model may hold so much more of the device, until this is said anew.

        False: rows inside need more. No others are let in, and once enough of them have ended this is said again.
        """
        ...


@runtime_checkable
class BatchEngine(Loader, Protocol):
    """What answers rows only together: encoders, classifiers, functions."""

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        """One micro-batch: task name -> column over ``batch`` in its order. Raises OutOfMemory, DeviceBroken."""
        ...


@runtime_checkable
class Detaching(Protocol):
    """An engine that can put away again what was attached beside a model, such as a function its artefacts."""

    def detach(self, handle: Any, digest: str) -> None:
        """Forget what was attached of the model of this digest. Twice is harmless."""
        ...


def spreads(engine: object) -> bool:
    """Whether an engine uses all GPUs of a group for one model (`Loader`)."""
    return bool(getattr(engine, "spreads", False))


@runtime_checkable
class SelfDescribing(Protocol):
    """An engine that brings its model along, such as a Python function: it needs no files, only a name."""

    def describe(self, name: str, version: str) -> Manifest:
        """The manifest to register it under. Raises CannotLoad where it is not installed."""
        ...
