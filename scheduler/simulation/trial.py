"""``python -m scheduler simulate``: try jobs on clusters that are not bought yet. One JSON object on stdout.

`motet simulate` runs it and shows what it found. Each seed is another world: other noise on every sub-task and load.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.errors import SetupError
from scheduler.simulation.cluster import Model, Scenario, SimulatedDevice
from scheduler.simulation.events import RunOutcome, Simulation
from scheduler.simulation.kinds import devices_of
from scheduler.simulation.policy import Motet
from scheduler.simulation.trace import EXAMPLE, Trace, read_models, read_trace, record


def run(arguments: Sequence[str]) -> None:
    """What `motet simulate` asks for. Raises SetupError."""
    parser = argparse.ArgumentParser(prog="python -m scheduler simulate", description=__doc__)
    parser.add_argument("--gpus", action="append", default=[], help="8xH200,16xL4; again: another cluster")
    parser.add_argument("--jobs", help="a trace; - is stdin  [default: an example]")
    parser.add_argument("--models", type=Path, help="a TOML file of what models cost")
    parser.add_argument("--price", action="append", default=[], help="KIND=AN_HOUR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--html", type=Path, help="write a picture of the first seed there")
    parser.add_argument("--record", action="store_true", help="activities on stdin, a trace on stdout")
    options = parser.parse_args(arguments)
    if options.record:
        told = json.load(sys.stdin)
        for line in record(told["activities"], told["parameters"]):
            print(json.dumps(line, ensure_ascii=False))
        return
    trace = _trace(options.jobs, options.models)
    clusters = {text: devices_of(text) for text in options.gpus}
    if not clusters:
        raise SetupError("--gpus is missing; expected such as 8xH200,16xL4")
    prices = _prices(options.price, {d.kind for devices in clusters.values() for d in devices})
    for text, devices in clusters.items():
        _must_fit(text, devices, trace.models)
    runs = {text: _runs(devices, trace, options.seeds) for text, devices in clusters.items()}
    if options.html:
        # Rarely wanted, and what it stands on takes a second to import.
        from scheduler.simulation.timeline import page

        pictured = [(text, clusters[text], outcomes[0]) for text, outcomes in runs.items()]
        options.html.write_text(page(pictured, trace), "utf-8")
    found = [
        {"gpus": text, **summary(clusters[text], trace, outcomes, prices)} for text, outcomes in runs.items()
    ]
    print(json.dumps({"clusters": found, "guessed": list(trace.guessed)}, ensure_ascii=False))


def scenario(devices: Sequence[SimulatedDevice], trace: Trace) -> Scenario:
    """These jobs on these devices, in a world that is as unkind as ours usually is."""
    return Scenario(devices=tuple(devices), models=dict(trace.models), jobs=trace.jobs)


def summary(
    devices: Sequence[SimulatedDevice],
    trace: Trace,
    outcomes: Sequence[RunOutcome],
    prices: Mapping[str, float],
) -> dict[str, Any]:
    """What the runs of one cluster came to."""
    ends = [max(o.ended_s.values()) for o in outcomes]
    kinds = _kinds(devices, outcomes, ends)
    found: dict[str, Any] = {
        "devices": len(devices),
        "seeds": len(outcomes),
        "makespan_s": spread(ends),
        "loads": spread([o.loads for o in outcomes]),
        "busy": sum(k["busy"] * k["devices"] for k in kinds) / len(devices),
        "kinds": kinds,
        "jobs": [
            {
                "name": job.name,
                "model": job.model,
                "tenant": job.tenant,
                "rows": job.rows,
                "at_s": job.at_s,
                "start_s": spread([o.first_s[job.name] for o in outcomes]),
                "end_s": spread([o.ended_s[job.name] for o in outcomes]),
                "took_s": trace.took_s.get(job.name),
                "deadline_s": job.deadline_s,
                "late": None
                if job.deadline_s is None
                else _mean(o.ended_s[job.name] > job.deadline_s for o in outcomes),
            }
            for job in trace.jobs
        ],
    }
    if prices:
        hours = found["makespan_s"]["p50"] / 3600
        bill = [(k, prices.get(k["kind"], 0.0) * k["devices"] * hours) for k in kinds]
        found["cost"] = sum(cost for _, cost in bill)
        found["cost_of_idle"] = sum(cost * k["idle"] for k, cost in bill)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile, between the nearest two."""
    return {"p50": round(_percentile(values, 0.5), 3), "p90": round(_percentile(values, 0.9), 3)}


def _kinds(
    devices: Sequence[SimulatedDevice], outcomes: Sequence[RunOutcome], ends: Sequence[float]
) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for device in devices:
        counts[device.kind] = counts.get(device.kind, 0) + 1
    kind_of = {device.name: device.kind for device in devices}
    spent = {kind: [0.0, 0.0] for kind in counts}
    for outcome in outcomes:
        for span in outcome.spans:
            spent[kind_of[span.device]][span.loads] += span.end_s - span.start_s
    found = []
    for kind, count in counts.items():
        busy, loading = (seconds / (count * sum(ends)) for seconds in spent[kind])
        idle = max(0.0, 1 - busy - loading)
        found.append(
            {
                "kind": kind,
                "devices": count,
                "busy": busy,
                "loading": loading,
                "idle": idle,
                "idle_hours": idle * count * _mean(ends) / 3600,
            }
        )
    return found


def _runs(devices: Sequence[SimulatedDevice], trace: Trace, seeds: int) -> list[RunOutcome]:
    world = scenario(devices, trace)
    return [Simulation(world, Motet(), seed).run() for seed in range(seeds)]


def _trace(jobs: str | None, models: Path | None) -> Trace:
    costs = read_models(_read(models), str(models)) if models else {}
    if jobs is None:
        return read_trace(EXAMPLE.splitlines(), "the example", costs)
    if jobs == "-":
        return read_trace(sys.stdin, "stdin", costs)
    return read_trace(_read(Path(jobs)).splitlines(), jobs, costs)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SetupError(f"cannot read {str(path)!r}: {words}") from None


def _prices(texts: Iterable[str], kinds: set[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        kind, _, price = text.partition("=")
        try:
            found[kind] = float(price)
        except ValueError:
            found[kind] = -1.0
        if kind not in kinds or not 0 <= found[kind] < float("inf"):
            raise SetupError(
                f"--price: got {text!r}; expected KIND=PRICE of an hour, KIND one of {', '.join(sorted(kinds))}"
            )
    return found


def _must_fit(text: str, devices: Sequence[SimulatedDevice], models: Mapping[str, Model]) -> None:
    largest = max(devices, key=lambda device: device.memory_mb)
    for model in models.values():
        # As the registry would predict it: what is placed goes by that.
        need_mb = max(model.memory_mb, model.manifest().memory_mb())
        if need_mb > largest.memory_mb:
            raise SetupError(
                f"no GPU of {text} fits {model.name!r}: it needs {need_mb:,} MB, the largest ({largest.kind}) has"
                f" {largest.memory_mb:,} for models; choose a larger kind, or a smaller memory_gb"
            )


def _mean(values: Iterable[float]) -> float:
    all_ = list(values)
    return sum(all_) / len(all_)


def _percentile(values: Sequence[float], share: float) -> float:
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    below = int(at)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (at - below) * (ranked[above] - ranked[below])
