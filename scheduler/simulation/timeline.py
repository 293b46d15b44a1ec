"""A picture of a simulated run: a page with a lane for each device, or for many alike, over time. Pure.

What a lane holds is bounded whatever the run: bars that would be thinner than a column of it become shares of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.pages import COLOURS, px
from scheduler.api.charts import Stretch
from scheduler.api.markup import render
from scheduler.api.words import duration, percent
from scheduler.simulation.cluster import SimulatedDevice
from scheduler.simulation.events import DeviceSpan, RunOutcome
from scheduler.simulation.trace import Trace

#: Lanes of a page, columns of a lane, and bars that a lane may have before it is drawn by columns.
LANES, COLUMNS, BARS = 64, 240, 300
_LANE_PX = 18
_LOADS, _WASTED = "load", "wasted"


@dataclass(frozen=True, slots=True)
class _Lane:
    """Devices of one kind whose spans are drawn together."""

    name: str
    devices: int
    spans: Sequence[DeviceSpan]


def page(runs: Sequence[tuple[str, Sequence[SimulatedDevice], RunOutcome]], trace: Trace) -> str:
    """A whole page with one section for each (name of a cluster, its devices, a run)."""
    colours, what = _colours(trace)
    longest = max(max(outcome.ended_s.values()) for _, _, outcome in runs)
    over = Stretch(0.0, longest)
    return render(
        "simulated.html",
        jobs=len(trace.jobs),
        rows=sum(job.rows for job in trace.jobs),
        what=what,
        key=_key(colours),
        lane_px=_LANE_PX,
        columns=COLUMNS,
        ticks=over.axis(),
        runs=[
            {
                "name": name,
                "figures": _figures(devices, outcome),
                "lanes": [_drawn(lane, colours, over) for lane in _lanes(devices, outcome.spans)],
            }
            for name, devices, outcome in runs
        ],
        live=False,
    )


def _colours(trace: Trace) -> tuple[Mapping[str, str], str]:
    """Job -> the class that colours it: its own, or its model's where there are more jobs than colours."""
    by_model = len(trace.jobs) > COLOURS
    named = {job.name: job.model if by_model else job.name for job in trace.jobs}
    numbers = {name: i % COLOURS for i, name in enumerate(dict.fromkeys(named.values()))}
    return {job: f"p{numbers[name]}" for job, name in named.items()}, "models" if by_model else "jobs"


def _key(colours: Mapping[str, str]) -> list[tuple[str, str]]:
    """(class, words) of each colour."""
    words: dict[str, list[str]] = {}
    for job, css in colours.items():
        words.setdefault(css, []).append(job)
    told = [
        (css, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more")
        for css, names in words.items()
    ]
    return [*told, (_LOADS, "a model loads"), (_WASTED, "done twice: the other one came first")]


def _figures(devices: Sequence[SimulatedDevice], outcome: RunOutcome) -> list[tuple[str, str, str]]:
    ended = max(outcome.ended_s.values())
    return [
        ("All done after", duration(ended), ""),
        *(_used(kind, alike, outcome, ended) for kind, alike in _by_kind(devices).items()),
        ("Loads", f"{outcome.loads:,}", f"{duration(outcome.load_s)} of device time"),
        ("Sub-tasks", f"{outcome.subtasks:,}", f"{duration(outcome.wasted_s)} done twice"),
    ]


def _used(
    kind: str, devices: Sequence[SimulatedDevice], outcome: RunOutcome, ended: float
) -> tuple[str, str, str]:
    names = {device.name for device in devices}
    busy, loads = (
        sum(s.end_s - s.start_s for s in outcome.spans if s.device in names and s.loads is what)
        / (ended * len(devices))
        for what in (False, True)
    )
    return (
        f"{len(devices):,} x {kind} busy",
        percent(busy),
        f"{percent(loads)} loading, {percent(max(0.0, 1 - busy - loads))} idle",
    )


def _by_kind(devices: Iterable[SimulatedDevice]) -> dict[str, list[SimulatedDevice]]:
    found: dict[str, list[SimulatedDevice]] = {}
    for device in devices:
        found.setdefault(device.kind, []).append(device)
    return found


def _lanes(devices: Sequence[SimulatedDevice], spans: Iterable[DeviceSpan]) -> list[_Lane]:
    """A lane for each device, or for so many neighbours of a kind that the page has about ``LANES``."""
    by_device: dict[str, list[DeviceSpan]] = {device.name: [] for device in devices}
    for span in spans:
        by_device[span.device].append(span)
    found = []
    for kind, alike in _by_kind(devices).items():
        # Each kind its share of the lanes, and at least one.
        lanes = max(1, min(len(alike), LANES * len(alike) // len(devices)))
        for i in range(lanes):
            names = [d.name for d in alike[len(alike) * i // lanes : len(alike) * (i + 1) // lanes]]
            name = names[0] if len(names) == 1 else f"{len(names):,} x {kind}"
            found.append(_Lane(name, len(names), [span for one in names for span in by_device[one]]))
    return found


def _drawn(lane: _Lane, colours: Mapping[str, str], over: Stretch) -> dict[str, Any]:
    """A lane's bars, or its areas where it has too many of them."""
    bars = _bars(lane, colours, over) if lane.devices == 1 else None
    busy = sum(span.end_s - span.start_s for span in lane.spans) / (lane.devices * over.to_s)
    return {
        "name": lane.name,
        "busy": percent(busy),
        "bars": bars or (),
        "areas": _columns(lane, colours, over) if bars is None else (),
    }


def _class(span: DeviceSpan, colours: Mapping[str, str]) -> str:
    return _LOADS if span.loads else _WASTED if span.wasted else colours[span.job]


def _bars(
    lane: _Lane, colours: Mapping[str, str], over: Stretch
) -> list[tuple[str, float, float, str]] | None:
    """(class, x, width, words) of each stretch of one colour; None where there would be too many."""
    gap_s = over.to_s / (4 * COLUMNS)
    merged: list[tuple[float, float, str, str]] = []
    for span in sorted(lane.spans, key=lambda s: s.start_s):
        css = _class(span, colours)
        words = f"{'loading ' if span.loads else ''}{span.model if span.loads else span.job}"
        if merged and merged[-1][2:] == (css, words) and span.start_s - merged[-1][1] < gap_s:
            merged[-1] = (merged[-1][0], span.end_s, css, words)
        else:
            merged.append((span.start_s, span.end_s, css, words))
    if len(merged) > BARS:
        return None
    return [
        (
            css,
            over.at(start),
            max(0.05, over.at(end) - over.at(start)),
            f"{words}: {duration(start)} to {duration(end)}",
        )
        for start, end, css, words in merged
    ]


def _columns(lane: _Lane, colours: Mapping[str, str], over: Stretch) -> list[tuple[str, str]]:
    """(class, path) of the share of these devices that did a thing in each column of time, above each other."""
    width_s = over.to_s / COLUMNS
    shares: dict[str, list[float]] = {}
    for span in lane.spans:
        mine = shares.setdefault(_class(span, colours), [0.0] * COLUMNS)
        first, last = int(span.start_s / width_s), min(COLUMNS - 1, int(span.end_s / width_s))
        for column in range(first, last + 1):
            inside = min(span.end_s, (column + 1) * width_s) - max(span.start_s, column * width_s)
            mine[column] += inside / (width_s * lane.devices)
    floor = [0.0] * COLUMNS
    drawn = []
    for css in sorted(shares):
        top = [min(1.0, low + share) for low, share in zip(floor, shares[css], strict=True)]
        drawn.append((css, _area(floor, top)))
        floor = top
    return drawn


def _area(floor: Sequence[float], top: Sequence[float]) -> str:
    """A path along the tops of the columns and back along their floors; flat stretches cost nothing."""
    there = _steps(top, range(len(top)), 1)
    back = _steps(floor, range(len(floor) - 1, -1, -1), 0)
    return f"M0 {_y(floor[0])}{there}{back}Z"


def _steps(levels: Sequence[float], order: Iterable[int], far: int) -> str:
    found, last = "", ""
    order = list(order)
    for i, column in enumerate(order):
        y = _y(levels[column])
        found += "" if y == last else f"V{y}"
        last = y
        following = order[i + 1] if i + 1 < len(order) else None
        if following is None or _y(levels[following]) != y:
            found += f"H{column + far}"
    return found


def _y(level: float) -> str:
    return px(_LANE_PX * (1 - level))
