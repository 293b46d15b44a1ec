"""Explain: why a job waits, who is beside it, which workers could run it, and when it will be done. Pure.

From the same facts that the dispatcher goes by to an `Explanation` in numbers; ``sentences`` says it in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from motet.messages.explanation import (
    Beside,
    CanLoad,
    Cannot,
    Due,
    Eta,
    Explanation,
    Loading,
    PassExplained,
    PassRows,
    Retries,
    Rival,
    Share,
    Why,
)
from motet.states import ENDED, GROWING
from scheduler.explaining.case import Case
from scheduler.explaining.sentences import REASONS, error_note, notes, reason, says
from scheduler.policy.capability import need_mb, room_mb, why_not
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL
from scheduler.policy.placing.records import Demand, WorkerState
from scheduler.simulation.forecast import ClusterNow, Forecast, Started, forecast

if TYPE_CHECKING:
    from scheduler.store.explain import PassStanding

#: Names of workers, and jobs beside this one, that are told; the others are counted.
NAMES = 20
_CLASSES: dict[int, Literal["interactive", "normal", "bulk"]] = {
    INTERACTIVE: "interactive",
    NORMAL: "normal",
    BULK: "bulk",
}
#: From the last answer to a merged block: what a forecast in sub-tasks leaves out.
_MERGE_S = 0.3
#: Of what is predicted of a sub-task that is overdue so much is still to come.
_OVERDUE = 0.25


def explain(case: Case) -> Explanation:
    """Why the job waits, or when it will be done."""
    job = case.standing.job
    if job.state in ENDED:
        return _ended(case)
    passes = tuple(_pass(case, p) for p in case.standing.passes)
    stuck = [p for p in passes if p.rows.waiting + p.rows.later and p.work_s is None]
    predicted = None
    if case.beats is not None and case.leads and case.throttle != 0 and not stuck:
        predicted = _forecast(case)
    eta = None if predicted is None else _eta(case, predicted)
    told = Explanation(
        job=case.id,
        name=job.name,
        state=job.state,
        says="",
        notes=(),
        passes=passes,
        beside=tuple(_beside(case)),
        share=_share(case),
        errors=job.cells_error,
        retries=_retries(case),
        throttle=case.throttle,
        deadline=_due(case, eta),
        eta=eta,
    )
    return replace(told, says=says(case, told, stuck), notes=tuple(notes(case, told)))


def _ended(case: Case) -> Explanation:
    job = case.standing.job
    why = f": {job.reason}" if job.reason else ""
    return Explanation(
        job=case.id,
        name=job.name,
        state=job.state,
        says=f"It has ended: {job.state}{why}.",
        notes=tuple(error_note(job.cells_error)),
        errors=job.cells_error,
    )


# -- who can run it


def _pass(case: Case, p: PassStanding) -> PassExplained:
    demand = p.demand
    resident: list[str] = []
    loading: list[Loading] = []
    can_load: dict[str, list[WorkerState]] = defaultdict(list)
    cannot: dict[tuple[Why, str], list[WorkerState]] = defaultdict(list)
    for name, worker in sorted(case.workers.items()):
        why = why_not(worker, demand)
        if why is not None:
            cannot[why, reason(case, why, worker, demand)].append(worker)
        elif demand.model.digest in worker.resident:
            resident.append(name)
        elif (left_s := _loading_s(case, worker, demand)) is not None:
            loading.append(Loading(worker=name, left_s=_s(left_s)))
        else:
            can_load[worker.device_name].append(worker)
    order = list(REASONS)
    return PassExplained(
        number=demand.pass_number,
        kind=p.kind,
        tasks=p.tasks,
        model=demand.model.ref,
        rows=PassRows(
            total=p.rows,
            waiting=max(0, demand.rows_waiting - p.rows_later),
            later=p.rows_later,
            open=p.rows_open,
            done=p.rows_done,
            blocked=p.rows_blocked,
        ),
        needs=p.needs,
        work_s=_s(case.work_s(demand)) if resident or loading or can_load else None,
        resident=len(resident),
        resident_on=tuple(resident[:NAMES]),
        loads=len(loading),
        loading=tuple(loading[:NAMES]),
        can_load=tuple(
            CanLoad(device_name=kind, workers=len(found), load_s=_s(case.load_s(found[0], demand)))
            for kind, found in sorted(can_load.items())
        ),
        cannot=tuple(
            Cannot(
                why=why,
                words=words,
                workers=len(found),
                names=tuple(w.name for w in found[:NAMES]),
                need_mb=demand.beside_mb + min(need_mb(w, demand.model, demand.numerics) for w in found)
                if why == "too_small"
                else None,
                have_mb=max(room_mb(w, demand.model.engine) for w in found) if why == "too_small" else None,
            )
            for (why, words), found in sorted(cannot.items(), key=lambda one: order.index(one[0][0]))
        ),
    )


def _loading_s(case: Case, worker: WorkerState, demand: Demand) -> float | None:
    """Seconds until a worker that was sent work of this model has loaded it; None where nothing was sent."""
    sent = [
        h.age_s
        for h in case.leases.get(worker.name, ())
        if (of := case.of_pass.get((str(h.job), h.pass_number))) is not None
        and of.model.digest == demand.model.digest
    ]
    return max(0.0, case.load_s(worker, demand) - max(sent)) if sent else None


# -- who is beside it


def _beside(case: Case) -> Iterator[Beside]:
    """What waits for workers that this job's passes could have, by class."""
    useful = [w for w in case.sorts if any(why_not(w, p.demand) is None for p in case.standing.passes)]
    tenant = case.standing.passes[0].demand.tenant if case.standing.passes else ""
    for class_, name in _CLASSES.items():
        own: Counter[str] = Counter()
        other: Counter[tuple[str, str]] = Counter()
        for d in case.others:
            if d.priority != class_ or not any(why_not(w, d) is None for w in useful):
                continue
            seconds = case.work_s(d) or 0.0
            if d.tenant == tenant:
                own[d.job] += seconds  # type: ignore[assignment]
            else:
                other[d.tenant, d.job] += seconds  # type: ignore[assignment]
        if own or other:
            yield Beside(
                priority=name,
                own=tuple(
                    Rival(job=job, name=case.owners[job].name if job in case.owners else "", work_s=_s(s))
                    for job, s in own.most_common(NAMES)
                ),
                own_jobs=len(own),
                own_s=_s(sum(own.values())),
                other_tenants=len({t for t, _ in other}),
                other_jobs=len(other),
                other_s=_s(sum(other.values())),
            )


def _share(case: Case) -> Share:
    mine = [h for h in case.facts.held if str(h.job) == case.id]
    return Share(subtasks=len(mine), all=len(case.facts.held), workers=len({h.worker for h in mine}))


def _retries(case: Case) -> Retries | None:
    later = [p for p in case.standing.passes if p.rows_later]
    if not later:
        return None
    return Retries(
        rows=sum(p.rows_later for p in later),
        until_s=_s(max(p.later_s for p in later)),
        tries=max(p.tries for p in later),
    )


# -- when it will be done


def _forecast(case: Case) -> Forecast | None:
    mine = [_all_to_come(p) for p in case.standing.passes if _any_to_come(p)]
    if not mine:
        return Forecast(p50_s=0.0, p90_s=0.0, measured=True)
    return forecast(
        case.id,
        ClusterNow(
            workers=list(case.usable.values()),
            rates=case.facts.rates,
            demand=[*case.others, *mine],
            started=list(_started(case)),
            subtask_s=case.subtask_s,
            ahead_s=case.ahead_s,
            depth=case.depth,
        ),
    )


def _any_to_come(p: PassStanding) -> bool:
    return bool(p.demand.rows_waiting or p.rows_open or p.rows_blocked)


def _all_to_come(p: PassStanding) -> Demand:
    """With what waits for other tasks as if it might run now: it follows these block by block, not after them all."""
    return replace(
        p.demand,
        rows_waiting=p.demand.rows_waiting + p.rows_blocked,
        bytes_waiting=p.demand.bytes_waiting + p.bytes_blocked,
    )


def _started(case: Case) -> Iterator[Started]:
    assert case.beats is not None
    for name in case.usable:
        held = case.leases.get(name, [])
        begun = [h for h in held if h.key in case.beats[name].held]
        predicted = sum(h.predicted_s for h in begun)
        backlog_s = case.beats[name].backlog_s
        met: set[str] = set()
        for i, h in enumerate(held):
            left_s = h.predicted_s
            if h in begun and backlog_s > 0 and predicted > 0:
                left_s *= backlog_s / predicted
            elif i == 0:
                left_s = max(_OVERDUE * left_s, left_s - h.age_s)
            of = case.of_pass.get((str(h.job), h.pass_number))
            if of is not None and of.model.digest not in {*met, *case.workers[name].resident}:
                met.add(of.model.digest)
                left_s += _loading_s(case, case.workers[name], of) or 0.0
            yield Started(worker=name, of=(str(h.job), h.pass_number), left_s=left_s)


def _eta(case: Case, predicted: Forecast) -> Eta:
    elsewhere = [h for h in case.facts.held if str(h.job) == case.id and h.worker not in case.usable]
    # What a worker has that gets no more, and what is tried again, is not in the forecast.
    least_s = max(
        (*(h.predicted_s for h in elsewhere), *(p.later_s for p in case.standing.passes)), default=0.0
    )
    p50_s, p90_s = (_s(max(s, least_s) + _MERGE_S) for s in (predicted.p50_s, predicted.p90_s))
    return Eta(
        p50_s=p50_s,
        p90_s=p90_s,
        p50_at=_at(case.now, p50_s),
        p90_at=_at(case.now, p90_s),
        measured=predicted.measured,
        complete=case.standing.job.state not in GROWING,
    )


def _due(case: Case, eta: Eta | None) -> Due | None:
    left_s = case.standing.left_s
    if left_s is None:
        return None
    kept: Literal["yes", "likely", "no"] | None = None
    if eta is not None:
        kept = "yes" if eta.p90_s <= left_s else "likely" if eta.p50_s <= left_s else "no"
    return Due(at=_at(case.now, left_s), left_s=_s(left_s), kept=kept)


def _s(seconds: float | None) -> float:
    return round(seconds or 0.0, 3)


def _at(now: datetime, seconds: float) -> str:
    try:
        at = now.astimezone(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        at = datetime.max
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
