"""Where the shapes of charts lie: shares of a whole, sub-tasks in time, a curve (templates/charts.html draws them).

Pure; lengths are per cent, so that text keeps its size on every screen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from motet.pages import COLOURS
from motet.progress import instant
from motet.words import count
from scheduler.api.words import compact, duration, number

#: Bars of one device that lie above each other: it rarely has more than three sub-tasks at a time.
_ROWS = 4
_ROW_PX = 16
#: Share of a bar that the one before it may cover.
_LATE = 0.35
#: Lanes of a timeline: more devices than these are counted in words.
_LANES = 100
#: Pixels of the curve's height, and of a small chart's.
_CURVE_PX, _SMALL_PX = 150, 72
#: Spans of a small chart at least: a minute.
_LEAST_SPANS = 12

Tick = tuple[float, str, str]


def colour(pass_number: int) -> str:
    """The class that colours a pass."""
    return f"p{pass_number % COLOURS}"


def boxes(parts: Sequence[tuple[str, float, str]], total: float) -> Iterator[tuple[str, float, float, str]]:
    """(class, x, width, words) of each (class, amount, words) side by side, of ``total``."""
    x = 0.0
    for css, amount, words in parts:
        width = 100 * amount / total if total > 0 else 0.0
        if amount > 0:
            # A share too small to be seen would look like none.
            at = min(x, 99.6)
            yield css, at, min(max(width, 0.4), 100 - at), words
        x += width


# -- sub-tasks in time


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

    def axis(self) -> list[Tick]:
        """(x, words, anchor) of each round moment: the words of the first and the last stay inside."""
        found = []
        for t in self.ticks():
            at = self.at(t)
            anchor = "start" if at < 3 else "end" if at > 97 else "middle"
            found.append((at, clock(t, self.to_s), anchor))
        return found


def lanes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A lane for each device, a bar for each sub-task, over the time that the timeline covers."""
    bars: Sequence[Mapping[str, Any]] = facts["timeline"]
    subtasks = sum(sum(p["subtasks"].values()) for p in facts["passes"])
    from_s = 0.0 if len(bars) >= subtasks else min(b["start_s"] for b in bars)
    span = Stretch(from_s, max(float(facts["now_s"]), from_s + 0.001))
    by_worker: dict[str, list[Mapping[str, Any]]] = {d["worker"]: [] for d in facts["devices"]}
    for bar in bars:
        by_worker.setdefault(bar["worker"], []).append(bar)
    shown = [(name, mine) for name, mine in by_worker.items() if mine]
    return {
        "lanes": [_lane(name, mine, span) for name, mine in shown[:_LANES]],
        "more": max(0, len(shown) - _LANES),
        "ticks": span.axis(),
    }


def _lane(worker: str, bars: Sequence[Mapping[str, Any]], span: Stretch) -> dict[str, Any]:
    drawn = drawn_bars(bars, span.to_s)
    states = [b["state"] for b in bars]
    told = ", ".join(f"{states.count(s)} {s}" for s in ("done", "open", "lost", "failed") if s in states)
    name = worker or "no device known"
    return {
        "name": name,
        "label": f"{name}: {count(len(bars), 'sub-task')}: {told}",
        "height": (max(row for _, _, row, _ in drawn) + 1) * _ROW_PX + 2,
        "bars": [_bar(bar, start_s, end_s, row, span) for start_s, end_s, row, bar in drawn],
    }


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


def _bar(bar: Mapping[str, Any], start_s: float, end_s: float, row: int, span: Stretch) -> dict[str, Any]:
    x = max(0.0, span.at(start_s))
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
    own = colour(bar["pass"])
    return {
        "x": x,
        "y": row * _ROW_PX + 1.5,
        "width": max(span.at(end_s) - x, 0.15),
        "height": _ROW_PX - 3,
        "css": {"done": own, "open": f"{own} edge", "lost": "lost", "failed": "error"}[bar["state"]],
        "words": " · ".join(words),
    }


# -- a curve


def curve(points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Tokens per second over the life of a job."""
    n, to_s = len(points), points[-1]["at_s"]
    from_s = max(0.0, (n * points[0]["at_s"] - to_s) / (n - 1)) if n > 1 else 0.0
    mean, most = sum(p["tokens_s"] for p in points) / n, max(p["tokens_s"] for p in points)
    top = nice(most)
    told = compact if top >= 1e6 else number
    return {
        "height": _CURVE_PX,
        "steps": " ".join(f"V{100 - 100 * p['tokens_s'] / top:.2f} H{i + 1}" for i, p in enumerate(points)),
        "levels": [(_CURVE_PX * (1 - share), told(top * share)) for share in (0.0, 0.5, 1.0)],
        "ticks": Stretch(from_s, to_s).axis(),
        "hits": [
            (
                100 * i / n,
                100 / n,
                f"to {duration(p['at_s'])}: {number(round(p['tokens_s']))} tokens/s,"
                f" {number(round(p['rows_s'], 1))} rows/s",
            )
            for i, p in enumerate(points)
        ],
        "label": f"Tokens per second over {duration(to_s - from_s)}: {compact(mean)} on average, {compact(most)} at most",
    }


# -- the last minutes of an open job


def minutes(asks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Small charts of the spans of an open job's asks: how many, how fast, how many wait, what went wrong."""
    spans: Sequence[Mapping[str, Any]] = asks["spans"]
    # A young job's begin with it, but a minute is always drawn.
    begins = next((i for i, s in enumerate(spans) if s["at_s"] > 0), 0)
    spans = spans[min(begins, max(0, len(spans) - _LEAST_SPANS)) :]
    minute = asks["minute"]
    return [
        _small(
            spans,
            title="Asks answered",
            now=f"{number(round(minute['asks_s'], 1))} a second",
            lines=(("stroke", "answered", [s["asks_s"] for s in spans]),),
            told=lambda y: number(round(y, 1)),
            filled=True,
        ),
        _small(
            spans,
            title="Time to the answer",
            now=f"{instant(minute['p50_s'])}, 99 % in {instant(minute['p99_s'])}",
            lines=(
                ("line p0", "half of them", [s["p50_s"] for s in spans]),
                ("line p1", "99 %", [s["p99_s"] for s in spans]),
            ),
            told=lambda y: instant(y) if y else "0",
        ),
        _small(
            spans,
            title="Rows that wait to be stored",
            now=f"{minute['waiting']:,} now",
            lines=(("stroke", "waiting", [s["waiting"] for s in spans]),),
            told=number,
            filled=True,
        ),
        _small(
            spans,
            title="Asks without an answer",
            now=f"{minute['late']:,} late, {minute['refused']:,} refused, {minute['failed']:,} failed",
            lines=(
                ("line p4", "late", [s["late"] for s in spans]),
                ("line p6", "refused", [s["refused"] for s in spans]),
                ("line p3", "failed", [s["failed"] for s in spans]),
            ),
            told=number,
        ),
    ]


def _small(
    spans: Sequence[Mapping[str, Any]],
    *,
    title: str,
    now: str,
    lines: Sequence[tuple[str, str, Sequence[float | None]]],
    told: Callable[[float], str],
    filled: bool = False,
) -> dict[str, Any]:
    """Lines of (class, words, a value for each span) over one axis; the first may be filled."""
    n = len(spans)
    to_s = spans[-1]["at_s"]
    top = nice(max((y for _, _, values in lines for y in values if y is not None), default=0.0))
    if all(isinstance(y, int) for _, _, values in lines for y in values):
        # Half a row is none.
        top = max(2.0, top)
    names = [words for _, words, _ in lines] if len(lines) > 1 else []
    hits = []
    for i, span in enumerate(spans):
        values = [
            f"{told(values[i] or 0) if values[i] is not None else '–'}{f' {words}' if names else ''}"
            for _, words, values in lines
        ]
        hits.append((100 * i / n, 100 / n, f"{_ago(to_s - span['at_s'])}: {', '.join(values)}"))
    width_s = (to_s - spans[0]["at_s"]) * n / (n - 1) if n > 1 else 0.0
    return {
        "title": title,
        "now": now,
        "height": _SMALL_PX,
        "lines": [(css, _steps(values, top)) for css, _, values in lines],
        "filled": filled,
        "key": [(css.rpartition(" ")[2], words) for css, words, _ in lines] if names else [],
        "levels": [(_SMALL_PX * (1 - share), told(top * share)) for share in (0.0, 0.5, 1.0)],
        "ticks": [(0.0, _ago(width_s), "start"), (50.0, _ago(width_s / 2), "middle"), (100.0, "now", "end")],
        "hits": hits,
        "label": f"{title} over the last {duration(width_s)}: {now} in the last minute",
    }


def _steps(values: Sequence[float | None], top: float) -> str:
    """A line of steps, broken where there is no value."""
    path, before = [], None
    for i, y in enumerate(values):
        if y is not None:
            at = f"{100 - 100 * y / top:.2f}"
            path.append(f"{f'M{i} {at}' if before is None else f'V{at}'} H{i + 1}")
        before = y
    return " ".join(path)


def _ago(seconds: float) -> str:
    return f"{duration(seconds).replace(' 00 s', '')} ago" if seconds >= 0.5 else "now"


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
