"""One run of chaos: a house, jobs without end, a schedule of faults; then everything heals and is judged."""

from __future__ import annotations

import math
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import redis

from motet.errors import MotetError
from tests.chaos import leftovers
from tests.chaos.asking import Asking
from tests.chaos.faults import KINDS, LIMIT_S, Arena, Missed, schedule
from tests.chaos.house import House
from tests.chaos.ledger import Freed, Ledger
from tests.chaos.oracle import DEADLY, TASKS, Verdict
from tests.chaos.recovery import Watcher, Wound

TENANTS = 3
#: The feeders keep so many cells waiting: some seconds of work for two workers.
BACKLOG_CELLS = 1500
#: How often a second fault comes right with the first.
TWICE = 0.12
#: Leases of one worker at a time, at most: the dispatcher's depth of 3, one of the interactive lane, one clone.
LEASES_PER_WORKER = 5
#: Time bounds are for two quiet cores; a busy machine may take so many times as long.
SLACK = 3.0
#: The device is free so long after a cancel or delete was answered.
FREE_S = 2.0
#: A fault is tried for so long where it cannot be done, or does nothing: until what it is done to is back, and works.
TRIES_S = 90.0
#: Once the attack has taken as long as it may, the rest of the faults come one after the other.
HURRY_S = 0.7
#: What feeders may take to end: one submission, through everything that happened last.
FEEDER_S = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How large a run is."""

    seed: int
    faults: int
    #: At least so many jobs and rows; more where the faults last longer.
    jobs: int
    rows: int
    #: The next fault comes when work goes on after the last one, or after so many seconds. In the first round, where
    #: each kind comes once and alone, as late as its time bound allows.
    patience_s: float
    #: After so many seconds the faults come faster.
    attack_s: float = math.inf
    #: After the last fault all jobs have ended within so many seconds: a row that hangs late takes its time.
    drain_s: float = 240.0
    workers: int = 2


@dataclass(slots=True)
class Report:
    """What came of it."""

    plan: Plan
    verdict: Verdict
    jobs: int
    rows: int
    wounds: list[Wound]
    freed: list[Freed]
    #: Attempts lost, and how many may be.
    wasted: int
    wasted_most: int
    #: Seconds from the first fault to the last.
    attack_s: float
    drained_s: float
    took_s: float
    #: How many keys of the open job were answered, and after how long.
    asks: dict[str, Any]
    left: dict[str, int] = field(default_factory=dict)
    #: Payloads of lost attempts that lay in Redis at the end, until they expire.
    payloads: int = 0
    troubles: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> int:
        return len({wound.kind for wound in self.wounds})

    @property
    def failures(self) -> list[str]:
        """Everything that may not be; empty after a good run."""
        found = [*self.verdict.breaches, *self.troubles]
        found += [f"left behind: {count} {name}" for name, count in self.left.items()]
        if self.wasted > self.wasted_most:
            found.append(f"{self.wasted} attempts were lost, {self.wasted_most} may be")
        for wound in self.wounds:
            limit_s = SLACK * LIMITS_S.get(wound.kind, math.inf)
            if wound.alone and (wound.healed_s or 0.0) > limit_s:
                found.append(
                    f"late: {wound.kind}: work went on after {wound.healed_s:.1f} s, not {limit_s:g}"
                )
        found += [
            f"late: the device was free {freed.after_s:.1f} s after a cancel or delete, not {SLACK * FREE_S:g}"
            for freed in self.freed
            if freed.alone and freed.after_s > SLACK * FREE_S
        ]
        return found

    def recoveries(self) -> dict[str, dict[str, Any]]:
        """By kind of fault: how often, and the seconds until work went on, of those that were alone and of all."""
        by_kind: dict[str, list[Wound]] = defaultdict(list)
        for wound in self.wounds:
            by_kind[wound.kind].append(wound)
        return {kind: _figures(wounds) for kind, wounds in sorted(by_kind.items())}

    def to_json(self) -> dict[str, Any]:
        v = self.verdict
        return {
            "seed": self.plan.seed,
            "faults": len(self.wounds),
            "kinds": self.kinds,
            "jobs": self.jobs,
            "rows": self.rows,
            "cells": v.cells,
            "lost": v.lost,
            "doubled": v.doubled,
            "stuck": v.stuck,
            "wrong": v.wrong,
            "attempts_lost": self.wasted,
            "attempts_lost_most": self.wasted_most,
            "left_behind": self.left,
            "payloads_not_yet_expired": self.payloads,
            "troubles": len(self.troubles),
            "asks": self.asks,
            "freed_after_cancel_s": _spread([freed.after_s for freed in self.freed]),
            "attack_s": round(self.attack_s, 1),
            "drained_s": round(self.drained_s, 1),
            "took_s": round(self.took_s, 1),
            "recovery": self.recoveries(),
        }


#: The time bound of each kind that has one.
LIMITS_S = {kind.__name__: limit_s for kind, limit_s in LIMIT_S.items()}


def _figures(wounds: list[Wound]) -> dict[str, Any]:
    healed = [w.healed_s for w in wounds if w.healed_s is not None]
    alone = [w.healed_s for w in wounds if w.healed_s is not None and w.alone]
    return {"faults": len(wounds), "alone": len(alone), **_spread(alone), "max_with_others_s": _most(healed)}


def _spread(seconds: list[float]) -> dict[str, float | None]:
    return {"p50_s": round(statistics.median(seconds), 2) if seconds else None, "max_s": _most(seconds)}


def _most(seconds: list[float]) -> float | None:
    return round(max(seconds), 2) if seconds else None


def run(data: Path, plan: Plan, say: Callable[[str], object] = print) -> Report:
    """Start a house in ``data``, attack it, judge it, stop it."""
    began = time.monotonic()
    house = House(data, workers=plan.workers)
    house.start()
    try:
        watcher = Watcher(house)
        watcher.start()
        ledger = Ledger.open(house, watcher, plan.seed, TENANTS)
        try:
            report = Campaign(house, watcher, ledger, plan, say).run()
        finally:
            ledger.close()
            watcher.stop()
        look = leftovers.after_stop(house)
    finally:
        house.stop()
    report.left |= look()
    report.took_s = time.monotonic() - began
    return report


class Campaign:
    """The attack itself."""

    def __init__(
        self, house: House, watcher: Watcher, ledger: Ledger, plan: Plan, say: Callable[[str], object]
    ) -> None:
        self._house, self._watcher, self._ledger, self._plan, self._say = house, watcher, ledger, plan, say
        self._dice = random.Random(f"campaign {plan.seed}")
        self._arena = Arena(house, ledger, random.Random(f"faults {plan.seed}"))
        self._asking = Asking(ledger, ledger.clients[0], plan.seed)
        self._over = threading.Event()
        self._attack_s = 0.0

    def run(self) -> Report:
        for i in range(TENANTS):
            self._ledger.later(f"feeder-{i}", self._feed)
        self._warm_up()
        self._asking.start()
        began = time.monotonic()
        for number, act in enumerate(schedule(self._plan.seed, self._plan.faults)):
            hurried = time.monotonic() - began > self._plan.attack_s
            self._attack(act, first_round=number < len(KINDS), hurried=hurried)
        self._attack_s = time.monotonic() - began
        self._await_enough()
        self._over.set()
        self._house.thaw()
        self._ledger.join(FEEDER_S, "feeder")
        self._asking.stop()
        return self._reckon()

    def _warm_up(self) -> None:
        """Some jobs of every task, so that speeds are learned.

        Before, a hanging row is given a minute, and a sub-task meant to take two seconds may take ten.
        """
        for rows in (60, 200, 200):
            first = self._ledger.new(rows=rows, tasks=TASKS)
            self._ledger.submit(first)
            if job := self._ledger.entries[first.number].job:
                job.wait(check=False, timeout=120)

    def _feed(self) -> None:
        """One tenant's stream of jobs: the next one when little waits."""
        while not self._over.is_set():
            if self._watcher.waiting < BACKLOG_CELLS:
                self._ledger.submit(self._ledger.new())
            self._over.wait(0.2)

    def _attack(self, act: Callable[[Arena], None], *, first_round: bool, hurried: bool) -> None:
        """Do it, again and again where it does nothing, and wait until work goes on."""
        until = time.monotonic() + TRIES_S
        while (wound := self._strike(act)) is None:
            if time.monotonic() > until:
                self._ledger.troubles.append(f"{act.__name__} did nothing for {TRIES_S:.0f} s")
                return
        patience_s = HURRY_S if hurried else self._plan.patience_s
        if first_round and not hurried and act in LIMIT_S:
            patience_s = SLACK * LIMIT_S[act]
        elif self._dice.random() < TWICE:
            return
        wound.closed.wait(patience_s)
        healed = "not yet" if wound.healed_s is None else f"{wound.healed_s:.1f} s"
        self._say(f"  {len(self._watcher.wounds):>4} {act.__name__:<20} {healed}")
        time.sleep(self._dice.uniform(0.05, 0.5))

    def _strike(self, act: Callable[[Arena], None]) -> Wound | None:
        """Do it once; None where it could not be done, or did nothing."""
        self._await_work()
        wound = self._watcher.wound(act.__name__, frozen=self._house.anything_frozen)
        try:
            act(self._arena)
        except (Missed, MotetError, redis.RedisError, psycopg.Error, OSError) as error:
            self._watcher.call_off(wound)
            self._say(f"  {len(self._watcher.wounds):>4} {act.__name__} missed ({type(error).__name__})")
            time.sleep(0.5)
            return None
        return wound

    def _await_work(self) -> None:
        until = time.monotonic() + 10
        while self._watcher.waiting == 0 and time.monotonic() < until:
            time.sleep(0.05)

    def _await_enough(self) -> None:
        """The faults may be over before there were jobs enough."""
        until = time.monotonic() + self._plan.jobs * 5
        while time.monotonic() < until:
            entries = list(self._ledger.entries.values())
            if (
                len(entries) >= self._plan.jobs
                and sum(len(e.order.texts) for e in entries) >= self._plan.rows
            ):
                return
            time.sleep(0.2)

    def _reckon(self) -> Report:
        drained_s = self._ledger.await_end(self._plan.drain_s)
        self._asking.await_end(self._plan.drain_s)
        least, most = self._ledger.kept
        # The open job is none of the ledger's.
        left = leftovers.in_services(self._house, (least + 1, most + 1))
        verdict = self._ledger.judge()
        verdict.add(self._asking.judge())
        entries = list(self._ledger.entries.values())
        return Report(
            plan=self._plan,
            verdict=verdict,
            jobs=len(entries),
            rows=sum(len(entry.order.texts) for entry in entries),
            wounds=list(self._watcher.wounds),
            freed=self._ledger.freed,
            wasted=int(self._house.sql("SELECT coalesce(sum(attempts_lost), 0) FROM job")[0][0]),
            wasted_most=self._wasted_most(),
            attack_s=self._attack_s,
            drained_s=drained_s,
            took_s=0.0,
            asks=self._asking.figures(),
            left=left,
            payloads=leftovers.payloads(self._house),
            troubles=self._ledger.troubles,
        )

    def _wasted_most(self) -> int:
        """Each fault loses at most every lease there is. A killing row is like a fault each time that it kills: once
        beside others, then halved until it is alone, then twice."""
        deaths = len(self._watcher.wounds)
        for entry in self._ledger.entries.values():
            for text in entry.order.texts:
                if any(word in text for word in DEADLY):
                    deaths += 3 + math.ceil(math.log2(max(2, len(entry.order.texts))))
        return deaths * LEASES_PER_WORKER * self._plan.workers


def table(report: Report) -> str:
    """The report for people."""
    columns = ("faults", "alone", "p50_s", "max_s", "max_with_others_s")
    rows: list[tuple[str, ...]] = [("fault", "times", "alone", "p50 s", "max s", "max s, with others")]
    rows += [(kind, *(_word(f[name]) for name in columns)) for kind, f in report.recoveries().items()]
    lines = ["{:<20}{:>7}{:>7}{:>8}{:>8}{:>20}".format(*row) for row in rows]
    v = report.verdict
    freed: Mapping[str, Any] = _spread([freed.after_s for freed in report.freed])
    lines += [
        "",
        f"{len(report.wounds)} faults of {report.kinds} kinds over {report.jobs} jobs, {report.rows:,} rows,"
        f" {v.cells:,} cells read: {v.lost} lost, {v.doubled} doubled, {v.stuck} stuck, {v.wrong} wrong",
        f"{report.asks['answered']} asks of an open job answered: p50 {_word(report.asks['p50_s'])} s,"
        f" p99 {_word(report.asks['p99_s'])} s, max {_word(report.asks['max_s'])} s",
        f"{report.wasted} attempts lost (at most {report.wasted_most} may be); free after cancel or delete:"
        f" p50 {_word(freed['p50_s'])} s, max {_word(freed['max_s'])} s;"
        f" attacked for {report.attack_s:.0f} s; all ended {report.drained_s:.1f} s after the last fault; left behind: {report.left or 'nothing'},"
        f" and {report.payloads} payloads that will expire",
    ]
    return "\n".join(lines)


def _word(value: Any) -> str:
    return "–" if value is None else str(value)
