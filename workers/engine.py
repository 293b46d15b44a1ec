"""The contract between the executor and an engine: load, run, unload, and a pure estimate of memory.

An engine is one file and one entry point of the group ``motet.engines``: a class that keeps this protocol, or
a plain function ``texts -> values`` (see workers/engines/function.py). Row errors are values: one bad row never
fails its neighbours. An engine never retries, never batches across calls and never talks to Redis.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from motet.columns import CellError, Column
from motet.manifest import Manifest
from motet.wire import TaskOrder


class OutOfMemory(Exception):
    """The device has no room for this micro-batch. The executor halves it and remembers the ceiling."""


class DeviceBroken(Exception):
    """The device's context is poisoned (a sticky CUDA error): the process must be replaced."""


class CannotLoad(Exception):
    """The model cannot be loaded here, and never will be: the message says why, without a user's text."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One row made ready by the engine: tokenised once, with its true length."""

    #: Position in the sub-task.
    row: int
    #: Tokens that the model will read; 1 where tokens mean nothing. Micro-batches are packed by it.
    length: int
    #: The input was cut.
    truncated: bool
    #: Whatever the engine's ``run`` wants: token ids, text ….
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


class Engine(Protocol):
    """What runs a pass. One instance per worker process.

    One thread, which owns the device, calls every method but ``prepare``; that one is also called by several
    other threads at once, while a pass runs, and must not touch the device.

    An engine that may take longer than others to load says so: ``longest_load_s``, in seconds. A worker that has loaded
    for longer than that is ended by its watchdog.
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

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        """One micro-batch: task name -> column over ``batch`` in its order. Raises OutOfMemory, DeviceBroken."""
        ...

    def unload(self, handle: Any) -> None:
        """Free the device's memory."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that left a continuous engine: its answer to each task, and what each of them consumed."""

    ticket: Hashable
    #: Task name -> a column of one row.
    columns: Mapping[str, Column]
    #: Task name -> tokens of its prompt, of them not computed for it, tokens written, seconds of the device.
    spent: Mapping[str, tuple[int, int, int, float]]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a continuous engine did."""

    ended: Sequence[Ended] = ()
    #: Tokens that ran through the model; 0: there was nothing to do but to wait for others.
    computed_tokens: int = 0
    #: Share of the places for rows that write which were taken; None where no place was asked for.
    occupancy: float | None = None


@runtime_checkable
class ContinuousEngine(Engine, Protocol):
    """An engine whose rows end one by one, while others begin: language models.

    It keeps rows of several sub-tasks in flight, and so outlives each of them (reference: performance 4.8). ``run``
    is for trials: it takes rows from beginning to end. The thread that owns the device calls all of this.
    """

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        """Let a row in. False: there is no room now; ask again after a step. ``urgent`` goes before those that wait.

        A row that is too long for all the room there is, is let in and ends with an error.
        """
        ...

    def step(self, handle: Any, tokens: int) -> Step:
        """Go on with all rows inside: one token of each that writes, and beginnings of at most ``tokens`` in all.

        Raises OutOfMemory, DeviceBroken; then the rows are still inside.
        """
        ...

    def abort(self, handle: Any, tickets: Collection[Hashable]) -> None:
        """Forget these rows, and free their room. Those that are not inside are passed over."""
        ...

    def inside(self, handle: Any) -> int:
        """Rows inside."""
        ...


@runtime_checkable
class SelfDescribing(Protocol):
    """An engine that brings its model along, such as a Python function: it needs no files, only a name."""

    def describe(self, name: str, version: str) -> Manifest:
        """The manifest to register it under. Raises CannotLoad where it is not installed."""
        ...
