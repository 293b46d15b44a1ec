"""What was learned is kept: in a real Postgres, by several aggregators at once, and only from what may teach."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from motet.protocol.columns import Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Outcome, Usage
from motet.tasks import Classify
from scheduler.policy.cost import RateKey, Rates, Workload
from scheduler.store.database import Database
from scheduler.store.outcomes import record
from scheduler.store.rates import Timed, Touched, learn, rates, refresh
from tests.integration.landing import land, register

MODEL = Manifest(
    name="m",
    version="1",
    engine="classifier",
    answers="label",
    trunk="t",
    max_tokens=256,
    labels=("a", "b"),
    parameters=110_000_000,
)
KEY: RateKey = ("t", "NVIDIA L4", "fast")
ROWS = 40


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, pool=4)
    yield database
    database.close()


def timed(key: RateKey = KEY, worker: str = "w1", tokens: int = 4000, seconds: float = 0.5) -> Timed:
    return Timed(
        key=key,
        worker=worker,
        device_kind="cuda",
        parameters=110_000_000,
        work=Workload(ROWS, tokens, tokens**2 / ROWS),
        seconds=seconds,
        text_bytes=5 * tokens,
    )


def known(database: Database) -> Rates:
    with database.transaction() as connection:
        return rates(connection)


def outcome(database: Database, *, clone: bool = False, verdict: str = "done", **usage: Any) -> Outcome:
    """Rows land, a worker has a lease of them all, and this is what it reports."""
    # Another text for each, for what is answered already is not computed again.
    land(database, [f"text {usage}"] * ROWS, {"task": Classify("m")})
    with database.transaction() as connection:
        subtask = connection.execute(
            text(
                "WITH cut AS (UPDATE block_pass SET cursor = n WHERE cursor < n RETURNING *),"
                " taken AS (UPDATE pass SET rows_waiting = 0, bytes_waiting = 0 WHERE rows_waiting > 0)"
                " INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
                " SELECT job_id, pass_number, '{0}', '{0}', ARRAY[n], '{20000}', todo, n, 20000 FROM cut RETURNING id"
            )
        ).scalar_one()
        connection.execute(
            text(
                "INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, device, device_kind, clone, predicted_s, until)"
                " VALUES (:id, 1, 'w1', 'b', 'n', :device, 'cuda', :clone, 1, now() + interval '1 min')"
            ),
            {"id": subtask, "device": KEY[1], "clone": clone},
        )
    labels = Column(
        kind="label",
        status=bytes(ROWS),
        arrays={
            "codes": struct.pack(f"<{ROWS}h", *[0] * ROWS),
            "scores": struct.pack(f"<{ROWS}f", *[0.5] * ROWS),
        },
    )
    # Its own count of bytes is not gone by: 20,000 are those that the sub-task was priced by.
    facts = {"tokens": 4000, "computed_tokens": 4000, "text_bytes": 7, "busy_s": 0.5, "squares": 600_000}
    return Outcome(
        subtask=subtask,
        attempt=1,
        nonce="n",
        worker="w1",
        boot="b",
        verdict="done" if verdict == "done" else "failed",
        columns={"task": labels} if verdict == "done" else {},
        usage=Usage(**{**facts, **usage}),
    )


def test_a_restart_forgets_nothing(database: Database) -> None:
    seen = [
        timed(worker=f"w{i % 2}", tokens=1000 + 300 * i, seconds=0.1 * (i % 5 + 1) * (1 + i % 2))
        for i in range(30)
    ]
    never_stopped = Rates()
    for t in seen:
        prior = Rates().of(t.key, device_kind="cuda", parameters=t.parameters)
        never_stopped.observe(t.key, t.worker, prior, t.work, t.seconds, t.text_bytes)
        never_stopped.loaded(("model", "NVIDIA L4"), t.seconds)
        with database.transaction() as connection:
            learn(connection, [t], [(("model", "NVIDIA L4"), t.seconds)])
    assert known(database) == never_stopped


def test_what_finished_sub_tasks_touched_is_read_anew_and_nothing_else(database: Database) -> None:
    with database.transaction() as connection:
        learn(connection, [timed(), timed(worker="w2")] * 10, [(("model", KEY[1]), 8.0)])
    mine = known(database)
    other: RateKey = ("t", "another", "fast")
    with database.transaction() as connection:
        learn(
            connection,
            [timed(seconds=0.6), timed(worker="w2", seconds=0.4), timed(key=other)],
            [(("model", KEY[1]), 4.0), (("other", KEY[1]), 1.0)],
        )
    before = mine.paces["w2"]
    with database.reading() as connection:
        refresh(connection, mine, Touched({KEY}, {("model", KEY[1])}, {"w1"}))
    now = known(database)
    assert mine.learned == {KEY: now.learned[KEY]}
    assert mine.loads == {("model", KEY[1]): 6.0}
    assert mine.paces == {"w1": now.paces["w1"], "w2": before} != now.paces


def test_outcomes_that_come_together_teach_as_one_after_the_other_would(database: Database) -> None:
    seen = [timed(worker=f"w{i % 3}", seconds=0.1 * (i + 1)) for i in range(12)]
    loads = [(("model", "NVIDIA L4"), s) for s in (8.0, 4.0)]
    with database.transaction() as connection:
        learn(connection, seen, loads)
    together = known(database)
    with database.transaction() as connection:
        for table in ("rate", "pace", "load_time"):
            connection.execute(text(f"DELETE FROM {table}"))
        for t in seen:
            learn(connection, [t], [])
        for load in loads:
            learn(connection, [], [load])
        assert rates(connection) == together
    assert together.loads == {("model", "NVIDIA L4"): 6.0}


def test_two_aggregators_that_learn_at_once_lose_nothing_and_never_wait_in_a_circle(
    database: Database,
) -> None:
    rounds, failures = 40, list[BaseException]()

    def aggregator(number: int) -> None:
        dice = random.Random(number)
        try:
            for i in range(rounds):
                # Old and new keys and workers, each time in another order.
                seen = [timed(("t", f"device {k}", "fast"), f"w{k}") for k in (0, 1, 2, 3 + i, 50 + i)]
                loads = [((f"model {k}", "NVIDIA L4"), 1.0) for k in (0, 1, 2 + i)]
                dice.shuffle(seen)
                dice.shuffle(loads)
                with database.transaction() as connection:
                    learn(connection, seen, loads)
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            failures.append(error)

    both = [threading.Thread(target=aggregator, args=(number,)) for number in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert failures == []
    learned = known(database).learned
    for k in range(3):
        assert learned["t", f"device {k}", "fast"].observations >= 2 * rounds, "nothing was lost"
    assert sum(rate.observations for rate in learned.values()) == 2 * rounds * 5
    with database.transaction() as connection:
        seconds = connection.execute(text("SELECT DISTINCT seconds FROM load_time")).scalars()
        assert list(seconds) == [1.0]


def test_an_accepted_outcome_teaches_what_the_device_can_do(database: Database) -> None:
    register(database, MODEL)
    done = outcome(database)
    assert record(database, [done, done]).accepted == 1
    learned = known(database)
    expected = Rates()
    prior = Rates().of(KEY, device_kind="cuda", parameters=MODEL.parameters)
    expected.observe(KEY, "w1", prior, Workload(ROWS, 4000, 600_000), 0.5, 20_000)
    assert learned.learned == expected.learned
    assert learned.pace("w1") == expected.pace("w1")


def test_squares_that_an_older_worker_does_not_count_are_those_of_rows_of_one_length(
    database: Database,
) -> None:
    register(database, MODEL)
    record(database, [outcome(database, squares=0)])
    expected = Rates()
    prior = Rates().of(KEY, device_kind="cuda", parameters=MODEL.parameters)
    expected.observe(KEY, "w1", prior, Workload(ROWS, 4000, 4000**2 / ROWS), 0.5, 20_000)
    assert known(database).learned == expected.learned


@pytest.mark.parametrize(
    "case",
    [
        {"verdict": "failed"},
        {"clone": True},
        {"clone": True, "load_s": 3.0},
        {"verdict": "failed", "load_s": 3.0},
        {"tokens": 100, "busy_s": 0.2},
        {"busy_s": 0.0},
    ],
    ids=str,
)
def test_what_says_nothing_of_speed_teaches_nothing(database: Database, case: dict[str, Any]) -> None:
    register(database, MODEL)
    record(database, [outcome(database, **case)])
    assert known(database) == Rates()


def test_bytes_of_attempts_that_failed_make_no_token_look_longer(database: Database) -> None:
    register(database, MODEL)
    record(database, [outcome(database), outcome(database, verdict="failed", tokens=10)])
    with database.transaction() as connection:
        found = connection.execute(text("SELECT bytes_done, tokens FROM pass ORDER BY tokens")).all()
    assert found == [(0, 0), (20_000, 4000)]


def test_few_tokens_teach_where_they_took_long_as_those_of_a_language_model_do(database: Database) -> None:
    register(database, MODEL)
    record(database, [outcome(database, tokens=100, busy_s=0.5)])
    assert known(database).learned


def test_a_sub_task_that_loaded_teaches_how_long_loading_takes_and_nothing_else(database: Database) -> None:
    register(database, MODEL)
    for load_s in (7.0, 3.0):
        record(database, [outcome(database, load_s=load_s)])
    learned = known(database)
    assert learned.loads == {(MODEL.digest, KEY[1]): 5.0}
    assert (learned.learned, learned.paces) == ({}, {})
    assert learned.load_s(MODEL.digest, KEY[1], weights_bytes=0) == 5.0
