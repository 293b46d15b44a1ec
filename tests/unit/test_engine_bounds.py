"""What engines keep for later rows is bounded, and what a model held is given back when it goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.beginnings import common_prefix
from motet.protocol.columns import values
from motet.tasks import Choose
from tests.unit.test_causal_engine import House, files_of, llama  # noqa: F401 - a fixture
from tests.unit.test_worker_engines import tiny_bert
from workers.engine import Prepared
from workers.engines.causal import rows
from workers.engines.causal.causal import CausalEngine
from workers.engines.causal.prefix_cache import LEAST_CACHED, PrefixCache
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.newest import Newest
from workers.engines.training.trainer import TrainerEngine
from workers.engines.trunk import Tokens
from workers.engines.writers import Grammar
from workers.registrar.describe import describe_folder, trainer_of


def test_what_was_used_last_is_kept() -> None:
    newest: Newest[str, int] = Newest(2)
    newest.put("a", 1)
    newest.put("b", 2)
    assert newest.get("a") == 1
    newest.put("c", 3)
    assert (len(newest), newest.get("a"), newest.get("b"), newest.get("c")) == (2, 1, None, 3)


def scores(ended: Any) -> dict[str, float]:
    [(_, _, every)] = values(ended.columns["a"], ("good", "bad"))
    return dict(every)


def test_label_priors_are_bounded_and_a_row_inside_keeps_the_one_that_it_began_with(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "PRIORS", 4)  # labels: of two tasks with two
    house = House(llama)
    first = house.pass_({"a": Choose("tiny", labels=("good", "bad"), scores=True)})
    [row] = house.rows(first, ["It rained all day, and nobody came."])
    exact = scores(house.ended(first, [row])[0])
    for i in range(5):
        house.run({"a": Choose("tiny", labels=(f"one {i}", f"two {i}"))}, ["Hm."])
    assert len(house.handle.priors) == 2

    # Its prior is known when it comes in, and pushed out before it ends.
    house.ended(first, [row])
    assert house.engine.admit(first, row, "kept", urgent=False)
    for i in range(5):
        house.handle.priors.put(("t", ("", (i,), ((1,), (2,), (3,)))), (0.0,) * 3)
    step = house.engine.step(house.handle, 1024)
    while not step.ended:
        step = house.engine.step(house.handle, 1024)
    assert scores(step.ended[0]) == pytest.approx(exact, rel=1e-4)


def test_schemas_and_limits_of_tokens_that_any_tenant_may_bring_are_bounded(
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.engines.writers.SCHEMAS", 2)
    monkeypatch.setattr("workers.engines.trunk.LIMITS", 2)
    house = House(llama)
    grammar = Grammar(house.handle.tokens.json, 400, [2])
    for i in range(4):
        grammar.matcher({"type": "string", "maxLength": i})
    assert len(grammar._fresh) == 2
    tokens = Tokens(llama / "tokenizer.json", 512, 1000)
    for most in (8, 9, 10, 11, 8):
        [cut] = tokens.prepare(["word " * 50], most)
        assert isinstance(cut, Prepared)
        assert cut.length == most
    assert tokens._reader.cache_info().currsize == 2


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("name", ["causal", "encoder", "trainer"])
def test_every_engine_gives_the_devices_memory_back(
    name: str,
    llama: Path,  # noqa: F811
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(name))
    folder = llama if name == "causal" else bert
    described = describe_folder(folder, name="m", version="1", licence="", source={})
    manifest = trainer_of(described).manifest if name == "trainer" else described.manifest
    engine: Any = {"causal": CausalEngine, "encoder": EncoderEngine, "trainer": TrainerEngine}[name]()
    handle = engine.load(manifest, files_of(folder), device="cpu", in_format="fp32")
    engine.unload(handle)
    assert freed == []
    # As if it were on a GPU.
    if name == "trainer":
        handle.trunk = replace(handle.trunk, device="cuda:0")
    else:
        handle = engine.load(manifest, files_of(folder), device="cpu", in_format="fp32")
        handle.device = "cuda:0"
    engine.unload(handle)
    assert freed == [name]


def test_a_prefix_cache_counts_the_tokens_that_it_holds_and_lets_the_least_used_prefix_go_first() -> None:
    cache = PrefixCache()
    a, b, c = (("", tuple(range(n, n + length))) for n, length in ((0, 13), (50, 15), (90, 17)))
    for prefix in (a, b, c, b):
        cache.put("t", prefix, [])
    cache.put("another", a, [])
    assert cache.size == 13 + 15 + 17 + 13
    assert cache.beginning("t", a) == (13, [])
    cache.shrink(30)
    assert cache.size == 13 + 13
    assert ("t", a) in cache
    assert ("another", a) in cache
    cache.shrink(0)
    assert (len(cache), cache.size) == (1, 13)
    cache.clear()
    assert (len(cache), cache.size) == (0, 0)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=12).map(tuple), min_size=1, max_size=30),
    st.data(),
)
def test_a_prefix_cache_finds_what_has_most_in_common_with_a_prompt(
    prefixes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    """Whatever has gone meanwhile, and of no other tenant or adapter."""
    cache = PrefixCache()
    for prefix in prefixes:
        cache.put("t", ("", prefix), [(torch.tensor(prefix), torch.tensor(prefix))])
        cache.put("t", ("adapter", (*prefix, 1)), [])
    cache.shrink(data.draw(st.integers(0, 200)))
    held = [prefix for prefix in prefixes if ("t", ("", prefix)) in cache]
    prompt = data.draw(st.lists(st.integers(0, 1), max_size=16).map(tuple))
    count, found = cache.beginning("t", ("", prompt))
    best = max((common_prefix(prefix, prompt) for prefix in held), default=0)
    assert count == (best if best >= LEAST_CACHED else 0)
    assert [keys.tolist() for keys, _ in found] == ([list(prompt[:count])] if count else [])
    assert cache.beginning("another", ("", prompt)) == (0, [])
