"""The memory of a language model: what runs out of it is made smaller, and nothing that was computed is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.protocol.columns import STATE_MASK, values
from motet.protocol.manifest import Manifest
from motet.tasks import Generate
from tests.unit import test_worker_executor as executing
from tests.unit.test_causal_engine import TEXTS, House, files_of, llama, several  # noqa: F401 - a fixture
from workers.engine import Elastic, OutOfMemory, Pass
from workers.engines.causal import causal, kv, steps
from workers.engines.causal.causal import CausalEngine, tokens_in_flight
from workers.engines.causal.kv import Pool
from workers.engines.writers import Writer
from workers.run.batching import LEAST_TOKENS, PATIENCE

LONG = "It rained on Monday, and the weather was fine on all other days of that week. " * 8


class WithModel(executing.House):
    """An executor whose engine is the real one."""

    def __init__(self, folder: Path, model: Manifest) -> None:
        self.path, self.model = folder, model
        super().__init__(budget_mb=10_000)
        self.executor._shelf._files = self  # type: ignore[assignment]
        self.executor._files = self  # type: ignore[assignment]
        self.causal = CausalEngine()

    def find(self, name: str) -> Any:
        return self.causal

    def fetch(self, model: Manifest) -> None:
        return None

    @contextmanager
    def folder(self, model: Manifest) -> Iterator[Mapping[str, Path]]:
        yield files_of(self.path)


def refusing(most: int) -> Callable[..., Any]:
    """A forward pass that has memory for so many tokens."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*given: Any, **more: Any) -> Any:
            if more["input_ids"].shape[1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(*given, **more)

        return limited

    return wrap


def test_a_long_prompt_runs_in_smaller_pieces_where_a_whole_one_has_no_memory(
    llama: Path,  # noqa: F811
) -> None:
    plain = House(llama)
    task = Generate("tiny", prompt="Summarise this.", max_tokens=4)
    [expected] = plain.run({"it": task}, [LONG])["it"]

    house = WithModel(llama, plain.model)
    order = executing.an_order(LONG, model=plain.model, tasks={"it": task})
    house.submit(replace(order, max_tokens=0))
    while not house.executor._shelf.loaded:
        assert house.executor.step()
    [loaded] = house.executor._shelf.loaded.values()
    handle = loaded.stream.handle
    handle.model.forward = refusing(300)(handle.model.forward)
    pace = loaded.stream.pace
    pace.budget = replace(pace.budget, tokens=1024, settled=True)
    pace.cost = pace.cost.observed(1000, 1e-6)
    house.steps()
    [outcome] = house.outcomes().values()
    assert not outcome.columns["it"].status[0] & STATE_MASK
    [found] = values(outcome.columns["it"])
    assert found == expected
    # It was made smaller until it fitted, remembers what it was, and grows again after many steps that filled it.
    assert (pace.budget.tokens, pace.budget.before) == (LEAST_TOKENS, 1024)
    for _ in range(PATIENCE):
        pace.observed(LEAST_TOKENS, LEAST_TOKENS, 1.0)
    assert pace.budget.tokens == 2 * LEAST_TOKENS


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_step_that_has_no_memory_for_its_last_part_changes_nothing_and_may_be_tried_again(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    house = House(llama)
    tasks = several(8) | {"drawn": Generate("tiny", prompt="Go on.", max_tokens=8, temperature=1.0)}
    expected = house.run(tasks)
    calls = 0
    argmax = torch.Tensor.argmax

    def short(tensor: torch.Tensor, *given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return argmax(tensor, *given)

    monkeypatch.setattr(torch.Tensor, "argmax", short)
    pass_ = house.pass_(tasks)
    rows = house.rows(pass_, TEXTS)
    for row in rows:
        assert house.engine.admit(pass_, row, row.row, urgent=False)
    found: dict[Any, Any] = {}
    short_of = 0
    while len(found) < len(rows):
        try:
            step = house.engine.step(house.handle, 64)
        except OutOfMemory:
            short_of += 1
            continue
        found |= {one.ticket: one for one in step.ended}
    assert short_of == 1
    for name in tasks:
        assert [next(iter(values(found[row.row].columns[name]))) for row in rows] == expected[name]


def test_what_draws_a_token_is_the_same_until_that_was_taken() -> None:
    writer = Writer.of("a", {"temperature": 1.0}, 8, 3, None)
    first = writer.chance
    assert writer.chance == first
    writer.take(7, frozenset(), lambda ids: "")
    assert writer.chance != first


def test_fewer_rows_are_let_in_where_slots_for_many_have_no_memory(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = House(llama)
    expected = house.run(several(8))
    house.handle.pool.lay_out(0, 0)
    pass_ = house.pass_(several(8))
    rows = house.rows(pass_, TEXTS)
    zeros = torch.zeros

    def short(*shape: Any, **more: Any) -> torch.Tensor:
        made = zeros(*shape, **more)
        # Two heads of 32: room for 512 tokens.
        if made.ndim >= 3 and made.numel() > 512 * 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    monkeypatch.setattr(torch, "zeros", short)
    waiting, found = list(rows), dict[Any, Any]()
    while len(found) < len(rows):
        # Where rows are inside, the others wait; where none is, one always comes in.
        try:
            while waiting and house.engine.admit(pass_, waiting[0], waiting[0].row, urgent=False):
                waiting.pop(0)
        except OutOfMemory:
            assert house.handle.rows
        found |= {one.ticket: one for one in house.engine.step(house.handle, 256).ended}
    for name, told in expected.items():
        assert [next(iter(values(found[i].columns[name]))) for i in range(len(rows))] == told


def test_a_prefix_that_cannot_be_cached_is_computed_again(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house, tasks = House(llama), several(8, system="You are a careful reader of newspapers, films and cats.")
    expected = house.run(tasks)
    assert house.handle.prefix_cache

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pool, "read", short)
    house = House(llama)
    assert house.run(tasks) == expected
    assert not house.handle.prefix_cache


# -- more than the least


@pytest.mark.parametrize(
    ("more_mb", "free", "held", "expected"),
    [
        # Nothing more is granted.
        (0, 1 << 40, 0, 16_384),
        # 1,000 MB more, in tokens of a KiB and what the prefix cache takes beside.
        (1000, 1 << 40, 0, 16_384 + 1000 * 1024 * 8 // 9),
        # Others hold the GPU: what is free, and what it has already, less a sixteenth of all memory.
        (1000, 70 << 20, 0, 16_384),
        (1000, 500 << 20, 500 << 20, int((1000 - 64) * 1024 * 8 / 9)),
    ],
)
def test_tokens_in_flight_are_what_is_granted_and_free(
    more_mb: int, free: int, held: int, expected: int
) -> None:
    assert tokens_in_flight(more_mb, 1024, free, held, 1 << 30) == pytest.approx(expected, abs=2)


def test_more_memory_lets_more_rows_in_and_they_end_before_it_is_given_back(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(causal, "KV_TOKENS", 512)
    gpu = (1 << 40, 1 << 40)
    house = House(llama)
    house.engine = CausalEngine(memory=lambda device: gpu)
    house.handle = house.engine.load(house.model, files_of(llama), device="cpu", in_format="fp32")
    assert isinstance(house.engine, Elastic)
    pass_ = house.pass_(several(8))
    rows = house.rows(pass_, TEXTS * 8)

    def inside() -> int:
        before = len(house.handle.rows)
        for ticket, row in enumerate(rows, 100 * before):
            if not house.engine.admit(pass_, row, ticket, urgent=False):
                break
        return len(house.handle.rows)

    few = inside()
    assert 0 < few <= 2
    assert house.engine.stretch(house.handle, 8)
    assert house.handle.room > 512
    # The rows inside go on where they are.
    house.engine.step(house.handle, 64)
    many = inside()
    assert many > few

    # Somebody else needs the memory: nobody comes in, and it is given back once it is possible.
    found: dict[Any, Any] = {}
    waits = 0
    while not house.engine.stretch(house.handle, 0):
        waits += 1
        assert not house.engine.admit(pass_, rows[0], "late", urgent=True)
        found |= {one.ticket: one for one in house.engine.step(house.handle, 256).ended}
    assert waits
    assert house.handle.pool.tokens <= 512
    while house.handle.rows:
        found |= {one.ticket: one for one in house.engine.step(house.handle, 256).ended}
    assert len(found) == many
    plain = House(llama).run(several(8))
    first = {name: next(iter(values(found[0].columns[name]))) for name in plain}
    assert first == {name: told[0] for name, told in plain.items()}


# -- the pool


SHAPES = [(2, 4, 4), (1, 8, 4)]
plays = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 9)), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(plays)
def test_slots_keep_what_they_hold_however_they_are_laid_out_and_whatever_fails(
    plays: list[tuple[int, int, int, int]],
) -> None:
    """``plays``: slots, cells, how many of the old ones are kept, and which allocation finds no memory (0: none)."""
    pool = Pool(SHAPES, torch.float32, "cpu")
    held: list[torch.Tensor] = []
    number = 0
    for slots, cells, kept, fault in plays:
        keep = list(range(min(kept, len(held), slots)))[::-1]
        left = fault

        def zeros(*shape: int, **more: Any) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.full(*((shape,) if shape else ()), 0.0, **more)

        original = kv.torch.zeros
        kv.torch.zeros = zeros  # type: ignore[assignment]
        try:
            pool.lay_out(slots, cells, keep)
            held = [held[slot][: min(len(held[slot]), cells)] for slot in keep]
        except torch.OutOfMemoryError:
            if not keep:
                held = []
        finally:
            kv.torch.zeros = original
        if pool.layers and number % 3 == 2 and len(held) == pool.slots:
            pool.shrink()
            assert pool.tokens == pool.slots * pool.cells
        if pool.layers and not held:
            for slot in range(pool.slots):
                number += 1
                for keys, stored in pool.layers:
                    keys[slot], stored[slot] = number, -number
                held.append(torch.full((pool.cells,), float(number)))
        for slot, cells_of_it in enumerate(held):
            for keys, stored in pool.layers:
                n = len(cells_of_it)
                assert torch.equal(keys[slot, :n, 0, 0], cells_of_it)
                assert torch.equal(stored[slot, :n, 0, 0], -cells_of_it)


def test_a_step_that_brings_nothing_back_waits_for_its_device(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(steps, "settle", waited.append)
    house = House(llama)
    pass_: Pass = house.pass_(several(2))
    [row] = house.rows(pass_, [LONG])
    assert house.engine.admit(pass_, row, 0, urgent=False)
    # In the middle of a prompt nobody asks for anything.
    assert not house.engine.step(house.handle, 8).ended
    assert waited == ["cpu"]
    while house.handle.rows:
        house.engine.step(house.handle, 512)
    assert waited == ["cpu"]
