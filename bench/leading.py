"""The leader's step with very many workers: what `bench/scale.py --workers N` measures.

Beats come through a real Valkey (bench/crowd.py), leases lie in a real Postgres, outcomes are recorded by the stage's
own aggregator. The dispatcher is the live class, stepped in this process with the words that it listens for.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

import redis
from crowd import DEVICE, ROW_S
from harness import peak_rss_mb, say
from stage import ENCODER, Stage, label_tasks, stream_short_texts

from motet.client import Client
from motet.protocol.redis_url import redis_py_url
from motet.protocol.settings import Settings
from motet.protocol.transport import OUTCOMES, WORKERS, RedisTransport, queue_name
from motet.protocol.transport.keys import beat_key, control_key
from scheduler.audit import Differences
from scheduler.dispatcher import Dispatcher
from scheduler.leading import look_for_circles_rarely
from scheduler.policy.cost import Workload
from scheduler.publishing import Publisher
from scheduler.store.listening import Listener
from scheduler.store.rates import Timed, learn
from scheduler.store.words import SILENCE

#: Sub-tasks at a worker, as the dispatcher's own default has it.
DEPTH = 3
#: Rows of a sub-task. So few that the payloads of 30,000 sub-tasks fill less than half of the embedded Valkey, where the
#: leader would send less.
ROWS = 12
#: Times that a tenth of all workers is given new work at once: enough to tell how many sub-tasks that are a second.
REFILLS = 3
#: Stages of what is done beside the step: no part of its wall clock.
BESIDE = "beside: "
#: Seconds between two looks at beats: the beat step's.
BEAT_STEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One step."""

    seconds: float
    cpu_s: float
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """The dispatcher's steps with so many workers."""

    workers: int
    idle: list[Lap]
    filling: list[Lap]
    #: The step that deals with the most of a hundredth of all leases that was answered.
    changed: list[Lap]
    #: From when the leader is told that a tenth of all workers have no work until they have some: beat steps included.
    refilling: list[Lap]
    #: Stage -> microseconds of it for each sub-task of these steps: wall clock, and CPU of the leader's process.
    stages: dict[str, tuple[float, float]]
    leases: int
    dispatcher_mb: float
    #: What a sub-task takes in Valkey, payload and message, until it is answered.
    valkey_bytes: float

    @property
    def idle_ms(self) -> float:
        return 1e3 * statistics.median(lap.seconds for lap in self.idle)

    @property
    def full_ms(self) -> float:
        return 1e3 * statistics.median(lap.seconds for lap in self.changed)

    @property
    def longest_s(self) -> float:
        return max(lap.seconds for lap in (*self.idle, *self.filling, *self.changed, *self.refilling))

    @property
    def step_us(self) -> tuple[float, float]:
        """Of whole steps for each sub-task, as in ``stages``: all of these but what is done beside."""
        stages = [both for stage, both in self.stages.items() if not stage.startswith(BESIDE)]
        return sum(wall for wall, _ in stages), sum(cpu for _, cpu in stages)

    @property
    def subtasks_s(self) -> float:
        """Taken in as ended, placed, leased, packed and published again a second, while all leases but these are live."""
        return sum(lap.sent for lap in self.refilling) / max(1e-9, sum(lap.seconds for lap in self.refilling))


class Led:
    """The dispatcher under test, and what it listens to."""

    def __init__(self, stage: Stage, transport: RedisTransport) -> None:
        self._stack = stage.database()
        self.database = self._stack.__enter__()
        self.listener = Listener(self.database)
        publisher = Publisher(
            {
                "MOTET_DATABASE_URL": self.database.engine.url.render_as_string(hide_password=False),
                "MOTET_REDIS_URL": stage.redis.scheduler,
            }
        )
        self.publisher = publisher
        self.dispatcher = Dispatcher(
            self.database, transport, Settings(leader_lease_s=600), publisher=publisher
        )
        self._step_at = 0.0
        look_for_circles_rarely()

    def lap(self, *, beats: bool = False) -> Lap:
        """One step; ``beats``: not before it has to look at the beats again."""
        if beats:
            time.sleep(max(0.0, self._step_at + BEAT_STEP_S - time.monotonic()))
        self._step_at = time.monotonic()
        words = self.listener.wait(0.0)
        cpu_s, began = time.thread_time(), time.perf_counter()
        sent = self.dispatcher.step(time.monotonic(), words)
        return Lap(seconds=time.perf_counter() - began, cpu_s=time.thread_time() - cpu_s, sent=sent)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Meanwhile `beat` keeps beats and leases as fresh as they always are, and what transactions say is kept for the
        first lap afterwards. The audit rests: it would call a difference what was said and not heard."""
        audit = self.dispatcher._audit
        go_on, audit.go_on = audit.go_on, lambda *_: Differences()  # type: ignore[method-assign]
        try:
            yield
        finally:
            audit.go_on = go_on  # type: ignore[method-assign]

    def beat(self) -> None:
        """A beat step without words, which is part of no lap."""
        time.sleep(max(0.0, self._step_at + BEAT_STEP_S - time.monotonic()))
        self._step_at = time.monotonic()
        self.dispatcher.step(self._step_at, SILENCE)

    def until_leading(self) -> None:
        """The stopped dispatcher's lease runs out first; ten thousand workers are taken in within a few steps."""
        deadline = time.monotonic() + 30
        while self.dispatcher.epoch is None:
            assert time.monotonic() < deadline, "another dispatcher leads"
            self.lap(beats=True)
        for _ in range(8):
            self.lap(beats=True)

    def peak_mb(self) -> float:
        """Largest resident set of this process and the publisher's together."""
        publisher = self.publisher.pid
        return peak_rss_mb(os.getpid()) + (peak_rss_mb(publisher) if publisher is not None else 0.0)

    def close(self) -> None:
        self.dispatcher.stop()
        self.listener.close()
        self._stack.__exit__(None, None, None)


class Stages:
    """What the stages of a dispatcher's steps take while it is counted: each is a method that is called through a watch,
    and what another stage takes inside of it counts there alone. Together they are all of a step, but for what the leader
    does beside it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._taken: dict[str, list[float]] = {}
        self._thread = threading.local()
        self._counts = False
        for stage, owner, method in (
            ("all else", dispatcher, "step"),
            ("hear", dispatcher.transport, "hear"),
            ("flags, speeds, what is due", dispatcher, "_read_flags"),
            ("extend, rescue", dispatcher, "_rescue"),
            ("learn of workers, tend", dispatcher, "_look"),
            ("take in what ended", dispatcher, "_catch_up"),
            ("place and carve", dispatcher, "_decide"),
            ("lease", dispatcher, "_lease"),
            ("render", dispatcher._payloads, "assignments"),
            ("pack and publish", dispatcher.transport, "publish_all"),
            ("wait for what is beside", dispatcher._beside, "end"),
            ("wait for the publisher", dispatcher, "_end_publishing"),
            ("take over", dispatcher, "_take_over"),
            ("tell workers", dispatcher._controls, "tell"),
            ("chores, audit", dispatcher, "_look_after"),
        ):
            self._watch(stage, owner, method)

    def _watch(self, stage: str, owner: object, method: str) -> None:
        act = getattr(owner, method)
        self._taken[stage] = [0.0, 0.0]
        stepping = threading.current_thread()

        def watched(*arguments: object) -> object:
            taken = self._taken[stage]
            if threading.current_thread() is not stepping:
                taken = self._taken.setdefault(f"{BESIDE}{stage}", [0.0, 0.0])
            if not hasattr(self._thread, "inside"):
                self._thread.inside = []
            around: list[list[float]] = self._thread.inside
            inside = [0.0, 0.0]
            around.append(inside)
            cpu_s, began = time.thread_time(), time.perf_counter()
            try:
                return act(*arguments)
            finally:
                spent = (time.perf_counter() - began, time.thread_time() - cpu_s)
                around.pop()
                for i in (0, 1):
                    taken[i] += self._counts * (spent[i] - inside[i])
                    if around:
                        around[-1][i] += spent[i]

        setattr(owner, method, watched)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Meanwhile it is counted."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def each(self, subtasks: int) -> dict[str, tuple[float, float]]:
        """Microseconds of each stage for one of so many sub-tasks."""
        n = max(1, subtasks)
        return {stage: (wall / n * 1e6, cpu / n * 1e6) for stage, (wall, cpu) in self._taken.items()}


@contextmanager
def crowd_of(stage: Stage, count: int) -> Iterator[subprocess.Popen[str]]:
    """So many workers that beat; nothing of them is left in Valkey afterwards but payloads, which expire."""
    command = [sys.executable, str(Path(__file__).parent / "crowd.py"), f"--workers={count}"]
    env = {
        **os.environ,
        "MOTET_REDIS_URL": stage.redis.worker,
        "MOTET_SCHEDULER_REDIS_URL": stage.redis.scheduler,
    }
    process = subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)
        valkey = redis.Redis.from_url(redis_py_url(stage.redis.scheduler))
        names = [f"crowd-{i}" for i in range(count)]
        valkey.srem(WORKERS, *names)
        pipe = valkey.pipeline(transaction=False)
        for name in names:
            pipe.unlink(beat_key(name), control_key(name), queue_name(name))
        pipe.execute()
        valkey.close()


def _order(crowd: subprocess.Popen[str], order: str, meanwhile: Callable[[], object] | None = None) -> None:
    """Have the crowd do something, and wait until it has; ``meanwhile`` is done again and again until then."""
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    crowd.stdin.write(f"{order}\n")
    crowd.stdin.flush()
    while meanwhile is not None and not select.select([crowd.stdout], [], [], 0.0)[0]:
        meanwhile()
    crowd.stdout.readline()


def freed(stage: Stage, crowd: subprocess.Popen[str], count: int, led: Led, stages: Stages) -> list[Lap]:
    """All that so many workers hold is answered and recorded. The steps, as one follows the other in `run`, from then on
    until a step finds nobody to give work to.

    The leader has done its beat steps until then. It used to stand still for the seconds in which the aggregator records
    alone, and to be charged with what had piled up in them: all beats new at once, and thousands of leases near their end.
    A leader stands still only when it has failed.
    """
    valkey = redis.Redis.from_url(redis_py_url(stage.redis.scheduler))
    with led.deaf():
        _order(crowd, f"free {count}", led.beat)
        deadline = time.monotonic() + 60
        while valkey.xlen(OUTCOMES):
            assert time.monotonic() < deadline, "the aggregator records nothing"
            led.beat()
        valkey.close()
    _order(crowd, "tell")
    with stages.counting():
        # It begins with a beat step, so that even a few sub-tasks pay for one.
        laps = [led.lap(beats=True)]
        while laps[-1].sent:
            laps.append(led.lap())
    return laps


def answered(stage: Stage, crowd: subprocess.Popen[str], count: int, led: Led) -> list[Lap]:
    """So many of the oldest attempts are answered and recorded; the steps from then on until beats have told of it."""
    _order(crowd, f"answer {count}")
    valkey = redis.Redis.from_url(redis_py_url(stage.redis.scheduler))
    deadline = time.monotonic() + 60
    laps: list[Lap] = []
    told_at = inf
    while time.monotonic() < told_at:
        laps.append(led.lap(beats=True))
        assert time.monotonic() < deadline, "the aggregator records nothing"
        if told_at == inf and not valkey.xlen(OUTCOMES):
            told_at = time.monotonic() + 1.2
    valkey.close()
    return laps


def know_the_speed(stage: Stage) -> None:
    """As if many outcomes had told how fast the crowd's devices are: sub-tasks then have as many rows as they should."""
    tokens = 28 * ROWS
    seen = Timed(
        key=(ENCODER.trunk, DEVICE, "fast"),
        worker="crowd-0",
        device_kind="cpu",
        parameters=ENCODER.parameters,
        work=Workload(ROWS, tokens, tokens**2 / ROWS),
        seconds=ROWS * ROW_S,
        text_bytes=114 * ROWS,
    )
    with stage.database() as database, database.transaction() as connection:
        learn(connection, [seen] * 40, [((ENCODER.digest, DEVICE), 0.1)])


def leading(stage: Stage, count: int, *, looks: int, patience_s: float) -> Leading:
    """Measure the step with so many workers: idle, while they are filled, and full."""
    transport = RedisTransport(stage.redis.scheduler)
    # That of the stage stands still until ours leads, and stands by from then on.
    os.kill(stage.pids["dispatch"], signal.SIGSTOP)
    led = Led(stage, transport)
    try:
        with crowd_of(stage, count) as crowd, Client(stage.url, stage.tokens["user"]) as client:
            led.until_leading()
            os.kill(stage.pids["dispatch"], signal.SIGCONT)
            idle = [led.lap(beats=True) for _ in range(looks)]
            job = client.submit(
                stream_short_texts(int(1.5 * count * DEPTH * ROWS)), label_tasks(4), progress=False
            )
            valkey = redis.Redis.from_url(redis_py_url(stage.redis.scheduler))
            before = valkey.info("memory")["used_memory"]
            filling = [led.lap()]
            valkey_bytes = (valkey.info("memory")["used_memory"] - before) / max(1, filling[0].sent)
            valkey.close()
            until = time.monotonic() + patience_s
            while _leases(stage) < count * DEPTH and time.monotonic() < until:
                filling.append(led.lap())
            leases = _leases(stage)
            say(
                f"  {count:,} workers: idle {statistics.median(x.seconds for x in idle) * 1e3:.1f} ms; {leases:,} leases after"
                f" {sum(x.seconds for x in filling):.1f} s, the longest step {max(x.seconds for x in filling):.2f} s"
            )
            changed: list[Lap] = []
            refilling: list[Lap] = []
            for _ in range(looks - 1):
                laps = answered(stage, crowd, max(1, leases // 100), led)
                # The step that has the most of it to deal with.
                changed.append(max(laps, key=lambda lap: lap.sent))
            stages = Stages(led.dispatcher)
            for _ in range(REFILLS):
                refilling += freed(stage, crowd, max(1, count // 10), led, stages)
            dispatcher_mb = led.peak_mb()
            job.cancel()
            for _ in range(3):
                led.lap(beats=True)
            assert not led.dispatcher.differences, "the audit found differences"
    finally:
        led.close()
        transport.close()
    return Leading(
        workers=count,
        idle=idle,
        filling=filling,
        changed=changed,
        refilling=refilling,
        stages=stages.each(sum(lap.sent for lap in refilling)),
        leases=leases,
        dispatcher_mb=dispatcher_mb,
        valkey_bytes=valkey_bytes,
    )


def _leases(stage: Stage) -> int:
    with stage.sql() as sql:
        found = sql.execute("SELECT count(*) FROM lease").fetchone()
    return int(str(found[0])) if found else 0
