"""Messages about the cluster: its workers, how pressed it is, whether it is ready, what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from motet.messages.message import ApiMessage

#: Why new rows are refused.
Reason = Literal["disk", "redis_memory", "outcomes", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained(ApiMessage):
    """When a worker was drained, and by which token."""

    #: The moment, as RFC 3339.
    since: str
    #: Name of the token.
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningWork(ApiMessage):
    """Sub-tasks of one pass that a worker holds."""

    #: Id of the job.
    job: str
    #: Kind of the pass.
    pass_: str = ""
    #: How many sub-tasks.
    subtasks: int = 1
    #: Rows in them.
    rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(ApiMessage):
    """One worker as the API sees it: its device, what it holds and how fast it is."""

    #: Its name.
    worker: str
    #: The machine that it runs on.
    host: str = ""
    #: ``starting``, ``ready``, ``draining`` (finishes what it holds, gets no more), ``drained`` (holds nothing),
    #: ``silent`` (its heartbeat has stopped), ``incompatible`` (speaks another protocol and gets no work), or
    #: ``gone`` (drained, and not there).
    state: str = ""
    #: ``cuda`` or ``cpu``.
    device_kind: str = ""
    #: Name of the device.
    device_name: str = ""
    #: Memory of the device.
    memory_mb: int = 0
    #: Memory of the device that is in use.
    memory_used_mb: int = 0
    #: Busy share of the device in the last second, 0 to 1.
    utilisation: float = 0.0
    #: Models in its memory, as ``name@version``.
    resident: tuple[str, ...] = ()
    #: Seconds of predicted work that it holds.
    backlog_s: float = 0.0
    #: Sub-tasks that it holds.
    held: int = 0
    #: Rows that it has answered since it started.
    rows_done: int = 0
    #: Learned tokens per second; null before it was measured.
    rate_tokens_s: float | None = None
    #: Major of the protocol that it speaks.
    protocol: int | None = None
    #: Version of motet that is installed there.
    version: str = ""
    #: When and by whom it was drained; null where it was not.
    drained: Drained | None = None
    #: What it runs of the tenant's own jobs.
    running: tuple[RunningWork, ...] = ()
    #: Sub-tasks of other tenants that it runs.
    running_other: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerList(ApiMessage):
    """Workers, by name."""

    #: The workers.
    workers: tuple[Worker, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload(ApiMessage):
    """One reason for which no new rows are taken now."""

    #: Which limit is reached.
    reason: Reason
    #: What was seen, in words.
    what: str
    #: What an operator can do.
    remedy: str
    #: When to come back.
    retry_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPressure(ApiMessage):
    """How pressed the cluster is, and whether it takes new rows."""

    #: The way from each soft limit to the hard one, 0 to 1, of the reasons that are known now.
    pressure: Mapping[Reason, float]
    #: Share of its usual rate at which the dispatcher sends, 1 to 0; null while Redis is away.
    throttle: float | None
    #: Why a new job is refused now.
    refused: tuple[Overload, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness(ApiMessage):
    """Whether all that the API stands on is there."""

    #: All of it.
    ready: bool
    #: Postgres answers.
    postgres: bool
    #: Redis answers.
    redis: bool
    #: A dispatcher leads.
    leader: bool


CheckState = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(ApiMessage):
    """One thing that the doctor looked at."""

    #: What it belongs to: ``python``, ``disk``, ``gpu``, ``server``, ``redis`` …; findings are shown by area.
    area: str
    #: What was looked at.
    name: str
    #: ``fail``: motet does not work so. ``warn``: it works, and will hurt. ``skipped``: not looked at, ``what`` says why.
    state: CheckState
    #: What was seen.
    what: str
    #: What to do; empty where there is nothing to do.
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport(ApiMessage):
    """What is wrong with the server's side."""

    #: Scope of the caller's token: only ``admin`` is shown all.
    scope: str
    #: Version of motet that is installed there.
    version: str
    #: Major of the protocol between scheduler and workers.
    protocol: int
    #: What was looked at, good and bad.
    findings: tuple[Finding, ...]
