"""Records of placing: what waits, who can work, which leases are live, and what is decided. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from motet.messages.explanation import Why
from motet.protocol.manifest import Manifest
from scheduler.policy.cost import PICTURE_BYTES, PRIOR_BYTES_PER_TOKEN, Price, Rate, Rates, learned_as

#: (job, pass number).
PassId = tuple[str, int]
#: (device kind, device name): devices of one kind share what is learned.
DeviceKind = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One pass with waiting rows."""

    job: str
    pass_number: int
    tenant: str
    weight: float
    priority: int
    #: Position by submission: older first among equals.
    age: int
    #: Ids of all models that the pass needs: the one that is loaded, and its heads.
    model_ids: frozenset[int]
    model: Manifest
    #: Memory of the artefacts that its functions read, in MB.
    beside_mb: int = 0
    numerics: str = "fast"
    #: Name under which its speed is learned; "": that of its model's trunk.
    rate_key: str = ""
    #: It reads other tasks' answers. What of it may run goes first in its job: then blocks are done while others wait.
    dependent: bool = False
    #: More rows of its job are on their way: what waits is not all that is left.
    loading: bool = False
    rows_waiting: int
    bytes_waiting: int
    #: Learned of this job; 0: not yet.
    bytes_per_token: float = 0.0
    #: On the clock of ``now``; None: no deadline.
    deadline: float | None = None

    @property
    def id(self) -> PassId:
        return (self.job, self.pass_number)

    @property
    def learned_as(self) -> str:
        """The name under which its speed is learned."""
        return learned_as(self.rate_key, self.model)

    def rate(self, rates: Rates, kind: DeviceKind) -> Rate:
        """What is known of its speed on a kind of device."""
        key = (self.learned_as, kind[1], self.numerics)
        model = self.model
        each = PRIOR_BYTES_PER_TOKEN if model.reads == "text" else PICTURE_BYTES / max(1, model.max_tokens)
        return rates.of(key, device_kind=kind[0], parameters=model.parameters, bytes_per_token=each)

    def load_s(self, rates: Rates, kind: DeviceKind) -> float:
        """Seconds that loading its model takes on a kind of device."""
        return rates.load_s(self.model.digest, kind[1], weights_bytes=self.model.weights_bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker, as of its newest beat. Whether it can run a pass: `scheduler.policy.capability`."""

    name: str
    boot: str
    device_kind: str
    device_name: str
    engines: tuple[str, ...]
    #: Memory that models may hold, of all GPUs of a group; 0: not known.
    memory_mb: int = 0
    #: GPUs of the group, and the engines that lay a model out over all of them: others use the first one alone.
    gpus: int = 1
    spreads: tuple[str, ...] = ()
    #: Numeric formats beside fp32 that the device is fast at.
    formats: tuple[str, ...] = ()
    resident: tuple[str, ...] = ()
    #: Ids of models that this process could not load.
    refused: frozenset[int] = frozenset()
    #: Why it is given no work at all now; None: it may be given work.
    barred: Why | None = None

    @property
    def kind(self) -> DeviceKind:
        return (self.device_kind, self.device_name)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker that could not load a model, as of one boot."""

    model_id: int
    worker: str
    boot: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """A live lease, as the store tells it."""

    key: Hashable
    rows: int
    bytes: int
    seconds: float
    age_s: float
    exclusive: bool = False
    clone: bool = False


class Placement(NamedTuple):
    """Give this worker the next sub-task of this pass, of about ``budget_s`` seconds."""

    worker: WorkerState
    demand: Demand
    budget_s: float
    price: Price
    #: Rows of the sub-task at least, where that many wait.
    least: int = 1
    #: The price rests on outcomes of such devices, and is no guess.
    measured: bool = False
