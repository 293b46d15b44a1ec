"""The executor, driven step by step with a fake engine: no threads, no device, no Redis."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.errors import MotetError, Unreachable
from motet.media.medium import Medium
from motet.protocol.columns import ERROR, OK, STATE_MASK, TRUNCATED, CellError, Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.transport import MemoryTransport, MemoryWorkerTransport, TransportLost
from motet.protocol.wire import Assignment, Outcome, Running, TaskOrder
from motet.tasks import Classify, Number, Task
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Pass, Prepared
from workers.run.attempts import Attempts, Key
from workers.run.batching import Budget, Cost, Pace
from workers.run.blobs import CannotFetch
from workers.run.device import Device
from workers.run.executor import LOAD_S, PREPARE_S, Executor
from workers.run.lane import WINDOW_S
from workers.run.media import Media
from workers.run.reporter import Reporter
from workers.run.sayer import Sayer
from workers.run.stream import FIRST_MEASURED_S, FIRST_RUN_S, RUN_S

#: Of a device that interactive work may take from bulk.
SHARE = 0.3
TRUNK = Manifest(name="trunk", version="1", engine="fake", answers="number", trunk="t", formats=("bf16",))
OTHER = Manifest(name="other", version="1", engine="fake", answers="number", trunk="o")


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """Answers each text with its length, in `second_per_row` seconds; some words make it fail."""

    clock: Clock
    second_per_row: float = 0.001
    #: Token budget of its memory; None has room for all.
    room: int | None = None
    size_mb: int = 10
    load_s: float = 0.0
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    #: Called while a micro-batch runs.
    during: Callable[[], None] = lambda: None
    formats: list[str] = field(default_factory=list)

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return self.size_mb

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> str:
        if model.name == "broken":
            raise CannotLoad("it is not a model")
        self.clock.now += self.load_s
        self.loads.append(model.name)
        self.formats.append(in_format)
        return model.name

    def attach(self, handle: str, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self.attached.append(task.manifest.name)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        if any("panic" in text for text in texts):
            raise ValueError("a text that must not be logged")
        most = pass_.max_tokens or 10_000
        return [
            CellError("bad_row", "cannot be read")
            if text == "unreadable"
            else Prepared(row, min(len(text), most), len(text) > most, text)
            for row, text in enumerate(texts)
        ]

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        texts = [row.inputs for row in batch]
        self.batches.append(texts)
        self.clock.now += self.second_per_row * len(batch)
        self.during()
        if self.room is not None and max(r.length for r in batch) * len(batch) > self.room:
            raise OutOfMemory
        if any("hog" in text for text in texts):
            raise OutOfMemory
        if any("bomb" in text for text in texts):
            raise RuntimeError("a text that must not be logged")
        if any("short circuit" in text for text in texts):
            raise DeviceBroken
        numbers = struct.pack(f"<{len(texts)}d", *map(len, texts))
        return {
            t.name: Column(kind="number", status=bytes([OK]) * len(texts), arrays={"numbers": numbers})
            for t in pass_.tasks
        }

    def unload(self, handle: str) -> None:
        self.unloads.append(handle)


class FakeFiles:
    """Files that are always there."""

    def fetch(self, model: Manifest) -> None:
        if model.name == "lost":
            raise CannotFetch("blob 0123…: the API answered 503")

    @contextmanager
    def folder(self, model: Manifest) -> Iterator[Mapping[str, Path]]:
        yield {}


@dataclass
class FakeMedia:
    """Gives two media at a time, of those that it has."""

    stored: dict[str, bytes] = field(default_factory=dict)
    error: MotetError | None = None
    #: What was asked for, and under which lease.
    asked: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def some(self, sha256s: Sequence[str], lease: str) -> Mapping[str, bytes]:
        self.asked.append((tuple(sha256s), lease))
        if self.error is not None:
            raise self.error
        return {s: self.stored[s] for s in [s for s in sha256s if s in self.stored][:2]}


@dataclass
class House:
    """An executor with everything around it, and short words for what tests do."""

    formats: tuple[str, ...] = ()
    budget_mb: int = 100
    device: Device | None = None
    clock: Clock = field(default_factory=Clock)
    broken: int = 0
    #: Where engines are found; a fake one unless told otherwise.
    engines: Any = None

    def __post_init__(self) -> None:
        self.engine = FakeEngine(self.clock)
        self.redis = MemoryTransport()
        self.transport: MemoryWorkerTransport = self.redis.worker("w")
        self.attempts = Attempts()
        self.reporter = Reporter(self.transport, self.attempts)
        self.sayer = Sayer(self.transport, self.clock)
        self.pictures = FakeMedia()
        #: Tokenising that waits to be done, and whether of interactive rows; None does it at once.
        self.pending: list[tuple[Callable[[], None], bool]] | None = None
        self.executor = Executor(
            lane_share=SHARE,
            worker="w",
            boot="b",
            device=self.device or Device("cpu", "a fake", "cpu", 1000, self.formats),
            engines=self.engines or self,
            files=FakeFiles(),
            transport=self.transport,
            attempts=self.attempts,
            reporter=self.reporter,
            budget_mb=self.budget_mb,
            broken=self._broken,
            spawn=self._spawn,
            sayer=self.sayer,
            media=Media(self.pictures, clock=self.clock),
            clock=self.clock,
        )

    def find(self, name: str) -> FakeEngine:
        if name != "fake":
            raise CannotLoad(f"no engine {name!r} here")
        return self.engine

    def submit(self, order: Assignment) -> None:
        self.attempts.receive(order.key)
        assert self.attempts.begin(order.key)
        self.executor.submit(order)

    def steps(self, most: int = 10_000) -> int:
        """Step until there is nothing to do; return how many did something."""
        return sum(1 for _ in itertools.takewhile(lambda _: self.executor.step(), range(most)))

    def outcomes(self) -> dict[Key, Outcome]:
        while self.reporter.step():
            pass
        return {key: Outcome.decode(body) for key, body in self.redis.entries.values()}

    def known_cost(self, model: Manifest = TRUNK, each: float = 0.0001) -> None:
        """Let the executor know the model's cost and budget, so that no probe is needed."""
        pace = Pace(Budget(1024, settled=True), Cost().observed(1000, 1000 * each))
        known = self.executor._shelf.paces[model.digest, "fp32"]
        known.budget, known.cost = pace.budget, pace.cost

    def _spawn(self, job: Callable[[], None], interactive: bool) -> None:
        if self.pending is None:
            job()
        else:
            self.pending.append((job, interactive))

    def _broken(self) -> None:
        self.broken += 1


ATTEMPTS = itertools.count(1)


def an_order(
    *texts: str,
    model: Manifest = TRUNK,
    tasks: Mapping[str, Task] | None = None,
    heads: Mapping[str, Manifest] | None = None,
    **more: Any,
) -> Assignment:
    """An assignment of one number task, unless told otherwise."""
    asked = tasks or {"size": Number(model.ref)}
    return Assignment(
        **{
            "subtask": next(ATTEMPTS),
            "attempt": 1,
            "nonce": "n",
            "job": "j",
            "tenant": "t",
            "pass_kind": "fake",
            "model": model,
            "numerics": "fast",
            "max_tokens": 0,
            "tasks": tuple(
                TaskOrder(name=name, spec=task.to_json(), manifest=(heads or {}).get(name, model))
                for name, task in asked.items()
            ),
            "texts": texts,
            **more,
        }
    )


def answers(outcome: Outcome, task: str = "size") -> list[Any]:
    return list(values(outcome.columns[task]))


@pytest.fixture
def house() -> House:
    return House()


# -- the ordinary way


def test_an_attempt_is_loaded_run_and_reported_in_its_own_row_order(house: House) -> None:
    order = an_order("aaa", "a", "aaaaa", "aa")
    house.submit(order)
    assert house.attempts.held() == (order.key,)
    house.steps()
    outcome = house.outcomes()[order.key]
    assert (outcome.verdict, answers(outcome)) == ("done", [3.0, 1.0, 5.0, 2.0])
    assert house.engine.batches == [["aaaaa", "aaa", "aa", "a"]]
    assert (outcome.worker, outcome.boot, outcome.nonce) == ("w", "b", "n")
    assert house.attempts.held() == ()


def test_usage_counts_tokens_padding_bytes_and_seconds(house: House) -> None:
    house.known_cost()
    order = an_order("é" * 600, "a" * 600, "a" * 300)
    house.submit(order)
    house.steps()
    usage = house.outcomes()[order.key].usage
    assert (usage.tokens, usage.text_bytes, usage.micro_batches) == (1500, 2100, 3)
    assert usage.computed_tokens == 600 + 600 + 300
    assert usage.busy_s == pytest.approx(0.003)
    assert usage.format == "fp32"


def test_padding_is_computed_tokens_beyond_tokens(house: House) -> None:
    house.known_cost()
    order = an_order("a" * 100, "a" * 80)
    house.submit(order)
    house.steps()
    usage = house.outcomes()[order.key].usage
    assert (usage.tokens, usage.computed_tokens, usage.micro_batches) == (180, 200, 1)


def test_rows_that_are_much_shorter_wait_for_the_next_micro_batch(house: House) -> None:
    house.known_cost()
    order = an_order("a" * 300, "a" * 10)
    house.submit(order)
    house.steps()
    usage = house.outcomes()[order.key].usage
    assert (usage.tokens, usage.computed_tokens, usage.micro_batches) == (310, 310, 2)


def test_the_last_micro_batch_of_a_sub_task_is_filled_up_with_the_next_one_of_the_same_pass(
    house: House,
) -> None:
    house.known_cost()
    first, second = an_order(*["a" * 300] * 4), an_order(*["b" * 290] * 4)
    house.submit(first)
    house.submit(second)
    house.steps()
    assert [[text[0] for text in batch] for batch in house.engine.batches] == [
        ["a", "a", "a"],
        ["a", "b", "b"],
        ["b", "b"],
    ]
    assert list(house.outcomes()) == [first.key, second.key]


def test_rows_somewhat_shorter_fill_up_a_micro_batch_as_long_as_that_costs_less_than_another(
    house: House,
) -> None:
    house.known_cost()
    house.submit(an_order("a" * 40))
    house.submit(an_order(*["b" * 25] * 6))
    house.steps()
    assert len(house.engine.batches) == 2
    assert len(house.engine.batches[0]) > 1


def test_rows_much_shorter_than_the_longest_do_not_fill_up_a_micro_batch(house: House) -> None:
    house.known_cost()
    house.submit(an_order("a" * 300))
    house.submit(an_order("b" * 30))
    house.steps()
    assert [len(batch) for batch in house.engine.batches] == [1, 1]


def test_two_jobs_that_ask_the_same_under_other_names_share_a_micro_batch(house: House) -> None:
    house.known_cost()
    first = an_order("aaaa", tasks={"size": Number("trunk@1")})
    second = an_order(
        "bbbb", tasks={"length": Number("trunk@1", too_long="error"), "again": Number("trunk@1")}
    )
    house.submit(first)
    house.submit(second)
    house.steps()
    assert house.engine.batches == [["aaaa", "bbbb"]]
    outcomes = house.outcomes()
    assert answers(outcomes[first.key], "size") == [4.0]
    assert answers(outcomes[second.key], "length") == answers(outcomes[second.key], "again") == [4.0]


def test_other_tasks_other_lengths_or_other_numerics_do_not_share_one() -> None:
    house = House(formats=("bf16",))
    for order in (an_order("aaaa"), an_order("bbbb", max_tokens=3), an_order("cccc", numerics="exact")):
        house.submit(order)
    house.steps()
    assert [len(batch) for batch in house.engine.batches] == [1, 1, 1]
    assert house.engine.formats == ["bf16", "fp32"]


def test_a_pass_runs_in_fp32_unless_every_head_passed_the_other_format() -> None:
    house = House(formats=("bf16",))
    head = Manifest(
        name="head", version="1", engine="fake", answers="number", trunk="t", trunk_model="trunk@1"
    )
    order = an_order("aa", tasks={"size": Number("trunk@1"), "head": Number("head@1")}, heads={"head": head})
    house.submit(order)
    house.steps()
    assert house.outcomes()[order.key].usage.format == "fp32"
    checked = replace(head, formats=("bf16",))
    order = an_order("aa", tasks={"head": Number("head@1")}, heads={"head": checked})
    house.submit(order)
    house.steps()
    assert house.outcomes()[order.key].usage.format == "bf16"


def test_heads_are_attached_once_beside_a_resident_trunk(house: House) -> None:
    head = Manifest(
        name="head", version="1", engine="fake", answers="number", trunk="t", trunk_model="trunk@1"
    )
    house.submit(an_order("aa"))
    house.steps()
    for _ in range(2):
        house.submit(an_order("aa", tasks={"head": Number("head@1")}, heads={"head": head}))
        house.steps()
    assert (house.engine.loads, house.engine.attached) == (["trunk"], ["head"])


def test_the_next_sub_task_is_tokenised_while_the_device_runs(house: House) -> None:
    house.submit(an_order("aa"))
    house.steps()
    house.pending = []
    house.submit(an_order("bb"))
    assert len(house.pending) == 1  # before any step
    house.pending.pop()[0]()
    house.steps()
    assert house.engine.batches[-1] == ["bb"]


# -- rows that go wrong


def test_a_bad_row_is_found_by_halving_and_its_neighbours_are_answered(house: House) -> None:
    house.known_cost()
    texts = [f"row {i}" for i in range(32)]
    texts[13] = "bomb"
    order = an_order(*texts)
    house.submit(order)
    house.steps()
    column = house.outcomes()[order.key].columns["size"]
    assert column.counts() == (31, 1, 0, 0)
    assert column.errors == {13: CellError("engine", "RuntimeError")}
    assert len(house.engine.batches) <= 1 + 2 * 5


def test_every_row_bad_is_every_row_an_error(house: House) -> None:
    order = an_order("bomb 1", "bomb 2", "bomb 3")
    house.submit(order)
    house.steps()
    column = house.outcomes()[order.key].columns["size"]
    assert column.counts() == (0, 3, 0, 0)
    column.check()


def test_a_row_that_cannot_be_prepared_is_its_own_error(house: House) -> None:
    order = an_order("fine", "unreadable", "panic", "also fine")
    house.submit(order)
    house.steps()
    column = house.outcomes()[order.key].columns["size"]
    assert {i: e.error for i, e in column.errors.items()} == {1: "bad_row", 2: "engine"}
    assert answers(house.outcomes()[order.key]) == [4.0, None, None, 9.0]


def test_out_of_memory_halves_and_the_ceiling_is_remembered(house: House) -> None:
    house.known_cost()
    house.engine.room = 300
    first = an_order(*["a" * 100] * 10)
    house.submit(first)
    house.steps()
    assert house.outcomes()[first.key].columns["size"].counts() == (10, 0, 0, 0)
    assert [len(b) for b in house.engine.batches] == [10, 5, 2, 2, 2, 2, 2]
    house.engine.batches.clear()
    house.submit(an_order(*["a" * 100] * 4))
    house.steps()
    assert [len(b) for b in house.engine.batches] == [2, 2]


def test_one_row_that_does_not_fit_is_an_error_and_the_others_are_answered(house: House) -> None:
    house.known_cost()
    house.engine.room = 200
    order = an_order("a" * 500, "a" * 100, "a" * 50)
    house.submit(order)
    house.steps()
    column = house.outcomes()[order.key].columns["size"]
    assert {i: (e.error, e.retriable) for i, e in column.errors.items()} == {0: ("out_of_memory", True)}
    assert column.counts() == (2, 1, 0, 0)


def test_a_row_that_takes_all_memory_by_itself_does_not_leave_small_micro_batches_behind(
    house: House,
) -> None:
    house.known_cost()
    order = an_order("a hog", *["short"] * 7)
    house.submit(order)
    house.steps()
    column = house.outcomes()[order.key].columns["size"]
    assert column.counts() == (7, 1, 0, 0)
    house.engine.batches.clear()
    house.submit(an_order(*["short"] * 12))
    house.steps()
    assert [len(b) for b in house.engine.batches] == [12]


def test_models_nobody_uses_give_way_before_a_row_is_given_up(house: House) -> None:
    house.submit(an_order("a", model=OTHER))
    house.steps()
    house.engine.room = 200
    house.engine.during = lambda: setattr(
        house.engine, "room", 200 if "other" not in house.engine.unloads else None
    )
    order = an_order("a" * 500)
    house.submit(order)
    house.steps()
    assert house.outcomes()[order.key].columns["size"].counts() == (1, 0, 0, 0)
    assert house.engine.unloads == ["other"]


def test_a_long_row_is_cut_and_marked_or_an_error_as_each_task_says(house: House) -> None:
    order = an_order(
        "a" * 9,
        "a" * 4,
        tasks={"cut": Number("trunk@1"), "strict": Number("trunk@1", too_long="error")},
        max_tokens=5,
    )
    house.submit(order)
    house.steps()
    columns = house.outcomes()[order.key].columns
    assert columns["cut"].status == bytes([OK | TRUNCATED, OK])
    assert columns["strict"].status[0] & STATE_MASK == ERROR
    assert columns["strict"].errors[0].error == "too_long"
    assert list(values(columns["strict"])) == [None, 4.0]


def test_a_long_row_that_every_task_refuses_never_reaches_the_device(house: House) -> None:
    order = an_order("a" * 9, tasks={"strict": Number("trunk@1", too_long="error")}, max_tokens=5)
    house.submit(order)
    house.steps()
    assert house.engine.batches == []
    assert house.outcomes()[order.key].columns["strict"].errors[0].error == "too_long"


def test_an_engine_that_answers_nonsense_is_an_error_of_its_rows(house: House) -> None:
    order = an_order("aa", tasks={"label": Classify("trunk@1")}, model=replace(TRUNK, answers="label"))
    house.submit(order)
    house.steps()
    assert house.outcomes()[order.key].columns["label"].errors == {0: CellError("engine", "ValueError")}


# -- attempts that go wrong


@pytest.mark.parametrize(
    ("model", "error", "refused"),
    [
        (replace(TRUNK, name="broken"), "cannot_load", True),
        (replace(TRUNK, engine="unknown"), "cannot_load", True),
        (replace(TRUNK, name="lost"), "cannot_fetch", False),
    ],
)
def test_a_model_that_cannot_be_had_fails_the_attempt_not_the_worker(
    house: House, model: Manifest, error: str, refused: bool
) -> None:
    order, fine = an_order("aa", model=model), an_order("aa")
    house.submit(order)
    house.submit(fine)
    house.steps()
    outcomes = house.outcomes()
    assert outcomes[order.key].verdict == "failed"
    assert (outcomes[order.key].error or ("",))[0] == error
    assert outcomes[order.key].refused == (model.digest if refused else "")
    assert outcomes[fine.key].verdict == "done"
    assert house.attempts.held() == ()


def test_a_model_larger_than_the_device_says_what_it_needs(house: House) -> None:
    house.engine.size_mb = 5000
    order = an_order("aa")
    house.submit(order)
    house.steps()
    outcome = house.outcomes()[order.key]
    assert outcome.error == ("cannot_load", "trunk@1: needs 5000 MB, models may hold 100 MB here")
    assert outcome.refused == TRUNK.digest


def test_a_broken_device_reports_nothing_and_ends_the_process(house: House) -> None:
    order = an_order("short circuit")
    house.submit(order)
    house.steps(3)
    assert house.broken
    assert house.outcomes() == {}
    assert house.attempts.held() == (order.key,)


# -- who goes first


def test_interactive_work_goes_first_at_the_next_micro_batch(house: House) -> None:
    house.known_cost()
    house.submit(an_order(*["b" * 900] * 6))
    house.executor.step()  # load
    house.executor.step()
    house.submit(an_order("now", interactive=True))
    house.executor.step()
    assert house.engine.batches[-1] == ["now"]


def test_bulk_is_cut_short_while_somebody_waited_lately_and_not_for_ever(house: House) -> None:
    house.known_cost(each=0.001)  # 100 tokens in a tenth of a second
    house.submit(an_order("i", interactive=True))
    house.steps()
    house.submit(an_order(*["b" * 10] * 30))
    house.executor.step()
    cut = len(house.engine.batches[-1])
    assert cut in (9, 10)
    house.clock.now += 11
    house.executor.step()
    assert len(house.engine.batches[-1]) == 30 - cut


def test_bulk_that_waits_keeps_its_share_of_the_device_under_any_number_of_interactive_rows(
    house: House,
) -> None:
    house.known_cost()
    house.engine.second_per_row = 0.05
    house.submit(an_order(*["b" * 900] * 400))
    house.executor.step()  # load
    began = house.clock.now
    while house.clock.now < began + 3 * WINDOW_S:
        house.submit(an_order("i" * 900, interactive=True))
        house.executor.step()
    bulk = sum(1 for (text,) in house.engine.batches if text[0] == "b") / len(house.engine.batches)
    assert 1 - SHARE <= bulk <= 1 - SHARE + 0.1


def test_interactive_rows_have_the_whole_device_while_no_bulk_could_run(house: House) -> None:
    house.known_cost()
    house.engine.second_per_row = 0.05
    house.submit(an_order(*["i" * 900] * 200, interactive=True))
    house.steps()
    house.submit(an_order(*["b" * 900] * 5))
    house.submit(an_order("now", interactive=True))
    house.executor.step()
    assert house.engine.batches[-1] == ["now"]


def test_loading_for_an_interactive_row_counts_but_the_row_itself_is_next(house: House) -> None:
    house.known_cost()
    house.known_cost(OTHER)
    house.submit(an_order(*["b" * 900] * 20))
    house.executor.step()
    house.executor.step()
    house.engine.load_s = 3.0
    house.submit(an_order("loads", model=OTHER, interactive=True))
    house.submit(an_order("later", interactive=True))
    for _ in range(4):
        house.executor.step()
    assert [batch[0][0] for batch in house.engine.batches] == ["b", "l", "b", "b"]
    assert house.engine.loads == ["trunk", "other"]
    house.clock.now += WINDOW_S
    house.executor.step()
    assert house.engine.batches[-1] == ["later"]


def test_halves_of_interactive_rows_keep_to_the_lane_too(house: House) -> None:
    house.known_cost()
    house.engine.second_per_row = 0.5
    house.submit(an_order(*["b" * 900] * 20))
    house.executor.step()
    house.submit(an_order("bomb", "i", interactive=True))
    for _ in range(3):
        house.executor.step()
    assert house.engine.batches == [["bomb", "i"], ["b" * 900], ["b" * 900]]
    house.steps()
    assert sorted(map(len, house.engine.batches)) == [1] * 22 + [2]


def test_interactive_rows_are_not_tokenised_behind_bulk(house: House) -> None:
    house.known_cost()
    house.submit(an_order("warm"))
    house.steps()
    house.pending = []
    house.submit(an_order("bulk"))
    house.submit(an_order("now", interactive=True))
    assert [interactive for _, interactive in house.pending] == [False, True]


def test_a_row_longer_than_the_cut_still_runs(house: House) -> None:
    house.known_cost(each=0.001)
    house.submit(an_order("i", interactive=True))
    house.submit(an_order("b" * 500, "b" * 500))
    house.steps()
    assert [len(b) for b in house.engine.batches] == [1, 1, 1]


def test_halves_of_a_failed_micro_batch_do_not_hold_up_interactive_work(house: House) -> None:
    house.known_cost()
    house.submit(an_order("bomb", "b2", "b3", "b4"))
    house.executor.step()
    house.executor.step()  # fails, is halved
    house.submit(an_order("now", interactive=True))
    house.executor.step()
    assert house.engine.batches[-1] == ["now"]


def test_an_exclusive_attempt_shares_no_micro_batch(house: House) -> None:
    house.known_cost()
    house.submit(an_order("aaaa"))
    house.submit(an_order("eeee", exclusive=True))
    house.submit(an_order("bbbb"))
    house.steps()
    assert sorted(map(sorted, house.engine.batches)) == [["aaaa", "bbbb"], ["eeee"]]


def test_an_exclusive_attempt_is_evidence_from_its_first_touch(house: House) -> None:
    seen: list[Running | None] = []
    house.submit(an_order("warm"))
    house.steps()
    order = an_order("eeee", "ee", exclusive=True)
    house.submit(order)
    prepare = house.engine.prepare

    def spy(pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        seen.append(house.redis.running("w"))
        return prepare(pass_, texts)

    house.engine.prepare = spy  # type: ignore[method-assign]
    house.steps()
    assert [r and dict(r.rows) for r in seen] == [{order.key: (0, 1)}]


def test_nothing_is_tokenised_beside_an_exclusive_micro_batch(house: House) -> None:
    house.submit(an_order("warm"))
    house.steps()
    house.submit(an_order("eeee", exclusive=True))
    order, alone = an_order("late"), []
    house.pending = []

    def arrive() -> None:
        house.engine.during = lambda: None
        house.submit(order)
        alone.append(house.executor._preparing._quiet)

    house.engine.during = arrive
    house.executor.step()
    house.executor.step()
    assert alone == [True]
    assert not house.executor._preparing._quiet


# -- dropping


def test_a_dropped_attempt_stops_at_the_boundary_and_reports_nothing(house: House) -> None:
    house.known_cost()
    order, other = an_order(*["a" * 900] * 5), an_order("other")
    house.submit(order)
    house.submit(other)
    house.executor.step()
    house.engine.during = lambda: house.executor.drop(house.attempts.drop([order.key]))
    house.steps()
    assert list(house.outcomes()) == [other.key]
    assert len([b for b in house.engine.batches if b[0][0] == "a"]) == 1
    assert house.attempts.held() == ()


def test_halves_of_a_dropped_attempt_do_not_run(house: House) -> None:
    house.known_cost()
    order = an_order("bomb", "b2", "b3", "b4")
    house.submit(order)
    house.executor.step()
    house.executor.step()
    house.executor.drop(house.attempts.drop([order.key]))
    count = len(house.engine.batches)
    house.steps()
    assert len(house.engine.batches) == count


def test_an_outcome_of_a_dropped_attempt_is_not_sent(house: House) -> None:
    order = an_order("a")
    house.submit(order)
    house.steps()
    house.attempts.drop([order.key])
    assert house.outcomes() == {}
    assert house.attempts.held() == ()


def test_an_attempt_dropped_while_it_is_tokenised_is_forgotten(house: House) -> None:
    house.submit(an_order("warm"))
    house.steps()
    house.pending = []
    order = an_order("b")
    house.submit(order)
    house.executor.drop(house.attempts.drop([order.key]))
    house.pending.pop()[0]()
    assert house.steps() == 0
    assert len(house.outcomes()) == 1


# -- models in memory


def test_the_least_recently_used_model_is_evicted_for_another(house: House) -> None:
    house.engine.size_mb = 50
    third = replace(OTHER, name="third", trunk="3")
    for model in (TRUNK, OTHER, TRUNK, third):
        house.submit(an_order("a", model=model))
        house.steps()
    assert house.engine.unloads == ["other"]
    assert set(house.executor.resident()) == {TRUNK.digest, third.digest}


def test_a_model_in_use_is_not_evicted_and_the_load_comes_as_soon_as_it_is_free(house: House) -> None:
    house.engine.size_mb = 60
    house.known_cost()
    house.submit(an_order(*["a" * 900] * 3))
    house.executor.step()
    house.submit(an_order("o", model=OTHER))
    late = an_order("late")
    house.submit(late)  # younger, of the model in memory: it must not keep the other out for ever
    house.steps()
    assert house.engine.loads == ["trunk", "other", "trunk"]
    assert house.engine.batches[-1] == ["late"]
    assert len(house.outcomes()) == 3


# -- evidence, progress, backlog


def test_rows_are_marked_before_they_run_and_the_mark_ends_when_all_is_done(house: House) -> None:
    house.known_cost()
    seen: list[Mapping[Key, tuple[int, ...]]] = []
    order = an_order("a" * 600, "a" * 900)
    house.engine.during = lambda: seen.append(dict(house.redis.under_way["w"].rows))
    house.submit(order)
    house.steps()
    assert seen == [{order.key: (1,)}, {order.key: (0,)}]
    assert house.redis.running("w") is None


def test_no_rows_are_suspected_while_a_model_is_loaded(house: House) -> None:
    house.known_cost()
    house.submit(an_order("a"))
    house.submit(an_order("o", model=OTHER))
    seen: list[Running | None] = []
    load = house.engine.load

    def spy(*args: Any, **kwargs: Any) -> str:
        seen.append(house.redis.running("w"))
        return load(*args, **kwargs)

    house.engine.load = spy  # type: ignore[method-assign]
    house.steps()
    assert seen == [None, None]


def test_work_goes_on_without_evidence_while_redis_is_away(house: House) -> None:
    tries = []

    def lost(running: Running | None) -> None:
        tries.append(running)
        raise TransportLost

    house.transport.mark_running = lost  # type: ignore[method-assign]
    house.known_cost()
    order = an_order(*["a" * 900] * 4)
    house.submit(order)
    house.steps()
    assert house.outcomes()[order.key].verdict == "done"
    assert len(tries) == 1  # and not once per micro-batch, each waiting for a time-out


def test_the_watchdog_sees_a_micro_batch_that_never_ends(house: House) -> None:
    house.known_cost()
    words: list[str | None] = []

    def hang() -> None:
        words.append(house.executor.stuck())
        house.clock.now += RUN_S + 1
        words.append(house.executor.stuck())

    house.engine.during = hang
    house.submit(an_order("a"))
    house.steps()
    assert words[0] is None
    assert "running for 9 s" in (words[1] or "")
    assert house.executor.stuck() is None


@pytest.mark.parametrize("longest_s", [None, 1200.0])
def test_an_engine_may_say_how_long_it_loads_at_most(
    house: House, longest_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if longest_s is not None:
        monkeypatch.setattr(FakeEngine, "longest_load_s", longest_s, raising=False)
    words: list[str | None] = []

    def wait(*_: object, **__: object) -> str:
        for seconds in ((longest_s or LOAD_S) - 1, 2):
            house.clock.now += seconds
            words.append(house.executor.stuck())
        return "trunk"

    house.engine.load = wait  # type: ignore[method-assign]
    house.submit(an_order("a"))
    house.executor.step()
    assert words[0] is None
    assert f"at most {longest_s or LOAD_S:.0f}" in (words[1] or "")


@pytest.mark.parametrize(
    ("measured", "predicted_s", "limit_s"),
    [(False, 0.1, FIRST_RUN_S), (True, 0.1, FIRST_MEASURED_S), (True, 6.0, 30)],
)
def test_a_fresh_process_waits_long_only_where_nobody_has_measured_the_model(
    house: House, measured: bool, predicted_s: float, limit_s: float
) -> None:
    words: list[str | None] = []

    def hang() -> None:
        for seconds in (limit_s - 1, 2):
            house.clock.now += seconds
            words.append(house.executor.stuck())

    house.engine.during = hang
    # The longer one runs first, alone: it is half of what was predicted.
    house.submit(an_order("a" * 500, "b" * 499, predicted_s=predicted_s, measured=measured))
    house.executor.step()
    assert house.executor.step()
    assert words[0] is None
    assert f"at most {limit_s:.0f}" in (words[1] or "")


def test_a_slow_but_predicted_micro_batch_is_left_alone(house: House) -> None:
    house.known_cost(each=2.0)
    house.engine.during = lambda: setattr(house.clock, "now", house.clock.now + 15)
    words: list[str | None] = []
    house.submit(an_order("a"))
    house.executor.step()
    house.engine.during = lambda: (
        setattr(house.clock, "now", house.clock.now + 15),
        words.append(house.executor.stuck()),
    )[1]
    house.executor.step()
    assert words == [None]


def test_tokenising_has_a_deadline_too(house: House) -> None:
    house.submit(an_order("warm"))
    house.steps()
    prepare = house.engine.prepare
    words: list[str | None] = []

    def hang(pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        house.clock.now += PREPARE_S + 1
        words.append(house.executor.stuck())
        return prepare(pass_, texts)

    house.engine.prepare = hang  # type: ignore[method-assign]
    house.submit(an_order("a"))
    assert "preparing" in (words[0] or "")


def test_backlog_is_what_the_scheduler_predicts_until_the_worker_knows_better(house: House) -> None:
    house.pending = []
    house.engine.second_per_row = 0.9
    house.submit(an_order("a" * 900, "a" * 900, predicted_s=7.0))
    assert house.executor.backlog_s() == 7.0
    house.known_cost(each=0.001)
    house.steps()
    house.pending.pop()[0]()
    assert house.executor.backlog_s() == pytest.approx(1.8)
    house.executor.step()
    assert house.executor.backlog_s() == pytest.approx(0.9)
    house.steps()
    assert house.executor.backlog_s() == 0


# -- whatever happens


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_fails_each_row_has_one_right_answer_or_one_error(data: st.DataObject) -> None:
    house = House()
    house.engine.size_mb = data.draw(st.sampled_from([10, 60]))
    house.engine.room = data.draw(st.sampled_from([None, 40, 400]))
    words = st.sampled_from(["a", "bb" * 9, "c" * 70, "unreadable", "panic", "bomb", "d" * 30])
    orders, dropped = [], set()
    for _ in range(data.draw(st.integers(1, 6))):
        order = an_order(
            *data.draw(st.lists(words, min_size=1, max_size=12)),
            model=data.draw(st.sampled_from([TRUNK, OTHER])),
            exclusive=data.draw(st.booleans()),
            interactive=data.draw(st.booleans()),
        )
        orders.append(order)
        house.submit(order)
        house.steps(data.draw(st.integers(0, 5)))
        if data.draw(st.integers(0, 4)) == 0:
            dropped.add(order.key)
            house.executor.drop(house.attempts.drop(dropped))
    house.steps()
    outcomes = house.outcomes()
    assert house.attempts.held() == ()
    for order in orders:
        if order.key not in outcomes:
            assert order.key in dropped
            continue
        column = outcomes[order.key].columns["size"]
        for text, value, row in zip(order.texts, values(column), range(len(column)), strict=True):
            error = column.errors.get(row)
            assert (value == len(text)) if error is None else (value is None)
            assert error is None or error.error in ("bad_row", "engine", "out_of_memory")
            if text in ("bomb", "panic", "unreadable"):
                assert error is not None
            elif house.engine.room is None or len(text) <= house.engine.room:
                assert error is None


def test_an_idle_executor_has_nothing_to_do(house: House) -> None:
    assert house.steps() == 0
    assert house.executor.stuck() is None


# -- media


@dataclass
class Eyes(FakeEngine):
    """Answers each picture with its bytes' number."""

    prepared: list[list[str]] = field(default_factory=list)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        self.prepared.append(list(texts))
        if any(value == b"panic" for value in pass_.values):
            raise ValueError("a picture that must not be logged")
        return [Prepared(row, 1, False, "x" * len(value)) for row, value in enumerate(pass_.values)]


def seeing(*pictures: bytes, stored: bool = True) -> tuple[House, list[Medium]]:
    house = House()
    house.engine = Eyes(house.clock)
    media = [Medium.of(data) for data in pictures]
    if stored:
        house.pictures.stored = {one.sha256: data for one, data in zip(media, pictures, strict=True)}
    return house, media


def numbers_of(house: House) -> list[Any]:
    (outcome,) = house.outcomes().values()
    return list(values(outcome.columns["size"]))


def test_an_engine_is_given_the_bytes_of_media_fetched_once_under_the_lease() -> None:
    house, media = seeing(b"one", b"three", b"sevenup")
    order = an_order(*(one.text for one in [*media, media[0]]), values=(*media, media[0]))
    house.submit(order)
    assert not house.engine.loads, "they are fetched while the model is not even loaded"
    house.steps()
    assert numbers_of(house) == [3.0, 5.0, 7.0, 3.0]
    asked = [set(asked) for asked, _ in house.pictures.asked]
    assert asked == [{one.sha256 for one in media}, {media[2].sha256}], "two come at a time"
    assert {lease for _, lease in house.pictures.asked} == {f"{order.subtask}.1.n"}
    again = an_order(media[0].text, values=(media[0],))
    house.submit(again)
    house.steps()
    assert len(house.pictures.asked) == 2, "it was kept"
    stranger = an_order(media[0].text, values=(media[0],), tenant="another")
    house.submit(stranger)
    assert len(house.pictures.asked) == 3, "for its tenant alone"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.stored.clear(),
        lambda p: setattr(p, "error", Unreachable("away")),
        lambda p: p.stored.update(dict.fromkeys(p.stored, b"other bytes")),
    ],
)
def test_rows_whose_medium_cannot_be_had_are_lost_for_now_and_others_are_not(
    spoil: Callable[[FakeMedia], object],
) -> None:
    house, media = seeing(b"one", b"three")
    house.submit(an_order(media[0].text, values=(media[0],)))
    house.steps()
    house.outcomes()
    house.redis.entries.clear()
    spoil(house.pictures)
    order = an_order(*(one.text for one in (*media, media[0])), values=(*media, media[0]))
    house.submit(order)
    house.steps()
    (outcome,) = house.outcomes().values()
    column = outcome.columns["size"]
    assert list(values(column))[::2] == [3.0, 3.0]
    lost = column.errors[1]
    assert (lost.error, lost.retriable) == ("lost_medium", True)
    assert isinstance(house.engine, Eyes)
    assert len(house.engine.prepared[-1]) == 2, "the engine never saw the row"


def test_a_picture_that_breaks_the_engine_is_the_one_row_at_fault() -> None:
    house, media = seeing(b"one", b"panic", b"three")
    house.submit(an_order(*(one.text for one in media), values=tuple(media)))
    house.steps()
    (outcome,) = house.outcomes().values()
    assert {row: error.error for row, error in outcome.columns["size"].errors.items()} == {1: "engine"}
    assert [v for i, v in enumerate(values(outcome.columns["size"])) if i != 1] == [3.0, 5.0]


def test_a_function_of_several_fields_is_given_bytes_among_its_values() -> None:
    house, media = seeing(b"one")
    house.submit(an_order("", values=({"photo": media[0], "age": 3},)))
    house.engine.prepare = lambda pass_, texts: [  # type: ignore[method-assign]
        Prepared(row, 1, False, "x" * len(value["photo"]) * value["age"])
        for row, value in enumerate(pass_.values)
    ]
    house.steps()
    assert numbers_of(house) == [9.0]


def test_media_that_are_kept_are_bounded_and_the_oldest_go_first() -> None:
    source = FakeMedia()
    pictures = [bytes([n]) * 10 for n in range(5)]
    media = [Medium.of(data) for data in pictures]
    source.stored = {one.sha256: data for one, data in zip(media, pictures, strict=True)}
    kept = Media(source, kept_bytes=30, clock=Clock())
    for one in media:
        kept.of(an_order(one.text, values=(one,)), lambda: True)
    before = len(source.asked)
    for one in reversed(media[2:]):
        assert kept.of(an_order(one.text, values=(one,)), lambda: True)
    assert len(source.asked) == before
    kept.of(an_order(media[1].text, values=(media[1],)), lambda: True)
    assert len(source.asked) == before + 1
    assert kept.of(an_order(media[0].text, values=(media[0],)), lambda: False) == {}, "nobody waits"
