"""Devices, models and jobs that are only numbers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import log
from random import Random

from motet.protocol.manifest import Manifest
from scheduler.policy.cost import Workload

#: Bytes that a token stands for in simulated text.
BYTES_PER_TOKEN = 4
#: Rows of a simulated block; all blocks of a job look alike, so rows never exist one by one.
BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a model costs, in truth."""

    name: str
    #: Seconds of a token on a device of speed 1, of a row, of a squared length, and of a sub-task.
    token_s: float
    row_s: float = 0.0
    square_s: float = 0.0
    start_s: float = 0.0
    #: Seconds to load it.
    load_s: float = 10.0
    memory_mb: int = 1000

    def manifest(self) -> Manifest:
        """As the registry would know it."""
        return Manifest(
            name=self.name,
            version="1",
            engine="encoder",
            answers="vector",
            trunk=self.name,
            # Of which Manifest.memory_mb makes about ``memory_mb`` again, whatever the format.
            sizes={"model.safetensors": max(1, int((self.memory_mb - 64) * (1 << 20) / 1.1))},
            files={"model.safetensors": self.name},
        )

    def seconds(self, work: Workload) -> float:
        return (
            self.start_s + self.row_s * work.rows + self.token_s * work.tokens + self.square_s * work.squares
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevice:
    """One worker with its device."""

    name: str
    kind: str
    speed: float
    #: What speed it truly has: a silently slow one is below what its kind promises.
    true_speed: float
    memory_mb: int = 80_000
    #: It dies at this time; its sub-tasks are rescued later.
    dies_s: float = float("inf")
    #: Models that it holds at the beginning, and those that it cannot load.
    resident: tuple[str, ...] = ()
    refuses: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedJob:
    """N rows for one model."""

    name: str
    model: str
    rows: int
    #: Mean tokens of a row; lengths are lognormal around it.
    tokens: float = 64.0
    spread: float = 0.7
    #: Tokens of rows, equally many of each, where they were recorded: in place of ``tokens`` and ``spread``.
    recorded: tuple[float, ...] = ()
    tenant: str = "all"
    weight: float = 1.0
    priority: int = 1
    at_s: float = 0.0
    deadline_s: float | None = None

    def lengths(self) -> list[int]:
        """Bytes of the rows of one block, longest first: quantiles of a lognormal, so that nothing is random."""
        # Blocks of like size, so that the last one holds no more of the longest than the others.
        rows = max(1, self.rows)
        n = -(-rows // -(-rows // BLOCK_ROWS))
        if self.recorded:
            return [round(BYTES_PER_TOKEN * tokens) for tokens in _resampled(self.recorded, n)]
        rng = Random(f"{self.name}:{self.tokens}:{self.spread}")
        mu = log(max(1.0, self.tokens)) - self.spread**2 / 2
        found = (min(512, max(2, round(rng.lognormvariate(mu, self.spread)))) for _ in range(n))
        return sorted((BYTES_PER_TOKEN * tokens for tokens in found), reverse=True)


def _resampled(lengths: Iterable[float], n: int) -> Iterator[float]:
    """``n`` lengths with the same mean, longest first: each the mean of its share of the given ones."""
    known = sorted(lengths, reverse=True)
    upto = [0.0, *accumulate(known)]
    share = len(known) / n

    def total(at: float) -> float:
        whole = min(len(known) - 1, int(at))
        return upto[whole] + (at - whole) * known[whole]

    return ((total((i + 1) * share) - total(i * share)) / share for i in range(n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A sub-task that is under way at the beginning: what is left of it, beside the rows of its job."""

    device: str
    job: str
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Devices, models, jobs, and how unkind the world is."""

    devices: tuple[SimulatedDevice, ...]
    models: dict[str, Model]
    jobs: tuple[SimulatedJob, ...]
    #: (model, kind of device) -> the model as it is there, where its speed alone does not tell.
    measured: Mapping[tuple[str, str], Model] = field(default_factory=dict)
    #: Earlier ones first, of one device.
    begun: tuple[Begun, ...] = ()
    #: Sigma of the lognormal noise on each sub-task, mean 1; and on each load.
    noise: float = 0.3
    load_noise: float = 0.1
    #: Share of sub-tasks that take eight times as long.
    stragglers: float = 0.0
    #: From an outcome to the dispatcher's answer at the worker: seconds, exponential around it.
    trip_s: float = 0.05
    #: Share of messages to workers that are lost (found by the end of the lease), and of outcomes said twice.
    lost: float = 0.0
    doubled: float = 0.0
    lease_s: float = 8.0
    #: What the cost model believes of a token before it has seen one, as a factor of the truth.
    prior_off: float = 3.0

    def model(self, name: str, device: SimulatedDevice) -> Model:
        """What a model costs on a device of speed 1 of this kind."""
        return self.measured.get((name, device.kind), self.models[name])


@dataclass(slots=True)
class UncarvedRows:
    """What of a job was not carved yet, without its rows: a block's lengths stand for all blocks."""

    job: SimulatedJob
    cumulative: list[int] = field(init=False)
    squares: list[int] = field(init=False)
    blocks: int = field(init=False)
    block: int = 0
    cursor: int = 0

    def __post_init__(self) -> None:
        lengths = self.job.lengths()
        self.cumulative = [0, *accumulate(lengths)]
        self.squares = [0, *accumulate((size // BYTES_PER_TOKEN) ** 2 for size in lengths)]
        self.blocks = -(-self.job.rows // len(lengths))

    @property
    def block_rows(self) -> int:
        return len(self.cumulative) - 1

    def rows_of(self, block: int) -> int:
        """The last block is shorter."""
        return min(self.block_rows, self.job.rows - block * self.block_rows)

    def total(self) -> tuple[int, int]:
        """Rows and bytes of the whole job."""
        whole, rest = divmod(self.job.rows, self.block_rows)
        return self.job.rows, whole * self.cumulative[-1] + self.cumulative[rest]

    def work(self, lo: int, hi: int) -> Workload:
        return Workload(
            hi - lo,
            (self.cumulative[hi] - self.cumulative[lo]) / BYTES_PER_TOKEN,
            self.squares[hi] - self.squares[lo],
        )
