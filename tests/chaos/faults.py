"""The kinds of faults, each one function: what it does to the house, with the dice of the run."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import signal
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgpack
import redis

from motet.protocol.columns import OK, Column
from motet.protocol.transport import OUTCOMES, queue_name
from motet.protocol.wire import Outcome
from tests.chaos.house import House
from tests.chaos.oracle import Order

#: Seconds that a process stays frozen: shorter and longer than a worker needs to count as dead.
FREEZE_S = (3.0, 12.0)
#: Outcomes kept, to come again much later.
KEPT = 40


class Missed(Exception):
    """The fault could not be done, since what it is done to is away already, or it did nothing. It does not count."""


class Jobs(Protocol):
    """What a fault can ask of the run: more jobs."""

    def new(self, *, rows: int, tasks: Sequence[str] = (), poison: Sequence[str] = ()) -> Order: ...
    def submit(self, order: Order, source: Any = None) -> None: ...
    def later(self, name: str, act: Callable[[], object]) -> object: ...
    def cancel(self, order: Order) -> bool: ...
    def delete(self, order: Order) -> bool: ...


@dataclass(slots=True)
class Arena:
    """What a fault gets to know."""

    house: House
    jobs: Jobs
    dice: random.Random
    kept: list[dict[bytes, bytes]] = field(default_factory=list)

    def freeze_s(self) -> float:
        return self.dice.uniform(*FREEZE_S)

    def one_of(self, what: Mapping[str, int]) -> int:
        """One of these processes. Raises Missed where there is none."""
        if not what:
            raise Missed
        return what[self.dice.choice(sorted(what))]

    def all_of(self, what: Mapping[str, int]) -> tuple[int, ...]:
        """All of these processes. Raises Missed where there is none."""
        if not what:
            raise Missed
        return tuple(what.values())


# -- processes


def worker_kill(arena: Arena) -> None:
    arena.house.kill(arena.one_of(arena.house.worker_pids()))


def worker_freeze(arena: Arena) -> None:
    arena.house.freeze(arena.freeze_s(), arena.one_of(arena.house.worker_pids()))


def launcher_kill(arena: Arena) -> None:
    arena.house.kill(arena.one_of(arena.house.named("workers")))


def dispatcher_kill(arena: Arena) -> None:
    arena.house.kill(_leader(arena))


def dispatcher_freeze(arena: Arena) -> None:
    arena.house.freeze(arena.freeze_s(), _leader(arena))


def aggregator_kill(arena: Arena) -> None:
    arena.house.kill(arena.one_of(arena.house.named("aggregate")))


def aggregators_kill(arena: Arena) -> None:
    arena.house.kill(*arena.all_of(arena.house.named("aggregate")))


def aggregator_freeze(arena: Arena) -> None:
    arena.house.freeze(arena.freeze_s(), arena.one_of(arena.house.named("aggregate")))


def api_kill_in_upload(arena: Arena) -> None:
    """The rows themselves kill it: the third part is cut while the first ones are sent."""
    order = arena.jobs.new(rows=arena.dice.randint(3200, 4000), tasks=("digest",))
    fatal = arena.dice.randint(2100, 3100)
    reached, lock = threading.Event(), threading.Lock()
    struck: list[int] = []
    called_off = False

    def rows() -> Any:
        for i, text in enumerate(order.texts):
            if i == fatal:
                with lock:
                    if not called_off:
                        struck.extend(arena.house.named("api").values())
                        arena.house.kill(*struck)
                        reached.set()
            yield text

    arena.jobs.later(f"upload of job {order.number}", lambda: arena.jobs.submit(order, rows()))
    reached.wait(10)
    with lock:
        # Else it would kill later, and nobody would have counted that.
        called_off = True
        if not struck:
            raise Missed


def _leader(arena: Arena) -> int:
    names = arena.house.named("dispatch")
    leader = arena.house.leader()
    return names[leader] if leader in names else arena.one_of(names)


# -- servers


def redis_kill(arena: Arena) -> None:
    arena.house.kill(arena.one_of(arena.house.named("valkey")))


def redis_flush(arena: Arena) -> None:
    with arena.house.redis() as client:
        client.flushall()


def redis_freeze(arena: Arena) -> None:
    arena.house.freeze(arena.dice.uniform(2, 8), arena.one_of(arena.house.named("valkey")))


def redis_full(arena: Arena) -> None:
    """Every write is refused, for some seconds."""
    # Not the limit that it has now: that may be another such fault's.
    usual = arena.house.valkey._maxmemory
    with arena.house.redis() as client:
        client.config_set("maxmemory", "1mb")

    full_s = arena.dice.uniform(2, 6)

    def free() -> None:
        time.sleep(full_s)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            # It may be frozen, or away; one that was killed starts with its usual limit.
            with contextlib.suppress(redis.RedisError, OSError), arena.house.redis() as client:
                client.config_set("maxmemory", usual)
                return
            time.sleep(0.2)
        raise TimeoutError("Redis stayed full")

    arena.jobs.later("room in Redis", free)


def redis_cut(arena: Arena) -> None:
    with arena.house.redis() as client:
        if not client.client_kill_filter(_type="normal", skipme=True):
            raise Missed


def postgres_crash(arena: Arena) -> None:
    """An immediate shutdown: no checkpoint, no goodbye."""
    arena.house.kill(arena.one_of(arena.house.named("postgres")), sign=signal.SIGQUIT)


def postgres_cut(arena: Arena) -> None:
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"""
    if not arena.house.sql(cut):
        raise Missed


# -- messages


def garbage_messages(arena: Arena) -> None:
    """What is no message, in a worker's queue."""
    beats = arena.house.beats()
    if not beats:
        raise Missed
    shapes = _message_shapes()
    with arena.house.redis() as client:
        client.lpush(queue_name(arena.dice.choice(sorted(beats))), *arena.dice.sample(shapes, 3))


def doubled_messages(arena: Arena) -> None:
    """Messages of live leases once more: to the same worker, and to one that was never meant."""
    leases = _leases(arena)
    names = sorted(arena.house.beats())
    if not leases or not names:
        raise Missed
    with arena.house.redis() as client:
        for lease in leases:
            message = _message(lease["subtask"], lease["attempt"], str(lease["job"]), lease["rows"])
            for worker in {lease["worker"], *arena.dice.sample(names, 1)}:
                client.lpush(queue_name(worker), json.dumps(message))


def garbage_outcomes(arena: Arena) -> None:
    """What is no outcome, on the stream; some of it under the name of a live attempt."""
    dice = arena.dice
    live = _leases(arena)
    bodies = [
        dice.randbytes(40),
        b"",
        # A frame that claims two gigabytes.
        b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 31) + b"\x01\x00\x00",
        Outcome(subtask=1, attempt=1, nonce="x", worker="w", boot="b", verdict="done").encode()[:-7],
        msgpack.packb({"v": 1}),
        dice.randbytes(300_000),
    ]
    with arena.house.redis() as client:
        for body in bodies:
            name = (
                dice.choice(live)
                if live and dice.random() < 0.5
                else {"subtask": dice.randrange(99), "attempt": 1}
            )
            client.xadd(OUTCOMES, {"s": name["subtask"], "a": name["attempt"], "m": body})
        client.xadd(OUTCOMES, {"s": "none", "a": "1", "x": "no body"})


def forged_outcomes(arena: Arena) -> None:
    """Well made outcomes of attempts that are live, with a wrong nonce, another's, or under another attempt.

    For about a second: a sub-task is here and gone, and a forgery of one that has ended proves nothing.
    """
    forged = 0
    for _ in range(8):
        live = _leases(arena)
        bodies = [body for lease in live for body in _forgeries(arena, lease, live[-1])]
        with arena.house.redis() as client:
            for subtask, attempt, outcome in bodies:
                client.xadd(OUTCOMES, {"s": subtask, "a": attempt, "m": outcome.encode()})
        forged += len(live)
        time.sleep(0.12)
    if not forged:
        raise Missed


def _forgeries(
    arena: Arena, lease: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[int, int, Outcome]]:
    """(sub-task, attempt, outcome) under which each goes on the stream."""
    forged = _forged(arena, lease)
    subtask, attempt = lease["subtask"], lease["attempt"]
    yield subtask, attempt, forged("guessed", attempt, "done")
    yield subtask, attempt, forged("guessed", attempt, "failed")
    yield subtask, attempt + 1, forged(lease["nonce"], attempt + 1, "done")
    if other["subtask"] != subtask:
        yield subtask, attempt, forged(other["nonce"], attempt, "done")


def doubled_outcomes(arena: Arena) -> None:
    """Real outcomes twice, and old ones once more. The aggregators are held so that there are some to be seen."""
    pids = arena.all_of(arena.house.named("aggregate"))
    arena.house.freeze(2.0, *pids)
    try:
        with arena.house.redis() as client:
            old = arena.dice.sample(arena.kept, min(5, len(arena.kept)))
            again = {client.xadd(OUTCOMES, cast("Any", entry)) for entry in old}
            until = time.monotonic() + 1.5
            seen: list[tuple[bytes, dict[bytes, bytes]]] = []
            while not seen and time.monotonic() < until:
                time.sleep(0.05)
                entries = cast("list[Any]", client.xrange(OUTCOMES, count=20))
                seen = [(id_, entry) for id_, entry in entries if id_ not in again]
            for _, entry in seen:
                client.xadd(OUTCOMES, cast("Any", entry))
                arena.kept.append(entry)
            del arena.kept[:-KEPT]
    finally:
        arena.house.thaw(*pids)
    if not seen and not old:
        raise Missed


def _leases(arena: Arena) -> list[dict[str, Any]]:
    rows = arena.house.sql(
        """SELECT l.subtask_id, l.attempt, l.worker, l.boot, l.nonce, s.job_id, s.pass_number, s.n_rows
             FROM lease l JOIN subtask s ON s.id = l.subtask_id"""
    )
    names = ("subtask", "attempt", "worker", "boot", "nonce", "job", "pass", "rows")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _forged(arena: Arena, lease: Mapping[str, Any]) -> Callable[[str, int, Any], Outcome]:
    tasks = arena.house.sql(
        "SELECT name FROM task WHERE job_id = %s AND pass_number = %s", lease["job"], lease["pass"]
    )
    body = b'"FORGED"'
    n = lease["rows"]
    column = Column(
        kind="json",
        status=bytes([OK]) * n,
        arrays={
            "offsets": struct.pack(f"<{n + 1}i", *range(0, len(body) * (n + 1), len(body))),
            "bytes": body * n,
        },
    )

    def make(nonce: str, attempt: int, verdict: Any) -> Outcome:
        done = verdict == "done"
        return Outcome(
            subtask=lease["subtask"],
            attempt=attempt,
            nonce=nonce,
            worker=lease["worker"],
            boot=lease["boot"],
            verdict=verdict,
            columns={name: column for (name,) in tasks} if done else {},
            error=None if done else ("poison", "forged"),
        )

    return make


def _message(subtask: object, attempt: object, job: object, rows: object) -> dict[str, Any]:
    body = json.dumps(
        [
            [subtask, attempt, job, rows],
            {},
            {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
        ]
    )
    id_ = str(uuid.uuid4())
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "motet.run", "id": id_, "lang": "py", "retries": 0, "motet": [subtask, attempt]},
        "properties": {
            "correlation_id": id_,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "x"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def _message_shapes() -> list[bytes]:
    good = _message(1, 1, "job", 1)
    pickled = good | {"content-type": "application/x-python-serialize", "body": "gAROLg=="}
    unknown = good | {"headers": good["headers"] | {"task": "os.system"}}
    huge = good | {"headers": good["headers"] | {"shadow": "x" * 2_000_000}}
    shapes: list[Any] = [
        *({key: value for key, value in good.items() if key != left_out} for left_out in good),
        pickled,
        unknown,
        huge,
        good | {"body": "no base64 at all"},
        good | {"body": base64.b64encode(b"[1, 2").decode()},
        good | {"body": base64.b64encode(b'[["a", "b", {}, null], {}, {}]').decode()},
        good | {"content-encoding": "utf-99"},
        good | {"headers": []},
        good | {"properties": {}},
        _message("x", None, 3, -1),
        {},
        [],
        None,
        7,
    ]
    raw = [b"not json", b'{"body": "', b"\x00\x00", b"\xff\xfe", b"", b"\x80\x04cnt\nsystem\n."]
    return [*(json.dumps(shape).encode() for shape in shapes), *raw]


# -- jobs


def cancel(arena: Arena) -> None:
    order = arena.jobs.new(rows=arena.dice.randint(100, 500))
    arena.jobs.submit(order)
    time.sleep(arena.dice.uniform(0, 1.5))
    if not arena.jobs.cancel(order):
        raise Missed


def delete(arena: Arena) -> None:
    order = arena.jobs.new(rows=arena.dice.randint(100, 500))
    arena.jobs.submit(order)
    time.sleep(arena.dice.uniform(0, 1.5))
    if not arena.jobs.delete(order):
        raise Missed


def raising_row(arena: Arena) -> None:
    words = arena.dice.sample(("#raise-digest", "#raise-measure"), arena.dice.randint(1, 2))
    arena.jobs.submit(
        arena.jobs.new(rows=arena.dice.randint(20, 200), tasks=("digest", "measure"), poison=words)
    )


def killing_row(arena: Arena) -> None:
    word = arena.dice.choice(("#kill", "#exit", "#segfault"))
    arena.jobs.submit(
        arena.jobs.new(rows=arena.dice.randint(2, 6), tasks=("digest", "weigh"), poison=(word,))
    )


def hanging_row(arena: Arena) -> None:
    arena.jobs.submit(arena.jobs.new(rows=arena.dice.randint(2, 20), tasks=("weigh",), poison=("#hang",)))


def hogging_row(arena: Arena) -> None:
    """Memory runs out in the middle of a micro-batch, and is there again afterwards."""
    arena.jobs.submit(
        arena.jobs.new(rows=arena.dice.randint(2, 20), tasks=("digest", "weigh"), poison=("#hog",))
    )


#: Within so many seconds work goes on after a fault that is alone, on two quiet cores. Killed processes of the
#: scheduler have three seconds to start, beside what the fault itself may take.
LIMIT_S: Mapping[Callable[[Arena], None], float] = {
    worker_kill: 6.0,
    worker_freeze: 15.0,
    launcher_kill: 15.0,
    dispatcher_kill: 6.5,
    dispatcher_freeze: 6.5,
    aggregator_kill: 5.0,
    aggregators_kill: 5.0,
    aggregator_freeze: 10.0,
    api_kill_in_upload: 5.0,
    redis_kill: 10.0,
    redis_flush: 10.0,
    redis_freeze: 15.0,
    redis_full: 15.0,
    redis_cut: 10.0,
    postgres_crash: 6.0,
    postgres_cut: 6.0,
    garbage_messages: 5.0,
    doubled_messages: 5.0,
    garbage_outcomes: 5.0,
    forged_outcomes: 5.0,
    doubled_outcomes: 5.0,
    cancel: 5.0,
    delete: 5.0,
    raising_row: 5.0,
}
#: Every kind, and how often it comes. The first round of a run takes each once.
KINDS: Mapping[Callable[[Arena], None], float] = {
    worker_kill: 6,
    worker_freeze: 3,
    launcher_kill: 2,
    dispatcher_kill: 4,
    dispatcher_freeze: 2,
    aggregator_kill: 3,
    aggregators_kill: 3,
    aggregator_freeze: 2,
    api_kill_in_upload: 3,
    redis_kill: 4,
    redis_flush: 4,
    redis_freeze: 2,
    redis_full: 2,
    redis_cut: 3,
    postgres_crash: 4,
    postgres_cut: 3,
    garbage_messages: 3,
    doubled_messages: 4,
    garbage_outcomes: 4,
    forged_outcomes: 4,
    doubled_outcomes: 3,
    cancel: 4,
    delete: 3,
    raising_row: 3,
    killing_row: 1,
    hanging_row: 0.3,
    hogging_row: 1,
}
#: These end worker after worker until the row is found, which takes its time: the last part of a run goes without.
LENGTHY = (killing_row, hanging_row, hogging_row)
_LAST_LENGTHY = 0.6


def schedule(seed: int, faults: int) -> list[Callable[[Arena], None]]:
    """Which faults, in which order: each kind once in a round of its own, the lengthy last; the rest by weight."""
    dice = random.Random(f"schedule {seed}")
    first = list(KINDS)
    dice.shuffle(first)
    first.sort(key=lambda kind: kind in LENGTHY)
    short = {kind: weight for kind, weight in KINDS.items() if kind not in LENGTHY}
    made = first[:faults]
    while len(made) < faults:
        among = KINDS if len(made) < _LAST_LENGTHY * faults else short
        made += dice.choices(list(among), list(among.values()))
    return made
