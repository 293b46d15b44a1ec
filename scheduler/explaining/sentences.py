"""Sentences: an explanation in words, as people read it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from motet.messages.explanation import Beside, Cannot, Eta, Explanation, PassExplained, Share, Why
from motet.progress import clock, instant
from motet.protocol.manifest import PATCH_PIXELS
from motet.states import CARVED, State
from motet.words import count
from scheduler.ask_times import quantile_s
from scheduler.explaining.case import Case
from scheduler.policy.capability import room_mb
from scheduler.policy.fairness import INTERACTIVE
from scheduler.policy.lifecycle import MAX_TRIES
from scheduler.policy.placing.records import Demand, WorkerState

#: For each reason what a worker is that has it, in a sentence that names the model; in order of what weighs most.
REASONS: dict[Why, str] = {
    "incompatible": "{} of another version",
    "no_engine": "{} without its engine",
    "too_small": "{} with too little memory",
    "refused": "{} that could not load it",
    "drained": "{} drained by an operator",
    "draining": "{} about to stop",
    "starting": "{} still starting",
    "exclusive": "{} with a suspect row that runs alone",
}


def reason(case: Case, why: Why, worker: WorkerState, demand: Demand) -> str:
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


def says(case: Case, told: Explanation, stuck: Sequence[PassExplained]) -> str:
    """The answer in one sentence."""
    done = _done_in(told.eta)
    if told.state == State.LOADING and not any(_to_come(p) for p in told.passes):
        rows = count(case.standing.job.n_rows, "row")
        return f"It waits for its upload: {rows} have arrived so far, and all of them are answered."
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
            f"It waits to try {count(told.retries.rows, 'row')} again, in {_time(told.retries.until_s)}"
            f" ({tries}); {done}."
        )
    if told.state == State.OPEN:
        return "It is open: all rows that have come are answered, and it takes more until it is closed."
    return "All its rows are answered, and the last of them are being merged."


def _to_come(p: PassExplained) -> int:
    return p.rows.waiting + p.rows.later + p.rows.open + p.rows.blocked


def _under_way(told: Explanation, share: Share, done: str) -> str:
    loads = [one for p in told.passes if not p.resident for one in p.loading]
    if loads and not any(p.rows.done or p.resident for p in told.passes):
        first = min(loads, key=lambda one: one.left_s)
        model = next(p.model for p in told.passes if first in p.loading)
        return f"It waits for {first.worker} to load {model}, about {_time(first.left_s)} more; {done}."
    of = (
        f"{share.subtasks:,} of {count(share.all, 'sub-task')} under way"
        if share.all > share.subtasks
        else ""
    )
    return f"It runs on {count(share.workers, 'worker')}{f' ({of})' if of else ''}; {done}."


def _waits(case: Case, told: Explanation, done: str) -> str:
    """Nothing of it is under way, though somebody could run it."""
    reasons = []
    interactive = case.standing.job.priority == INTERACTIVE
    ahead = _ahead([b for b in told.beside if not interactive or b.priority == "interactive"])
    if ahead:
        reasons.append(f"behind {ahead}")
    elif told.share and told.share.all and not interactive:
        reasons.append(f"behind {count(told.share.all, 'sub-task')} under way")
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
        words.append(f"{count(others, 'job')} of {'other tenants' if others > 1 else 'another tenant'}")
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
            f" and the largest of {count(all_of_them, 'worker')} has {have:,} MB for models."
        )
    why = "; ".join(
        f"{REASONS[why].format(count(n, 'worker'))}"
        for why in REASONS
        if (n := sum(c.workers for c in p.cannot if c.why == why))
    )
    return f"It waits for a worker that can run {p.model}: there are only {why}."


def notes(case: Case, told: Explanation) -> Iterator[str]:
    """What else is worth knowing."""
    if told.eta is not None and not told.eta.measured:
        yield "When it is done is a guess: nothing was measured yet of its models on these devices."
    if told.state == State.OPEN:
        yield from _open_notes(case)
    yield from _beside_notes(told)
    yield from _lane_note(case)
    looked_at = {d.id for d in case.facts.demand}
    if told.state in CARVED and any(p.demand.id not in looked_at for p in case.waits):
        yield f"{len(looked_at):,} older passes wait, and no more are looked at at a time: its turn comes after them."
    for p in told.passes:
        if not (p.rows.waiting or p.rows.later):
            continue
        for c in p.cannot:
            yield f"{_named(c)} cannot run {p.model}: {_told_why(c)}."
    yield from _picture_notes(case)
    for p in told.passes:
        if p.rows.blocked:
            wait = "waits" if p.rows.blocked == 1 else "wait"
            yield f"{count(p.rows.blocked, 'row')} of {', '.join(p.tasks)} {wait} for {', '.join(p.needs)}."
    if told.share and told.share.subtasks and told.retries:
        yield f"{count(told.retries.rows, 'row')} came back and are tried again in {_time(told.retries.until_s)}."
    yield from error_note(told.errors)
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


def _picture_notes(case: Case) -> Iterator[str]:
    for demand in (p.demand for p in case.waits if p.demand.model.reads != "text"):
        pictures = demand.rows_waiting
        tokens = pictures * demand.model.max_tokens
        yield (
            f"{count(pictures, 'picture')} {'waits' if pictures == 1 else 'wait'} for {demand.model.ref}:"
            f" {tokens * PATCH_PIXELS / 1e6:,.1f} megapixels as it sees them, which count for {tokens:,} tokens."
        )


def _open_notes(case: Case) -> Iterator[str]:
    job, asks = case.standing.job, case.standing.asks
    if asks is not None:
        p50_s, p99_s = (quantile_s(asks.times, share) for share in (0.5, 0.99))
        if p50_s is None:
            told = ["In the last minute none of its asks was answered"]
        else:
            told = [
                f"In the last minute {count(asks.answered, 'ask')} of it {'was' if asks.answered == 1 else 'were'} answered,"
                f" half of them in {instant(p50_s)} and 99 % in {instant(p99_s)}"
            ]
        if asks.late:
            told.append(f"{asks.late:,} came too late for their callers")
        if asks.refused:
            told.append(f"{asks.refused:,} were refused, since too many waited")
        if asks.waiting:
            told.append(
                f"{count(asks.waiting, 'row')} {'waits' if asks.waiting == 1 else 'wait'} to be stored"
            )
        yield f"{'; '.join(told)}."
    if job.first_row:
        yield f"Its rows before {job.first_row:,} were deleted, having been kept long enough."


def error_note(errors: int) -> Iterator[str]:
    if errors:
        yield f"{count(errors, 'cell')} of it {'is an error' if errors == 1 else 'are errors'}."


def _beside_notes(told: Explanation) -> Iterator[str]:
    for b in told.beside:
        parts = []
        if b.own_jobs:
            names = ", ".join(r.name or r.job for r in b.own[:3])
            more = f" and {b.own_jobs - 3:,} more" if b.own_jobs > 3 else ""
            parts.append(f"{count(b.own_jobs, 'job')} of yours ({names}{more}; {_time(b.own_s)} of work)")
        if b.other_jobs:
            of = count(b.other_tenants, "other tenant")
            parts.append(f"{count(b.other_jobs, 'job')} of {of} ({_time(b.other_s)} of work)")
        yield f"Beside it in class {b.priority}: {' and '.join(parts)}."


def _lane_note(case: Case) -> Iterator[str]:
    """Where interactive work and other work are there at once, how devices are shared between them."""
    classes = {owner.priority == INTERACTIVE for owner in case.owners.values()}
    if len(classes | {case.standing.job.priority == INTERACTIVE}) > 1:
        yield (
            "Interactive rows go before others, and take at most"
            f" {case.lane_share:.0%} of a device from them (MOTET_LANE_SHARE)."
        )


def _named(c: Cannot) -> str:
    names = ", ".join(c.names[:3])
    return names if c.workers <= 3 else f"{names} and {c.workers - 3:,} more"


def _told_why(c: Cannot) -> str:
    if c.why == "too_small":
        return f"it needs {c.need_mb:,} MB, and models may hold {c.have_mb:,} MB there"
    return c.words.rstrip(".")


def _done_in(eta: Eta | None) -> str:
    if eta is None:
        return "when it is done cannot be told"
    return f"{'' if eta.complete else 'what has arrived is '}done in {_range(eta)}"


def _range(eta: Eta | None) -> str:
    if eta is None:
        return ""
    p50, p90 = _time(eta.p50_s), _time(eta.p90_s)
    return f"about {p50}" if p50 == p90 else f"{p50} to {p90} (p50 to p90)"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "less than 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else clock(seconds)
