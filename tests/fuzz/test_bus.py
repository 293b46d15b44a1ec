"""Thousands of garbage entries on every key of Redis while a real job runs: no wrong cell, and work goes on.

Real processes throughout. What is thrown is drawn from a seed: FUZZ_SEED repeats a run, FUZZ_ENTRIES sizes it.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import psycopg
import pytest
import redis

from motet import Client, Function
from motet.local.cluster import Cluster
from motet.local.valkey import ValkeyUrls
from motet.protocol.envelope import pack
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import (
    DEAD,
    DEAD_KEPT,
    OUTCOMES,
    WORKERS,
    RedisTransport,
    RedisWorkerTransport,
    celery_message,
    queue_name,
)
from motet.protocol.wire import PROTOCOL, Assignment, Beat, Control, Running
from tests.fuzz.small_cluster import eventually, redis_of, small_cluster

ENTRIES = int(os.environ.get("FUZZ_ENTRIES", "5000"))
pytestmark = pytest.mark.timeout(max(900, ENTRIES // 10))
SEED = int(os.environ.get("FUZZ_SEED", "5"))
#: Work goes on within so long after the last garbage; three times the promise, for CI is a slow machine.
HEALED_S = 15.0
#: Rows of each job that runs meanwhile, and entries thrown between two looks at it.
ROWS, HANDFUL = 2000, 100

ENGINE = """
import time

def shout(texts):
    time.sleep(0.002 * len(texts))
    return [text.upper() for text in texts]
"""


def texts(n: int, mark: str) -> list[str]:
    return [f"{mark} row {i} of the song" for i in range(n)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with small_cluster(tmp_path, ENGINE, ("shout",), cpus=2) as running:
        yield running


def test_no_garbage_on_the_bus_changes_a_cell_or_stops_the_work(cluster: Cluster, tmp_path: Path) -> None:
    with (
        redis_of(cluster, "scheduler") as bus,
        psycopg.connect(cluster.database_url, autocommit=True) as sql,
        Client(cluster.url, cluster.tokens["user"]) as client,
    ):
        eventually(lambda: [w.state for w in client.workers()] == ["ready", "ready"], words="two workers")
        names = [worker.worker for worker in client.workers()]
        throw = Thrower(bus, sql, names, random.Random(SEED), tmp_path / "unpickled")
        jobs = [client.submit(texts(ROWS, "0"), {"loud": Function("shout")})]
        with throw.listening():
            while throw.thrown < ENTRIES:
                throw.handful(HANDFUL)
                time.sleep(0.05)
                if jobs[-1].state != "running":  # so that there is work to harm, to the last
                    jobs.append(client.submit(texts(ROWS, str(len(jobs))), {"loud": Function("shout")}))
        began = time.monotonic()
        fresh = client.submit(texts(20, "fresh"), {"loud": Function("shout")}, priority="interactive")
        fresh.wait(timeout=HEALED_S + 60)
        healed_s = time.monotonic() - began
        for job in jobs:
            job.wait(timeout=240)
        took = dict(sorted(throw.kinds.items()))
        print(f"\n{throw.thrown} entries {took} beside {len(jobs)} jobs; work went on after {healed_s:.1f} s")

        every = [(job, texts(ROWS, str(number))) for number, job in enumerate(jobs)]
        for one, rows in [*every, (fresh, texts(20, "fresh"))]:
            found = list(one.results())
            assert [row.index for row in found] == list(range(len(rows)))
            wrong = [row.index for row, text in zip(found, rows, strict=True) if row["loud"] != text.upper()]
            assert not wrong, [dict(found[i]) for i in wrong[:3]]
            assert (one.progress.ok, one.progress.error) == (len(rows), 0)
        assert healed_s < HEALED_S
        assert not (tmp_path / "unpickled").exists(), "somebody unpickled what was thrown"
        # What was thrown is gone, and what is kept of it is bounded and holds no bytes of it.
        eventually(lambda: bus.xlen(OUTCOMES) == 0, HEALED_S, "an empty stream")
        assert bus.llen(DEAD) <= DEAD_KEPT
        assert all(set(json.loads(letter)) == {"id", "bytes", "why"} for letter in bus.lrange(DEAD, 0, -1))
        real = {name.encode() for name in throw.workers}
        eventually(lambda: bus.smembers(WORKERS) == real, 90, f"none but {real} among the workers")
        for name in throw.workers:
            eventually(lambda name=name: bus.llen(queue_name(name)) == 0, HEALED_S, "empty queues")
        [counted] = sql.execute(
            "SELECT count(*) FILTER (WHERE state = 'open'), (SELECT count(*) FROM lease), (SELECT count(*) FROM piece)"
            " FROM subtask"
        ).fetchall()
        assert counted == (0, 0, 0)


@pytest.mark.parametrize("last", [f"{2**64 - 1}-{2**64 - 1}", f"{2**63}-7"])
def test_an_entry_with_the_last_possible_id_does_not_close_the_stream(
    redis_url: str, redis_urls: ValkeyUrls, last: str
) -> None:
    """Ids of a stream only grow: whoever may add an entry could be the last who did."""
    transport, worker = RedisTransport(redis_url), RedisWorkerTransport(redis_urls.worker, "w")
    transport.read_outcomes("a", 10, 0.01, 6.0)
    with redis.Redis.from_url(redis_py_url(redis_urls.worker)) as forger:
        forger.execute_command("XADD", OUTCOMES, last, "m", b"x", "s", "1", "a", "1")
    assert transport.waiting_outcomes() == {(1, 1)}
    for entry in transport.read_outcomes("a", 10, 0.01, 6.0):
        transport.bury(entry, "unreadable")
    transport.read_outcomes("a", 10, 0.01, 6.0)
    worker.report(7, 1, b"a real one")
    assert transport.waiting_outcomes() == {(7, 1)}
    assert [entry.body for entry in transport.read_outcomes("a", 10, 0.01, 6.0)] == [b"a real one"]
    assert transport.outcome_lag().oldest_s < 60
    transport.close()
    worker.close()


@dataclass
class Thrower:
    """Throws garbage at every key that a worker or a stranger could reach."""

    bus: redis.Redis
    sql: psycopg.Connection[Any]
    #: The real ones.
    workers: list[str]
    dice: random.Random
    #: Appears if anybody unpickles.
    marker: Path
    thrown: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    #: Real outcomes as they were seen on the stream, the newest few.
    overheard: list[dict[bytes, bytes]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def listening(self) -> Any:
        """Overhear real outcomes meanwhile, to throw them again, torn."""
        thrower = self

        class Listening:
            def __enter__(self) -> None:
                self.thread = threading.Thread(target=thrower._overhear, daemon=True)
                self.thread.start()

            def __exit__(self, *_: object) -> None:
                thrower._stop.set()
                self.thread.join(10)

        return Listening()

    def _overhear(self) -> None:
        last: Any = "$"
        while not self._stop.is_set():
            for _, entries in _streams(self.bus.xread({OUTCOMES: last}, count=50, block=200)):
                for last, fields in entries:  # noqa: B007 - the last one is where to go on
                    if b"fuzz" not in fields and len(fields.get(b"m", b"")) < 200_000:
                        self.overheard = [*self.overheard[-19:], fields]

    def leases(self) -> list[Any]:
        """(sub-task, attempt, worker, boot, rows) of what runs now."""
        return self.sql.execute(
            "SELECT l.subtask_id, l.attempt, l.worker, l.boot, s.n_rows"
            " FROM lease l JOIN subtask s ON s.id = l.subtask_id"
        ).fetchall()

    def handful(self, count: int) -> None:
        leases = self.leases()
        pipe = self.bus.pipeline(transaction=False)
        kinds: list[tuple[int, Callable[..., None]]] = [
            (60, self.on_the_stream),
            (10, self.on_a_queue),
            (12, self.on_a_key),
            (8, self.among_the_workers),
            (10, self.overheard_again),
        ]
        for _ in range(count):
            [act] = self.dice.choices([act for _, act in kinds], [weight for weight, _ in kinds])
            act(pipe, leases)
            self.kinds[act.__name__] += 1
            self.thrown += 1
        pipe.execute(raise_on_error=False)

    # -- what is thrown

    def on_the_stream(self, pipe: Any, leases: list[Any]) -> None:
        lease = self.dice.choice(leases) if leases else (1, 1, "w", "b", 1)
        body = self.dice.choice(STREAM)(self.dice, lease)
        fields: dict[Any, Any] = {"m": body, "s": lease[0], "a": lease[1], "fuzz": 1}
        match self.dice.randrange(8):
            case 0:
                fields.pop("m")
            case 1:
                fields["s"] = self.dice.choice([b"", b"x", b"\xff", str(2**70), "-1", "1e9", b"\0"])
            case 2:
                fields = {self.dice.randbytes(5): self.dice.randbytes(20), "fuzz": 1}
        pipe.xadd(OUTCOMES, fields)

    def overheard_again(self, pipe: Any, leases: list[Any]) -> None:
        """A real outcome once more: whole, cut, or with bits turned; and one of its kind in the real one's place."""
        if not self.overheard:
            self.on_the_stream(pipe, leases)
            return
        fields = dict(self.dice.choice(self.overheard))
        raw = bytearray(fields[b"m"])
        match self.dice.randrange(3):
            case 0:
                del raw[self.dice.randrange(len(raw)) :]
            case 1:
                for _ in range(self.dice.choice([1, 1, 2, 8])):
                    raw[self.dice.randrange(len(raw))] ^= 1 << self.dice.randrange(8)
        pipe.xadd(OUTCOMES, {**fields, b"m": bytes(raw), b"fuzz": b"1"})

    def on_a_queue(self, pipe: Any, leases: list[Any]) -> None:
        name = self.dice.choice([*self.workers, "ghost"])
        shape = self.dice.choice(QUEUE)
        pipe.lpush(queue_name(name), shape(self.dice, name, str(self.marker)))
        if name == "ghost":
            pipe.expire(queue_name(name), 20)

    def on_a_key(self, pipe: Any, leases: list[Any]) -> None:
        name = self.dice.choice([*self.workers, f"ghost{self.dice.randrange(20)}"])
        word = self.dice.choice(["beat", "control", "running"])
        body = self.dice.choice(WORDS)(self.dice, name)
        pipe.set(f"motet:w:{name}:{word}", body, ex=20)
        if name.startswith("ghost"):
            pipe.sadd(WORKERS, name)

    def among_the_workers(self, pipe: Any, leases: list[Any]) -> None:
        pipe.sadd(WORKERS, self.dice.choice(NAMES)(self.dice))


def _streams(read: Any) -> Any:
    return (
        [(name, [e for batch in batches for e in batch]) for name, batches in read.items()]
        if isinstance(read, dict)
        else read
    )


# -- bodies for the stream: (dice, lease) -> bytes


def outcome_of(lease: Any, **changed: Any) -> bytes:
    """An answer to every row of a sub-task that runs, all of form but for what is changed; and not its nonce."""
    n = lease[4]
    wire = {
        "v": PROTOCOL,
        "subtask": lease[0],
        "attempt": lease[1],
        "nonce": "forged",
        "worker": lease[2],
        "boot": lease[3],
        "verdict": "done",
        "columns": {
            "loud": {
                "kind": "json",
                "status": bytes(n),
                "arrays": {
                    "offsets": struct.pack(f"<{n + 1}i", *range(0, 4 * n + 1, 4)),
                    "bytes": b'"no"' * n,
                },
                "errors": {},
                "dim": 0,
                "dtype": "",
            }
        },
        "error": None,
        "refused": "",
        "usage": [1, 1, 1, 1, 0.1, 0.0, "fp32", 1],
    }
    return pack({**wire, **changed})


#: Values that numbers, texts and lists were not meant to be.
ODD = (
    *(None, True, -1, 0, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e308, float("nan"), float("inf"), ""),
    *(
        "\0",
        "x" * 70_000,
        "\u202e",
        b"",
        b"\xff" * 9,
        [],
        [[]],
        {},
        {"a": 1},
        {1: 2},
        [None] * 300,
        "9" * 5000,
    ),
)
FIELDS = (
    *("v", "subtask", "attempt", "nonce", "worker", "boot", "verdict", "columns", "error"),
    "refused",
    "usage",
)

STREAM: tuple[Callable[[random.Random, Any], bytes], ...] = (
    lambda dice, lease: dice.randbytes(dice.randrange(300)),
    lambda dice, lease: outcome_of(lease),
    lambda dice, lease: outcome_of(lease, **{dice.choice(FIELDS): dice.choice(ODD)}),
    lambda dice, lease: outcome_of(lease, **{dice.choice(FIELDS): dice.choice(ODD) for _ in range(4)}),
    lambda dice, lease: outcome_of(lease, subtask=dice.choice([*ODD[2:9], dice.randrange(2**63)])),
    lambda dice, lease: outcome_of(lease, usage=[dice.choice(ODD) for _ in range(dice.randrange(10))]),
    lambda dice, lease: outcome_of(lease, columns={dice.choice(["loud", "x", ""]): dice.choice(ODD)}),
    lambda dice, lease: outcome_of(
        lease, verdict="failed", error=dice.choice([ODD, ["x", "y"], ["\0", "\0"], "ab"])
    ),
    lambda dice, lease: outcome_of(lease)[: dice.randrange(200)],
    lambda dice, lease: pack(dice.choice(ODD)),
    lambda dice, lease: msgpack.packb({"v": PROTOCOL}),
    # A bomb: 64 MiB of nothing in a few kilobytes, and one that only says so.
    lambda dice, lease: pack(bytes(dice.choice([10, 1 << 26]) if dice.random() < 0.05 else 10)),
    lambda dice, lease: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8,
    lambda dice, lease: dice.randbytes(dice.choice([1 << 20, 1 << 12])) if dice.random() < 0.05 else b"",
    lambda dice, lease: b"\xdd" * 2000,
)


# -- bodies for a queue: (dice, worker, marker) -> str or bytes


def message(worker: str, **changed: Any) -> dict[str, Any]:
    """A message of form for an attempt that never was."""
    model = {"name": "m", "version": "1", "engine": "shout", "answers": "json"}
    from motet.protocol.manifest import Manifest

    never = Assignment(
        subtask=2**40,
        attempt=1,
        nonce="n",
        job=str(uuid.uuid4()),
        tenant="t",
        pass_kind="function shout",
        model=Manifest.from_json({**Manifest(**model).to_json()}),
        numerics="fast",
        max_tokens=0,
        tasks=(),
        texts=("x",),
    )
    return {**json.loads(celery_message(worker, never)), **changed}


def without(whole: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in whole.items() if k != key}


def pickled(worker: str, marker: str) -> str:
    """A message whose body is a pickle that leaves a mark when it is read."""

    class Mark:
        def __reduce__(self) -> Any:
            return (Path(marker).touch, ())

    body = base64.b64encode(pickle.dumps(Mark())).decode()
    return json.dumps(
        message(
            worker,
            body=body,
            **{"content-type": "application/x-python-serialize", "content-encoding": "binary"},
        )
    )


def bodied(worker: str, body: Any) -> str:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.dumps(message(worker, body=base64.b64encode(raw).decode()))


QUEUE: tuple[Callable[[random.Random, str, str], str | bytes], ...] = (
    lambda dice, worker, _: dice.randbytes(dice.randrange(100)),
    lambda dice, worker, _: b"",
    lambda dice, worker, _: "raw text",
    lambda dice, worker, _: json.dumps(message(worker)),
    lambda dice, worker, _: json.dumps(message(worker))[: dice.randrange(1, 900)],
    lambda dice, worker, _: json.dumps(without(message(worker), dice.choice(list(message(worker))))),
    lambda dice, worker, _: json.dumps(message(worker, headers=dice.choice([None, [], {}, "x", 1]))),
    lambda dice, worker, _: json.dumps(
        message(worker, properties=dice.choice([None, [], {}, "x", {"delivery_tag": 1}]))
    ),
    lambda dice, worker, _: json.dumps(
        message(
            worker,
            headers={
                **message(worker)["headers"],
                dice.choice(["task", "id", "motet"]): dice.choice([None, "os.system", 7, []]),
            },
        )
    ),
    lambda dice, worker, _: json.dumps(dice.choice([None, 1, [], {}, "x", [[]], True])),
    lambda dice, worker, _: bodied(
        worker, dice.choice([None, [], [[]], [[], {}, {}], [[1], {}, {}], [["x", "y", "z", "u"], {}, {}]])
    ),
    lambda dice, worker, _: bodied(
        worker, [[2**70, -1, None, [1]], {"x": 1}, {"chord": 1, "callbacks": [1]}]
    ),
    lambda dice, worker, _: bodied(worker, b"\xff\xfe not json"),
    lambda dice, worker, _: json.dumps(message(worker, body="%%% not base64")),
    lambda dice, worker, _: json.dumps(message(worker, **{"content-encoding": "no-such-coding"})),
    lambda dice, worker, _: json.dumps(message(worker, **{"content-type": "application/x-yaml"})),
    lambda dice, worker, _: bodied(worker, [["a" * 300_000], {}, {}]),
    lambda dice, worker, _: '{"body": "' + "\\u0000" * 10 + '"}',
    lambda dice, worker, _: "[" * 5000,
    lambda dice, worker, _: json.dumps(
        message(
            worker,
            headers={**message(worker)["headers"], "eta": "tomorrow", "expires": "never", "timelimit": 3},
        )
    ),
    lambda dice, worker, marker: pickled(worker, marker),
)


# -- bodies for beats, controls and running words: (dice, worker) -> bytes

WORDS: tuple[Callable[[random.Random, str], bytes], ...] = (
    lambda dice, name: dice.randbytes(dice.randrange(100)),
    lambda dice, name: msgpack.packb(dice.choice([o for o in ODD if not isinstance(o, float)])),
    lambda dice, name: Beat(worker=name, boot="b", seq=dice.randrange(2**60), state="asleep").encode(),  # type: ignore[arg-type]
    lambda dice, name: Beat(worker="another", boot="b", seq=1).encode(),
    lambda dice, name: msgpack.packb(
        {
            **{field: getattr(Beat(worker=name, boot="b", seq=1), field) for field in Beat.__slots__},
            dice.choice(Beat.__slots__): dice.choice(ODD),
        }
    ),
    lambda dice, name: Control(epoch=dice.choice([-1, 0, 1]), drop=((2**62, 1),), drain=True).encode(),
    lambda dice, name: msgpack.packb(
        {"epoch": dice.choice(ODD), "drop": dice.choice(ODD), "drain": dice.choice(ODD)}
    ),
    lambda dice, name: Running(boot="b", rows={(1, 1): (2**40, -1)}).encode(),
    lambda dice, name: msgpack.packb({"boot": dice.choice(ODD), "rows": dice.choice(ODD)}),
    lambda dice, name: b"\xdd\xff\xff\xff\xff",
)

NAMES: tuple[Callable[[random.Random], str | bytes], ...] = (
    lambda dice: dice.randbytes(8),
    lambda dice: f"nobody{dice.randrange(10**6)}",
    lambda dice: dice.choice(
        ["", "*", "?", "[a-z]*", "a:b", "\n", "\0", "x" * 10_000, "w\\", "é", "../..", "{x}"]
    ),
)
