"""Callers of an open job through everything that happens: each repeats its ask, under its key, until it is answered.

Sometimes one asks again what was answered long ago. A key has one row and one answer, whoever died in between.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from motet import Client
from motet.errors import MotetError
from tests.chaos.ledger import Ledger, asked, cells_of
from tests.chaos.oracle import WORDS, Verdict, expected

TASKS = ("digest", "measure")
#: Threads that ask, one row at a time.
CALLERS = 4
#: So long may one ask be repeated: longer than two faults one after the other.
PATIENCE_S = 120.0
#: How long a server may take for one call, in seconds; and how long callers rest where it gives no answer.
_WITHIN_S, _REST_S = 5.0, 0.1
#: How often a key is asked again that was answered before.
_AGAIN = 0.1
#: Come back: too much is asked, something is away, or it takes longer.
_COME_BACK = frozenset({429, 502, 503, 504})


@dataclass(slots=True)
class Answered:
    """What a key stands for, as its caller was told first."""

    text: str
    row: int
    cells: Mapping[str, Any]


@dataclass(slots=True)
class Asking:
    """The open job of a run."""

    ledger: Ledger
    client: Client
    seed: int
    job: str = ""
    answered: dict[str, Answered] = field(default_factory=dict)
    #: Seconds from the first call for a key to its answer.
    took_s: list[float] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> None:
        opened = self.client._http.post(
            "/v1/jobs",
            {
                "tasks": {name: asked(name).to_json() for name in TASKS},
                "name": "chaos, asked",
                "priority": "interactive",
                "open": True,
            },
            key=f"chaos-{self.seed}-open",
        )
        self.job = str(opened["id"])
        for i in range(CALLERS):
            self.ledger.later(f"caller-{i}", lambda i=i: self._ask_on(i))  # type: ignore[misc]

    def stop(self) -> None:
        """No more asks; those under way are answered. Then it is closed, and ends by itself."""
        self._over.set()
        self.ledger.join(PATIENCE_S + 30, "caller")
        self.client._http.post(f"/v1/jobs/{self.job}/close", {})

    def await_end(self, within_s: float) -> None:
        try:
            self.client.job(self.job).wait(check=False, timeout=within_s)
        except (TimeoutError, MotetError) as error:
            self.verdict.breach("stuck", f"the open job was closed, and does not end: {type(error).__name__}")

    def _ask_on(self, caller: int) -> None:
        dice = random.Random(f"{self.seed}/caller {caller}")
        with httpx.Client(
            base_url=self.client._http.address.url,
            headers={"Authorization": f"Bearer {self.client._http.address.token}"},
            timeout=_WITHIN_S + 5,
        ) as line:
            while not self._over.is_set():
                if self.answered and dice.random() < _AGAIN:
                    with self._lock:
                        key = dice.choice(list(self.answered))
                    self._ask(line, key, self.answered[key].text)
                else:
                    key = f"{caller}-{next(self._numbers)}"
                    words = " ".join(dice.choices(WORDS, k=dice.randint(1, 20)))
                    self._ask(line, key, f"{words} {key}")

    def _ask(self, line: httpx.Client, key: str, text: str) -> None:
        """Until it is answered."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_S:
            body = {"rows": [text], "key": key, "within_s": _WITHIN_S}
            try:
                answer = line.post(f"/v1/jobs/{self.job}/ask", json=body)
            except httpx.TransportError:
                time.sleep(_REST_S)
                continue
            if answer.status_code in _COME_BACK:
                time.sleep(_REST_S)
                continue
            if answer.status_code != 200:
                self.verdict.breach("wrong", f"key {key}: {answer.status_code} {answer.text[:200]}")
                return
            (row,) = answer.json()["rows"]
            self._note(key, Answered(text, row["row"], {task: row[task] for task in TASKS}), began)
            return
        self.verdict.breach("stuck", f"key {key} was not answered in {PATIENCE_S:.0f} s")

    def _note(self, key: str, came: Answered, began: float) -> None:
        with self._lock:
            before = self.answered.setdefault(key, came)
            if before is came:
                self.took_s.append(time.monotonic() - began)
        if before != came:
            self.verdict.breach("wrong", f"key {key}: was {before}, and is {came}")

    def judge(self) -> Verdict:
        """Each key has a row of its own, with the right answers, as it was told; and no row belongs to no key."""
        verdict = self.verdict
        by_row: dict[int, str] = {}
        for key, one in self.answered.items():
            if (other := by_row.setdefault(one.row, key)) != key:
                verdict.breach("wrong", f"keys {other} and {key} have row {one.row} both")
            for task in TASKS:
                if ("ok", one.cells[task]) != expected(task, one.text):
                    verdict.breach("wrong", f"key {key}, {task}: got {one.cells[task]}")
        job = self.client.job(self.job)
        record, seen = job.record, set[int]()
        for row, cells in cells_of(job):
            verdict.cells += len(cells)
            if row in seen:
                verdict.breach("doubled", f"row {row} of the open job came twice")
            seen.add(row)
            whose = self.answered[by_row[row]] if row in by_row else None
            for task in TASKS if whose is not None else ():
                if cells[task].status != "ok" or cells[task].value != whose.cells[task]:
                    verdict.breach("wrong", f"row {row}, {task}: told {whose}, and it is {cells[task]}")
        if missing := by_row.keys() - seen:
            verdict.breach("lost", f"rows {sorted(missing)[:9]} of the open job", len(missing))
        if record["state"] != "succeeded" or record["rows"] != len(seen):
            verdict.breach(
                "wrong", f"the open job is {record['state']}, {len(seen)} of {record['rows']} rows"
            )
        counts = record["cells"]
        if counts["ok"] + counts["error"] + counts["skipped"] != record["rows"] * len(TASKS):
            verdict.breach("wrong", f"the open job's counters do not add up: {counts}")
        keys, rows = self.ledger.house.sql(
            "SELECT count(*), coalesce(sum(n_rows), 0) FROM ask WHERE job_id = %s", self.job, timeout_s=30
        )[0]
        if not keys == rows == record["rows"] or keys != len(self.answered):
            verdict.breach(
                "doubled", f"{keys} keys and {rows} rows are stored, {len(self.answered)} were asked"
            )
        return verdict

    def figures(self) -> dict[str, Any]:
        took = sorted(self.took_s)
        return {
            "answered": len(took),
            "p50_s": round(statistics.median(took), 3) if took else None,
            "p99_s": round(took[int(len(took) * 0.99)], 3) if took else None,
            "max_s": round(took[-1], 3) if took else None,
        }
