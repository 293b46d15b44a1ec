"""Capability: whether, and why not, a worker can run a pass. Pure.

`why_not` is asked by placing, the explanation, the forecast, the plan and what is hopeless, and by nothing else decided.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import ceil

from motet.messages.explanation import Why
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Beat
from scheduler.policy.liveness import speaks
from scheduler.policy.placing.records import Demand, Refusal, WorkerState

#: Reasons that last as long as the worker's process: it will never run the pass. The others pass.
LASTING: frozenset[Why | None] = frozenset({"no_engine", "too_small", "refused", "incompatible"})


def workers(
    beats: Mapping[str, Beat],
    refusals: Sequence[Refusal],
    memory_share: float,
    *,
    drained: Container[str] = (),
    suspects: Container[str] = (),
) -> list[WorkerState]:
    """Workers as of their beats. Models may hold ``memory_share`` of a device's memory.

    ``drained``: by an operator. ``suspects``: workers with a row that runs alone, since it may kill its process.
    """
    refused: dict[tuple[str, str], set[int]] = {}
    for r in refusals:
        refused.setdefault((r.worker, r.boot), set()).add(r.model_id)
    return [
        WorkerState(
            name=name,
            boot=b.boot,
            device_kind=b.device_kind,
            device_name=b.device_name,
            engines=b.engines,
            memory_mb=int(memory_share * b.memory_mb),
            gpus=b.gpus,
            spreads=b.spreads,
            formats=b.formats,
            resident=b.resident,
            refused=frozenset(refused.get((name, b.boot), ())),
            barred=barred(b, drained=name in drained, suspect=name in suspects),
        )
        for name, b in beats.items()
    ]


def barred(beat: Beat, *, drained: bool = False, suspect: bool = False) -> Why | None:
    """Why a worker is given no work at all now; None: it may be given work."""
    if not speaks(beat):
        return "incompatible"
    if drained:
        return "drained"
    if beat.state != "ready":
        return beat.state
    return "exclusive" if suspect else None


def why_not(worker: WorkerState, demand: Demand) -> Why | None:
    """Why a worker is given nothing of a pass: what it can never run before what it does not run now. None: it can."""
    if worker.barred == "incompatible" or (worker.barred == "starting" and not worker.engines):
        # It has not said yet, or not in our words, what it can do.
        return worker.barred
    lack = cannot_hold(worker, demand.model, demand.numerics, demand.beside_mb)
    return lack or ("refused" if refuses(worker, demand) else worker.barred)


def refuses(worker: WorkerState, demand: Demand) -> bool:
    """Whether this process could not load the pass' model, or a head of it."""
    return not worker.refused.isdisjoint(demand.model_ids)


def lacks_room_beside(worker: WorkerState, demand: Demand) -> bool:
    """Whether a worker that can hold the pass' model has no room for the artefacts beside it."""
    return (
        bool(demand.beside_mb)
        and cannot_hold(worker, demand.model, demand.numerics, demand.beside_mb) == "too_small"
    )


def cannot_hold(worker: WorkerState, model: Manifest, numerics: str, beside_mb: int = 0) -> Why | None:
    """Why a worker can never load a model, with ``beside_mb`` of artefacts, however free it is; None where nothing is
    known against it."""
    if model.engine not in worker.engines:
        return "no_engine"
    too_small = 0 < room_mb(worker, model.engine) < need_mb(worker, model, numerics) + beside_mb
    return "too_small" if too_small else None


def need_mb(worker: WorkerState, model: Manifest, numerics: str) -> int:
    """Memory that a model takes on a worker, in the numeric format that it would run in there."""
    fast = (name for name in worker.formats if name in model.formats) if numerics == "fast" else ()
    return model.memory_mb(next(iter(fast), "fp32"))


def room_mb(worker: WorkerState, engine: str) -> int:
    """Memory that a model of an engine can have on a worker that holds no other; 0: not known."""
    return worker.memory_mb if engine in worker.spreads else worker.memory_mb // worker.gpus


def on_first_mb(worker: WorkerState, model: Manifest, numerics: str) -> int:
    """What the first GPU of a worker holds of a model. It is the fullest of a group, since most engines use it alone."""
    whole_mb = need_mb(worker, model, numerics)
    return ceil(whole_mb / worker.gpus) if model.engine in worker.spreads else whole_mb
