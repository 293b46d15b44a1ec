"""Does the simulator tell the truth: runs of a real two-worker cluster, replayed on the virtual clock before they ran.

replay_error    largest |predicted / actual - 1| of the makespans: from the first job's start to the last one's end, as
                Postgres has them
schedule_error  the same once more, with each worker as fast as it was in that very run: what is left is the simulator's
                own error, without that of the machine's speed from run to run

Real workers (two CPU slots, MiniLM with the demo's heads), real texts. Mixes: one job; two tenants; short and long texts;
two models; one worker that takes three times as long. A prediction knows of a run its trace alone (when which job of
how many rows of which lengths came). What rows cost, how slow each worker is, and what messages and sealing take, was
learned from runs before it, never from itself; the first round only learns. Mixes take turns.

Both figures are of steady workers (bench/paced.py), whose speed is their own. bare_replay_error and bare_schedule_error are
those of bare CPU slots, whose speed is what this machine's other programs leave of it: others tells how much they took
of the machine during a run. Runs that were disturbed are told, not dropped.

    python bench/truth.py            about a quarter of an hour
    python bench/truth.py --quick    one round after the first, smaller
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
from harness import EXACT, ROOT, Size, cluster_folder, cpu_s, finish, options, say, table, texts
from paced import FACTOR, OVERRUN, Paced, first_tasks, paced, second_tasks
from stage import short_texts

from motet import Client
from motet.job import Job
from scheduler.policy.cost import RateKey, Rates
from scheduler.simulation.cluster import Model, Scenario, SimulatedDevice
from scheduler.simulation.events import Simulation
from scheduler.simulation.policy import Motet
from scheduler.simulation.trace import done_in, read_trace, record, work_of
from scheduler.store.database import Database
from scheduler.store.rates import rates

Activity = Mapping[str, Any]
SEEDS = 5
KIND = "cpu"
#: Rows that a mix has altogether: some 25 s at steady workers.
ROWS, QUICK_ROWS, SMOKE_ROWS = 1200, 240, 36
#: Bare workers are so many times as fast as steady ones.
BARE = 4


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What runs so far have taught: nothing of it is told by the run that is predicted."""

    rates: Rates
    #: Reference of a model -> digest of its trunk.
    trunks: Mapping[str, str]
    #: Device-seconds from the begin of a worker's first sub-task to the end of its last / those in which it was busy.
    gaps: float
    #: Of a message to a worker and its outcome back; before the first sub-task and after the last one.
    trip_s: float
    edges_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One mix, run and predicted."""

    mix: str
    steady: bool
    actual_s: float
    predicted_s: float
    #: With the speeds of this very run.
    hindsight_s: float
    #: Predicted device-seconds / actual ones, over the same sub-tasks.
    work: float
    others: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.actual_s - 1

    @property
    def schedule_error(self) -> float:
        return self.hindsight_s / self.actual_s - 1


@dataclass
class Watched:
    """A real cluster, and what its runs so far have said beside its rates."""

    running: Paced
    clients: Sequence[Client]
    gaps: list[float] = field(default_factory=list)
    trips_s: list[float] = field(default_factory=list)
    edges_s: list[float] = field(default_factory=list)

    def learned(self) -> Learned:
        database = Database(self.running.database_url.replace("postgresql", "postgresql+psycopg", 1), pool=1)
        try:
            with database.transaction() as connection:
                known = rates(connection)
        finally:
            database.close()
        last = 10
        return Learned(
            rates=known,
            trunks={model.ref: model.trunk for model in self.clients[0].models()},
            gaps=statistics.median(self.gaps[-last:]),
            trip_s=statistics.median(self.trips_s[-last:]),
            edges_s=statistics.median(self.edges_s[-last:]),
        )

    def watch(self, mix: Callable[[Sequence[Client]], list[Job]]) -> tuple[list[Activity], float]:
        """Run a mix. What its jobs did, and the share of the machine's CPU that others took."""
        # Every process of the cluster is a child of ours.
        pids = [os.getpid()]
        ours, all_, began = cpu_s(pids), _machine_s(), time.perf_counter()
        jobs = mix(self.clients)
        for job in jobs:
            job.wait()
        seconds = (time.perf_counter() - began) * (psutil.cpu_count() or 1)
        others = (_machine_s() - all_ - (cpu_s(pids) - ours)) / seconds
        return [job.activity(timeline=None) for job in jobs], max(0.0, others)

    def note(self, found: Sequence[Activity]) -> None:
        """Learn from a run what the next prediction may know."""
        by_worker = _by_worker(found)
        starts = [min(s["start_s"] for s in mine) for mine in by_worker.values()]
        ends = [max(s["end_s"] for s in mine) for mine in by_worker.values()]
        busy = sum(s["busy_s"] for mine in by_worker.values() for s in mine)
        self.gaps.append(max(1.0, (sum(ends) - sum(starts)) / busy))
        firsts = [min(mine, key=lambda s: s["carved_s"]) for mine in by_worker.values()]
        self.trips_s += [max(0.0, s["end_s"] - s["busy_s"] - s["carved_s"]) for s in firsts]
        self.edges_s.append(min(s["carved_s"] for s in firsts) - _start(found) + _end(found) - max(ends))


def main() -> None:
    arguments = options(__doc__).parse_args()
    full = arguments.size is Size.FULL
    rows = arguments.size.of(full=ROWS, quick=QUICK_ROWS, smoke=SMOKE_ROWS)
    rounds = 2 if full else 1
    runs: list[Run] = []
    for steady, slow in arguments.size.of(
        full=((True, False), (True, True), (False, False)), quick=((True, True),), smoke=((True, False),)
    ):
        every = mixes(rows if steady else BARE * rows, slow=slow)
        if arguments.size is Size.QUICK or not steady:
            # Bare workers prove less, and take the whole machine.
            every = dict(islice(every.items(), 0, None, 2))
        warm_up = mixes((rows if steady else BARE * rows) // 3, slow=slow)
        say(f"{'steady' if steady else 'bare'} workers, {'one of them slow' if slow else 'both alike'}:")
        with cluster_folder() as folder, paced(folder, slow=slow, steady=steady) as running:
            runs += _rounds(running, [warm_up[name] for name in every], every, rounds, steady=steady)
            if steady:
                say(f"  {running.events(OVERRUN):,} micro-batches took longer than they should")
    table(
        "replayed before they ran",
        ("mix", "workers", "actual s", "predicted s", "error", "rates", "schedule", "others"),
        [
            (
                r.mix,
                "steady" if r.steady else "bare",
                f"{r.actual_s:.2f}",
                f"{r.predicted_s:.2f}",
                f"{r.error:+.1%}",
                f"{r.work - 1:+.1%}",
                f"{r.schedule_error:+.1%}",
                f"{r.others:.0%}",
            )
            for r in runs
        ],
    )
    keys = {
        f"{'' if steady else 'bare_'}{name}": round(max(abs(r) for r in errors), 4)
        for steady in (True, False)
        for name, errors in (
            ("replay_error", [r.error for r in runs if r.steady is steady]),
            ("schedule_error", [r.schedule_error for r in runs if r.steady is steady]),
        )
        if errors
    }
    scatter = [
        {
            "mix": r.mix,
            "steady": r.steady,
            "actual_s": round(r.actual_s, 3),
            "predicted_s": round(r.predicted_s, 3),
            "hindsight_s": round(r.hindsight_s, 3),
            "work": round(r.work, 4),
            "others": round(r.others, 3),
        }
        for r in runs
    ]
    drawn = picture(runs)
    if full and not arguments.save:
        (ROOT / "docs" / "truth.svg").write_text(drawn, "utf-8")
    finish("truth", keys, arguments, details={"runs": scatter})


Mix = Callable[[Sequence[Client]], list[Job]]


def mixes(rows: int, *, slow: bool) -> dict[str, Mix]:
    """What is submitted together, by name."""

    def submit(client: Client, sample: Sequence[str], tasks: Any, name: str) -> Job:
        return client.submit(list(sample), tasks, name=name, reuse=False, progress=False)

    def one(clients: Sequence[Client]) -> list[Job]:
        return [submit(clients[0], texts(rows), EXACT, "one")]

    def tenants(clients: Sequence[Client]) -> list[Job]:
        halves = texts(rows // 3), texts(2 * rows // 3)
        return [
            submit(c, half, EXACT, f"tenant {i}")
            for i, (c, half) in enumerate(zip(clients, halves, strict=True))
        ]

    def lengths(clients: Sequence[Client]) -> list[Job]:
        return [
            submit(clients[0], short_texts(rows), EXACT, "short"),
            submit(clients[0], _long(rows // 12), EXACT, "long"),
        ]

    def models(clients: Sequence[Client]) -> list[Job]:
        return [
            submit(clients[0], texts(rows // 2), first_tasks(), "first model"),
            submit(clients[0], texts(rows // 2), second_tasks(), "second model"),
        ]

    if slow:
        return {
            f"one worker {FACTOR:g} x slower": one,
            f"two tenants, one worker {FACTOR:g} x slower": tenants,
        }
    return {"one job": one, "two tenants": tenants, "short and long texts": lengths, "two models": models}


def _rounds(
    running: Paced, warm_up: Sequence[Mix], every: Mapping[str, Mix], rounds: int, *, steady: bool
) -> list[Run]:
    with Client(running.url, running.tokens["admin"]) as admin:
        other = admin.create_token("bench", tenant="other").token
    runs: list[Run] = []
    with Client(running.url, running.tokens["user"]) as first, Client(running.url, other) as second:
        watched = Watched(running, (first, second))
        for mix in warm_up:
            # Loads are no part of what follows.
            watched.watch(mix)
        for round_ in range(rounds + 1):
            for name, mix in every.items():
                known = watched.learned() if round_ else None
                found, others = watched.watch(mix)
                if known:
                    run = _run(name, steady, found, others, known)
                    say(
                        f"  {name:<40}{run.actual_s:7.2f} s, predicted {run.predicted_s:7.2f} s ({run.error:+.1%}),"
                        f" others took {others:.0%}"
                    )
                    runs.append(run)
                watched.note(found)
    return runs


# -- replay


def _run(mix: str, steady: bool, found: Sequence[Activity], others: float, known: Learned) -> Run:
    keys = _rate_keys(found, known)
    expected: dict[str, float] = {}
    busy: dict[str, float] = {}
    for a in found:
        rate = known.rates.learned[keys[_model(a)]]
        for s in done_in(a):
            expected[s["worker"]] = expected.get(s["worker"], 0.0) + rate.seconds(work_of(s))
            busy[s["worker"]] = busy.get(s["worker"], 0.0) + s["busy_s"]
    learned = {worker: known.rates.pace(worker) for worker in busy}
    return Run(
        mix=mix,
        steady=steady,
        actual_s=span_s(found),
        predicted_s=replayed(found, known, keys, learned),
        hindsight_s=replayed(found, known, keys, {w: busy[w] / expected[w] for w in busy}),
        work=sum(expected[w] * learned[w] for w in busy) / sum(busy.values()),
        others=others,
    )


def replayed(
    found: Sequence[Activity], known: Learned, keys: Mapping[str, RateKey], paces: Mapping[str, float]
) -> float:
    """The makespan of these jobs in the simulator, where workers are in truth so many times slower than their kind."""
    lines = record(found, {})
    trace = read_trace(map(json.dumps, lines), "the run", {})
    tenants = {line["name"]: str(i) for i, line in enumerate(lines)}
    models = {}
    for name, key in keys.items():
        start, row, token, square = (known.gaps * c for c in known.rates.learned[key].coefficients)
        models[name] = Model(
            name=name, start_s=start, row_s=row, token_s=token, square_s=square, load_s=0.0, memory_mb=200
        )
    world = Scenario(
        devices=tuple(
            SimulatedDevice(name=name, kind=KIND, speed=1.0, true_speed=1 / pace, resident=tuple(models))
            for name, pace in sorted(paces.items())
        ),
        models=models,
        jobs=tuple(replace(job, tenant=tenants[job.name]) for job in trace.jobs),
        noise=0.1,
        trip_s=known.trip_s,
        prior_off=1.0,
    )
    ends = []
    for seed in range(SEEDS):
        believed = Rates(
            {(name, KIND, "fast"): known.rates.learned[key] for name, key in keys.items()},
            dict(known.rates.paces),
        )
        outcome = Simulation(world, Motet(rates=believed), seed).run()
        ends.append(max(outcome.ended_s.values()))
    return statistics.median(ends) + known.edges_s


def _rate_keys(found: Sequence[Activity], known: Learned) -> dict[str, RateKey]:
    """Model of a pass -> where its rate is kept."""
    of_trunk = {key[0]: key for key in known.rates.learned}
    return {_model(a): of_trunk[known.trunks[_model(a)]] for a in found}


def _model(activity: Activity) -> str:
    return str(activity["job"]["passes"][0]["model"])


# -- small parts


def _long(count: int) -> list[str]:
    return sorted(texts(4000), key=len, reverse=True)[:count]


def _by_worker(found: Sequence[Activity]) -> dict[str, list[dict[str, Any]]]:
    """Sub-tasks of all jobs by worker, in seconds since the epoch."""
    workers: dict[str, list[dict[str, Any]]] = {}
    for activity in found:
        at = _moment(activity["job"]["created"])
        for s in done_in(activity):
            moved = {key: s[key] + at for key in ("carved_s", "start_s", "end_s")}
            workers.setdefault(s["worker"], []).append({**s, **moved})
    return workers


def span_s(found: Sequence[Activity]) -> float:
    """Seconds from the first job's start to the last one's end."""
    return _end(found) - _start(found)


def _start(found: Sequence[Activity]) -> float:
    return min(_moment(a["job"]["started"]) for a in found)


def _end(found: Sequence[Activity]) -> float:
    return max(_moment(a["job"]["finished"]) for a in found)


def _moment(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _machine_s() -> float:
    """CPU seconds that this machine has worked, for whomever; those stolen from it too."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def picture(runs: Sequence[Run]) -> str:
    """Predicted over actual seconds, a dot for each run, with the band of 5 %."""
    size, edge = 420, 46
    top = 1.1 * max(max(r.actual_s, r.predicted_s) for r in runs)

    def at(x: float, y: float) -> tuple[float, float]:
        return edge + x / top * (size - edge - 10), size - edge - y / top * (size - edge - 10)

    names = list(dict.fromkeys(r.mix for r in runs))
    colours = ("#3f75b5", "#c08a1e", "#2f9488", "#8d62ad", "#c43d4b", "#9a6a43")
    corner, low, high = at(0, 0), at(top, 0.95 * top), at(top / 1.05, top)
    parts = [
        f'<polygon points="{corner[0]:.1f},{corner[1]:.1f} {low[0]:.1f},{low[1]:.1f} {high[0]:.1f},{high[1]:.1f}"'
        ' fill="#8a949e" opacity=".2"/>',
        *(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colours[names.index(r.mix) % len(colours)]}">'
            f"<title>{r.mix}: {r.error:+.1%}</title></circle>"
            for r in runs
            for x, y in (at(r.actual_s, r.predicted_s),)
        ),
        *(
            f'<circle cx="{edge + 16}" cy="{20 + 18 * i}" r="4" fill="{colours[i % len(colours)]}"/>'
            f'<text x="{edge + 26}" y="{24 + 18 * i}">{name}</text>'
            for i, name in enumerate(names)
        ),
        f'<path d="M{edge} 10V{size - edge}H{size - 10}" fill="none" stroke="#8a949e"/>',
        *(
            f'<text x="{at(t, 0)[0]:.1f}" y="{size - edge + 16}" text-anchor="middle">{t:g}</text>'
            f'<text x="{edge - 8}" y="{at(0, t)[1] + 4:.1f}" text-anchor="end">{t:g}</text>'
            for t in range(0, int(top), 10)
        ),
        f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">actual s</text>',
        f'<text x="12" y="{size / 2}" text-anchor="middle" transform="rotate(-90 12 {size / 2})">predicted s</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">'
        "<style>text{font:12px system-ui,sans-serif;fill:#7b858f}</style>" + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    main()
