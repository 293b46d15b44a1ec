"""Place: which worker gets work of which pass now. Pure; a simple rule behind the final seam.

Interactive before normal before bulk; within a priority the tenant, then the job, with the least work under
way for its weight; a worker that has the model beats one that must load it. Workers are kept seconds deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from motet.manifest import Manifest
from scheduler.carve import size_s
from scheduler.cost import Rates

INTERACTIVE, NORMAL, BULK = 0, 1, 2


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
    numerics: str = "fast"
    rows_waiting: int
    bytes_waiting: int
    #: Open sub-tasks of the job and of its tenant, as the share of work under way.
    job_open: int = 0
    tenant_open: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One live worker, as of its newest beat and its live leases."""

    name: str
    boot: str
    device_kind: str
    device_name: str
    engines: tuple[str, ...]
    resident: tuple[str, ...]
    #: Live leases it holds, and their predicted seconds.
    leases: int
    leased_s: float
    #: An exclusive sub-task is under way: nothing may be put beside it.
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Give this worker the next sub-task of this pass, of about so many seconds and bytes."""

    worker: Worker
    demand: Demand
    budget_bytes: float
    seconds_per_byte: float


@dataclass
class _Remaining:
    """How one call of ``place`` sees waiting work shrink as it hands it out."""

    rows: dict[tuple[str, int], int] = field(default_factory=dict)
    left: dict[tuple[str, int], float] = field(default_factory=dict)
    job_open: dict[str, float] = field(default_factory=dict)
    tenant_open: dict[str, float] = field(default_factory=dict)


def place(
    demands: Sequence[Demand],
    workers: Sequence[Worker],
    rates: Rates,
    refused: Mapping[str, frozenset[int]],
    *,
    subtask_s: float,
    depth: int,
) -> Iterator[Placement]:
    """Placements in the order they should be carved. ``refused``: worker -> ids of models it cannot load.

    A worker takes bulk work while it holds fewer than ``depth`` sub-tasks and less than two sub-tasks' seconds;
    interactive work may go twice as deep, so that it never waits for a slot.
    """
    state = _Remaining(
        rows={(d.job, d.pass_number): d.rows_waiting for d in demands},
        left={(d.job, d.pass_number): float(d.bytes_waiting) for d in demands},
        job_open={d.job: float(d.job_open) for d in demands},
        tenant_open={d.tenant: float(d.tenant_open) for d in demands},
    )
    load = {w.name: (w.leases, w.leased_s) for w in workers}
    able = [w for w in workers if not w.exclusive]
    while True:
        # The emptiest worker asks first, so that work spreads before it deepens.
        able.sort(key=lambda w: (load[w.name][0], load[w.name][1], w.name))
        for worker in able:
            leases, leased_s = load[worker.name]
            full = leases >= depth or leased_s >= 2 * subtask_s
            demand = _choose(
                demands, worker, refused.get(worker.name, frozenset()), state, full, leases, depth
            )
            if demand is not None:
                break
        else:
            return
        key = (demand.job, demand.pass_number)
        rate = rates.of(
            (demand.model.trunk or demand.model.digest, worker.device_name, demand.numerics),
            device_kind=worker.device_kind,
            parameters=demand.model.parameters,
        )
        per_byte = rate.seconds_per_token / rate.bytes_per_token
        budget_s = size_s(subtask_s, state.left[key] * per_byte, len(able))
        budget_bytes = max(1.0, budget_s / per_byte)
        taken = min(budget_bytes, state.left[key])
        yield Placement(worker, demand, budget_bytes, per_byte)
        state.rows[key] -= max(1, int(demand.rows_waiting * taken / max(1, demand.bytes_waiting)))
        state.left[key] -= taken
        state.job_open[demand.job] += 1
        state.tenant_open[demand.tenant] += 1
        load[worker.name] = (leases + 1, leased_s + taken * per_byte)


def _choose(
    demands: Sequence[Demand],
    worker: Worker,
    refused: frozenset[int],
    state: _Remaining,
    full: bool,
    leases: int,
    depth: int,
) -> Demand | None:
    """The demand that this worker should serve next, or None."""

    def wanted(d: Demand) -> bool:
        return (
            state.rows[d.job, d.pass_number] > 0
            and d.model.engine in worker.engines
            and not d.model_ids & refused
            and (not full or (d.priority == INTERACTIVE and leases < 2 * depth))
        )

    def rank(d: Demand) -> tuple[float, ...]:
        return (
            d.priority,
            state.tenant_open[d.tenant] / d.weight,
            state.job_open[d.job],
            d.model.digest not in worker.resident,
            d.age,
        )

    return min(filter(wanted, demands), key=rank, default=None)
