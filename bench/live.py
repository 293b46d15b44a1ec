"""Many callers who each wait for one short text, three heads fused: an open job beside LitServe, which keeps nothing.

req_s_N          rows answered a second to N connections that each ask again at once; median of the rounds
p50_ms_N, p99_ms_N  what a caller waits, of all rounds together
of_litserve_N    req_s_N over LitServe's of the same round; median
cpu_ms_32        CPU of all of motet's processes, Postgres and Redis too, for each row at 32 connections
bulk_beside      (bulk device-seconds a second beside 32 callers, and theirs) / bulk device-seconds a second alone
lost, doubled    asks without the row of their key, and keys with more than one row; must be 0
connected_mb     most memory of the API while 10,000 callers are connected and 200 ask at a time
untold           refusals of these without Retry-After; must be 0
beside_bad       their p99 beside 300 callers that read slowly, never read or hang up, over p99 without these

motet is an embedded cluster with two CPU workers, LitServe has two processes of one thread, batches of 16 and 5 ms;
same weights, in bf16 where the processor has it. Each key is sent once; a part of them again at the end, for the same
row. The callers are a process on the same machine (bench/callers.py). The figures of the machine stand beside: CPU
that neither side nor the callers took.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import connected
import httpx
import psutil
from callers import Order, to_json
from family import own_children
from harness import (
    Size,
    cluster,
    cpu_s,
    finish,
    in_turn,
    options,
    ratio,
    say,
    table,
    texts,
)

from motet import Client
from motet.demo.texts import TASKS
from motet.local.cluster import Cluster
from motet.local.places import free_port

HERE = Path(__file__).resolve().parent
#: Connections.
LEVELS = (1, 8, 32, 128)
#: Words of a text: about 18 tokens.
WORDS = 12
#: A text that both sides answered must be of the same topic so often: half precision rounds.
SAME_TOPIC = 0.97
#: Seconds that LitServe may take to load its models.
START_S = 120.0
HEADS = {"topic": "news-topics", "sentiment": "review-sentiment", "tone": "tone"}


@dataclass(slots=True)
class Side:
    """A server, and what callers have seen of it."""

    port: int
    path: str
    token: str
    #: By name.
    pids: Mapping[str, int]
    keyed: bool
    latencies: dict[int, list[float]] = field(default_factory=dict)
    cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    #: The same by process, with its children.
    cpu_ms_by: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    others: dict[int, list[float]] = field(default_factory=dict)
    #: Name of a round -> number of the ask -> (status, body).
    answers: dict[str, dict[int, tuple[int, str]]] = field(default_factory=dict)
    #: Text -> topic.
    topics: dict[str, str] = field(default_factory=dict)

    def round(self, callers: int, seconds: float, asked: Sequence[str]) -> float:
        """So many callers for so long. Rows answered a second."""
        order = Order(
            port=self.port, path=self.path, token=self.token, callers=callers, seconds=seconds,
            texts=list(asked), name=uuid4().hex[:8], keyed=self.keyed,
        )  # fmt: skip
        before, busy, began = self._cpu_s(), machine_s(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE / "callers.py")],
            input=to_json(order), capture_output=True, text=True, check=True,
        )  # fmt: skip
        told = json.loads(done.stdout)
        after = self._cpu_s()
        by = {name: after[name] - before[name] for name in before}
        used = sum(by.values())
        seen = told["seen"]
        good = [(n, body, s) for n, status, body, s, in_time in seen if status == 200 and in_time]
        self.answers[order.name] = {n: (status, body) for n, status, body, _, _ in seen}
        self.latencies.setdefault(callers, []).extend(s * 1000 for _, _, s in good)
        self.cpu_ms.setdefault(callers, []).append(1000 * used / max(1, len(seen)))
        self.cpu_ms_by.setdefault(callers, []).append(
            {name: round(1000 * s / max(1, len(seen)), 3) for name, s in by.items()}
        )
        self.others.setdefault(callers, []).append(
            (machine_s() - busy - used - told["cpu_s"]) / (time.perf_counter() - began)
        )
        for n, body, _ in good:
            self.topics[asked[n % len(asked)]] = self._topic(json.loads(body))
        return len(good) / seconds

    def _cpu_s(self) -> dict[str, float]:
        return {name: cpu_s([pid]) for name, pid in self.pids.items()}

    def _topic(self, answer: Any) -> str:
        if self.keyed:
            return str(answer["rows"][0]["topic"])
        return str(LABELS[answer["news-topics"]])


LABELS = json.loads((HERE.parent / "motet/heads/news-topics/head.json").read_text("utf-8"))["labels"]


def main() -> None:
    arguments = options(__doc__).parse_args()
    size = arguments.size
    seconds = size.of(full=8.0, quick=3.0, smoke=0.5)
    rounds = size.of(full=3, quick=1, smoke=1)
    asked = short_texts(size.of(full=40_000, quick=20_000, smoke=400))
    rates: dict[int, dict[str, list[float]]] = {}
    with (
        own_children(),
        litserve() as ready,
        cluster(2) as running,
        httpx.Client(base_url=running.url, headers=bearer(running), timeout=60) as http,
    ):
        lit = ready()
        job = open_job(http)
        motet = Side(
            port_of(running),
            f"/v1/jobs/{job}/ask",
            running.tokens["user"],
            running.pids,
            keyed=True,
        )
        sides = {"motet": motet} | ({"litserve": lit} if lit else {})
        for side in sides.values():
            side.round(8, size.of(full=6.0, quick=2.0, smoke=0.3), asked[-200:])
            side.latencies.clear()
            side.cpu_ms.clear()
            side.cpu_ms_by.clear()
            side.others.clear()
        for callers in LEVELS:
            say(f"{callers} connections")
            rates[callers] = in_turn(
                {
                    name: lambda side=side, n=callers: alone(side, lit, n, seconds, asked)
                    for name, side in sides.items()
                },
                rounds,
            )
        if lit:
            evict_all([*lit.pids.values()])
        beside = bulk_beside(
            running, http, job, motet, asked, size.of(full=16.0, quick=5.0, smoke=0.5),
            size.of(full=30_000, quick=12_000, smoke=2_000),
        )  # fmt: skip
        # In a job of its own: what they ask is not held to its keys.
        crowd = many_connected(running, open_job(http), asked, size)
        lost, doubled = held_to_keys(http, job, motet, asked, size.of(full=200, quick=30, smoke=5))
    if lit and (other := [t for t in motet.topics if lit.topics.get(t, motet.topics[t]) != motet.topics[t]]):
        both = len(motet.topics.keys() & lit.topics.keys())
        say(f"{len(other)} of {both} texts have another topic")
        assert len(other) <= 2 + (1 - SAME_TOPIC) * both, "answers were given to the wrong asks"
    table(
        "one short text a request, three tasks",
        ("", "connections", "req/s", "p50 ms", "p99 ms", "CPU ms", "others' CPU"),
        [
            (
                name,
                n,
                f"{statistics.median(rates[n][name]):.0f}",
                f"{quantile(side.latencies[n], 50):.0f}",
                f"{quantile(side.latencies[n], 99):.0f}",
                f"{statistics.median(side.cpu_ms[n]):.1f}",
                f"{statistics.median(side.others[n]):.2f}",
            )
            for n in LEVELS
            for name, side in sides.items()
        ],
    )
    keys: dict[str, Any] = {}
    for n in LEVELS:
        keys[f"req_s_{n}"] = round(statistics.median(rates[n]["motet"]), 1)
        keys[f"p50_ms_{n}"] = round(quantile(motet.latencies[n], 50), 1)
        keys[f"p99_ms_{n}"] = round(quantile(motet.latencies[n], 99), 1)
    keys["cpu_ms_32"] = round(statistics.median(motet.cpu_ms[32]), 2)
    for n in (32, 128):
        keys[f"of_litserve_{n}"] = (
            round(ratio(rates[n], "motet", "litserve"), 3) if lit and all(rates[n]["litserve"]) else None
        )
    keys |= {"bulk_beside": round(beside, 3), "lost": lost, "doubled": doubled, **crowd}
    finish(
        "live", keys, arguments, whole=lit is not None,
        details={
            "rates": rates,
            "cpu_ms": {name: side.cpu_ms for name, side in sides.items()},
            "cpu_ms_by": motet.cpu_ms_by,
            "others_cpu": {name: side.others for name, side in sides.items()},
            "p99_ms": {name: {n: quantile(side.latencies[n], 99) for n in LEVELS} for name, side in sides.items()},
        },
    )  # fmt: skip


def short_texts(n: int) -> list[str]:
    """Texts of the demo, cut short, no two alike."""
    return [f"{i} {' '.join(text.split()[:WORDS])}" for i, text in enumerate(texts(n))]


def port_of(running: Cluster) -> int:
    return int(running.url.rpartition(":")[2])


def bearer(running: Cluster) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {running.tokens['user']}"}


def open_job(http: httpx.Client) -> str:
    answer = http.post(
        "/v1/jobs",
        json={
            "tasks": {name: TASKS[name].to_json() for name in HEADS},
            "name": "live",
            "priority": "interactive",
            "open": True,
        },
    )
    answer.raise_for_status()
    return str(answer.json()["id"])


def alone(side: Side, lit: Side | None, callers: int, seconds: float, asked: Sequence[str]) -> float:
    """A round in which LitServe, where it is not asked, stands still."""
    if lit is None or side is lit:
        return side.round(callers, seconds, asked)
    standing = [psutil.Process(pid) for top in lit.pids.values() for pid in family(top)]
    for process in standing:
        process.suspend()
    try:
        return side.round(callers, seconds, asked)
    finally:
        for process in standing:
            process.resume()


def family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def machine_s() -> float:
    """CPU seconds that this machine has worked since its start."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def bulk_beside(
    running: Cluster, http: httpx.Client, job: str, motet: Side, asked: Sequence[str], seconds: float, rows: int
) -> float:  # fmt: skip
    """Device-seconds a second of bulk and asks together, as a share of bulk's alone."""
    with Client(running.url, running.tokens["user"]) as client:
        bulk = client.submit(
            texts(rows), {n: TASKS[n] for n in HEADS}, priority="bulk", reuse=False, progress=False
        )

        def used() -> tuple[float, float, float]:
            asks = http.get(f"/v1/jobs/{job}").json()["usage"]["busy_s"]
            return bulk.refresh().usage["busy_s"], asks, time.perf_counter()

        def stands() -> tuple[float, float, float]:
            """As the next bulk sub-task has ended."""
            before = used()[0]
            while (now := used())[0] == before and bulk.state == "running":
                time.sleep(0.02)
            return now

        first = stands()
        time.sleep(seconds)
        second = stands()
        motet.round(32, seconds, asked)
        # What is used is told when a sub-task ends, and those of bulk last for seconds.
        third = stands()
        if bulk.state != "running":
            say("  the bulk job ended before the callers did: bulk_beside tells nothing")
        bulk.cancel()
    bulk_s = (second[0] - first[0]) / (second[2] - first[2])
    beside = (third[0] - second[0] + third[1] - second[1]) / (third[2] - second[2])
    say(f"  device-seconds a second: bulk alone {bulk_s:.2f}, bulk and asks {beside:.2f}")
    return beside / max(1e-9, bulk_s)


def many_connected(running: Cluster, job: str, asked: Sequence[str], size: Size) -> dict[str, float | None]:
    """Figures of thousands of callers, of whom 200 ask at a time, without bad ones and beside them."""
    order = connected.Order(
        port=port_of(running), path=f"/v1/jobs/{job}/ask", token=running.tokens["user"],
        connections=size.of(full=10_000, quick=2_000, smoke=60), asking=size.of(full=200, quick=200, smoke=20),
        bad=size.of(full=100, quick=20, smoke=3), seconds=size.of(full=20.0, quick=5.0, smoke=0.5),
        texts=list(asked), name=uuid4().hex[:8],
    )  # fmt: skip
    seen = connected.connected(order, running.pids["api"])
    assert seen["connected"] == order.connections, "not all were connected"
    alone_ms, beside_ms = (quantile(seen["waits"][part], 99) for part in (0, 2))
    say(
        f"  {seen['connected']:,} callers connected, {order.asking} ask at a time: API {seen['api_mb']:.0f} MB, before "
        f"{seen['api_mb_before']:.0f}; p99 {alone_ms:.0f} ms, beside bad callers {beside_ms:.0f} ms; "
        f"statuses {seen['statuses']}, connections cut {seen['cut']}"
    )
    return {
        "connected_mb": round(seen["api_mb"], 1),
        "untold": seen["untold"],
        "beside_bad": round(beside_ms / alone_ms, 2) if max(beside_ms, alone_ms) < float("inf") else None,
    }


def held_to_keys(
    http: httpx.Client, job: str, motet: Side, asked: Sequence[str], again_: int = 200
) -> tuple[int, int]:
    """Asks without the row of their key; rows beyond one a key, and keys that were answered in two ways: so many are asked again."""
    lost, rows, sent = 0, [], 0
    for name, answers in motet.answers.items():
        sent += len(answers)
        for n, (status, body) in answers.items():
            if status == 200:
                rows.append(json.loads(body)["rows"][0]["row"])
            else:
                lost += 1
                if lost == 1:
                    say(f"  lost: key {name}-{n}: {status} {body[:300]}")
    stored = http.get(f"/v1/jobs/{job}").json()["rows"]
    doubled = len(rows) - len(set(rows)) + max(0, stored - sent)
    names = [
        (name, n) for name, answers in motet.answers.items() for n, (s, _) in answers.items() if s == 200
    ]
    for name, n in names[:: max(1, len(names) // again_)]:
        # The round that warmed up took the last texts.
        pool = asked[-200:] if name == next(iter(motet.answers)) else asked
        again = http.post(f"/v1/jobs/{job}/ask", json={"rows": [pool[n % len(pool)]], "key": f"{name}-{n}"})
        doubled += again.json() != json.loads(motet.answers[name][n][1])
    say(f"  {sent} asks, {stored} rows stored, {len(names)} answered")
    return lost, doubled


def quantile(ms: Sequence[float], percent: int) -> float:
    if len(ms) < 2:
        return ms[0] if ms else float("inf")
    return statistics.quantiles(ms, n=100, method="inclusive")[percent - 1]


@contextmanager
def litserve() -> Iterator[Callable[[], Side | None]]:
    """LitServe on its way up; the function waits until it is ready. None where it is not installed."""
    if find_spec("litserve") is None:
        say("LitServe is not installed (pip install litserve): motet alone")
        yield lambda: None
        return
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "rival" / "lit_serve.py"), str(port)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def ready() -> Side:
        end = time.monotonic() + START_S
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return Side(port, "/predict", "", {"litserve": process.pid}, keyed=False)
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("LitServe did not start")
            time.sleep(0.2)

    try:
        yield ready
    finally:
        evict_all([process.pid])
        process.wait()


def evict_all(pids: Sequence[int]) -> None:
    """End these processes and their children."""
    below = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            below += [psutil.Process(one) for one in family(pid)]
    for one in below:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(below, timeout=10)


if __name__ == "__main__":
    main()
