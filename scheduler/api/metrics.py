"""``GET /metrics``: what Prometheus is told, read from Postgres and the beats at the moment it asks.

Labels are names of machines, states and routes; never a job, a tenant or anything that a user wrote. What shrinks
when jobs are deleted is a gauge of unfinished jobs only; counters begin at the first scrape of this process, so of
several API processes each counts all jobs: take the highest, not the sum.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args
from uuid import UUID

from fastapi import Request
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)
from prometheus_client import Counter as CountedSeries
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.responses import Response

from motet.distributions import installed
from motet.messages.cluster import Reason
from motet.protocol.columns import storable
from motet.protocol.transport import Lag, TransportLost
from motet.protocol.wire import PROTOCOL, Beat
from motet.states import ENDED, LIVE, REACHED
from scheduler.api.ask_meter import Result
from scheduler.api.auth import Caller
from scheduler.api.resources import Resources
from scheduler.api.routing import Routes
from scheduler.ask_times import BOUNDS_S
from scheduler.policy.liveness import speaks
from scheduler.policy.pressure import pressures
from scheduler.store import metrics as store
from scheduler.store.database import StoreUnavailable
from scheduler.store.metrics import MARGIN, JobFigures, StoreFigures
from scheduler.webhooks.deliverer import Tried

routes = Routes(tags=["cluster"])


@dataclass(frozen=True, slots=True)
class Family:
    """A metric family: what it is, what it means, and what its samples are told apart by."""

    kind: Literal["gauge", "counter", "info", "histogram"]
    words: str
    labels: tuple[str, ...] = ()


_DEVICE = ("worker", "device")
#: Every family of ours, by the name that PromQL uses. The dashboard and the alerts are tested against it.
FAMILIES: Mapping[str, Family] = {
    "motet_build_info": Family(
        "info",
        "Version of motet, and major of the protocol that its processes speak",
        ("version", "protocol"),
    ),
    "motet_up": Family("gauge", "1 where this service answered the scrape, else 0", ("service",)),
    # -- of Postgres
    "motet_jobs": Family("gauge", "Unfinished jobs", ("state",)),
    "motet_jobs_finished_total": Family("counter", "Jobs that ended since the first scrape", ("state",)),
    "motet_rows": Family("gauge", "Rows of unfinished jobs"),
    "motet_rows_landed_total": Family("counter", "Rows received since the first scrape"),
    "motet_rows_waiting": Family("gauge", "Rows x passes that wait to be given to a device"),
    "motet_cells": Family("gauge", "Cells of unfinished jobs; waiting: without an answer yet", ("state",)),
    "motet_cells_recorded_total": Family(
        "counter", "Cells that became final since the first scrape", ("state",)
    ),
    "motet_cells_reused_total": Family("counter", "Of those, cells that an earlier job had answered"),
    "motet_subtasks_open": Family("gauge", "Sub-tasks that are leased now"),
    "motet_subtasks_closed_total": Family(
        "counter", "Sub-tasks that reported, and attempts that were lost and rescued", ("state",)
    ),
    "motet_tokens_total": Family("counter", "Tokens of rows that devices worked on"),
    "motet_computed_tokens_total": Family("counter", "Tokens computed, padding included"),
    "motet_busy_seconds_total": Family("counter", "Seconds that devices worked for jobs"),
    "motet_leases": Family("gauge", "Live leases"),
    "motet_oldest_lease_seconds": Family("gauge", "Age of the oldest live lease; 0 where there is none"),
    "motet_leader_epoch": Family(
        "gauge", "Second in which the lead was taken; grows each time that a dispatcher takes it"
    ),
    "motet_leader_lease_remaining_seconds": Family(
        "gauge", "Seconds until the leader's lease runs out; 0 where nobody leads"
    ),
    "motet_database_bytes": Family("gauge", "Size of the database"),
    "motet_webhook_events_pending": Family("gauge", "Events that wait for webhooks"),
    "motet_webhook_oldest_pending_seconds": Family(
        "gauge", "Seconds since the oldest event was written that waits for a webhook; 0 where none does"
    ),
    "motet_webhooks_failing": Family("gauge", "Webhooks that did not take what they were told last"),
    # -- of Redis
    "motet_outcomes_waiting": Family("gauge", "Outcomes that no aggregator has recorded yet"),
    "motet_outcomes_oldest_seconds": Family(
        "gauge", "Age of the oldest outcome that waits; 0 where none does"
    ),
    "motet_dead_letters": Family("gauge", "Outcomes that could not be read; the last hundred are kept"),
    "motet_audit_differences": Family(
        "gauge", "What audits of the leader found to be otherwise than it thought; more than 0 is a fault"
    ),
    "motet_redis_memory_ratio": Family("gauge", "Used share of Redis' memory limit; 0 where it has none"),
    # -- of both
    "motet_pressure": Family(
        "gauge",
        "Way from a soft limit, 0, to the hard one, 1, from which on new rows are refused",
        ("reason",),
    ),
    # -- of the workers' beats
    "motet_worker_info": Family(
        "info",
        "A worker that beats, or did within the last minute",
        ("worker", "host", "device", "kind", "state"),
    ),
    "motet_worker_rows_done_total": Family(
        "counter", "Rows that a worker has done since it started", ("worker",)
    ),
    "motet_worker_attempts_held": Family("gauge", "Sub-tasks that a worker holds", ("worker",)),
    "motet_backlog_seconds": Family(
        "gauge", "Predicted seconds of the work that a worker holds", ("worker",)
    ),
    "motet_device_utilisation_ratio": Family("gauge", "Busy share of the device in the last second", _DEVICE),
    "motet_device_memory_bytes": Family("gauge", "Memory of the device", _DEVICE),
    "motet_device_memory_used_bytes": Family("gauge", "Memory of the device that is in use", _DEVICE),
    "motet_device_tokens_per_second": Family(
        "gauge", "Learned speed of the device, with the model that it runs fastest", _DEVICE
    ),
    # -- of this process: of several API processes take the sum
    "motet_asks_total": Family("counter", "Asks of open jobs that ended here", ("result",)),
    "motet_ask_duration_seconds": Family("histogram", "Seconds from an ask to its answer"),
    "motet_ask_rows_waiting": Family("gauge", "Rows of open jobs that wait here to be stored"),
    "motet_webhook_deliveries_total": Family(
        "counter",
        "Tries to tell a webhook of an event that ended here, and events given up here",
        ("result",),
    ),
    "motet_http_requests_total": Family("counter", "Requests answered", ("method", "route", "status")),
    "motet_http_request_duration_seconds": Family(
        "histogram", "Seconds from a request to the end of its answer, waiting included", ("method", "route")
    ),
}

_MIB = 1 << 20
#: Long ones wait for news on purpose (``wait_s`` up to 30 s).
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
#: Every other bound of those that pages go by: a factor of 1.4 lies between two.
_ASK_BUCKETS_S = BOUNDS_S[::2]
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BEAT_STATES = frozenset({"starting", "ready", "draining"})


# -- requests


class Requests:
    """Counts and times the requests of one API process. Safe between threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # A series per series that says when the series began: nobody asks.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        counted, timed = (
            FAMILIES[name] for name in ("motet_http_requests_total", "motet_http_request_duration_seconds")
        )
        self._count = CountedSeries(
            "motet_http_requests_total", counted.words, counted.labels, registry=registry
        )
        self._seconds = Histogram(
            "motet_http_request_duration_seconds",
            timed.words,
            timed.labels,
            registry=registry,
            buckets=_BUCKETS_S,
        )

    def saw(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered. ``route``: its template, or ``-`` for none of ours."""
        # A method is any word that a client likes; each of them would be a series for ever.
        method = method if method in _METHODS else "other"
        self._count.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


class DeliveryFigures:
    """Counts the deliveries of one API process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        name = "motet_webhook_deliveries_total"
        counted = FAMILIES[name]
        self._count = CountedSeries(name, counted.words, counted.labels, registry=registry)
        for result in get_args(Tried):
            self._count.labels(result)

    def saw(self, result: Tried, count: int) -> None:
        """So many ended so."""
        self._count.labels(result).inc(count)


class AskFigures:
    """Counts and times the asks of one API process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counted, timed = FAMILIES["motet_asks_total"], FAMILIES["motet_ask_duration_seconds"]
        self._count = CountedSeries("motet_asks_total", counted.words, counted.labels, registry=registry)
        self._seconds = Histogram(
            "motet_ask_duration_seconds", timed.words, registry=registry, buckets=_ASK_BUCKETS_S
        )
        for result in get_args(Result):
            self._count.labels(result)

    def saw(self, result: Result, seconds: float) -> None:
        """One ask ended so; only answers are timed."""
        self._count.labels(result).inc()
        if result == "answered":
            self._seconds.observe(seconds)


# -- jobs


#: Counts of a job that only grow while it runs.
_COUNTED: Sequence[str] = (
    *("n_rows", "cells_ok", "cells_error", "cells_skipped", "cells_reused"),
    *("tokens", "computed_tokens", "busy_s", "subtasks", "attempts_lost"),
)


@dataclass
class Tally:
    """Makes counters that never shrink of jobs that come, grow, end and are deleted. No clock, no I/O.

    Each look brings every unfinished job and those that ended lately; what grew since the look before is added.
    What was there at the first look is where counting begins. A job that is deleted between two looks takes its
    last few cells with it.
    """

    totals: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    _before: dict[UUID, JobFigures] | None = None

    def look(self, jobs: Iterable[JobFigures]) -> None:
        """Add what has grown since the look before."""
        now = {job.id: job for job in jobs}
        if self._before is not None:
            for job in now.values():
                self._add(job, self._before.get(job.id))
        self._before = now

    def _add(self, job: JobFigures, before: JobFigures | None) -> None:
        for name in _COUNTED:
            # An end takes unsealed answers back: they are counted as skipped then, and the counter stands still.
            self.totals[name] += max(0, getattr(job, name) - (getattr(before, name) if before else 0))
        if job.state in ENDED and (before is None or before.state not in ENDED):
            self.ended[job.state] += 1


# -- the scrape


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """What Redis says at one moment."""

    lag: Lag
    dead_letters: int
    differences: int
    memory_share: float
    beats: Mapping[str, Beat]
    #: Workers whose beat has stopped.
    silent: set[str]


class Figures(Collector):
    """The registry of one API process: its own requests, and the cluster as it is when somebody asks."""

    def __init__(self, use: Resources) -> None:
        self._use = use
        self._lock = threading.Lock()
        self._tally = Tally()
        self._since: datetime | None = None
        self.registry = CollectorRegistry()
        self.requests = Requests(self.registry)
        use.feeds.meter.heard = AskFigures(self.registry).saw
        self.deliveries = DeliveryFigures(self.registry)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def describe(self) -> list[Metric]:
        """Nothing is asked of anybody when the registry is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family. A service that is away is said to be; the other's figures are there all the same."""
        page = _Page()
        page.add("motet_build_info", 1, version=installed() or "unknown", protocol=str(PROTOCOL))
        stored = self._stored()
        page.add("motet_up", stored is not None, service="postgres")
        if stored is not None:
            _show_store(page, stored[0], stored[1])
            for reason, pressure in self._pressures().items():
                page.add("motet_pressure", pressure, reason=reason)
        page.add("motet_ask_rows_waiting", sum(self._use.feeds.waiting().values()))
        moving = self._moving()
        page.add("motet_up", moving is not None, service="redis")
        if moving is not None:
            _show_redis(page, moving)
            _show_workers(page, moving, stored[0].speeds if stored else {})
        return page.families()

    def _stored(self) -> tuple[StoreFigures, Tally] | None:
        # One look at a time: two at once would both add what is new.
        with self._lock:
            try:
                with self._use.database.transaction() as connection:
                    found = store.figures(connection, self._since)
            except StoreUnavailable:
                return None
            self._since = found.now - MARGIN
            self._tally.look(found.jobs)
            return found, Tally(self._tally.totals.copy(), self._tally.ended.copy())

    def _pressures(self) -> Mapping[Reason, float]:
        try:
            return pressures(self._use.door.look())
        except StoreUnavailable:
            return {}

    def _moving(self) -> Moving | None:
        transport = self._use.transport
        if transport is None:
            return None
        try:
            beats = transport.beats()
            return Moving(
                lag=transport.outcome_lag(),
                dead_letters=transport.dead_letters(),
                differences=transport.differences(),
                memory_share=transport.memory_share(),
                beats=beats,
                silent=self._use.workers.silent(beats, time.monotonic()),
            )
        except TransportLost:
            return None


def _show_store(page: _Page, found: StoreFigures, tally: Tally) -> None:
    jobs, totals = found.jobs, tally.totals
    unfinished = [job for job in jobs if job.state in LIVE]
    for name in REACHED:
        if name in ENDED:
            page.add("motet_jobs_finished_total", tally.ended[name], state=name)
        else:
            page.add("motet_jobs", sum(job.state == name for job in unfinished), state=name)
    page.add("motet_rows", sum(job.n_rows for job in unfinished))
    page.add("motet_rows_landed_total", totals["n_rows"])
    page.add("motet_rows_waiting", found.rows_waiting)
    for state, number in _cells(unfinished).items():
        page.add("motet_cells", number, state=state)
    for state in ("ok", "error", "skipped"):
        page.add("motet_cells_recorded_total", totals[f"cells_{state}"], state=state)
    page.add("motet_cells_reused_total", totals["cells_reused"])
    page.add("motet_subtasks_open", found.open_subtasks)
    page.add("motet_subtasks_closed_total", totals["subtasks"], state="reported")
    page.add("motet_subtasks_closed_total", totals["attempts_lost"], state="lost")
    page.add("motet_tokens_total", totals["tokens"])
    page.add("motet_computed_tokens_total", totals["computed_tokens"])
    page.add("motet_busy_seconds_total", totals["busy_s"])
    page.add("motet_leases", found.leases)
    page.add("motet_oldest_lease_seconds", found.oldest_lease_s)
    page.add("motet_leader_epoch", found.epoch)
    page.add("motet_leader_lease_remaining_seconds", found.leader_left_s)
    page.add("motet_database_bytes", found.database_bytes)
    page.add("motet_webhook_events_pending", found.pending.events)
    page.add("motet_webhook_oldest_pending_seconds", found.pending.oldest_s)
    page.add("motet_webhooks_failing", found.pending.failing)


def _cells(jobs: Sequence[JobFigures]) -> dict[str, int]:
    final = {
        state: sum(getattr(job, f"cells_{state}") for job in jobs) for state in ("ok", "error", "skipped")
    }
    return {**final, "waiting": sum(job.n_cells for job in jobs) - sum(final.values())}


def _show_redis(page: _Page, moving: Moving) -> None:
    page.add("motet_outcomes_waiting", moving.lag.entries)
    page.add("motet_outcomes_oldest_seconds", moving.lag.oldest_s)
    page.add("motet_dead_letters", moving.dead_letters)
    page.add("motet_audit_differences", moving.differences)
    page.add("motet_redis_memory_ratio", moving.memory_share)


def _show_workers(page: _Page, moving: Moving, speeds: Mapping[str, float]) -> None:
    for worker, beat in sorted(moving.beats.items()):
        on = {"worker": worker, "device": beat.device_name}
        page.add(
            "motet_worker_info",
            1,
            **on,
            host=beat.host,
            kind=beat.device_kind,
            state=_state(beat, moving.silent),
        )
        page.add("motet_worker_rows_done_total", beat.rows_done, worker=worker)
        if worker in moving.silent:
            # What it said last is no longer true of its device.
            continue
        page.add("motet_worker_attempts_held", len(beat.held), worker=worker)
        page.add("motet_backlog_seconds", beat.backlog_s, worker=worker)
        page.add("motet_device_utilisation_ratio", beat.utilisation, **on)
        page.add("motet_device_memory_bytes", beat.memory_mb * _MIB, **on)
        page.add("motet_device_memory_used_bytes", beat.memory_used_mb * _MIB, **on)
        if beat.device_name in speeds:
            page.add("motet_device_tokens_per_second", speeds[beat.device_name], **on)


def _state(beat: Beat, silent: set[str]) -> str:
    if beat.worker in silent:
        return "silent"
    if not speaks(beat):
        return "incompatible"
    return beat.state if beat.state in _BEAT_STATES else "unknown"


class _Page:
    """Samples of a scrape, by family."""

    def __init__(self) -> None:
        self._samples: defaultdict[str, dict[tuple[str, ...], float]] = defaultdict(dict)

    def add(self, name: str, value: float, **labels: str) -> None:
        values = tuple(_label(labels[each]) for each in FAMILIES[name].labels)
        self._samples[name][values] = float(value)

    def families(self) -> Iterator[Metric]:
        for name, samples in self._samples.items():
            family = FAMILIES[name]
            if family.kind == "info":
                facts = InfoMetricFamily(name.removesuffix("_info"), family.words, labels=family.labels)
                for labels in samples:
                    facts.add_metric(labels, {})
                yield facts
                continue
            of_kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            numbers = of_kind(name, family.words, labels=family.labels)
            for labels, value in samples.items():
                numbers.add_metric(labels, value)
            yield numbers


def _label(words: str) -> str:
    """A worker says its names itself: bounded, and nothing that UTF-8 cannot hold."""
    return storable(words, 100).encode("utf-8", "replace").decode()


# -- the route


@dataclass(frozen=True, slots=True)
class Exposition:
    """One of the two ways to write figures down."""

    write: Callable[[CollectorRegistry], bytes]
    content_type: str


PLAIN = Exposition(exposition.generate_latest, exposition.CONTENT_TYPE_PLAIN_0_0_4)
OPENMETRICS = Exposition(openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST)
_EXAMPLE = """# HELP motet_jobs Unfinished jobs
# TYPE motet_jobs gauge
motet_jobs{state="loading"} 0.0
motet_jobs{state="running"} 2.0
"""


@routes.get(
    "/metrics",
    summary="Figures of the cluster, for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Every family, as text or, where asked for, as OpenMetrics.",
            "content": {"text/plain": {"example": _EXAMPLE}},
        },
    },
)
def read_metrics(request: Request, caller: Caller) -> Response:
    figures: Figures = request.app.state.figures
    asked_for = request.headers.get("accept", "")
    # Prometheus lists it where it reads it; which versions and weights it names beside it makes no difference here.
    form = OPENMETRICS if "application/openmetrics-text" in asked_for else PLAIN
    return Response(form.write(figures.registry), headers={"Content-Type": form.content_type})
