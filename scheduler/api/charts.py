"""Charts as inline SVG: shares of a whole, sub-tasks in time, a curve. Pure; lengths are per cent, so that text keeps
its size on every screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from motet.markup import Html, join, tag
from scheduler.api.markup import compact, count, duration, number

#: Colours of passes; beyond them they come again.
PASS_COLOURS = 6
#: Bars of one device that lie above each other: it rarely has more than three sub-tasks at a time.
_ROWS = 4
_ROW_PX = 16
#: Share of a bar that the one before it may cover.
_LATE = 0.35


def colour(pass_number: int) -> str:
    """The class that colours a pass."""
    return f"p{pass_number % PASS_COLOURS}"


def swatch(*classes: str) -> Html:
    """A small square beside the word that it explains."""
    box = tag("rect", x=0.5, y=0.5, width=11, height=11, rx=2, class_=" ".join(classes))
    return tag("svg", box, width=12, height=12, aria_hidden="true")


def shares(parts: Sequence[tuple[str, float, str]], total: float, *, label: str, height: int = 12) -> Html:
    """A bar of (class, amount, words) side by side, of ``total``; the rest is its track."""
    boxes = [tag("rect", width="100%", height=height, rx=min(4, height / 2), class_="track")]
    x = 0.0
    for css, amount, words in parts:
        width = 100 * amount / total if total > 0 else 0.0
        if amount > 0:
            # A share too small to be seen would look like none.
            boxes.append(
                tag(
                    "rect",
                    tag("title", words),
                    x=_per_cent(min(x, 99.6)),
                    width=_per_cent(min(max(width, 0.4), 100 - min(x, 99.6))),
                    height=height,
                    rx=min(2, height / 2),
                    class_=css,
                )
            )
        x += width
    return tag("svg", boxes, width="100%", height=height, role="img", aria_label=label)


# -- sub-tasks in time


def lanes(facts: Mapping[str, Any], *, most: int = 100) -> Html:
    """A lane per device, a bar per sub-task, over the time that the timeline covers."""
    bars: Sequence[Mapping[str, Any]] = facts["timeline"]
    now_s = float(facts["now_s"])
    from_s = 0.0 if len(bars) >= _subtasks(facts) else min(b["start_s"] for b in bars)
    span = Stretch(from_s, max(now_s, from_s + 0.001))
    by_worker: dict[str, list[Mapping[str, Any]]] = {d["worker"]: [] for d in facts["devices"]}
    for bar in bars:
        by_worker.setdefault(bar["worker"], []).append(bar)
    shown = [(name, mine) for name, mine in by_worker.items() if mine]
    return join(
        _HATCH,
        [_lane(name, mine, span) for name, mine in shown[:most]],
        tag("p", f"{count(len(shown) - most, 'more device')} not drawn", class_="small soft")
        if len(shown) > most
        else None,
        tag(
            "div",
            tag("div"),
            tag("svg", _axis(span), width="100%", height=18, aria_hidden="true"),
            class_="lane",
        ),
    )


class Stretch:
    """A stretch of time that is drawn from 0 to 100 per cent."""

    def __init__(self, from_s: float, to_s: float) -> None:
        self.from_s, self.to_s = from_s, to_s

    def at(self, second: float) -> float:
        return 100 * (second - self.from_s) / (self.to_s - self.from_s)

    def ticks(self) -> list[float]:
        """Four to eight round moments."""
        step = round_step((self.to_s - self.from_s) / 6)
        first = ceil(self.from_s / step)
        return [i * step for i in range(first, floor(self.to_s / step) + 1)]


def _subtasks(facts: Mapping[str, Any]) -> int:
    return sum(sum(p["subtasks"].values()) for p in facts["passes"])


_HATCH = tag(
    "svg",
    tag(
        "defs",
        tag(
            "pattern",
            tag("path", d="M-1 1l2-2M0 6l6-6M5 7l2-2", class_="hatch"),
            id="hatched",
            width=6,
            height=6,
            pattern_units="userSpaceOnUse",
        ),
    ),
    width=0,
    height=0,
    aria_hidden="true",
)


def _lane(worker: str, bars: Sequence[Mapping[str, Any]], span: Stretch) -> Html:
    drawn = drawn_bars(bars, span.to_s)
    rows = max(row for _, _, row, _ in drawn) + 1
    states = [b["state"] for b in bars]
    told = ", ".join(f"{states.count(s)} {s}" for s in ("done", "open", "lost", "failed") if s in states)
    grid = [
        tag("line", x1=_per_cent(span.at(t)), x2=_per_cent(span.at(t)), y1=0, y2="100%", class_="grid")
        for t in span.ticks()
    ]
    boxes = [_bar(bar, start_s, end_s, row, span) for start_s, end_s, row, bar in drawn]
    name = worker or "no device known"
    return tag(
        "div",
        tag("div", name, class_="who", title=name),
        tag(
            "svg",
            grid,
            boxes,
            width="100%",
            height=rows * _ROW_PX + 2,
            role="img",
            aria_label=f"{name}: {count(len(bars), 'sub-task')}: {told}",
        ),
        class_="lane",
    )


def drawn_bars(
    bars: Sequence[Mapping[str, Any]], now_s: float
) -> list[tuple[float, float, int, Mapping[str, Any]]]:
    """(start, end, row, bar) of one device's sub-tasks, so that none covers another.

    An open one begins where the device has last ended one: before that it waited for its turn.
    """
    ended = max((b["end_s"] for b in bars if b["state"] == "done"), default=0.0)
    timed = []
    for b in bars:
        open_ = b["end_s"] is None
        start = max(b["start_s"], ended) if open_ else b["start_s"]
        timed.append((min(start, now_s), now_s if open_ else b["end_s"], b))
    timed.sort(key=lambda t: (t[0], t[2]["subtask"]))
    free = [float("-inf")] * _ROWS
    drawn = []
    for start, end, b in timed:
        # Outcomes are recorded a moment after the device went on to the next: so small an overlap is none.
        slack = _LATE * (end - start)
        row = next((i for i, until in enumerate(free) if until <= start + slack), _ROWS - 1)
        drawn.append((min(max(start, free[row]), end), end, row, b))
        free[row] = max(free[row], end)
    return drawn


def _bar(bar: Mapping[str, Any], start_s: float, end_s: float, row: int, span: Stretch) -> Html:
    x = max(0.0, span.at(start_s))
    width = max(span.at(end_s) - x, 0.15)
    css = {
        "done": colour(bar["pass"]),
        "open": f"{colour(bar['pass'])} edge",
        "lost": "lost",
        "failed": "error",
    }[bar["state"]]
    words = [
        f"sub-task {bar['subtask']}: {bar['state']}",
        f"pass {bar['pass'] + 1}",
        count(bar["rows"], "row"),
    ]
    if bar["tokens"]:
        words.append(count(bar["tokens"], "token"))
    if bar["busy_s"]:
        words.append(f"{duration(bar['busy_s'])} busy")
    words.append(f"from {duration(start_s)}" + ("" if bar["end_s"] is None else f" to {duration(end_s)}"))
    if bar["exclusive"]:
        words.append("alone on its device")
    return tag(
        "rect",
        tag("title", " · ".join(words)),
        x=_per_cent(x),
        y=row * _ROW_PX + 1.5,
        width=_per_cent(width),
        height=_ROW_PX - 3,
        rx=2,
        class_=css,
    )


def _axis(span: Stretch) -> list[Html]:
    found = []
    for t in span.ticks():
        at = span.at(t)
        anchor = "start" if at < 3 else "end" if at > 97 else "middle"
        found.append(tag("text", clock(t, span.to_s), x=_per_cent(at), y=13, text_anchor=anchor))
    return found


# -- a curve


def curve(points: Sequence[Mapping[str, float]], *, height: int = 150) -> Html:
    """Tokens per second over the life of a job, as an area with steps."""
    top = nice(max(p["tokens_s"] for p in points))
    to_s = points[-1]["at_s"]
    span = Stretch(0.0, to_s)
    n = len(points)
    steps = " ".join(f"V{100 - 100 * p['tokens_s'] / top:.2f} H{i + 1}" for i, p in enumerate(points))
    # Its own coordinates, stretched to any width; the stroke is not stretched with them.
    plot = tag(
        "svg",
        tag("path", d=f"M0 100 {steps} V100 Z", class_="area"),
        tag("path", d=f"M0 100 {steps}", class_="stroke", vector_effect="non-scaling-stroke"),
        view_box=f"0 0 {n} 100",
        width="100%",
        height=height,
        preserve_aspect_ratio="none",
    )
    levels = [(share, height * (1 - share)) for share in (0.0, 0.5, 1.0)]
    lines = [tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid") for _, y in levels]
    amounts = [
        tag(
            "text",
            compact(top * share) if top >= 1e6 else number(top * share),
            x="100%",
            y=y + 4,
            text_anchor="end",
        )
        for share, y in levels
    ]
    hits = [
        tag(
            "rect",
            tag(
                "title",
                f"to {duration(p['at_s'])}: {number(round(p['tokens_s']))} tokens/s, {number(round(p['rows_s'], 1))} rows/s",
            ),
            x=_per_cent(100 * i / n),
            width=_per_cent(100 / n),
            height=height,
            class_="hit",
        )
        for i, p in enumerate(points)
    ]
    mean = sum(p["tokens_s"] for p in points) / n
    most = max(p["tokens_s"] for p in points)
    chart = tag(
        "svg",
        lines,
        plot,
        tag("svg", _axis(span), y=height, width="100%", height=18),
        hits,
        width="100%",
        height=height + 20,
        role="img",
        aria_label=f"Tokens per second over {duration(to_s)}: {compact(mean)} on average, {compact(most)} at most",
    )
    beside = tag("svg", amounts, width="100%", height=height + 20, aria_hidden="true")
    return tag("div", beside, chart, class_="plot")


# -- round numbers


def round_step(least: float) -> float:
    """The smallest step of seconds that people count in and that is no less than this."""
    for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400):
        if 1 <= least <= step:
            return float(step)
    return nice(least) if least < 1 else 86400.0 * ceil(least / 86400)


def nice(value: float) -> float:
    """The smallest of 1, 2, 3, 4, 5, 6, 8, 10 × a power of ten that is no less."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(value))
    return next((m * unit for m in (1, 2, 3, 4, 5, 6, 8) if value <= m * unit * (1 + 1e-9)), 10 * unit)


def clock(seconds: float, longest: float) -> str:
    """A moment of an axis that ends at ``longest``: ``0``, ``0.5 s``, ``30 s``; ``2:30``, ``1:05:00`` beyond two minutes."""
    if not seconds:
        return "0"
    if longest < 120:
        return f"{seconds:g} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _per_cent(value: float) -> str:
    return f"{value:.2f}%"
