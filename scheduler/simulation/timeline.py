"""A picture of a simulated run: a page with a lane for each device, or for many alike, over time. Pure.

What a lane holds is bounded whatever the run: bars that would be thinner than a column of it become shares of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from motet.markup import Html, tag
from scheduler.api.charts import Stretch, clock
from scheduler.api.markup import count, document, duration, percent
from scheduler.simulation.cluster import SimulatedDevice
from scheduler.simulation.events import DeviceSpan, RunOutcome
from scheduler.simulation.trace import Trace

#: Lanes of a page, columns of a lane, and bars that a lane may have before it is drawn by columns.
LANES, COLUMNS, BARS = 64, 240, 300
_LANE_PX = 18
_COLOURS = 8
_LOADS, _WASTED = "load", "wasted"

_STYLE = """
:root{--c0:#3f75b5;--c1:#c08a1e;--c2:#2f9488;--c3:#8d62ad;--c4:#9a6a43;--c5:#5b8a3a;--c6:#b5577f;--c7:#6b7785}
@media(prefers-color-scheme:dark){:root{--c0:#6a9fdd;--c1:#d9a845;--c2:#4fb5a8;--c3:#b28bd1;--c4:#c2926b;--c5:#86b765;
--c6:#de86ab;--c7:#9ba5b1}}
.c0{fill:var(--c0)}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}
.c6{fill:var(--c6)}.c7{fill:var(--c7)}.blank{fill:var(--wash)}.load{fill:url(#loads)}.wasted{fill:var(--error)}
.loads{stroke:var(--soft);stroke-width:1.5}.lane{padding:1px 0}.figures{margin-bottom:14px}
"""


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
    return document(
        "Simulated",
        tag("nav", "motet › simulate", aria_label="Where you are"),
        tag("style", Html(_STYLE)),
        _HATCH,
        tag("h1", "Simulated, not measured"),
        tag(
            "p",
            f"{count(len(trace.jobs), 'job')}, {count(sum(job.rows for job in trace.jobs), 'row')}. Colours are {what},"
            " loads are hatched, idle time is blank. One run of several that differ by chance.",
            class_="head soft",
        ),
        _key(colours),
        [_section(text, devices, outcome, colours, longest) for text, devices, outcome in runs],
    )


def _colours(trace: Trace) -> tuple[Mapping[str, str], str]:
    """Job -> the class that colours it: its own, or its model's where there are more jobs than colours."""
    by_model = len(trace.jobs) > _COLOURS
    named = {job.name: job.model if by_model else job.name for job in trace.jobs}
    numbers = {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(named.values()))}
    return {job: f"c{numbers[name]}" for job, name in named.items()}, "models" if by_model else "jobs"


_HATCH = tag(
    "svg",
    tag(
        "defs",
        tag(
            "pattern",
            tag("path", d="M-1 1l2-2M0 6l6-6M5 7l2-2", class_="loads"),
            id="loads",
            width=6,
            height=6,
            pattern_units="userSpaceOnUse",
        ),
    ),
    width=0,
    height=0,
    aria_hidden="true",
)


def _key(colours: Mapping[str, str]) -> Html:
    words: dict[str, list[str]] = {}
    for job, css in colours.items():
        words.setdefault(css, []).append(job)
    told = [
        (css, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more")
        for css, names in words.items()
    ]
    boxes = [
        tag("li", tag("svg", tag("rect", width=12, height=12, class_=css), width=12, height=12), words)
        for css, words in (
            *told,
            (_LOADS, "a model loads"),
            (_WASTED, "done twice: the other one came first"),
        )
    ]
    return tag("ul", boxes, class_="key")


def _section(
    text: str,
    devices: Sequence[SimulatedDevice],
    outcome: RunOutcome,
    colours: Mapping[str, str],
    longest: float,
) -> Html:
    lanes = _lanes(devices, outcome.spans)
    over = Stretch(0.0, longest)
    ended = max(outcome.ended_s.values())
    figures = [
        ("All done after", duration(ended), ""),
        *(_used(kind, alike, outcome, ended) for kind, alike in _by_kind(devices).items()),
        ("Loads", f"{outcome.loads:,}", f"{duration(outcome.load_s)} of device time"),
        ("Sub-tasks", f"{outcome.subtasks:,}", f"{duration(outcome.wasted_s)} done twice"),
    ]
    return tag(
        "section",
        tag("h2", text),
        tag(
            "dl",
            [
                tag("div", tag("dt", k), tag("dd", v, tag("small", more, class_="soft")))
                for k, v, more in figures
            ],
            class_="figures",
        ),
        [_drawn(lane, colours, over) for lane in lanes],
        tag(
            "div",
            tag("div"),
            tag(
                "svg",
                [
                    tag("text", clock(t, longest), x=f"{over.at(t):.2f}%", y=13, text_anchor="middle")
                    for t in over.ticks()
                    if 3 < over.at(t) < 97
                ],
                width="100%",
                height=18,
                aria_hidden="true",
            ),
            class_="lane",
        ),
    )


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


def _drawn(lane: _Lane, colours: Mapping[str, str], over: Stretch) -> Html:
    bars = _bars(lane, colours, over) if lane.devices == 1 else None
    busy = sum(span.end_s - span.start_s for span in lane.spans) / (lane.devices * over.to_s)
    return tag(
        "div",
        tag("div", lane.name, class_="who", title=lane.name),
        tag(
            "svg",
            tag("rect", width="100%", height=_LANE_PX, class_="blank"),
            bars if bars is not None else _columns(lane, colours, over),
            width="100%",
            height=_LANE_PX,
            role="img",
            aria_label=f"{lane.name}: {percent(busy)} used",
        ),
        class_="lane",
    )


def _class(span: DeviceSpan, colours: Mapping[str, str]) -> str:
    return _LOADS if span.loads else _WASTED if span.wasted else colours[span.job]


def _bars(lane: _Lane, colours: Mapping[str, str], over: Stretch) -> list[Html] | None:
    """A bar for each stretch of one colour; None where there would be too many."""
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
        tag(
            "rect",
            tag("title", f"{words}: {duration(start)} to {duration(end)}"),
            x=f"{over.at(start):.2f}%",
            width=f"{max(0.05, over.at(end) - over.at(start)):.2f}%",
            height=_LANE_PX,
            class_=css,
        )
        for start, end, css, words in merged
    ]


def _columns(lane: _Lane, colours: Mapping[str, str], over: Stretch) -> Html:
    """For each column of time, which share of these devices did what: colours above each other."""
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
        drawn.append(tag("path", d=_area(floor, top), class_=css))
        floor = top
    return tag(
        "svg",
        drawn,
        view_box=f"0 0 {COLUMNS} {_LANE_PX}",
        width="100%",
        height=_LANE_PX,
        preserve_aspect_ratio="none",
    )


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
    return f"{_LANE_PX * (1 - level):.1f}".removesuffix(".0")
