"""Rows of a language model inside the executor, driven step by step with a fake continuous engine."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from motet.protocol.columns import OK, CellError, Column, typed
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment
from motet.tasks import Generate
from tests.unit.test_worker_executor import OTHER, FakeEngine, House, an_order, answers
from workers.engine import Ended, OutOfMemory, Pass, Prepared, Step

MODEL = Manifest(name="lm", version="1", engine="fake", answers="text", trunk="lm")


@dataclass
class FakeLanguageEngine(FakeEngine):
    """Writes a token of each row a step; a row has ended after as many steps as its text has characters."""

    places: int = 4
    inside_: dict[Hashable, list[Any]] = field(default_factory=dict)
    #: The texts inside at each step.
    seen: list[list[str]] = field(default_factory=list)
    #: Rows inside beyond which there is no memory.
    memory: int | None = None
    #: Seconds that a row takes to come in.
    admit_s: float = 0.0
    tenants: set[str] = field(default_factory=set)

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        if len(self.inside_) >= self.places + urgent:
            return False
        self.tenants.add(pass_.tenant)
        self.clock.now += self.admit_s
        self.inside_[ticket] = [row.inputs, len(row.inputs), pass_.tasks]
        return True

    def step(self, handle: Any, tokens: int) -> Step:
        texts = sorted(one[0] for one in self.inside_.values())
        self.seen.append(texts)
        self.clock.now += 0.01
        self.during()
        if self.memory is not None and len(texts) > self.memory:
            raise OutOfMemory
        if any("bomb" in text for text in texts):
            raise RuntimeError("a text that must not be logged")
        ended = []
        for ticket, one in list(self.inside_.items()):
            one[1] -= 1
            if one[1] <= 0:
                del self.inside_[ticket]
                columns = {task.name: json_column(one[0].upper()) for task in one[2]}
                ended.append(
                    Ended(ticket, columns, {task.name: (10, 4, len(one[0]), 0.5) for task in one[2]})
                )
        return Step(ended, len(texts), len(texts) / self.places)

    def abort(self, handle: Any, tickets: Collection[Hashable]) -> None:
        for ticket in tickets:
            self.inside_.pop(ticket, None)

    def inside(self, handle: Any) -> int:
        return len(self.inside_)


def json_column(value: Any) -> Column:
    raw = json.dumps(value).encode()
    arrays = {"offsets": struct.pack("<2i", 0, len(raw)), "bytes": raw}
    return Column(kind="json", status=bytes([OK]), arrays=arrays)


class LanguageHouse(House):
    engine: FakeLanguageEngine  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine = FakeLanguageEngine(self.clock)
        self.plain = FakeEngine(self.clock)
        self.known_cost(MODEL)

    def find(self, name: str) -> FakeEngine:
        return self.plain if name == "plain" else super().find(name)


def asks(*texts: str, **more: Any) -> Assignment:
    return an_order(*texts, model=MODEL, tasks={"said": Generate("lm", prompt="Go on.")}, **more)


def errors(outcome: Any) -> Mapping[int, CellError]:
    return outcome.columns["said"].errors  # type: ignore[no-any-return]


@pytest.fixture
def house() -> LanguageHouse:
    return LanguageHouse()


def test_rows_end_one_by_one_and_come_back_in_their_order(house: LanguageHouse) -> None:
    order = asks("aaaa", "b", "cc")
    house.submit(order)
    house.steps()
    outcome = house.outcomes()[order.key]
    assert answers(outcome, "said") == ["AAAA", "B", "CC"]
    assert house.engine.seen == [["aaaa", "b", "cc"], ["aaaa", "cc"], ["aaaa"], ["aaaa"]]
    assert house.executor.rows_done == 3


def test_places_that_become_free_are_filled_by_the_next_sub_task_at_once(house: LanguageHouse) -> None:
    first, second = asks("aaaaaaaa", "bb", "cc", "dd"), asks("eeee", "ffff")
    house.submit(first)
    house.submit(second)
    house.steps()
    assert house.engine.seen[2] == ["aaaaaaaa", "eeee", "ffff"]
    assert set(house.outcomes()) == {first.key, second.key}


def test_who_waits_interactively_goes_in_before_bulk_and_beyond_its_places(house: LanguageHouse) -> None:
    house.submit(asks(*["bulk bulk"] * 8))
    house.executor.step()
    house.executor.step()
    quick = asks("hi", interactive=True)
    house.submit(quick)
    house.executor.step()
    assert house.engine.seen[-1] == ["bulk bulk"] * 4 + ["hi"]
    house.executor.step()
    assert list(house.outcomes()) == [quick.key]


def test_what_is_asked_by_many_at_once_is_written_together(house: LanguageHouse) -> None:
    house.engine.places = 32
    for _ in range(16):
        house.submit(asks("a" * 10, interactive=True))
    house.steps()
    assert [len(texts) for texts in house.engine.seen] == [16] * 10


def test_rows_that_are_slow_to_come_in_do_not_make_a_step_look_slow(house: LanguageHouse) -> None:
    house.engine.admit_s = 1.0
    house.submit(asks("aaaa", "bbbb"))
    house.steps()
    assert house.executor._shelf.paces[MODEL.digest, "fp32"].cost.seconds(2) == pytest.approx(0.01, rel=0.1)


def test_tokens_and_seconds_are_told_row_by_row_and_add_up(house: LanguageHouse) -> None:
    order = asks("aaa", "bb")
    house.submit(order)
    house.steps()
    outcome = house.outcomes()[order.key]
    spent = outcome.spent["said"]
    assert typed("I", spent.tokens_in).tolist() == [10, 10]
    assert typed("I", spent.tokens_cached).tolist() == [4, 4]
    assert typed("I", spent.tokens_out).tolist() == [3, 2]
    assert outcome.usage.computed_tokens == 12
    assert outcome.usage.busy_s == pytest.approx(sum(typed("f", spent.seconds)))


def test_two_tasks_that_ask_the_same_are_computed_once(house: LanguageHouse) -> None:
    task = Generate("lm", prompt="Go on.")
    order = an_order("aa", model=MODEL, tasks={"one": task, "two": task})
    house.submit(order)
    house.steps()
    outcome = house.outcomes()[order.key]
    assert answers(outcome, "one") == answers(outcome, "two") == ["AA"]
    told = [typed("I", outcome.spent[name].tokens_cached).tolist() for name in ("one", "two")]
    assert told == [[4], [10]]


def test_the_row_that_makes_a_step_fail_is_found_by_halves_and_nobody_else_is_touched(
    house: LanguageHouse,
) -> None:
    house.engine.places = 8
    order = asks("aaa", "bb", "bomb", "cccc", "d", "ee", "ff")
    other = asks("gg")
    house.submit(order)
    house.submit(other)
    house.steps()
    outcomes = house.outcomes()
    assert answers(outcomes[order.key], "said") == ["AAA", "BB", None, "CCCC", "D", "EE", "FF"]
    assert errors(outcomes[order.key]) == {2: CellError("engine", "RuntimeError")}
    assert answers(outcomes[other.key], "said") == ["GG"]
    failed = [texts for texts in house.engine.seen if "bomb" in texts]
    assert len(failed) <= 4


def test_where_memory_is_short_fewer_rows_go_in_and_all_are_answered(house: LanguageHouse) -> None:
    house.engine.memory = 2
    order = asks("aaa", "bbb", "ccc", "ddd", "eee")
    house.submit(order)
    house.steps()
    assert answers(house.outcomes()[order.key], "said") == ["AAA", "BBB", "CCC", "DDD", "EEE"]


def test_one_row_that_does_not_fit_alone_is_told_and_may_be_tried_elsewhere(house: LanguageHouse) -> None:
    house.engine.memory = 0
    order = asks("aaa")
    house.submit(order)
    house.steps()
    [error] = errors(house.outcomes()[order.key]).values()
    assert (error.error, error.retriable) == ("out_of_memory", True)


def test_a_dropped_attempt_leaves_its_places_at_once(house: LanguageHouse) -> None:
    gone, kept = asks("aaaaaaaa", "bbbbbbbb"), asks("cccc")
    house.submit(gone)
    house.submit(kept)
    house.executor.step()
    house.executor.step()
    house.executor.drop([gone.key])
    house.executor.step()
    assert house.engine.seen[-1] == ["cccc"]
    house.steps()
    assert list(house.outcomes()) == [kept.key]


def test_a_suspect_of_killing_its_process_is_inside_with_nobody_beside(house: LanguageHouse) -> None:
    before, suspect, after = asks("aa"), asks("sss", "ttt", exclusive=True), asks("bb")
    for order in (before, suspect, after):
        house.submit(order)
    house.steps()
    assert house.engine.seen == [*[["aa", "bb"]] * 2, *[["sss", "ttt"]] * 3]
    assert len(house.outcomes()) == 3


def test_all_rows_inside_are_the_evidence_while_a_step_runs(house: LanguageHouse) -> None:
    marked: list[Any] = []
    house.engine.during = lambda: marked.append(house.transport.shared.under_way["w"].rows)
    first, second = asks("aa", "b"), asks("cc")
    house.submit(first)
    house.submit(second)
    house.steps()
    assert {key: set(rows) for key, rows in marked[0].items()} == {first.key: {0, 1}, second.key: {0}}
    assert {key: set(rows) for key, rows in marked[1].items()} == {first.key: {0}, second.key: {0}}
    assert house.transport.shared.under_way == {}


def test_each_row_is_known_by_its_tenant(house: LanguageHouse) -> None:
    house.submit(asks("aa", tenant="one"))
    house.submit(asks("bb", tenant="two"))
    house.steps()
    assert house.engine.tenants == {"one", "two"}


def test_rows_that_wait_for_another_machine_are_written_down_once(house: LanguageHouse) -> None:
    class Remote(FakeLanguageEngine):
        def step(self, handle: Any, tokens: int) -> Step:
            return super().step(handle, tokens) if self.clock.now > 1001 else Step()

    marks: list[Any] = []
    mark = house.transport.mark_running
    house.transport.mark_running = lambda rows: (marks.append(rows), mark(rows))[1]  # type: ignore[method-assign]
    house.engine = Remote(house.clock)
    order = asks("a")
    house.submit(order)
    for _ in range(200):
        house.executor.step()
        house.clock.now += 0.006
    assert order.key in house.outcomes()
    assert [rows and dict(rows.rows) for rows in marks] == [{order.key: (0,)}, None]


def test_an_engine_that_waits_for_another_machine_lets_others_run_meanwhile(house: LanguageHouse) -> None:
    class Remote(FakeLanguageEngine):
        def step(self, handle: Any, tokens: int) -> Step:
            self.seen.append(["waits"])
            return Step()

    house.engine = Remote(house.clock)
    house.submit(asks("aa"))
    other = an_order("xx", model=replace(OTHER, engine="plain"))
    house.submit(other)
    turns: Sequence[bool] = [house.executor.step() for _ in range(6)]
    assert turns.count(True) >= 3
    assert other.key in house.outcomes()
    assert house.plain.batches == [["xx"]]
