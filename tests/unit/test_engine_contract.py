"""Engines that fail in every method, at every call: the executor loses no row, ends none twice, and goes on.

Driven through what the executor shows to others (submit, drop, step, what it reports), so that it holds whatever the
executor is made of. `Faults` say which call of which method raises what.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.protocol.columns import CellError, Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment, Outcome, TaskOrder
from motet.tasks import Choose, Embed, Generate, Number
from tests.tiny_language import a_llama
from tests.unit.test_worker_engines import tiny_bert
from tests.unit.test_worker_executor import OTHER, TRUNK, FakeEngine, House, an_order
from tests.unit.test_worker_flow import MODEL, FakeLanguageEngine, asks, json_column
from workers.engine import CannotLoad, DeviceBroken, Ended, OutOfMemory, Pass, Prepared, Step
from workers.engines.causal.causal import CausalEngine
from workers.engines.encoder.encoder import EncoderEngine
from workers.registrar.describe import describe_folder
from workers.run.attempts import Key

#: What an engine may raise, by a short name.
ERRORS: Mapping[str, type[Exception]] = {
    "no memory": OutOfMemory,
    "device": DeviceBroken,
    "refusal": CannotLoad,
    "bug": ValueError,
}
EVERYWHERE = ("memory_mb", "load", "attach", "prepare", "unload")
OF_BATCHES = (*EVERYWHERE, "run")
OF_STREAMS = (*EVERYWHERE, "admit", "step", "abort")


@dataclass
class Faults:
    """Which call of which method raises what, counted from 1. Each strikes once."""

    planned: dict[tuple[str, int], str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    struck: list[tuple[str, str]] = field(default_factory=list)

    def strike(self, method: str) -> None:
        self.calls[method] += 1
        if error := self.planned.pop((method, self.calls[method]), None):
            self.struck.append((method, error))
            raise ERRORS[error]("a text that must not be logged")


class Accounts:
    """What is in memory: no model twice, and never more than there is room for. Wrongs are kept for the end of a test."""

    def __init__(self, budget_mb: int) -> None:
        self.budget_mb, self.size_mb = budget_mb, 10
        #: Model -> its megabytes.
        self.loaded: dict[str, int] = {}
        self.wrongs: list[str] = []
        self.answered: list[Prepared] = []

    def hold(self, right: bool, wrong: str) -> None:
        if not right:
            self.wrongs.append(wrong)

    def took(self, name: str) -> None:
        self.hold(name not in self.loaded, f"{name} was loaded twice")
        self.loaded[name] = self.size_mb
        self.hold(sum(self.loaded.values()) <= self.budget_mb, "more was loaded than there is room for")

    def gave(self, name: str) -> None:
        self.hold(name in self.loaded, f"{name} was unloaded twice")
        self.loaded.pop(name, None)

    def used(self, name: str, rows: Sequence[Prepared]) -> None:
        self.hold(name in self.loaded, f"{name} was used, and is not loaded")
        again = [row for row in rows if any(row is one for one in self.answered)]
        self.hold(not again, "a row came again that was answered")


@dataclass
class FaultyBatches(FakeEngine):
    """Answers whole batches, and fails as told."""

    faults: Faults = field(default_factory=Faults)
    accounts: Accounts = field(default_factory=lambda: Accounts(100))

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        self.faults.strike("memory_mb")
        self.accounts.size_mb = self.size_mb
        return super().memory_mb(model, in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> str:
        self.faults.strike("load")
        handle = super().load(model, files, device=device, in_format=in_format)
        self.accounts.took(handle)
        return handle

    def attach(self, handle: str, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self.faults.strike("attach")
        super().attach(handle, task, files)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        self.faults.strike("prepare")
        return super().prepare(pass_, texts)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        self.accounts.used(pass_.handle, batch)
        self.faults.strike("run")
        found = super().run(pass_, batch)
        self.accounts.answered += batch
        return found

    def unload(self, handle: str) -> None:
        self.accounts.gave(handle)
        self.faults.strike("unload")
        super().unload(handle)


@dataclass
class FaultyStream(FakeLanguageEngine):
    """Answers row by row, and fails as told. ``late``: a row that is refused with an error is inside all the same."""

    faults: Faults = field(default_factory=Faults)
    accounts: Accounts = field(default_factory=lambda: Accounts(100))
    late: bool = False
    #: Rows inside, by model.
    each: dict[str, dict[Hashable, list[Any]]] = field(default_factory=dict)

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        self.faults.strike("memory_mb")
        self.accounts.size_mb = self.size_mb
        return super().memory_mb(model, in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> str:
        self.faults.strike("load")
        handle = super().load(model, files, device=device, in_format=in_format)
        self.accounts.took(handle)
        self.each[handle] = {}
        return handle

    def attach(self, handle: str, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self.faults.strike("attach")
        super().attach(handle, task, files)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        self.faults.strike("prepare")
        return super().prepare(pass_, texts)

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        self.accounts.used(pass_.handle, [row])
        self.inside_ = self.each[pass_.handle]
        beside = [one[3] for one in self.inside_.values()]
        self.accounts.hold(all(one is not row for one in beside), "a row went in twice")
        if not self.late:
            self.faults.strike("admit")
        entered = super().admit(pass_, row, ticket, urgent=urgent)
        if entered:
            self.inside_[ticket].append(row)
        if self.late:
            self.faults.strike("admit")
        return entered

    def step(self, handle: Any, tokens: int) -> Step:
        self.faults.strike("step")
        self.inside_ = self.each[handle]
        rows = {ticket: one[3] for ticket, one in self.inside_.items()}
        step = super().step(handle, tokens)
        self.accounts.answered += [rows[one.ticket] for one in step.ended if isinstance(one, Ended)]
        return step

    def abort(self, handle: Any, tickets: Collection[Hashable]) -> None:
        self.faults.strike("abort")
        self.inside_ = self.each[handle]
        super().abort(handle, tickets)

    def unload(self, handle: str) -> None:
        self.accounts.gave(handle)
        del self.each[handle]
        self.faults.strike("unload")
        super().unload(handle)


class FaultyHouse(House):
    """An executor over an engine that fails as told."""

    engine: FaultyBatches | FaultyStream  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.submitted: list[Assignment] = []
        self.dropped: set[Key] = set()
        self.engine = FaultyBatches(self.clock)
        self.known_cost(TRUNK)
        self.known_cost(OTHER)
        self.known_cost(MODEL)

    @property
    def faults(self) -> Faults:
        return self.engine.faults

    def submit(self, order: Assignment) -> None:
        self.submitted.append(order)
        super().submit(order)

    def replaced(self) -> FaultyHouse:
        """Another process in place of one whose device was lost; what is planned to fail still does."""
        house = FaultyHouse()
        house.engine = dataclasses.replace(self.engine, clock=house.clock, accounts=Accounts(100))
        if isinstance(house.engine, FaultyStream):
            house.engine.each = {}
        return house

    def drop(self, order: Assignment) -> None:
        self.dropped.add(order.key)
        self.executor.drop(self.attempts.drop(self.dropped))

    def step(self) -> bool:
        """One step; none after the device was lost, which ends a real process."""
        return not self.broken and self.executor.step()

    def settled(self) -> dict[Key, Outcome]:
        """Step until nothing is left to do: every attempt has then ended, once. Unless the device was lost."""
        steps = 0
        while self.step():
            steps += 1
            assert steps < 2000, "it goes round and round"
        outcomes = self.outcomes()
        assert len(self.redis.entries) == len(outcomes), "an attempt has ended twice"
        assert self.engine.accounts.wrongs == []
        if not self.broken:
            assert set(outcomes) | self.dropped == {order.key for order in self.submitted}
            assert self.attempts.held() == ()
            assert self.executor.backlog_s() == 0
            assert len(self.executor.resident()) == len(self.engine.accounts.loaded)
        return outcomes


def a_house(kind: str, *, late: bool = False, **planned: str) -> FaultyHouse:
    """A house of batches or of a stream; ``planned``: as ``admit_3="bug"``."""
    house = FaultyHouse()
    if kind == "stream":
        house.engine = FaultyStream(house.clock, late=late)
    for where, error in planned.items():
        method, _, call = where.rpartition("_")
        house.faults.planned[method, int(call)] = error
    return house


def answered(house: FaultyHouse, outcomes: Mapping[Key, Outcome]) -> Counter[str]:
    """How each row ended, by class of error; "ok" only where the answer is right."""
    found: Counter[str] = Counter()
    for order in house.submitted:
        if order.key not in outcomes:
            continue
        outcome = outcomes[order.key]
        if outcome.verdict == "failed":
            found[(outcome.error or ("",))[0]] += len(order.texts)
            continue
        for task in order.tasks:
            column = outcome.columns[task.name]
            column.check()
            right = [t.upper() if task.column_kind == "json" else len(t) for t in order.texts]
            for row, value in enumerate(values(column)):
                error = column.errors.get(row)
                assert error is not None or value == right[row]
                found[error.error if error else "ok"] += 1
    return found


# -- rows are let in once, or wait, or end


@pytest.mark.parametrize("late", [False, True])
def test_no_memory_to_let_the_first_row_in_ends_that_row_alone(late: bool) -> None:
    house = a_house("stream", late=late, admit_1="no memory")
    house.submit(asks("aaa", "bb", "c"))
    outcomes = house.settled()
    assert answered(house, outcomes) == {"ok": 2, "out_of_memory": 1}
    [error] = outcomes[house.submitted[0].key].columns["said"].errors.values()
    assert error.retriable


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", ["no memory", "bug"])
def test_rows_that_went_in_before_the_third_failed_do_not_go_in_again(error: str, late: bool) -> None:
    house = a_house("stream", late=late, admit_3=error)
    house.submit(asks("aaaa", "bbbb", "cccc", "dddd"))
    outcomes = house.settled()
    assert answered(house, outcomes) == ({"ok": 4} if error == "no memory" else {"ok": 3, "engine": 1})


def test_an_engine_that_can_let_no_row_in_ends_them_all_with_errors() -> None:
    house = a_house("stream")
    house.faults.planned = {("admit", call): "bug" for call in range(1, 100)}
    house.submit(asks("aaaa", "bb"))
    house.submit(asks("cc"))
    assert answered(house, house.settled()) == {"engine": 3}


def test_an_engine_that_never_has_room_though_nothing_is_inside_ends_the_row() -> None:
    house = a_house("stream")
    assert isinstance(house.engine, FaultyStream)
    house.engine.places = 0
    house.submit(asks("aaaa", "bb"))
    assert answered(house, house.settled()) == {"engine": 2}


def test_a_lack_of_memory_for_one_more_row_lets_the_others_end_first() -> None:
    house = a_house("stream", admit_2="no memory")
    house.submit(asks("aaaa", "bbb", "cc"))
    assert answered(house, house.settled()) == {"ok": 3}
    assert house.engine.unloads == []


# -- answers of a stranger's engine


def nonsense(what: str, rows: int) -> Mapping[str, Column]:
    whole = json_column("x")
    return {
        "no column": {},
        "another kind": Column(kind="number", status=bytes(rows), arrays={"numbers": bytes(8 * rows)}),
        "too many rows": replace(whole, status=bytes(rows + 1)),
        "broken arrays": replace(whole, arrays={"offsets": b"", "bytes": b""}),
        "no arrays": replace(whole, arrays={}),
        "none at all": None,
    }[what]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "what", ["no column", "another kind", "too many rows", "broken arrays", "no arrays", "none at all"]
)
def test_a_bad_column_is_the_error_of_its_row_and_its_neighbours_are_answered(what: str) -> None:
    class Odd(FaultyStream):
        def step(self, handle: Any, tokens: int) -> Step:
            step = super().step(handle, tokens)
            return replace(step, ended=[self._bad(one) for one in step.ended])

        def _bad(self, one: Ended) -> Ended:
            if b'"ODD"' not in next(iter(one.columns.values())).arrays["bytes"]:
                return one
            bad = nonsense(what, 1)
            columns = dict.fromkeys(one.columns, bad) if isinstance(bad, Column) else bad
            return replace(one, columns=columns)

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    house.submit(asks("aaa", "odd", "ccc"))
    outcomes = house.settled()
    assert answered(house, outcomes) == {"ok": 2, "engine": 1}
    assert list(outcomes[house.submitted[0].key].columns["said"].errors) == [1]


@pytest.mark.parametrize("need_mb", [float("nan"), float("inf"), None, "much"])
def test_a_need_of_memory_that_is_no_number_fails_the_attempt(need_mb: Any) -> None:
    house = a_house("batch")
    house.submit(an_order("a", model=OTHER))
    house.settled()
    house.engine.memory_mb = lambda model, in_format: need_mb  # type: ignore[method-assign]
    house.submit(an_order("a"))
    assert answered(house, house.settled()) == {"ok": 1, "cannot_load": 1}


@pytest.mark.parametrize("length", [None, -1, "long", 1.5])
def test_a_length_that_is_none_is_the_error_of_its_row(length: Any) -> None:
    class Odd(FaultyBatches):
        def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
            found = super().prepare(pass_, texts)
            return [
                replace(r, length=length) if isinstance(r, Prepared) and r.inputs == "odd" else r
                for r in found
            ]

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    house.submit(an_order("aaa", "odd", "c"))
    assert answered(house, house.settled()) == {"ok": 2, "engine": 1}


@pytest.mark.parametrize(
    "spent", [(1, 2, 0, 0.1), (-1, -1, 0, 0.1), (1, 0, 1 << 40, 0.1), (1, 0, 0, float("nan")), None]
)
def test_what_a_row_cannot_have_consumed_is_its_error(spent: Any) -> None:
    class Odd(FaultyStream):
        def step(self, handle: Any, tokens: int) -> Step:
            step = super().step(handle, tokens)
            ended = [one for one in step.ended if isinstance(one, Ended)]
            return replace(step, ended=[replace(one, spent=dict.fromkeys(one.spent, spent)) for one in ended])

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    house.submit(asks("aaa"))
    assert answered(house, house.settled()) == {"engine": 1}


def test_vectors_of_another_format_than_was_asked_for_are_an_error_of_their_rows() -> None:
    vector = replace(TRUNK, answers="vector", dim=2)

    class Odd(FaultyBatches):
        def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
            n = len(batch)
            column = Column(
                kind="vector", status=bytes(n), arrays={"vectors": bytes(8 * n)}, dim=2, dtype="fp32"
            )
            return dict.fromkeys((task.name for task in pass_.tasks), column)

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    half = an_order("a", model=vector, tasks={"it": Embed("x", dtype="fp16")})
    house.submit(half)
    outcome = house.settled()[half.key]
    assert outcome.columns["it"].errors == {0: CellError("engine", "ValueError")}


@pytest.mark.parametrize("what", ["unknown", "twice", "no tickets"])
def test_a_row_that_ends_though_it_is_not_inside_changes_nothing(what: str) -> None:
    class Odd(FaultyStream):
        def step(self, handle: Any, tokens: int) -> Step:
            step = super().step(handle, tokens)
            if what == "no tickets":
                self.accounts.answered.clear()  # nobody was told of them
            more = {
                "unknown": [Ended("nobody", {}, {})],
                "twice": list(step.ended),
                "no tickets": None if self.faults.calls["step"] == 2 else [],
            }[what]
            return replace(step, ended=None if more is None else [*step.ended, *more])  # type: ignore[arg-type]

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    house.submit(asks("aaa", "bb", "c"))
    assert answered(house, house.settled())["ok"] >= (0 if what == "no tickets" else 3)


def test_rows_that_are_prepared_under_each_others_numbers_are_prepared_one_by_one() -> None:
    class Odd(FaultyBatches):
        def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
            found = super().prepare(pass_, texts)
            return [replace(row, row=0) for row in found if isinstance(row, Prepared)]

    house = FaultyHouse()
    house.engine = Odd(house.clock)
    house.submit(an_order("aaa", "bb", "c"))
    assert answered(house, house.settled()) == {"ok": 3}


# -- one fault, anywhere


HEAD = Manifest(name="head", version="1", engine="fake", answers="number", trunk="t", trunk_model="trunk@1")


def orders_of(kind: str) -> list[Assignment]:
    """Three attempts of two models, of which one gives way to the other, and a suspect."""
    if kind == "stream":
        return [
            asks("aaaa", "bb", "ccc", "dd", "eeeee"),
            asks("ff", "ggg"),
            replace(asks("hh"), model=replace(MODEL, name="other", trunk="o")),
            asks("ii", "jj", exclusive=True),
        ]
    both = {"size": Number("trunk@1"), "head": Number("head@1")}
    return [
        an_order(*(letter * 300 for letter in "abcde"), tasks=both, heads={"head": HEAD}),
        an_order("ff", "ggg"),
        an_order("hh", model=OTHER),
        an_order("ii", "jj", exclusive=True),
    ]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("kind", "method"), [*(("batch", m) for m in OF_BATCHES), *(("stream", m) for m in OF_STREAMS)]
)
def test_one_fault_of_any_method_at_any_call_costs_no_row_twice_and_nothing_stands_still(
    kind: str, method: str, error: str
) -> None:
    for call in range(1, 7):
        house = a_house(kind, late=bool(call % 2), **{f"{method}_{call}": error})
        house.engine.size_mb = 60
        for order in orders_of(kind):
            house.submit(order)
            house.step()
        house.step()
        if call == 5:
            house.drop(house.submitted[1])
        outcomes = house.settled()
        if house.broken:
            assert error == "device"
            continue
        found = answered(house, outcomes)
        if method in ("prepare", "run", "admit", "step"):
            # Rows are blamed alone; and the fault of one call is at most that of one row.
            assert found.total() - found["ok"] <= 1
        assert found["ok"] == found.total() or method != "unload"
        assert found["ok"] >= 1


@pytest.mark.parametrize("error", ERRORS)
def test_an_engine_that_cannot_put_rows_out_is_given_up_and_its_attempts_come_back(error: str) -> None:
    house = a_house("stream", step_2="bug", abort_1=error)
    for order in (asks("aaaa", "bb"), asks("cc")):
        house.submit(order)
    outcomes = house.settled()
    if error == "device":
        assert house.broken
        return
    assert {one.error[0] for one in outcomes.values() if one.error} == {"engine"}
    assert not any(one.refused for one in outcomes.values())
    house.submit(asks("dd"))
    assert answered(house, house.settled())["ok"] == 1
    assert house.engine.loads == ["lm", "lm"]


@pytest.mark.parametrize("error", ERRORS)
def test_an_engine_that_cannot_forget_a_dropped_attempt_does_not_take_the_others_along(error: str) -> None:
    house = a_house("stream", abort_1=error)
    gone, kept = asks("aaaa"), asks("bbbb")
    for order in (gone, kept):
        house.submit(order)
    house.step()
    house.step()
    house.drop(gone)
    outcomes = house.settled()
    assert house.broken == (error == "device")
    assert house.broken or kept.key in outcomes


# -- many faults, anywhere


def whatever(kind: str, data: st.DataObject) -> FaultyHouse:
    """A house of which anything may fail, and fails again in the processes that take its place."""
    methods = OF_BATCHES if kind == "batch" else OF_STREAMS
    house = a_house(kind, late=data.draw(st.booleans(), "late"))
    house.faults.planned = data.draw(
        st.dictionaries(
            st.tuples(st.sampled_from(methods), st.integers(1, 12)), st.sampled_from([*ERRORS]), max_size=8
        ),
        "faults",
    )
    house.engine.size_mb = data.draw(st.sampled_from([10, 60]), "size_mb")
    if isinstance(house.engine, FaultyStream):
        house.engine.places = data.draw(st.integers(1, 6), "places")
        house.engine.memory = data.draw(st.sampled_from([None, 1, 2]), "memory")
    else:
        house.engine.room = data.draw(st.sampled_from([None, 40, 400]), "room")
    return house


def any_order(kind: str, data: st.DataObject) -> Assignment:
    words = st.sampled_from(["a", "bb", "c" * 9, "d" * 30, "bomb"])
    texts = data.draw(st.lists(words, min_size=1, max_size=8), "texts")
    how = {name: data.draw(st.booleans(), name) for name in ("exclusive", "interactive")}
    other = data.draw(st.booleans(), "other")
    if kind == "stream":
        order = asks(*texts, **how)
        return replace(order, model=replace(MODEL, name="other", trunk="o")) if other else order
    return an_order(*texts, model=OTHER if other else TRUNK, **how)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["batch", "stream"]), st.data())
def test_whatever_fails_every_row_ends_exactly_once(kind: str, data: st.DataObject) -> None:
    house = whatever(kind, data)
    ended: dict[int, Outcome] = {}
    waiting: dict[int, Assignment] = {}
    for _ in range(data.draw(st.integers(1, 5), "orders")):
        order = any_order(kind, data)
        waiting[order.subtask] = order
        house.submit(order)
        for _ in range(data.draw(st.integers(0, 4), "steps")):
            house.step()
        if data.draw(st.integers(0, 5), "drop") == 0:
            house.drop(order)
            del waiting[order.subtask]
    for attempt in range(2, 40):
        for key, outcome in house.settled().items():
            if outcome.verdict == "done":
                # Told again by this house, or the first end of these rows.
                assert ended.setdefault(key[0], outcome).attempt == key[1]
                waiting.pop(key[0], None)
        if not waiting:
            break
        # What failed as a whole comes back; what a lost process held comes back to another one.
        house = house.replaced() if house.broken else house
        for subtask, order in waiting.items():
            waiting[subtask] = replace(order, attempt=attempt)
            house.submit(waiting[subtask])
    assert not waiting
    for subtask, outcome in ended.items():
        assert outcome.subtask == subtask
        for column in outcome.columns.values():
            column.check()
            assert len(column) == sum(column.counts()[:2])


# -- the engines that come with motet


class Struck:
    """A real engine that fails as told before it does anything."""

    def __init__(self, engine: Any, files: Mapping[str, Path], faults: Faults) -> None:
        self.engine, self.files, self.faults = engine, files, faults

    def find(self, name: str) -> Any:
        return self

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        self.faults.strike("memory_mb")
        return 10

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Any:
        self.faults.strike("load")
        return self.engine.load(model, self.files, device=device, in_format=in_format)

    def attach(self, handle: Any, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self.faults.strike("attach")
        self.engine.attach(handle, task, files)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        self.faults.strike("prepare")
        return self.engine.prepare(pass_, texts)  # type: ignore[no-any-return]

    def unload(self, handle: Any) -> None:
        self.faults.strike("unload")
        self.engine.unload(handle)


class StruckBatches(Struck):
    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        self.faults.strike("run")
        return self.engine.run(pass_, batch)  # type: ignore[no-any-return]


class StruckStream(Struck):
    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        entered: bool = self.engine.admit(pass_, row, ticket, urgent=urgent)
        self.faults.strike("admit")
        return entered

    def step(self, handle: Any, tokens: int) -> Step:
        self.faults.strike("step")
        return self.engine.step(handle, tokens)  # type: ignore[no-any-return]

    def abort(self, handle: Any, tickets: Collection[Hashable]) -> None:
        self.faults.strike("abort")
        self.engine.abort(handle, tickets)


TEXTS = ("the cat sat on the mat", "prices rose again in March", "a film", "the dog looked at the cat " * 4)


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Callable[[Faults], tuple[House, Assignment]]]:
    """Houses of the tiny encoder and the tiny language model, each with an order for it."""
    bert = describe_folder(
        tiny_bert(tmp_path_factory.mktemp("bert")), name="bert", version="1", licence="", source={}
    )
    llama = describe_folder(
        a_llama(tmp_path_factory.mktemp("llama")), name="tiny", version="1", licence="", source={}
    )
    encoder, causal = EncoderEngine(), CausalEngine()

    def encodes(faults: Faults) -> tuple[House, Assignment]:
        house = House(engines=StruckBatches(encoder, bert.files, faults))
        return house, an_order(*TEXTS, model=bert.manifest, tasks={"it": Embed("x")})

    def writes(faults: Faults) -> tuple[House, Assignment]:
        house = House(engines=StruckStream(causal, llama.files, faults))
        tasks = {
            "it": Generate("tiny", prompt="Go on.", max_tokens=6),
            "mood": Choose("tiny", labels=("a", "b")),
        }
        return house, an_order(*TEXTS, model=llama.manifest, tasks=tasks)

    return {"batch": encodes, "stream": writes}


def told(house: House, order: Assignment) -> tuple[dict[str, list[Any]], dict[int, str]]:
    """The answers of an order, and the class of its errors by row."""
    house.submit(order)
    house.steps(2000)
    outcome = house.outcomes()[order.key]
    errors = {row: e.error for column in outcome.columns.values() for row, e in column.errors.items()}
    return {name: list(values(column, ("a", "b"))) for name, column in outcome.columns.items()}, errors


@pytest.mark.parametrize("error", ["no memory", "bug"])
@pytest.mark.parametrize("kind", ["batch", "stream"])
def test_a_real_engine_gives_the_same_answers_whatever_failed_beside_them(
    real: Mapping[str, Callable[[Faults], tuple[House, Assignment]]], kind: str, error: str
) -> None:
    right, none = told(*real[kind](Faults()))
    assert not none
    methods = ("prepare", "run") if kind == "batch" else ("prepare", "admit", "step")
    for method, call in itertools.product(methods, (1, 2, 3)):
        found, errors = told(*real[kind](Faults({(method, call): error})))
        assert len(errors) <= 1, (method, call)
        assert set(errors.values()) <= {"engine" if error == "bug" else "out_of_memory"}
        for name, answers in found.items():
            wrong = [
                a for a, b in zip(answers, right[name], strict=True) if a is not None and not alike(a, b)
            ]
            assert not wrong, (method, call)


def alike(one: Any, other: Any) -> bool:
    """Numbers may differ by what another micro-batch rounds otherwise."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else bool(one == other)


# -- steps that bring nothing


def idle_steps(house: FaultyHouse, seconds: float) -> None:
    """Look every second, as long as the watchdog sees nothing wrong."""
    until = house.clock.now + seconds
    while house.clock.now < until and house.executor.stuck() is None:
        house.step()
        house.clock.now += 1


class Idle(FaultyStream):
    """Never goes on with the rows that say so."""

    def step(self, handle: Any, tokens: int) -> Step:
        waiting = any(one[0] == "idle" for one in self.each[handle].values())
        return Step() if waiting else super().step(handle, tokens)


def test_a_stream_that_for_ever_computes_nothing_with_rows_inside_is_seen_by_the_watchdog() -> None:
    house = FaultyHouse()
    house.engine = Idle(house.clock)
    house.submit(asks("idle"))
    idle_steps(house, 7)
    assert house.executor.stuck() is None
    idle_steps(house, 100)
    assert "no progress for 9 s, at most 8" in (house.executor.stuck() or "")


def test_an_engine_that_asks_other_machines_says_how_long_those_may_be_silent() -> None:
    house = FaultyHouse()
    house.engine = Idle(house.clock)
    house.engine.longest_wait_s = 300.0  # type: ignore[attr-defined]
    house.submit(asks("idle"))
    idle_steps(house, 290)
    assert house.executor.stuck() is None
    idle_steps(house, 100)
    assert "at most 300" in (house.executor.stuck() or "")


def test_silence_counts_from_the_last_progress_and_not_where_the_rows_were_dropped() -> None:
    house = FaultyHouse()
    house.engine = Idle(house.clock)
    for _ in range(5):
        gone = asks("idle")
        house.submit(gone)
        idle_steps(house, 6)
        house.drop(gone)
        house.settled()
        house.submit(asks("aaa"))
        house.settled()
    assert house.executor.stuck() is None


class Silent(Idle):
    """Counts its steps; rows in it wait for a server."""

    steps = 0

    def step(self, handle: Any, tokens: int) -> Step:
        self.steps += 1
        return super().step(handle, tokens)


def looks_in_a_second(house: FaultyHouse, order: Assignment) -> int:
    house.engine = engine = Silent(house.clock)
    house.submit(order)
    for _ in range(1000):
        house.step()
        house.clock.now += 0.001
    return engine.steps


def test_rows_inside_that_wait_for_a_server_are_looked_at_often_only_where_somebody_waits_for_them() -> None:
    bulk, urgent = FaultyHouse(), FaultyHouse()
    assert looks_in_a_second(bulk, asks("idle")) <= 12
    assert looks_in_a_second(urgent, asks("idle", interactive=True)) >= 50
    # The server works on them all the time.
    assert bulk.executor.busy_s() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("interactive", [False, True])
def test_work_that_comes_while_rows_inside_wait_for_a_server_is_let_in_at_once(interactive: bool) -> None:
    house = FaultyHouse()
    house.engine = engine = Silent(house.clock)
    house.submit(asks("idle"))
    while house.step():
        pass
    house.submit(asks("more", interactive=interactive))
    house.step()
    assert sorted(one[0] for rows in engine.each.values() for one in rows.values()) == ["idle", "more"]


# -- memory comes back


def test_a_micro_batch_that_was_too_large_once_grows_again() -> None:
    house = a_house("batch", run_1="no memory")
    house.submit(an_order(*["a" * 100] * 1000))
    assert answered(house, house.settled()) == {"ok": 1000}
    sizes = [len(batch) for batch in house.engine.batches]
    assert sizes[0] == 5
    assert sizes[70] == 10
    assert set(sizes) == {5, 10}


def test_rows_that_were_too_many_at_once_are_more_again_where_memory_is_back() -> None:
    house = a_house("stream")
    assert isinstance(house.engine, FaultyStream)
    house.engine.memory = 2
    house.submit(asks(*["aaa"] * 20))
    house.settled()
    assert len(house.engine.seen[-3]) <= 2
    house.engine.memory = None
    house.submit(asks(*["bbb"] * 400))
    assert answered(house, house.settled()) == {"ok": 420}
    assert max(map(len, house.engine.seen[-100:-10])) == house.engine.places


def test_a_prompt_too_long_for_a_whole_step_is_read_in_smaller_ones() -> None:
    class Long(FaultyStream):
        def step(self, handle: Any, tokens: int) -> Step:
            if tokens > 300:
                raise OutOfMemory
            return super().step(handle, tokens)

    house = FaultyHouse()
    house.engine = Long(house.clock)
    house.submit(asks("aaa"))
    assert answered(house, house.settled()) == {"ok": 1}


# -- rows that run again to find the one at fault


def test_nobody_joins_the_rows_among_which_the_one_at_fault_is_looked_for() -> None:
    house = a_house("stream")
    assert isinstance(house.engine, FaultyStream)
    house.submit(asks("bomb", "aaaa"))
    house.step()
    house.step()
    for _ in range(4):
        house.submit(asks("cc"))
        house.step()
    house.settled()
    with_bomb = [texts for texts in house.engine.seen if "bomb" in texts]
    assert with_bomb == [["aaaa", "bomb"], ["bomb"]]


def test_what_somebody_waits_for_goes_in_between_the_halves() -> None:
    house = a_house("stream")
    assert isinstance(house.engine, FaultyStream)
    house.submit(asks("bomb", "bbbb", "cccc", "dddd"))
    house.step()
    house.step()
    house.submit(asks("i", interactive=True))
    house.step()
    assert house.engine.seen[-1] == ["i"]
    assert answered(house, house.settled()) == {"ok": 4, "engine": 1}


# -- memory


class Elsewhere:
    """Does something on another thread, and waits for its end unless a lock keeps it waiting."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.thread = threading.Thread(target=do)

    def run(self) -> None:
        self.thread.start()
        self.thread.join(0.2)


def test_an_attempt_that_comes_while_models_give_way_finds_its_model_whole() -> None:
    house = a_house("batch")
    house.engine.size_mb = 45
    for model in (TRUNK, OTHER):
        house.submit(an_order("a", model=model))
        house.settled()
    house.pending = []
    late = Elsewhere(lambda: house.submit(an_order("late", model=OTHER, interactive=True)))
    unload = house.engine.unload

    def spy(handle: str) -> None:
        if not late.thread.ident:
            late.run()
        unload(handle)

    house.engine.unload = spy  # type: ignore[method-assign]
    house.engine.size_mb = 90
    house.submit(an_order("large", model=replace(OTHER, name="large", trunk="l")))
    while house.executor.step() or house.pending:
        late.thread.join()
        for job, _ in house.pending:
            job()
        house.pending.clear()
    house.engine.size_mb = 45
    house.pending = None
    assert answered(house, house.settled()) == {"ok": 4}


@pytest.mark.parametrize("call", range(1, 8))
def test_a_model_that_is_wanted_again_while_another_is_about_to_load_is_not_pushed_out(call: int) -> None:
    house = a_house("batch")
    house.engine.size_mb = 60
    house.submit(an_order("a"))
    house.settled()
    house.engine.faults.calls.clear()
    again = Elsewhere(lambda: house.submit(an_order("again", interactive=True)))
    memory_mb = house.engine.memory_mb

    def spy(model: Manifest, in_format: str) -> int:
        found = memory_mb(model, in_format)
        if house.engine.faults.calls["memory_mb"] == call:
            again.run()
        return found

    house.engine.memory_mb = spy  # type: ignore[method-assign]
    house.submit(an_order("o", model=OTHER))
    house.executor.step()
    if again.thread.ident:
        again.thread.join()
    found = answered(house, house.settled())
    assert found == {"ok": 2 + bool(again.thread.ident)}


def test_the_device_is_lost_where_preparing_says_so() -> None:
    house = a_house("batch", prepare_1="device")
    house.submit(an_order("a"))
    house.settled()
    assert house.broken == 1


def test_a_row_without_memory_to_be_prepared_may_be_tried_elsewhere() -> None:
    house = a_house("batch", prepare_1="no memory", prepare_3="no memory")
    house.submit(an_order("aa", "bb", "cc"))
    outcomes = house.settled()
    assert answered(house, outcomes) == {"ok": 2, "out_of_memory": 1}
    [error] = outcomes[house.submitted[0].key].columns["size"].errors.values()
    assert error.retriable
