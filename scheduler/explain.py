"""Explain: why a job waits, who is beside it, which workers could run it, and when it will be done. Pure.

From the same facts that the dispatcher goes by to an `Explanation`, in numbers and in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
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
from motet.progress import clock
from motet.states import ENDED, State
from scheduler.policy.capability import cannot_run, need_mb, room_mb
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL
from scheduler.policy.lifecycle import MAX_TRIES
from scheduler.policy.liveness import speaks
from scheduler.policy.placing.records import Demand, PassId, WorkerState
from scheduler.simulation.forecast import ClusterNow, Forecast, Started, forecast

if TYPE_CHECKING:
    from motet.protocol.wire import Beat
    from scheduler.facts import Facts
    from scheduler.store.explain import Owner, PassStanding, Standing
    from scheduler.store.leases import Held

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
#: For each reason what a worker is that has it, in a sentence that names the model; in order of what weighs most.
_REASONS: dict[Why, str] = {
    "incompatible": "{} of another version",
    "no_engine": "{} without its engine",
    "too_small": "{} with too little memory",
    "refused": "{} that could not load it",
    "drained": "{} drained by an operator",
    "draining": "{} about to stop",
    "starting": "{} still starting",
    "exclusive": "{} with a suspect row that runs alone",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job, and all that is known of the cluster around it."""

    standing: Standing
    facts: Facts
    #: Of the jobs in ``facts``.
    owners: Mapping[str, Owner]
    #: Newest beats of live workers, and the workers that they make; None where Redis is away, and nobody is heard.
    beats: Mapping[str, Beat] | None
    workers: Mapping[str, WorkerState]
    #: Some dispatcher leads.
    leads: bool
    #: Share of its usual rate at which it sends; None where that is not known.
    throttle: float | None
    subtask_s: float
    ahead_s: float
    depth: int
    now: datetime

    @cached_property
    def id(self) -> str:
        return str(self.standing.job.id)

    @cached_property
    def waits(self) -> list[PassStanding]:
        """Passes with rows that may run now."""
        return [p for p in self.standing.passes if p.demand.rows_waiting > p.rows_later]

    @cached_property
    def usable(self) -> dict[str, WorkerState]:
        """Workers that may be given work at all."""
        return {name: w for name, w in self.workers.items() if self.idle_for(name) is None}

    @cached_property
    def suspects(self) -> set[str]:
        """Workers that run a suspect, beside which nothing runs."""
        return {h.worker for h in self.facts.held if h.exclusive}

    def idle_for(self, name: str) -> Why | None:
        """Why a worker is given no work of anybody."""
        assert self.beats is not None
        beat = self.beats[name]
        if not speaks(beat):
            return "incompatible"
        if name in self.facts.drained:
            return "drained"
        if beat.state != "ready":
            return "draining" if beat.state == "draining" else "starting"
        return "exclusive" if name in self.suspects else None

    def why_not(self, worker: WorkerState, demand: Demand) -> Why | None:
        """Why a worker is given nothing of a pass; what it can never do before what it does not do now."""
        idle = self.idle_for(worker.name)
        if idle in ("incompatible", "starting"):
            # It has not said yet, or not in our words, what it can do.
            return idle
        return cannot_run(worker, demand) or idle

    def runs(self, worker: WorkerState, demand: Demand) -> bool:
        return worker.name in self.usable and cannot_run(worker, demand) is None

    @cached_property
    def kinds(self) -> list[WorkerState]:
        """One usable worker of each sort: what one of them can, all of them can, refusals apart."""
        sorts = {
            (w.kind, w.memory_mb, w.gpus, w.engines, w.spreads, w.formats): w for w in self.usable.values()
        }
        return [replace(w, refused=frozenset()) for w in sorts.values()]

    def work_s(self, demand: Demand) -> float | None:
        """Predicted device-seconds of what waits of a pass, on the fastest device that can run it."""
        return min(
            (self.seconds(w, demand) for w in self.kinds if cannot_run(w, demand) is None), default=None
        )

    def seconds(self, worker: WorkerState, demand: Demand) -> float:
        model = demand.model
        rate = self.facts.rates.of(
            (demand.learned_as, worker.device_name, demand.numerics),
            device_kind=worker.device_kind,
            parameters=model.parameters,
        )
        return rate.price(1.0, demand.bytes_per_token).of(demand.rows_waiting, demand.bytes_waiting)

    def load_s(self, worker: WorkerState, demand: Demand) -> float:
        model = demand.model
        return self.facts.rates.load_s(model.digest, worker.device_name, weights_bytes=model.weights_bytes())

    @cached_property
    def leases(self) -> dict[str, list[Held]]:
        """Live leases of each worker, the oldest first."""
        found: dict[str, list[Held]] = defaultdict(list)
        for h in sorted(self.facts.held, key=lambda h: -h.age_s):
            found[h.worker].append(h)
        return found

    @cached_property
    def others(self) -> list[Demand]:
        """What waits of other jobs."""
        return [d for d in self.facts.demand if d.job != self.id]

    @cached_property
    def of_pass(self) -> dict[PassId, Demand]:
        return {d.id: d for d in (*self.others, *(p.demand for p in self.standing.passes))}


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
    return replace(told, says=_says(case, told, stuck), notes=tuple(_notes(case, told, stuck)))


def _ended(case: Case) -> Explanation:
    job = case.standing.job
    why = f": {job.reason}" if job.reason else ""
    return Explanation(
        job=case.id,
        name=job.name,
        state=job.state,
        says=f"It has ended: {job.state}{why}.",
        notes=tuple(_error_note(job.cells_error)),
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
        why = case.why_not(worker, demand)
        if why is not None:
            cannot[why, _words(case, why, worker, demand)].append(worker)
        elif demand.model.digest in worker.resident:
            resident.append(name)
        elif (left_s := _loading_s(case, worker, demand)) is not None:
            loading.append(Loading(worker=name, left_s=_s(left_s)))
        else:
            can_load[worker.device_name].append(worker)
    order = list(_REASONS)
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
                need_mb=min(need_mb(w, demand.model, demand.numerics) for w in found)
                if why == "too_small"
                else None,
                have_mb=max(room_mb(w, demand.model.engine) for w in found) if why == "too_small" else None,
            )
            for (why, words), found in sorted(cannot.items(), key=lambda one: order.index(one[0][0]))
        ),
    )


def _words(case: Case, why: Why, worker: WorkerState, demand: Demand) -> str:
    match why:
        case "no_engine":
            return f"has no engine {demand.model.engine!r}"
        case "too_small":
            if room_mb(worker, demand.model.engine) < worker.memory_mb:
                return f"{demand.model.ref} does not fit into one GPU of its group, and {demand.model.engine!r} uses one"
            return f"{demand.model.ref} does not fit into its memory"
        case "refused":
            return next(
                r.why
                for r in case.facts.refusals
                if (r.worker, r.boot) == (worker.name, worker.boot) and r.model_id in demand.model_ids
            )
        case "drained":
            return "was drained; `motet resume` lets it work again"
        case "draining":
            return "finishes what it has, and stops"
        case "starting":
            return "is starting"
        case "incompatible":
            return "speaks another protocol; upgrade it, or this server"
        case "exclusive":
            return "runs rows alone that may have killed their worker"


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
    useful = [w for w in case.kinds if any(cannot_run(w, p.demand) is None for p in case.standing.passes)]
    tenant = case.standing.passes[0].demand.tenant if case.standing.passes else ""
    for class_, name in _CLASSES.items():
        own: Counter[str] = Counter()
        other: Counter[tuple[str, str]] = Counter()
        for d in case.others:
            if d.priority != class_ or not any(cannot_run(w, d) is None for w in useful):
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
            can=case.runs,
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
        complete=case.standing.job.state != State.LOADING,
    )


def _due(case: Case, eta: Eta | None) -> Due | None:
    left_s = case.standing.left_s
    if left_s is None:
        return None
    kept: Literal["yes", "likely", "no"] | None = None
    if eta is not None:
        kept = "yes" if eta.p90_s <= left_s else "likely" if eta.p50_s <= left_s else "no"
    return Due(at=_at(case.now, left_s), left_s=_s(left_s), kept=kept)


# -- in words


def _says(case: Case, told: Explanation, stuck: Sequence[PassExplained]) -> str:
    """The answer in one sentence."""
    done = _done_in(told.eta)
    if told.state == State.LOADING:
        rows = _n(case.standing.job.n_rows, "row")
        says = f"It waits for its upload: {rows} have arrived so far, and nothing runs before it is closed"
        return f"{says}; these would then take {_range(told.eta)}." if told.eta else f"{says}."
    if case.beats is None:
        return "It waits for Redis, which does not answer: nothing is sent, and no worker can be heard."
    if not case.leads:
        return "It waits for a dispatcher: none leads now, so nothing is sent."
    if stuck:
        return _nobody(case, stuck[0])
    if told.throttle == 0:
        return (
            "It waits for the cluster to recover: nothing is sent while so many outcomes wait to be recorded,"
            " or Redis is so full."
        )
    assert told.share is not None
    if told.share.subtasks:
        return _under_way(told, told.share, done)
    if any(p.rows.waiting for p in told.passes):
        return _waits(case, told, done)
    if told.retries:
        tries = f"try {told.retries.tries + 1} of {MAX_TRIES}"
        return (
            f"It waits to try {_n(told.retries.rows, 'row')} again, in {_time(told.retries.until_s)}"
            f" ({tries}); {done}."
        )
    return "All its rows are answered, and the last of them are being merged."


def _under_way(told: Explanation, share: Share, done: str) -> str:
    loads = [one for p in told.passes if not p.resident for one in p.loading]
    if loads and not any(p.rows.done or p.resident for p in told.passes):
        first = min(loads, key=lambda one: one.left_s)
        model = next(p.model for p in told.passes if first in p.loading)
        return f"It waits for {first.worker} to load {model}, about {_time(first.left_s)} more; {done}."
    of = f"{share.subtasks:,} of {_n(share.all, 'sub-task')} under way" if share.all > share.subtasks else ""
    return f"It runs on {_n(share.workers, 'worker')}{f' ({of})' if of else ''}; {done}."


def _waits(case: Case, told: Explanation, done: str) -> str:
    """Nothing of it is under way, though somebody could run it."""
    reasons = []
    interactive = case.standing.job.priority == INTERACTIVE
    ahead = _ahead([b for b in told.beside if not interactive or b.priority == "interactive"])
    if ahead:
        reasons.append(f"behind {ahead}")
    elif told.share and told.share.all and not interactive:
        reasons.append(f"behind {_n(told.share.all, 'sub-task')} under way")
    to_load = [p for p in told.passes if p.rows.waiting and not p.resident]
    if to_load:
        p = to_load[0]
        if p.loading:
            reasons.append(f"for {p.loading[0].worker} to load {p.model}, {_time(p.loading[0].left_s)} more")
        elif p.can_load:
            soonest = min(p.can_load, key=lambda one: one.load_s)
            reasons.append(
                f"for a worker to load {p.model}, about {_time(soonest.load_s)} on {soonest.device_name or 'one'}"
            )
    if not reasons:
        reasons.append("for the next moment in which the dispatcher sends")
    return f"It waits {' and '.join(reasons)}; {done}."


def _ahead(beside: Sequence[Beside]) -> str:
    own = sum(b.own_jobs for b in beside)
    others = sum(b.other_jobs for b in beside)
    seconds = sum(b.own_s + b.other_s for b in beside)
    names = [r.name or r.job for b in beside for r in b.own]
    words = []
    if own:
        words.append(f"your own job {names[0]}" if own == 1 else f"{own:,} jobs of yours")
    if others:
        words.append(f"{_n(others, 'job')} of {'other tenants' if others > 1 else 'another tenant'}")
    return f"{' and '.join(words)} ({_time(seconds)} of work for one device)" if words else ""


def _nobody(case: Case, p: PassExplained) -> str:
    """No worker can run a pass."""
    if not case.workers:
        return "It waits for a worker: none is alive. Start one with `motet worker`."
    too_small = [c for c in p.cannot if c.why == "too_small"]
    all_of_them = sum(c.workers for c in p.cannot)
    if len(too_small) == len(p.cannot):
        need, have = too_small[0].need_mb, too_small[0].have_mb
        return (
            f"It waits for a worker with more memory: {p.model} needs {need:,} MB,"
            f" and the largest of {_n(all_of_them, 'worker')} has {have:,} MB for models."
        )
    why = "; ".join(
        f"{_REASONS[why].format(_n(n, 'worker'))}"
        for why in _REASONS
        if (n := sum(c.workers for c in p.cannot if c.why == why))
    )
    return f"It waits for a worker that can run {p.model}: there are only {why}."


def _notes(case: Case, told: Explanation, stuck: Sequence[PassExplained]) -> Iterator[str]:
    """What else is worth knowing."""
    if told.eta is not None and not told.eta.measured:
        yield "When it is done is a guess: nothing was measured yet of its models on these devices."
    yield from _beside_notes(told)
    looked_at = {d.id for d in case.facts.demand}
    if told.state == State.RUNNING and any(p.demand.id not in looked_at for p in case.waits):
        yield f"{len(looked_at):,} older passes wait, and no more are looked at at a time: its turn comes after them."
    for p in told.passes:
        if not (p.rows.waiting or p.rows.later):
            continue
        for c in p.cannot:
            yield f"{_named(c)} cannot run {p.model}: {_told_why(c)}."
    for p in told.passes:
        if p.rows.blocked:
            wait = "waits" if p.rows.blocked == 1 else "wait"
            yield f"{_n(p.rows.blocked, 'row')} of {', '.join(p.tasks)} {wait} for {', '.join(p.needs)}."
    if told.share and told.share.subtasks and told.retries:
        yield f"{_n(told.retries.rows, 'row')} came back and are tried again in {_time(told.retries.until_s)}."
    yield from _error_note(told.errors)
    if told.throttle is not None and 0 < told.throttle < 1:
        yield f"The dispatcher sends at {told.throttle:.0%} of its usual rate, while outcomes or Redis catch up."
    if told.deadline is not None:
        left = _time(told.deadline.left_s)
        kept = {
            "yes": "will be kept",
            "likely": "will probably be kept",
            "no": "will probably be missed",
            None: "comes nearer",
        }[told.deadline.kept]
        yield f"Its deadline in {left} {kept}."


def _error_note(errors: int) -> Iterator[str]:
    if errors:
        yield f"{_n(errors, 'cell')} of it {'is an error' if errors == 1 else 'are errors'}."


def _beside_notes(told: Explanation) -> Iterator[str]:
    for b in told.beside:
        parts = []
        if b.own_jobs:
            names = ", ".join(r.name or r.job for r in b.own[:3])
            more = f" and {b.own_jobs - 3:,} more" if b.own_jobs > 3 else ""
            parts.append(f"{_n(b.own_jobs, 'job')} of yours ({names}{more}; {_time(b.own_s)} of work)")
        if b.other_jobs:
            of = _n(b.other_tenants, "other tenant")
            parts.append(f"{_n(b.other_jobs, 'job')} of {of} ({_time(b.other_s)} of work)")
        yield f"Beside it in class {b.priority}: {' and '.join(parts)}."


def _named(c: Cannot) -> str:
    names = ", ".join(c.names[:3])
    return names if c.workers <= 3 else f"{names} and {c.workers - 3:,} more"


def _told_why(c: Cannot) -> str:
    if c.why == "too_small":
        return f"it needs {c.need_mb:,} MB, and models may hold {c.have_mb:,} MB there"
    return c.words.rstrip(".")


def _done_in(eta: Eta | None) -> str:
    return f"done in {_range(eta)}" if eta is not None else "when it is done cannot be told"


def _range(eta: Eta | None) -> str:
    if eta is None:
        return ""
    p50, p90 = _time(eta.p50_s), _time(eta.p90_s)
    return f"about {p50}" if p50 == p90 else f"{p50} to {p90} (p50 to p90)"


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "less than 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else clock(seconds)


def _s(seconds: float | None) -> float:
    return round(seconds or 0.0, 3)


def _at(now: datetime, seconds: float) -> str:
    try:
        at = now.astimezone(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        at = datetime.max
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
