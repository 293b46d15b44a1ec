"""Capability: whether, and why not, a worker can run a pass. Pure."""

from __future__ import annotations

from math import ceil
from typing import Literal

from motet.protocol.manifest import Manifest
from scheduler.policy.placing.records import Demand, WorkerState


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


def cannot_hold(
    worker: WorkerState, model: Manifest, numerics: str
) -> Literal["no_engine", "too_small"] | None:
    """Why a worker can never load a model, however free it is; None where nothing is known against it."""
    if model.engine not in worker.engines:
        return "no_engine"
    too_small = 0 < room_mb(worker, model.engine) < need_mb(worker, model, numerics)
    return "too_small" if too_small else None


def cannot_run(worker: WorkerState, demand: Demand) -> Literal["no_engine", "too_small", "refused"] | None:
    """Why a worker can never run a pass, however free it is; None where nothing is known against it."""
    lacks = cannot_hold(worker, demand.model, demand.numerics)
    return lacks or ("refused" if demand.model_ids & worker.refused else None)
