"""Routes of the cluster: is the process up, is it ready, which workers are there; and to drain and resume them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import Path
from starlette.responses import PlainTextResponse, Response

from motet.errors import NotFound
from motet.messages.cluster import ClusterPressure, Drained, Readiness, RunningWork, Worker, WorkerList
from motet.protocol.transport import TransportLost
from motet.protocol.wire import Beat
from motet.tasks import short
from scheduler.api.auth import Caller
from scheduler.api.refusals import Unavailable, refusal
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, reply
from scheduler.policy.liveness import speaks
from scheduler.policy.pressure import PressureFacts, overloads, pressures, throttle
from scheduler.store import drains
from scheduler.store.database import StoreUnavailable
from scheduler.store.rates import speeds
from scheduler.store.registry import Registered, has_leader, models
from scheduler.store.runs import runs_by_worker

log = logging.getLogger(__name__)
routes = Routes(tags=["cluster"])

WorkerPath = Annotated[
    str, Path(description="A worker's name, or a host's for all of its workers.", examples=["gpu-host-gpu0"])
]


@routes.get("/healthz", summary="The process is up", response_class=PlainTextResponse)
def healthz() -> PlainTextResponse:
    return PlainTextResponse("ok")


@routes.get(
    "/readyz",
    summary="Postgres, Redis and a leader are there",
    response_model=Readiness,
)
def readyz(use: Use) -> Response:
    postgres, leader = _postgres(use)
    found = {"postgres": postgres, "redis": _redis(use), "leader": leader}
    missing = [name for name, there in found.items() if not there]
    if missing:
        return refusal(Unavailable(f"not there: {', '.join(missing)}"))
    return reply(Readiness(ready=True, **found))


def _postgres(use: Resources) -> tuple[bool, bool]:
    """Whether Postgres answers, and whether it knows a dispatcher that leads."""
    try:
        with use.database.transaction() as connection:
            return True, has_leader(connection)
    except StoreUnavailable:
        return False, False


def _redis(use: Resources) -> bool:
    try:
        if use.transport is not None:
            use.transport.ping()
        return use.transport is not None
    except TransportLost:
        return False


@routes.get(
    "/v1/cluster",
    summary="How pressed the cluster is, and whether it takes new rows",
)
def show_cluster(use: Use, caller: Caller) -> ClusterPressure:
    facts = use.door.look()
    return ClusterPressure(
        pressure=pressures(facts), throttle=throttle_of(facts), refused=tuple(overloads(facts))
    )


def throttle_of(facts: PressureFacts) -> float | None:
    """Share of its usual rate at which the dispatcher sends; None while Redis is away."""
    lag, memory_share = facts.lag, facts.memory_share
    return None if lag is None or memory_share is None else throttle(lag.entries, memory_share)


@routes.get(
    "/v1/workers",
    summary="The workers that beat",
)
def list_workers(use: Use, caller: Caller) -> WorkerList:
    return WorkerList(workers=tuple(_workers(use, caller.tenant).values()))


@routes.post(
    "/v1/workers/{worker}/drain",
    summary="Let a worker, or all of a host, finish what it has and give it no more",
    response_description="The worker, or those of the host; it is `drained` once it holds nothing.",
)
def drain_worker(use: Use, caller: Caller, worker: WorkerPath) -> WorkerList:
    """It stays so, restarted or not, until it is resumed. Again is harmless."""
    named = _named(use, worker, caller.tenant)
    with use.database.transaction() as connection:
        drains.drain(connection, {name: worker.host for name, worker in named.items()}, caller.token)
    log.info("drained", extra={"workers": sorted(named), "token": caller.token})
    return _shown(use, named, caller.tenant)


@routes.post(
    "/v1/workers/{worker}/resume",
    summary="Let a drained worker, or all of a host, have work again",
)
def resume_worker(use: Use, caller: Caller, worker: WorkerPath) -> WorkerList:
    """Again is harmless."""
    named = _named(use, worker, caller.tenant)
    with use.database.transaction() as connection:
        drains.resume(connection, list(named))
    log.info("resumed", extra={"workers": sorted(named), "token": caller.token})
    return _shown(use, named, caller.tenant)


def _named(use: Resources, name: str, tenant: UUID) -> dict[str, Worker]:
    """The worker of this name, or else those of the host of this name. Raises NotFound."""
    every = _workers(use, tenant)
    if name in every:
        return {name: every[name]}
    found = {worker: record for worker, record in every.items() if on_host(worker, record.host, name)}
    if not found:
        raise NotFound(f"no worker and no host named {short(name)}; see `motet workers`")
    return found


def on_host(worker: str, host: str, name: str) -> bool:
    """Whether this worker is on the host of this name: the machine's own, with its domain or without, or the one
    that its launcher was given (``build-7`` of ``build-7-gpu0``)."""
    launched = re.fullmatch(r"(.+)-(?:cpu|gpu)[0-9-]+", worker)
    return bool(name) and name in (host, host.partition(".")[0], launched[1] if launched else "")


def _shown(use: Resources, named: Mapping[str, Worker], tenant: UUID) -> WorkerList:
    """These workers as they are now; one that was forgotten meanwhile as it was."""
    now = _workers(use, tenant)
    return WorkerList(workers=tuple(now.get(name, replace(was, drained=None)) for name, was in named.items()))


def _workers(use: Resources, tenant: UUID) -> dict[str, Worker]:
    """Every worker that beats or is drained, by name, as docs/http.md shows it. Raises TransportLost."""
    if use.transport is None:
        raise Unavailable("no Redis is configured; set MOTET_REDIS_URL")
    # Beats before leases: whoever says that it drains was told by a leader that gives it no more.
    beats = use.transport.beats()
    silent = use.workers.silent(beats, time.monotonic())
    with use.database.transaction() as connection:
        refs = refs_by_digest(models(connection))
        learned = speeds(connection)
        drained = drains.drains(connection)
        holding = drains.holding(connection)
        runs = runs_by_worker(connection, tenant)
    gone = {name: Beat(worker=name, boot="", seq=0, host=d.host) for name, d in drained.items()}
    return {
        name: Worker(
            worker=name,
            host=beat.host,
            state=_state(beat, silent=name in silent, drained=name in drained, holding=name in holding)
            if name in beats
            else "gone",
            device_kind=beat.device_kind if name in beats else "",
            device_name=beat.device_name,
            memory_mb=beat.memory_mb,
            memory_used_mb=beat.memory_used_mb,
            utilisation=beat.utilisation,
            resident=tuple(refs.get(digest, digest[:12]) for digest in beat.resident),
            backlog_s=beat.backlog_s,
            held=len(beat.held),
            rows_done=beat.rows_done,
            rate_tokens_s=learned.get(beat.device_name),
            protocol=beat.protocol if name in beats else None,
            version=beat.version,
            drained=Drained(since=drain.since, by=drain.by) if (drain := drained.get(name)) else None,
            running=tuple(
                RunningWork(job=str(run.job), pass_=run.pass_kind, subtasks=run.subtasks, rows=run.rows)
                for run in runs.get(name, ())
                if run.job is not None
            ),
            running_other=sum(run.subtasks for run in runs.get(name, ()) if run.job is None),
        )
        for name, beat in sorted({**gone, **beats}.items())
    }


def _state(beat: Beat, *, silent: bool, drained: bool, holding: bool) -> str:
    """A worker's state in one word. ``drained``: the flag is set, it has said so, and nothing of it is left there."""
    if silent:
        return "silent"
    if not speaks(beat):
        return "incompatible"
    if drained and beat.state != "starting":
        return "drained" if beat.state == "draining" and not (beat.held or holding) else "draining"
    return beat.state


def refs_by_digest(registered: list[Registered]) -> Mapping[str, str]:
    """Digest, of a model or of the trunk that it is, -> ``name@version``."""
    refs: dict[str, str] = {}
    for model in (r.manifest for r in registered):
        refs[model.digest] = model.ref
        if model.trunk and not model.trunk_model:
            refs[model.trunk] = model.ref
    return refs
