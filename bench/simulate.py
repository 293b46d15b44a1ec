"""How well work is placed, in simulation: motet's own policy on a virtual clock, beside the bound, rivals and itself maimed.

All is SIMULATED: devices are numbers, and sub-tasks take the time that a seed says. The policy is no model of motet's:
it is the `Placer`, `carve` and `Rates` that the dispatcher runs (tests/unit/test_simulation.py proves it).

1. Efficiency, the least time in which the work as it turned out can be done with each model loaded where it runs
   (bench/lower_bound.py), over the makespan; for motet and four rivals on the cases of bench/scenarios/*.toml. Rivals
   know what models cost and pull their work within a millisecond; motet learns it, and waits 50 ms for each answer.
2. Model loads over the fewest that any schedule as short as ours has.
3. Fairness: the most by which two who wait differ in device-seconds by weight, in sub-tasks of the longest kind.
4. Where the device-seconds go that are missing, and what each mechanism is worth: the same seeds with it off.
5. Chaos: devices die, messages are lost and said twice; every row is done once or the run fails.

Last line, JSON: efficiency_<case> (means over the seeds), fairness_gap_subtasks (the worse of the two cases in which all
wait from the beginning), loads_vs_minimum (the worst of the cases but the hard one); and apart, because they are known
to be worse: fairness_gap_newcomer, fairness_gap_cold, loads_vs_minimum_hard. Each is a mean over the seeds; its worst
seed is told as worst_<key>.

    python bench/simulate.py            some minutes on two cores
    python bench/simulate.py --quick    two seeds, and no ablations
    python bench/simulate.py --markdown the ablations of the last full run as docs/simulate.md has them
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import RESULTS, finish, options, say, table
from lower_bound import least_loads, least_makespan_s
from rival_policies import RULES, pulled, rival
from scipy.stats import t as students_t

from scheduler.policy import fairness
from scheduler.policy.cost import Rates
from scheduler.policy.placing import choice, rebalancing
from scheduler.simulation.cluster import Scenario
from scheduler.simulation.events import RunOutcome, Simulation
from scheduler.simulation.fair_share import gap_s, largest_s
from scheduler.simulation.policy import Motet
from scheduler.simulation.scenarios import ScenarioFile, read

SCENARIOS = Path(__file__).parent / "scenarios"
#: Case -> the efficiency that was asked for.
CASES = {"homogeneous": 0.99, "mixed": 0.98, "silent_slow": 0.96, "models": 0.95, "hard": 0.85}
#: Cases on which mechanisms are turned off.
CASES_MAIMED = ("mixed", "silent_slow", "models", "hard")
FAIR = ("fair_tenants", "fair_models", "fair_late", "fair_cold")
SEEDS, QUICK_SEEDS, ABLATION_SEEDS = 10, 2, 3
#: Of a smoke run: seconds of work a device, and how much is changed.
SMOKE_WORK_S, SMOKE_VARIANTS = 10.0, 2
PROCESSES = 2
MOTET, FIFO = "motet", "FIFO"


@dataclass(frozen=True)
class Variant:
    """motet's policy with something about it changed, or the world."""

    policy: Mapping[str, object] = field(default_factory=dict)
    #: (module or class, name) -> what stands there meanwhile.
    parts: Mapping[tuple[object, str], object] = field(default_factory=dict)
    world: Mapping[str, float] = field(default_factory=dict)


def _unless_near(rates: Rates, worker: str) -> float:
    """The pace of a worker, or that of its kind where it is within a tenth of it."""
    pace, _ = rates.paces.get(worker, (1.0, 0))
    return 1.0 if 0.9 < pace < 1.1 else pace


def _whole(cap_s: float, remaining_s: float, devices: float) -> float:
    """Sub-tasks of one size, however little is left."""
    return cap_s


def _nothing(*_: object) -> None: ...


def _no_time(*_: object) -> float:
    return 0.0


#: What is changed, in words -> how.
VARIANTS: Mapping[str, Variant] = {
    "costs told, not learned": Variant(world={"prior_off": 1.0}),
    "costs never learned, 3 x off": Variant(policy={"learn": False}),
    "paces of devices not learned": Variant(policy={"pace": False}),
    "paces within a tenth taken for 1": Variant(parts={(Rates, "pace"): _unless_near}),
    "nothing recalled": Variant(policy={"recall": False}),
    "nothing cloned": Variant(policy={"clone": False}),
    "neither recalled nor cloned": Variant(policy={"recall": False, "clone": False}),
    "sub-tasks of one size": Variant(parts={(choice, "size_s"): _whole}),
    "sub-tasks of 0.5 s at most": Variant(policy={"subtask_s": 0.5}),
    "sub-tasks of 1 s at most": Variant(policy={"subtask_s": 1.0}),
    "sub-tasks of 5 s at most": Variant(policy={"subtask_s": 5.0}),
    "sub-tasks of 10 s at most": Variant(policy={"subtask_s": 10.0}),
    "one sub-task at a device": Variant(policy={"depth": 1}),
    "two sub-tasks at a device": Variant(policy={"depth": 2}),
    "eight sub-tasks, 10 s ahead": Variant(policy={"depth": 8, "ahead_s": 10.0}),
    "asked for at the last moment": Variant(policy={"ahead_s": 0.0}),
    "asked for 2 s ahead": Variant(policy={"ahead_s": 2.0}),
    "nobody goes early to another model": Variant(parts={(rebalancing.Rebalancing, "balance"): _nothing}),
    "what gives way costs nothing": Variant(parts={(choice.Choice, "reload_s"): _no_time}),
    "no switch forced by fairness": Variant(parts={(rebalancing.Rebalancing, "pay"): _nothing}),
    "another host at once": Variant(parts={(choice, "JOIN_GAIN"): 0.0, (choice, "JOIN_AT"): 0.0}),
    "another host for half the gain": Variant(parts={(choice, "JOIN_GAIN"): choice.JOIN_GAIN / 2}),
    "another host for twice the gain": Variant(parts={(choice, "JOIN_GAIN"): 2 * choice.JOIN_GAIN}),
    "another host for that gain alone": Variant(parts={(choice, "JOIN_AT"): inf}),
    "answers without delay": Variant(world={"trip_s": 0.0}),
    "answers after 0.5 s": Variant(world={"trip_s": 0.5}),
    "answers after 0.5 s, one sub-task": Variant(world={"trip_s": 0.5}, policy={"depth": 1}),
    "no noise": Variant(world={"noise": 0.0}),
    "noise of 60 %": Variant(world={"noise": 0.6}),
    "1 % of sub-tasks 8 x longer": Variant(world={"stragglers": 0.01}),
    "the same, nothing cloned": Variant(world={"stragglers": 0.01}, policy={"clone": False}),
}


def _unmoved(account: fairness.Account, seconds: float) -> fairness.StartTags:
    """Nobody's turn passes: the oldest goes first."""
    return ()


#: The same for fairness.
UNFAIR: Mapping[str, Variant] = {
    "nothing charged (first come)": Variant(
        parts={(fairness.Account, "charge"): _unmoved, (fairness.Account, "correct"): _unmoved}
    ),
    "predictions not corrected": Variant(parts={(fairness.Account, "correct"): _unmoved}),
    "sub-tasks of 0.5 s at most": Variant(policy={"subtask_s": 0.5}),
    "one sub-task at a device": Variant(policy={"depth": 1}),
    "no forced switch of models": Variant(
        parts={(rebalancing, name): inf for name in ("OWED_TENANT", "OWED_JOB", "OWED_MORE")}
    ),
}


@dataclass(frozen=True)
class Run:
    """One simulated run, in figures."""

    case: str
    seed: int
    who: str
    makespan_s: float
    bound_s: float
    loads: int
    least_loads: int
    most_of_both: int
    subtasks: int
    recalled: int
    cloned: int
    lost: int
    #: Share of all device-seconds until the makespan.
    shares: Mapping[str, float]
    gap_subtasks: float
    cpu_s: float

    @property
    def efficiency(self) -> float:
        return self.bound_s / self.makespan_s


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--markdown", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.markdown:
        kept = json.loads((RESULTS / "simulate.json").read_text("utf-8"))
        say("\n".join(markdown(kept["details"]["runs"])))
        return
    size = arguments.size
    seeds = range(size.of(full=SEEDS, quick=QUICK_SEEDS, smoke=2))
    few = range(size.of(full=ABLATION_SEEDS, quick=0, smoke=2))
    work_s = size.of(full=None, quick=None, smoke=SMOKE_WORK_S)
    began = time.perf_counter()
    say(
        "All figures are SIMULATED: a virtual clock, devices that are numbers, and the dispatcher's own policy."
    )
    asked = [(case, seed, who, work_s) for case in CASES for who in (MOTET, *RULES) for seed in seeds]
    asked += [(case, seed, who, work_s) for case in FAIR for who in (MOTET, FIFO) for seed in seeds]
    asked += [("chaos", seed, who, work_s) for who in (MOTET, FIFO) for seed in seeds]
    for variant in (*VARIANTS.values(), *UNFAIR.values()):
        # A part that is not there any more is told of now, not in ten minutes.
        with _changed(variant.parts):
            pass
    most = size.of(full=None, quick=0, smoke=SMOKE_VARIANTS)
    for variants, cases in ((VARIANTS, CASES_MAIMED), (UNFAIR, FAIR)):
        asked += [
            (case, seed, who, work_s) for who in islice(variants, most) for case in cases for seed in few
        ]
    say(f"{len(asked)} runs on {PROCESSES} processes …")
    runs: dict[tuple[str, str], list[Run]] = {}
    with multiprocessing.Pool(PROCESSES) as pool:
        for done in pool.imap(_run, asked, chunksize=1):
            runs.setdefault((done.case, done.who), []).append(done)
    tell_efficiency(runs)
    tell_loads(runs)
    tell_shares(runs)
    tell_fairness(runs)
    tell_chaos(runs)
    if few:
        tell_ablations(runs, few)
    tell_losses(runs)
    n = sum(map(len, runs.values()))
    say(f"\n{n} runs of {len(runs)} kinds, seeds 0-{max(seeds)}, in {time.perf_counter() - began:.0f} s")
    finish("simulate", keys(runs), arguments, details=details(runs))


# -- one run


def _run(asked: tuple[str, int, str, float | None]) -> Run:
    case, seed, who, work_s = asked
    file = _file(case)
    if work_s is not None:
        file = replace(file, spec={**file.spec, "seconds_a_device": work_s})
    scenario = file.scenario(seed)
    began = time.process_time()
    if who in RULES:
        outcome = Simulation(pulled(scenario), rival(who, seed), seed).run()
    else:
        variant = (UNFAIR if case in FAIR else VARIANTS).get(who, Variant())
        scenario = replace(scenario, **variant.world)  # type: ignore[arg-type]
        with _changed(variant.parts):
            outcome = Simulation(scenario, Motet(rates=Rates(), **variant.policy), seed).run()  # type: ignore[arg-type]
    return _figures(scenario, outcome, case, seed, who, time.process_time() - began)


@cache
def _file(case: str) -> ScenarioFile:
    return read(SCENARIOS / f"{case}.toml")


@contextmanager
def _changed(parts: Mapping[tuple[object, str], object]) -> Iterator[None]:
    before = {at: getattr(*at) for at in parts}
    try:
        for at, part in parts.items():
            setattr(*at, part)
        yield
    finally:
        for at, part in before.items():
            setattr(*at, part)


def _figures(scenario: Scenario, outcome: RunOutcome, case: str, seed: int, who: str, cpu_s: float) -> Run:
    wanted = {job.name: job.rows for job in scenario.jobs}
    assert outcome.rows == wanted, f"{case}, seed {seed}, {who}: {outcome.rows} rows were done of {wanted}"
    placing, fair = case in CASES, case in FAIR
    bound_s = least_makespan_s(scenario, outcome.work_s, outcome.makespan_s) if placing else 0.0
    assert bound_s <= outcome.makespan_s, f"{case}, seed {seed}, {who}: shorter than the bound"
    return Run(
        case=case,
        seed=seed,
        who=who,
        makespan_s=outcome.makespan_s,
        bound_s=bound_s,
        loads=outcome.loads,
        least_loads=least_loads(scenario, outcome.work_s, outcome.makespan_s) if placing else 0,
        most_of_both=max(len(scenario.models), len(scenario.devices)),
        subtasks=outcome.subtasks,
        recalled=outcome.recalled,
        cloned=outcome.cloned,
        lost=outcome.lost,
        shares=_shares(scenario, outcome),
        gap_subtasks=gap_s(scenario.jobs, outcome) / largest_s(outcome) if fair else 0.0,
        cpu_s=cpu_s,
    )


def _shares(scenario: Scenario, outcome: RunOutcome) -> dict[str, float]:
    """What devices did until the makespan, as shares of it: worked, loaded, worked for nothing, were idle."""
    end_s = outcome.makespan_s
    seconds = dict.fromkeys(("work", "loads", "wasted", "idle first", "between", "last"), 0.0)
    by_device: dict[str, list[tuple[float, float]]] = {d.name: [] for d in scenario.devices}
    for span in outcome.spans:
        kind = "loads" if span.loads else "wasted" if span.wasted else "work"
        start, end = min(span.start_s, end_s), min(span.end_s, end_s)
        seconds[kind] += end - start
        by_device[span.device].append((start, end))
    for spans in by_device.values():
        spans.sort()
        last = 0.0
        for i, (start, end) in enumerate(spans):
            seconds["between" if i else "idle first"] += max(0.0, start - last)
            last = max(last, end)
        seconds["last"] += end_s - last
    return {kind: amount / (end_s * len(by_device)) for kind, amount in seconds.items()}


# -- telling


Runs = Mapping[tuple[str, str], Sequence[Run]]


def mean(amounts: Iterable[float]) -> float:
    return statistics.fmean(amounts)


def half_width(amounts: Sequence[float]) -> float:
    """Of the 95 % confidence interval of the mean, by Student's t."""
    if len(amounts) < 2:
        return inf
    return float(students_t.ppf(0.975, len(amounts) - 1)) * statistics.stdev(amounts) / len(amounts) ** 0.5


def spread(amounts: Sequence[float], digits: int = 3) -> str:
    return f"{mean(amounts):.{digits}f}±{half_width(amounts):.{digits}f}"


def efficiencies(runs: Runs, case: str, who: str) -> list[float]:
    return [run.efficiency for run in runs[case, who]]


def tell_efficiency(runs: Runs) -> None:
    table(
        "schedule efficiency: bound / makespan, mean and 95 % confidence interval over the seeds; 1 cannot be beaten",
        ("case", "asked", MOTET, *RULES),
        [
            (case, f"{asked}", *(spread(efficiencies(runs, case, who)) for who in (MOTET, *RULES)))
            for case, asked in CASES.items()
        ],
    )


def tell_loads(runs: Runs) -> None:
    table(
        "model loads: over the fewest that any schedule as short has; over the larger of models and devices; and rivals'",
        ("case", "loads", "/ fewest", "/ larger", *RULES),
        [
            (
                case,
                f"{mean(run.loads for run in runs[case, MOTET]):.1f}",
                spread([run.loads / run.least_loads for run in runs[case, MOTET]], 2),
                spread([run.loads / run.most_of_both for run in runs[case, MOTET]], 2),
                *(f"{mean(run.loads for run in runs[case, who]):.0f}" for who in RULES),
            )
            for case in CASES
        ],
    )


def tell_shares(runs: Runs) -> None:
    kinds = list(runs["mixed", MOTET][0].shares)
    table(
        "where motet's device-seconds go, in % of all until the makespan; CPU of policy and clock",
        ("case", *kinds, "recalls", "clones", "us/sub-task"),
        [
            (
                case,
                *(f"{100 * mean(run.shares[kind] for run in own):.2f}" for kind in kinds),
                f"{mean(run.recalled for run in own):.0f}",
                f"{mean(run.cloned for run in own):.1f}",
                f"{1e6 * mean(run.cpu_s / run.subtasks for run in own):.0f}",
            )
            for case in CASES
            for own in (runs[case, MOTET],)
        ],
    )


def tell_fairness(runs: Runs) -> None:
    who = (MOTET, FIFO, *(name for name in UNFAIR if (FAIR[0], name) in runs))
    table(
        "fairness gap, in sub-tasks of the longest kind, mean and worst seed; at most 2 is asked",
        ("", *(case.removeprefix("fair_") for case in FAIR), "cold: makespan s"),
        [
            (
                name,
                *(
                    f"{spread(gaps, 2)}, {max(gaps):.2f}"
                    for case in FAIR
                    for gaps in ([run.gap_subtasks for run in runs[case, name]],)
                ),
                f"{mean(run.makespan_s for run in runs[FAIR[-1], name]):.0f}",
            )
            for name in who
        ],
    )
    for case in FAIR:
        say(f"  {case.removeprefix('fair_')}: {_file(case).about}")


def tell_chaos(runs: Runs) -> None:
    say(f"\nchaos: {_file('chaos').about}")
    for who in (MOTET, FIFO):
        own = runs["chaos", who]
        say(
            f"  {who}: every row done once in {len(own)} of {len(own)} runs, {spread([r.makespan_s for r in own], 1)} s;"
            f" {mean(r.lost for r in own):.0f} leases ran out, {mean(r.cloned for r in own):.1f} clones a run"
        )


def tell_ablations(runs: Runs, seeds: range) -> None:
    def cell(case: str, name: str) -> str:
        usual = [runs[case, MOTET][seed].efficiency for seed in seeds]
        off = [b - a for a, b in zip(usual, efficiencies(runs, case, name), strict=True)]
        return f"{100 * mean(off):+.1f}±{100 * half_width(off):.1f}"

    table(
        f"ablations: efficiency in points (1/100) more or less than motet's on the same seeds 0-{max(seeds)}",
        ("changed", *CASES_MAIMED),
        [
            (
                "(motet)",
                *(
                    f"{100 * mean(efficiencies(runs, case, MOTET)[: len(seeds)]):.1f}"
                    for case in CASES_MAIMED
                ),
            ),
            *(
                (name, *(cell(case, name) for case in CASES_MAIMED))
                for name in VARIANTS
                if (CASES_MAIMED[0], name) in runs
            ),
        ],
    )


def tell_losses(runs: Runs) -> None:
    """Where somebody else, or less of motet, is better."""
    say("\nlosses:")
    lost = list(losses(runs))
    for line in lost or ["none"]:
        say(f"  {line}")


def losses(runs: Runs) -> Iterator[str]:
    for case, asked in CASES.items():
        own = efficiencies(runs, case, MOTET)
        if mean(own) < asked:
            yield f"{case}: {mean(own):.3f} is less than the {asked:.2f} that was asked"
        for who in (*RULES, *VARIANTS):
            theirs = [run.efficiency for run in runs.get((case, who), ())]
            if not theirs or (who in VARIANTS and VARIANTS[who].world):
                continue
            more = [b - a for a, b in zip(own, theirs, strict=False)]
            if mean(more) - half_width(more) > 0:
                yield f'{case}: "{who}" is {100 * mean(more):.1f} ±{100 * half_width(more):.1f} points better'
    for case in FAIR:
        gap = mean(run.gap_subtasks for run in runs[case, MOTET])
        if gap > 2:
            yield f"{case}: a gap of {gap:.1f} sub-tasks is more than 2"
    for case in CASES:
        extra = mean(run.loads / run.least_loads for run in runs[case, MOTET])
        if extra > 1.1:
            yield f"{case}: {extra:.2f} times the fewest loads is more than 1.1"


def keys(runs: Runs) -> dict[str, float]:
    found: dict[str, float] = {}

    def tell(key: str, amounts: Sequence[float], digits: int, worst: Callable[..., float] = max) -> None:
        found[key] = round(mean(amounts), digits)
        found[f"worst_{key}"] = round(worst(amounts), digits)

    gaps = {case: [run.gap_subtasks for run in runs[case, MOTET]] for case in FAIR}
    extra = {case: [run.loads / run.least_loads for run in runs[case, MOTET]] for case in CASES}
    for case in CASES:
        tell(f"efficiency_{case}", efficiencies(runs, case, MOTET), 4, min)
    tell("fairness_gap_subtasks", max(gaps["fair_tenants"], gaps["fair_models"], key=mean), 2)
    tell("fairness_gap_newcomer", gaps["fair_late"], 2)
    tell("fairness_gap_cold", gaps["fair_cold"], 1)
    tell("loads_vs_minimum", max((extra[case] for case in CASES if case != "hard"), key=mean), 3)
    tell("loads_vs_minimum_hard", extra["hard"], 3)
    return found


def markdown(kept: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """The ablations that were measured, as a table, from the results that are kept."""
    yield "| changed | " + " | ".join(CASES_MAIMED) + " |"
    yield "|---|" + "---|" * len(CASES_MAIMED)
    usual = {case: kept[f"{case} / {MOTET}"]["efficiency"][:ABLATION_SEEDS] for case in CASES_MAIMED}
    yield "| (motet) | " + " | ".join(f"{100 * mean(usual[case]):.1f}" for case in CASES_MAIMED) + " |"
    for name in VARIANTS:
        if f"{CASES_MAIMED[0]} / {name}" not in kept:
            continue
        cells = []
        for case in CASES_MAIMED:
            off = [b - a for a, b in zip(usual[case], kept[f"{case} / {name}"]["efficiency"], strict=True)]
            cells.append(f"{100 * mean(off):+.1f} ± {100 * half_width(off):.1f}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def details(runs: Runs) -> dict[str, object]:
    return {
        "simulated": True,
        "losses": list(losses(runs)),
        "runs": {
            f"{case} / {who}": {
                "seeds": len(own),
                "efficiency": [round(run.efficiency, 4) for run in own] if case in CASES else None,
                "makespan_s": [round(run.makespan_s, 2) for run in own],
                "loads": [run.loads for run in own],
                "least_loads": [run.least_loads for run in own] if case in CASES else None,
                "shares": {kind: round(mean(run.shares[kind] for run in own), 5) for kind in own[0].shares},
                "gap_subtasks": [round(run.gap_subtasks, 2) for run in own] if case in FAIR else None,
            }
            for (case, who), own in runs.items()
        },
    }


if __name__ == "__main__":
    main()
