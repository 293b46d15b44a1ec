"""Routes that look at the cluster: is the process up, is it ready, and which workers are there."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import JSONResponse, PlainTextResponse

from motet.transport import TransportLost
from motet.wire import Beat
from scheduler.api import shapes
from scheduler.api.auth import Caller
from scheduler.api.refusals import Unavailable, refusal
from scheduler.api.resources import Resources, Use
from scheduler.store.database import StoreUnavailable
from scheduler.store.leases import rates
from scheduler.store.registry import Registered, has_leader, models

routes = APIRouter(tags=["cluster"])


@routes.get("/healthz", summary="The process is up", response_class=PlainTextResponse)
def healthz() -> PlainTextResponse:
    return PlainTextResponse("ok")


@routes.get(
    "/readyz",
    summary="Postgres, Redis and a leader are there",
    responses=shapes.answers(200, shapes.ReadyShape, shapes.READY, "All three are there.", anyone=True),
)
def readyz(use: Use) -> JSONResponse:
    postgres, leader = _postgres(use)
    found = {"postgres": postgres, "redis": _redis(use), "leader": leader}
    missing = [name for name, there in found.items() if not there]
    if missing:
        return refusal(Unavailable(f"not there: {', '.join(missing)}"))
    return JSONResponse({"ready": True, **found})


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
    "/v1/workers",
    summary="The workers that beat",
    responses=shapes.answers(200, shapes.WorkersShape, {"workers": [shapes.WORKER]}, "Every worker."),
)
def list_workers(use: Use, caller: Caller) -> JSONResponse:
    if use.transport is None:
        raise Unavailable("no Redis is configured; set MOTET_REDIS_URL")
    beats = use.transport.beats()
    silent = use.workers.silent(beats, time.monotonic())
    with use.database.transaction() as connection:
        refs = refs_by_digest(models(connection))
        speeds = _speeds(connection)
    return JSONResponse(
        {
            "workers": [
                {
                    "worker": name,
                    "host": beat.host,
                    "state": "silent" if name in silent else beat.state,
                    "device_kind": beat.device_kind,
                    "device_name": beat.device_name,
                    "memory_mb": beat.memory_mb,
                    "memory_used_mb": beat.memory_used_mb,
                    "utilisation": beat.utilisation,
                    "resident": [refs.get(digest, digest[:12]) for digest in beat.resident],
                    "backlog_s": beat.backlog_s,
                    "held": len(beat.held),
                    "rows_done": beat.rows_done,
                    "rate_tokens_s": speeds.get(beat.device_name),
                }
                for name, beat in sorted(beats.items())
            ]
        }
    )


def live_workers(use: Resources) -> dict[str, Beat]:
    """Newest beat of every worker that is not known to be silent. Raises TransportLost."""
    if use.transport is None:
        return {}
    beats = use.transport.beats()
    silent = use.workers.silent(beats, time.monotonic())
    return {name: beat for name, beat in beats.items() if name not in silent}


def refs_by_digest(registered: list[Registered]) -> Mapping[str, str]:
    """Digest, of a model or of the trunk that it is, -> ``name@version``."""
    refs: dict[str, str] = {}
    for model in (r.manifest for r in registered):
        refs[model.digest] = model.ref
        if model.trunk and not model.trunk_model:
            refs[model.trunk] = model.ref
    return refs


def _speeds(connection: Connection) -> dict[str, float]:
    """Device name -> tokens per second, as learned of the model that it runs fastest."""
    speeds: dict[str, float] = {}
    for (_, device, _), rate in rates(connection).learned.items():
        speeds[device] = max(speeds.get(device, 0.0), 1 / rate.seconds_per_token)
    return speeds
