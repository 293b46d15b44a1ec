"""Half an hour of jobs under mild faults: memory, file descriptors, Redis keys and table sizes stay flat.

    python bench/soak.py [--minutes 30] [--quick]

A whole cluster (two dispatchers, two aggregators, two workers) gets jobs of all sizes from three tenants. Each is
checked by the oracle of tests/chaos when it has ended, and deleted. Every half minute something happens that no
process has to die of: Redis emptied, connections cut, garbage and forgeries, cancelled and deleted jobs, rows that
raise. So each process lives as long as the run, and what it leaks is seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import harness
import psutil
import psycopg
import redis
from harness import Size

from motet.errors import MotetError, NotFound

# The house and its oracle are those of `make chaos`; sys.path holds the folder of this file alone.
sys.path.append(str(harness.ROOT))

from tests.chaos import faults
from tests.chaos.house import House
from tests.chaos.ledger import UNDER_WAY, Entry, Ledger
from tests.chaos.oracle import Verdict
from tests.chaos.recovery import Watcher

#: What is kept ran for so long.
MINUTES = 30.0
TENANTS = 3
BACKLOG_CELLS = 1000
SEED = 5
#: What is under way at the end of the run may take so long.
JOIN_S = 180.0
MILD = (
    faults.redis_flush,
    faults.redis_cut,
    faults.postgres_cut,
    faults.garbage_outcomes,
    faults.forged_outcomes,
    faults.doubled_messages,
    faults.cancel,
    faults.delete,
    faults.raising_row,
)
#: Of each kind of series: its unit, what it may grow between the second and the last third of the run, and by how
#: many per cent of itself. Caches fill, allocators keep some; a leak goes on and on.
ROOM: Mapping[str, tuple[str, float, float]] = {
    "memory": ("MB", 8.0, 5.0),
    "files": ("", 6.0, 10.0),
    "redis keys": ("", 20.0, 0.0),
    "redis memory": ("MB", 2.0, 10.0),
    "tables": ("MB", 4.0, 20.0),
}


@dataclass(slots=True)
class Series:
    """One thing that was measured again and again."""

    kind: str
    at: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """From the median of the second third to that of the last one."""
        third = len(self.values) // 3
        return statistics.median(self.values[2 * third :]) - statistics.median(self.values[third : 2 * third])

    @property
    def per_hour(self) -> float:
        """Slope behind the first third, by least squares."""
        start = len(self.values) // 3
        return statistics.linear_regression(self.at[start:], self.values[start:]).slope * 3600

    @property
    def flat(self) -> bool:
        _, absolute, per_cent = ROOM[self.kind]
        return self.growth <= max(absolute, per_cent / 100 * statistics.median(self.values))

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.values[0],
            "last": self.values[-1],
            "most": max(self.values),
            "growth": round(self.growth, 2),
            "per_hour": round(self.per_hour, 2),
            "flat": self.flat,
        }


def main() -> int:
    parser = harness.options(__doc__)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"[default: {MINUTES:g}; less is not kept]"
    )
    options = parser.parse_args()
    minutes = options.size.of(full=options.minutes, quick=0.7, smoke=0.05)
    with harness.scratch() as folder, House(folder / "data") as house:
        watcher = Watcher(house)
        watcher.start()
        soak = Soak(house, watcher, Ledger.open(house, watcher, SEED, TENANTS), options.size)
        try:
            soak.run(minutes * 60)
        finally:
            soak.ledger.close()
            watcher.stop()
    return report(soak, minutes, options)


class Soak:
    """The run: feeders, judges, faults and samples."""

    def __init__(self, house: House, watcher: Watcher, ledger: Ledger, size: Size) -> None:
        self.house, self.watcher, self.ledger = house, watcher, ledger
        self._sample_s = size.of(full=5.0, quick=5.0, smoke=0.3)
        self._fault_every_s = size.of(full=30.0, quick=30.0, smoke=0.5)
        self.series: dict[str, Series] = {}
        self.verdict = Verdict()
        self.jobs = self.faults = 0
        self._over = threading.Event()
        self._began = time.monotonic()

    def run(self, seconds: float) -> None:
        self._began = time.monotonic()
        for i in range(TENANTS):
            self.ledger.later(f"feeder-{i}", self._feed)
        self.ledger.later("judge", self._judge)
        self.ledger.later("attacker", self._disturb)
        while time.monotonic() - self._began < seconds:
            with suppress(psycopg.Error, redis.RedisError, OSError):
                self._sample()
            time.sleep(self._sample_s)
        self._over.set()
        self.ledger.await_end(JOIN_S)
        for entry in self.ledger.entries.values():
            self.ledger.judge_one(self.verdict, entry)
            self.jobs += 1

    def _feed(self) -> None:
        while not self._over.is_set():
            if self.watcher.waiting < BACKLOG_CELLS:
                self.ledger.submit(self.ledger.new())
            self._over.wait(0.2)

    def _judge(self) -> None:
        """Check each job that has ended, and delete it: what is stored stays flat, too."""
        while not self._over.is_set():
            for number, entry in list(self.ledger.entries.items()):
                # Postgres or the API may be away just now: then at the next look.
                with suppress(MotetError, psycopg.Error, OSError), entry.lock:
                    if self._ended(entry):
                        found = Verdict()
                        self.ledger.judge_one(found, entry)
                        if entry.job and not entry.deleted:
                            entry.asked = "delete"  # its answer may be lost
                            with suppress(NotFound):
                                entry.job.delete()
                        del self.ledger.entries[number]
                        self.verdict.add(found)
                        self.jobs += 1
            self._over.wait(1.0)

    def _ended(self, entry: Entry) -> bool:
        if entry.deleted or entry.job is None:
            return entry.deleted
        try:
            return entry.job.refresh().record["state"] not in UNDER_WAY
        except NotFound:  # which the oracle will judge
            return True

    def _disturb(self) -> None:
        arena = faults.Arena(self.house, self.ledger, random.Random(SEED))
        while not self._over.wait(self._fault_every_s):
            act = arena.dice.choice(MILD)
            with suppress(faults.Missed, MotetError, redis.RedisError, psycopg.Error, OSError):
                act(arena)
                self.faults += 1

    def _sample(self) -> None:
        now = time.monotonic() - self._began
        for kind, name, value in self._facts():
            series = self.series.setdefault(f"{kind}: {name}", Series(kind))
            series.at.append(round(now, 1))
            series.values.append(value)

    def _facts(self) -> Iterator[tuple[str, str, float]]:
        """(kind, name, value) of everything that is watched."""
        for name, pids in self._processes().items():
            with suppress(psutil.NoSuchProcess):
                alive = [psutil.Process(pid) for pid in pids]
                # What a process shares with its siblings is counted once, so that a fork is no leak.
                memory = sum(one.memory_full_info().pss for one in alive) / 2**20
                yield "memory", name, round(memory, 1)
                yield "files", name, float(sum(one.num_fds() for one in alive))
        with self.house.redis() as client:
            info: Any = client.info("memory")
            keys: Any = client.dbsize()
            yield "redis keys", "all", float(keys)
            yield "redis memory", "all", round(info["used_memory"] / 2**20, 2)
        for name, size in self.house.sql(
            "SELECT relname, pg_total_relation_size(oid) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        ):
            yield "tables", str(name), round(size / 2**20, 2)

    def _processes(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        found |= {name: [pid] for name, pid in self.house.pids.items()}
        # Its backends come and go: the server as a whole.
        with suppress(KeyError, psutil.NoSuchProcess):
            found["postgres"] += [
                c.pid for c in psutil.Process(found["postgres"][0]).children(recursive=True)
            ]
        workers = self.house.worker_pids()
        with suppress(KeyError, psutil.NoSuchProcess):
            below = {c.pid for c in psutil.Process(found["workers"][0]).children(recursive=True)}
            found["workers"] += sorted(below - set(workers.values()))
        found |= {name: [pid] for name, pid in workers.items()}
        return found


def report(soak: Soak, minutes: float, options: argparse.Namespace) -> int:
    """Print what was measured, keep it and its picture; 0 where all of it stayed flat."""
    enough = {name: one for name, one in soak.series.items() if len(one.values) >= 6}
    harness.table(
        f"{minutes:g} minutes, {soak.jobs} jobs, {soak.faults} faults",
        ("series", "first", "last", "most", "growth", "an hour", ""),
        (
            (
                name,
                *(f"{one.to_json()[key]:,.1f}" for key in ("first", "last", "most", "growth", "per_hour")),
                "" if one.flat else "grows",
            )
            for name, one in enough.items()
            if one.kind != "tables" or max(one.values) >= 0.5 or not one.flat
        ),
    )
    growing = [name for name, one in enough.items() if not one.flat]
    v = soak.verdict
    wrong = v.lost + v.doubled + v.stuck + v.wrong
    for words in (*v.breaches[:20], *soak.ledger.troubles[:20]):
        harness.say(words)
    drawn, full = picture(enough), options.size is Size.FULL
    whole = full and minutes >= MINUTES
    if whole and not options.save:
        (harness.ROOT / "docs" / "soak.svg").write_text(drawn, "utf-8")
    harness.finish(
        "soak",
        {
            "minutes": minutes,
            "jobs": soak.jobs,
            "faults": soak.faults,
            "cells": v.cells,
            "breaches": wrong,
            "troubles": len(soak.ledger.troubles),
            "growing": growing,
        },
        options,
        whole=whole,
        details={name: one.to_json() for name, one in enough.items()},
    )
    # A run too short has caches that still fill.
    return 1 if wrong or soak.ledger.troubles or (growing and full) else 0


# -- the picture

_WIDTH, _HEIGHT, _LEFT, _GAP = 760, 120, 60, 34
_COLOURS = ("#2f6fb0", "#c2542d", "#3d8f5f", "#8d5bb5", "#b08d2f", "#4aa3a8", "#b0446f", "#6b7780", "#7a9a3a")


def picture(series: Mapping[str, Series]) -> str:
    """A panel for each kind of series, as SVG: minutes to the right, amount upwards from 0."""
    panels = []
    for i, kind in enumerate(ROOM):
        chosen = {name.partition(": ")[2]: one for name, one in series.items() if one.kind == kind}
        # The largest ones: more lines than colours are no picture.
        largest = sorted(chosen, key=lambda name: -max(chosen[name].values))[: len(_COLOURS)]
        panels.append(_panel(kind, {name: chosen[name] for name in largest}, i * (_HEIGHT + _GAP) + 20))
    height = len(ROOM) * (_HEIGHT + _GAP) + 20
    width = _LEFT + _WIDTH + 180
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        "<style>text{font:11px system-ui,sans-serif;fill:#7b858f}polyline{fill:none;stroke-width:1.3}</style>"
        + "".join(panels)
        + "</svg>\n"
    )


def _panel(kind: str, series: Mapping[str, Series], top: float) -> str:
    if not series:
        return ""
    unit, _, _ = ROOM[kind]
    most = max(max(one.values) for one in series.values()) or 1.0
    end = max(one.at[-1] for one in series.values()) or 1.0
    parts = [
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#7b858f55"/>',
        f'<text x="{_LEFT}" y="{top - 5}">{kind}</text>',
        f'<text x="{_LEFT - 5}" y="{top + 9}" text-anchor="end">{most:,.0f} {unit}</text>',
        f'<text x="{_LEFT - 5}" y="{top + _HEIGHT}" text-anchor="end">0</text>',
        f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 12}" text-anchor="end">{end / 60:.0f} min</text>',
    ]
    for i, (name, one) in enumerate(series.items()):
        points = " ".join(
            f"{_LEFT + x / end * _WIDTH:.1f},{top + _HEIGHT * (1 - y / most):.1f}"
            for x, y in zip(one.at, one.values, strict=True)
        )
        parts.append(f'<polyline points="{points}" stroke="{_COLOURS[i]}"/>')
        parts.append(
            f'<text x="{_LEFT + _WIDTH + 8}" y="{top + 10 + 13 * i}" style="fill:{_COLOURS[i]}">{name}</text>'
        )
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
