"""Entries of the ledger: workers, jobs, passes, queues, and leases in flight, as placing changes them. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf

from motet.protocol.manifest import Manifest
from scheduler.policy.cost import RateKey, learned_as
from scheduler.policy.fairness import Account, FairQueue, StartTags
from scheduler.policy.placing.records import Demand, DeviceKind, PassId, WorkerState


@dataclass(slots=True, eq=False)
class Flight:
    """One lease in flight."""

    key: Hashable
    at: WorkerEntry
    of: QueuedPass
    rows: int
    bytes: int
    #: Predicted seconds of its rows, without loading.
    seconds: float
    #: Predicted seconds of loading its model before it; 0: the model is there by then.
    load_s: float
    opened: float
    #: When its worker came to it, as far as is known.
    began: float
    #: Nothing may run beside it.
    exclusive: bool = False
    #: May be doubled: its rows are suspected of nothing.
    harmless: bool = True
    #: It is the second lease of its sub-task.
    clone: bool = False
    #: Its sub-task has two leases.
    cloned: bool = False
    #: Fair-queueing tags, charged when the sub-task starts.
    tags: StartTags = ()

    @property
    def worker(self) -> WorkerState:
        return self.at.state

    @property
    def demand(self) -> Demand:
        return self.of.demand


@dataclass(slots=True, eq=False)
class JobAccount:
    """A job's account, and those of its passes that are known."""

    account: Account
    passes: dict[PassId, QueuedPass] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class QueuedPass:
    """A pass: its waiting rows, and how many of its leases are in flight."""

    demand: Demand
    queue: ModelQueue
    job: Account
    tenant: TenantQueue
    rows: int = 0
    bytes: int = 0
    flights: int = 0
    #: Its deadline is near: it goes before all passes that are not urgent.
    urgent: bool = False

    def waits(self) -> bool:
        return self.rows > 0

    def key(self) -> tuple[float, ...]:
        number = -self.demand.pass_number if self.demand.dependent else self.demand.pass_number
        if self.urgent and self.demand.deadline is not None:
            return (0.0, self.demand.deadline, self.demand.age, number)
        return (1.0, self.job.start, self.demand.age, number)


@dataclass(slots=True, eq=False)
class TenantQueue:
    """One tenant's passes of one model and one class."""

    account: Account
    queue: FairQueue[QueuedPass] = field(default_factory=lambda: FairQueue(QueuedPass.key, QueuedPass.waits))
    #: Number of its passes with waiting rows.
    waiting: int = 0

    def waits(self) -> bool:
        return self.waiting > 0

    def key(self) -> tuple[float, ...]:
        return (self.account.start,)


@dataclass(slots=True, eq=False)
class ModelQueue:
    """All passes that one loaded model answers in one numeric class, and who works for them."""

    digest: str
    numerics: str
    model: Manifest
    classes: dict[int, FairQueue[TenantQueue]] = field(default_factory=dict)
    tenants: dict[tuple[int, str], TenantQueue] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0
    #: Waiting rows and bytes by the name under which their speed is learned.
    by_rate: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Number of its passes with waiting rows.
    waiting: int = 0
    #: Workers that serve it, by kind, counted as devices of that kind at its usual pace.
    power: dict[DeviceKind, float] = field(default_factory=dict)
    #: Workers that hold the model, or are told to load it.
    hosts: dict[str, WorkerEntry] = field(default_factory=dict)
    #: Its leases in flight at workers that are there, by identity.
    flights: dict[int, Flight] = field(default_factory=dict)
    #: Cache: when it was counted, and how many devices of a kind all serving workers together equal.
    devices: dict[DeviceKind, tuple[float, float]] = field(default_factory=dict)
    #: What its finished sub-tasks took, by kind: outcomes, bytes, device-seconds.
    took: dict[DeviceKind, tuple[int, float, float]] = field(default_factory=dict)
    #: Cache: keys of its rates, by kind and the name under which a pass' speed is learned.
    _rate_keys: dict[tuple[DeviceKind, str], RateKey] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return (self.digest, self.numerics)

    def rate_key(self, kind: DeviceKind, name: str) -> RateKey:
        """Under which the speed of a pass on a kind of device is kept; ``name``: its own, "": that of the model's trunk."""
        key = self._rate_keys.get((kind, name))
        if key is None:
            key = self._rate_keys[kind, name] = (learned_as(name, self.model), kind[1], self.numerics)
        return key

    def first(self, class_: int) -> QueuedPass | None:
        """The fairest of its passes of a class."""
        tenants = self.classes.get(class_)
        tenant = tenants.first() if tenants is not None else None
        return tenant.queue.first() if tenant is not None else None


@dataclass(slots=True, eq=False)
class WorkerEntry:
    """A worker, its leases in flight in the order it takes them, and the models it holds by then."""

    state: WorkerState
    #: Unique and ascending: breaks ties.
    number: int
    name: str
    #: Never changes while the entry lives.
    kind: DeviceKind
    flights: list[Flight] = field(default_factory=list)
    #: Number of its flights that are not interactive.
    bulk: int = 0
    #: Number of its flights beside which nothing may run.
    exclusive: int = 0
    #: When all its flights will have ended.
    drain: float = 0.0
    #: Digest of each model that it holds, or will hold by then -> when it was used last.
    resident: dict[str, float] = field(default_factory=dict)
    #: Cache: whether it can ever load a queue's model.
    can: dict[ModelQueue, bool] = field(default_factory=dict)
    #: The queue that it serves, and with how much of a usual device of its kind.
    serves: tuple[ModelQueue, float] | None = None
    #: It is not made to switch models before then.
    stays_until: float = -inf
    #: The queue that rebalancing took it from: until ``stays_until`` it goes back only if it would be idle otherwise.
    taken_from: ModelQueue | None = None
    idle: bool = False
    #: Entries of the ask queue with another generation are dead.
    generation: int = 0
