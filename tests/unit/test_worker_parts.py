"""The small parts of a worker: columns put together, attempts, reporter, heart, watchdog, logs."""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import SetupError
from motet.protocol.columns import ERROR, OK, TRUNCATED, CellError, Column, cut, values
from motet.protocol.logs import configure, event
from motet.protocol.manifest import Manifest
from motet.protocol.transport import MemoryTransport, TransportLost
from motet.protocol.wire import Beat, Control, Outcome, TaskOrder
from motet.tasks import Classify
from scheduler.merge import check as check_column
from workers.engines.answers import label_column, labels_column, logits_column, number_column, vector_column
from workers.engines.function import json_column
from workers.launch.pulse import LOADING_SILENCE_S, SILENCE_S
from workers.run.assemble import assemble
from workers.run.attempts import LEFT_S, REMEMBERED, Attempts, Key
from workers.run.beat import Heart, Watchdog
from workers.run.device import Device
from workers.run.reporter import Reporter

# -- columns

LABELS = ("a", "b", "c")


def a_column(kind: str, rows: int, seed: int) -> Column:
    """Any answers of a kind."""
    dice = np.random.default_rng(seed)
    logits = dice.normal(size=(rows, len(LABELS))).astype(np.float32)
    match kind:
        case "label":
            return label_column(logits, every_score=bool(seed % 2))
        case "labels":
            return labels_column(logits, (), every_score=bool(seed % 2))
        case "number":
            return number_column(logits[:, :1])
        case "vector":
            return vector_column(logits, "fp16" if seed % 2 else "fp32")
        case "json":
            return json_column([{"n": int(n), "x": ["é"] * int(n % 3)} for n in dice.integers(0, 9, rows)])
        case _:
            counts = dice.integers(0, 4, rows)
            spans = int(counts.sum())
            return Column(
                kind="spans",
                status=bytes(rows),
                arrays={
                    "offsets": np.cumsum([0, *counts]).astype("<i4").tobytes(),
                    "starts": np.arange(spans, dtype="<i4").tobytes(),
                    "ends": np.arange(1, spans + 1, dtype="<i4").tobytes(),
                    "codes": dice.integers(0, 3, spans).astype("<i2").tobytes(),
                    "scores": dice.random(spans).astype("<f4").tobytes(),
                },
            )


@given(
    st.sampled_from(["label", "labels", "number", "vector", "json", "spans"]),
    st.integers(0, 30),
    st.integers(0, 1000),
    st.data(),
)
def test_columns_cut_up_and_put_together_in_any_order_are_what_they_were(
    kind: str, rows: int, seed: int, data: st.DataObject
) -> None:
    whole = a_column(kind, rows, seed)
    whole.check()
    order = data.draw(st.permutations(range(rows)))
    truth = list(values(whole, LABELS))
    lost = set(data.draw(st.lists(st.sampled_from(range(rows)), max_size=5)) if rows else [])
    # Micro-batches hold the rows in another order than the sub-task.
    shuffled = pick(whole, order)
    edges = sorted({0, rows, *(data.draw(st.lists(st.integers(0, rows), max_size=4)))})
    parts = [(order[lo:hi], cut(shuffled, lo, hi)) for lo, hi in pairwise(edges)]
    found = assemble(
        whole.kind,
        rows,
        parts,
        {row: CellError("engine", "X") for row in lost},
        frozenset({0} if rows else ()),
        dim=whole.dim,
        dtype=whole.dtype,
    )
    found.check()
    assert list(values(found, LABELS)) == [None if i in lost else truth[i] for i in range(rows)]
    assert set(found.errors) == lost
    assert all(bool(s & TRUNCATED) == (i == 0 and i not in lost) for i, s in enumerate(found.status))


def pick(column: Column, order: Sequence[int]) -> Column:
    """The rows of a column in another order, one by one."""
    parts = [([at], cut(column, row, row + 1)) for at, row in enumerate(order)]
    return assemble(column.kind, len(order), parts, {}, dim=column.dim, dtype=column.dtype)


def test_a_column_without_a_single_answer_is_still_well_formed() -> None:
    errors = {0: CellError("engine", "X"), 1: CellError("engine", "Y")}
    for kind in ("label", "labels", "number", "vector", "json", "spans"):
        column = assemble(kind, 2, [], errors, dim=3, dtype="fp16")  # type: ignore[arg-type]
        column.check()
        assert column.counts() == (0, 2, 0, 0)


def test_a_row_with_neither_answer_nor_error_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="1 of 2 rows"):
        assemble("number", 2, [([0], number_column(np.ones((1, 1), np.float32)))], {})


# -- answers


def test_single_labels_are_the_softmax_winner_with_every_score_on_request() -> None:
    column = label_column(np.array([[0, 2, 1], [5, 0, 0]], np.float32), every_score=True)
    column.check()
    (first, score, every), (second, _, _) = values(column, LABELS)
    assert (first, second) == ("b", "a")
    assert score == every["b"] == pytest.approx(0.6652, abs=1e-4)
    assert sum(every.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "labels", "given"),
    [
        ({"min_score": 0.9}, ("a", "b", "c", "unsure"), ["unsure", "a", None]),
        ({"min_score": 0.9, "otherwise": "c"}, LABELS, ["c", "a", None]),
        ({"min_score": 0.5, "otherwise": "?"}, ("a", "b", "c", "?"), ["b", "a", None]),
    ],
)
def test_a_classifier_abstains_below_the_score_that_its_task_asks_for(
    spec: dict[str, Any], labels: tuple[str, ...], given: list[str | None]
) -> None:
    head = Manifest(name="h", version="1", engine="encoder", answers="label", labels=LABELS)
    assert Classify("h", **spec).labels_of(LABELS) == labels
    logits = np.array([[0, 2, 1], [5, 0, 0], [np.nan, 0, 0]], np.float32)
    for scores in (False, True):
        task = Classify("h", scores=scores, **spec)
        column = logits_column(TaskOrder(name="t", spec=task.to_json(), manifest=head), logits)
        check_column(column, kind="label", n_rows=3, n_labels=len(labels))
        found = list(values(column, labels))
        assert [v and v[0] for v in found] == given
        assert found[0][1] == pytest.approx(0.6652, abs=1e-4)
    assert set(found[0][2]) == set(labels)


def test_several_labels_reach_their_thresholds_and_come_best_first() -> None:
    column = labels_column(
        np.array([[0.1, 3, -9], [-9, -9, -9]], np.float32), (0.5, 0.9, 0.5), every_score=False
    )
    column.check()
    first, second = values(column, LABELS)
    assert [label for label, _ in first] == ["b", "a"]
    assert second == []


def test_an_answer_that_is_no_number_is_an_error_of_its_row() -> None:
    logits = np.array([[1, 2, 3], [np.nan, 0, 0], [np.inf, 0, 0]], np.float32)
    for column in (
        label_column(logits, every_score=True),
        labels_column(logits, (), every_score=True),
        number_column(logits),
        vector_column(logits, "fp32"),
    ):
        column.check()
        assert column.counts() == (1, 2, 0, 0)
        assert {e.error for e in column.errors.values()} == {"not_finite"}
    assert vector_column(np.array([[70_000.0]], np.float32), "fp16").counts() == (0, 1, 0, 0)


def test_json_values_are_strict() -> None:
    column = json_column(
        [{"a": 1}, float("nan"), object(), {1, 2}, "\ud800", b"x", None, CellError("engine", "E")]
    )
    column.check()
    assert column.counts() == (2, 6, 0, 0)
    assert list(values(column))[0::6] == [{"a": 1}, None]
    assert {column.errors[i].error for i in (1, 2, 3, 4, 5)} == {"bad_value"}
    assert column.errors[7] == CellError("engine", "E")


# -- attempts


def test_an_attempt_is_held_from_its_receipt_to_its_release_and_begins_once() -> None:
    attempts = Attempts()
    attempts.receive((1, 1))
    assert attempts.held() == ((1, 1),)
    assert attempts.begin((1, 1))
    attempts.receive((1, 1))
    assert not attempts.begin((1, 1))
    assert attempts.held() == ((1, 1),)
    attempts.release((1, 1))
    attempts.receive((1, 1))  # delivered again after it was done
    assert attempts.held() == ()


def test_an_attempt_dropped_before_it_began_never_begins() -> None:
    attempts = Attempts()
    attempts.receive((1, 1))
    assert set(attempts.drop([(1, 1), (9, 9)])) == {(1, 1)}
    assert not attempts.begin((1, 1))
    assert attempts.held() == ()
    assert attempts.dropped((9, 9))
    attempts.drop([])
    assert not attempts.dropped((9, 9))


def test_an_attempt_that_cannot_run_is_said_to_be_left_for_a_while() -> None:
    now = [100.0]
    attempts = Attempts(lambda: now[0])
    attempts.receive((1, 1))
    attempts.begin((1, 1))
    attempts.leave((1, 1))
    assert (attempts.held(), attempts.left()) == ((), ((1, 1),))
    now[0] += LEFT_S
    assert attempts.left() == ((1, 1),)
    now[0] += 0.1
    assert attempts.left() == ()


def test_memory_of_attempts_is_bounded() -> None:
    attempts = Attempts()
    for i in range(REMEMBERED + 10):
        attempts.begin((i, 1))
        attempts.release((i, 1))
    assert attempts.begin((0, 1))
    assert not attempts.begin((REMEMBERED + 9, 1))


# -- reporter


class Flaky:
    """A line to Redis that is cut for a number of calls."""

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts
        self.sent: list[Key] = []

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        if self.cuts:
            self.cuts -= 1
            raise TransportLost
        self.sent.append((subtask, attempt))


def an_outcome(subtask: int) -> Outcome:
    return Outcome(subtask=subtask, attempt=1, nonce="n", worker="w", boot="b", verdict="done")


def test_an_outcome_is_sent_however_often_redis_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.run.reporter.RETRY_S", 0.0)
    line, attempts, sent = Flaky(3), Attempts(), threading.Event()
    attempts.begin((1, 1))
    reporter = Reporter(line, attempts)  # type: ignore[arg-type]
    reporter.put((1, 1), lambda: an_outcome(1), sent)
    assert reporter.step()
    assert line.sent == [(1, 1)]
    assert sent.is_set()
    assert attempts.held() == ()


def test_an_outcome_that_nobody_wants_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.run.reporter.RETRY_S", 0.0)
    line, attempts, sent = Flaky(10**9), Attempts(), threading.Event()
    attempts.begin((1, 1))
    reporter = Reporter(line, attempts)  # type: ignore[arg-type]
    reporter.put((1, 1), lambda: an_outcome(1), sent)
    attempts.drop([(1, 1)])
    assert reporter.step()
    assert (line.sent, sent.is_set()) == ([], True)


# -- heart and watchdog


class Idle:
    """An executor with nothing to do."""

    rows_done = 7

    def __init__(self) -> None:
        self.dropped: list[Any] = []
        self.busy = 0.0
        self.words: str | None = None
        self.loads = False

    def drop(self, keys: Any) -> None:
        self.dropped.append(sorted(keys))

    def resident(self) -> tuple[str, ...]:
        return ("digest",)

    def backlog_s(self) -> float:
        return 1.23456

    def busy_s(self) -> float:
        return self.busy

    def stuck(self) -> str | None:
        return self.words

    def loading(self) -> bool:
        return self.loads


class Body:
    """A heart with what it needs."""

    def __init__(self) -> None:
        self.redis, self.executor, self.attempts = MemoryTransport(), Idle(), Attempts()
        self.now, self.taps = 100.0, list[bool]()
        self.heart = Heart(
            worker="w",
            boot="b",
            device=Device("cpu", "a cpu", "cpu", 1000, ("bf16",)),
            engines=("encoder",),
            transport=self.redis.worker("w"),
            attempts=self.attempts,
            executor=self.executor,  # type: ignore[arg-type]
            consume=self.taps.append,
            clock=lambda: self.now,
        )

    def beat(self) -> Beat:
        self.now += 1
        self.heart.step()
        return self.redis.newest_beats["w"]


def test_a_beat_says_what_is_true_and_counts_up() -> None:
    body = Body()
    body.attempts.receive((3, 1))
    body.executor.busy = 0.25
    beat = body.beat()
    assert (beat.worker, beat.boot, beat.seq, beat.state) == ("w", "b", 1, "ready")
    assert (beat.held, beat.resident, beat.backlog_s, beat.rows_done) == (((3, 1),), ("digest",), 1.235, 7)
    assert (beat.formats, beat.engines, beat.utilisation) == (("bf16",), ("encoder",), 0.25)
    assert beat.memory_used_mb > 0
    assert (body.beat().seq, body.beat().utilisation) == (2, 0.0)


def test_only_the_newest_leader_is_obeyed() -> None:
    body = Body()
    body.attempts.receive((1, 1))
    for epoch, drop in ((5, ()), (4, ((1, 1),)), (5, ((1, 1),))):
        body.redis.control({"w": Control(epoch=epoch, drop=drop)})
        body.beat()
    assert body.executor.dropped == [[], [(1, 1)]]


def test_a_forged_epoch_does_not_deafen_a_worker_for_good() -> None:
    body = Body()
    for epoch, drain in ((1, False), (2**64 - 1, True)):
        body.redis.control({"w": Control(epoch=epoch, drain=drain)})
        body.beat()
    assert body.beat().state == "draining"
    body.redis.control({"w": Control(epoch=1)})
    states = [body.beat().state for _ in range(5)]
    assert states == ["draining"] * 4 + ["ready"], "once no replaced leader can have said it"
    body.redis.control({"w": Control(epoch=0, drain=True)})
    assert {body.beat().state for _ in range(3)} == {"ready"}


def test_a_worker_told_to_drain_stops_taking_and_may_be_told_to_work_again() -> None:
    body = Body()
    states = []
    for drain in (True, True, False):
        body.redis.control({"w": Control(epoch=1, drain=drain)})
        body.beat()
        states.append(body.beat().state)
    assert states == ["draining", "draining", "ready"]
    assert body.taps == [False, True]
    body.heart.leave()
    assert body.beat().state == "draining"


def test_a_heart_beats_on_while_redis_is_away() -> None:
    body = Body()
    alive, body.heart._transport = body.heart._transport, Cut()  # type: ignore[assignment]
    body.heart.step()
    body.heart.step()
    body.heart._transport = alive
    assert body.beat().seq == 3


class Cut:
    def beat(self, beat: Beat) -> None:
        raise TransportLost


def test_the_watchdog_ends_what_hangs_and_what_lost_its_launcher() -> None:
    executor, ends = Idle(), list[str]()

    pulses = list[int]()

    def dog(parent: int) -> Watchdog:
        return Watchdog(
            executor,  # type: ignore[arg-type]
            stuck=lambda: ends.append("stuck"),
            orphaned=lambda: ends.append("orphan"),
            parent=parent,
            pulse=pulses.append,
        )

    dog(parent=0).step()
    assert ends == []
    executor.loads = True
    dog(parent=0).step()
    assert pulses == [SILENCE_S, LOADING_SILENCE_S]
    executor.words = "running for 99 s"
    dog(parent=0).step()
    assert ends == ["stuck"]
    executor.words = None
    dog(parent=1 << 30).step()
    assert ends == ["stuck", "orphan"]


# -- logs


def test_logs_are_json_lines_without_what_libraries_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure("w", "INFO")
        event(logging.getLogger("workers.x"), "loaded", model="m@1")
        logging.getLogger("celery.x").error("body: %r", "a user's text")
        try:
            raise ValueError("a user's text")
        except ValueError:
            logging.getLogger("workers.x").exception("fault")
    finally:
        root.handlers[:], root.level = before
        logging.captureWarnings(False)
    raw = capsys.readouterr().err
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [line["event"] for line in lines] == ["loaded", "body: %r", "fault"]
    assert lines[0]["model"] == "m@1"
    assert lines[2]["error"] == "ValueError"
    assert "a user's text" not in raw
    with pytest.raises(SetupError, match="MOTET_LOG_LEVEL"):
        configure("w", "LOUD")


def test_statuses_are_one_byte_a_row() -> None:
    column = number_column(np.array([[1], [np.nan]], np.float32))
    assert column.status == bytes([OK, ERROR])
    assert struct.unpack("<2d", column.arrays["numbers"]) == (1.0, 0.0)
