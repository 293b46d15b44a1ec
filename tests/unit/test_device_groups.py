"""A group of GPUs: most engines use its first GPU alone, and everybody reckons with that one's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from motet.protocol.wire import Beat
from scheduler.policy.capability import cannot_hold, on_first_mb, room_mb, workers
from scheduler.simulation.forecast import forecast
from tests.unit.test_explain import beat, told
from tests.unit.test_explain import demand as wanted
from tests.unit.test_forecast import MODELS, cluster, crew, wants
from tests.unit.test_place import A, B, demand, model, worker
from tests.unit.test_place import Cluster as Placing
from tests.unit.test_worker_executor import FakeEngine, House, an_order, answers
from workers.engine import spreads
from workers.engines import InstalledEngines
from workers.run import device as devices
from workers.run.device import Device

#: Needs more than one GPU of 80 GB, and less than two.
LARGE = model("large", 100_000, engine="causal", answers="text")


def test_a_model_that_only_all_gpus_together_could_hold_fits_an_engine_that_spreads_and_no_other() -> None:
    group = worker("a", engines=("causal", "vllm"), spreads=("vllm",), memory_mb=160_000, gpus=2)
    spread = replace(LARGE, engine="vllm")
    assert cannot_hold(group, LARGE, "fast") == "too_small"
    assert cannot_hold(group, spread, "fast") is None
    assert (room_mb(group, "causal"), room_mb(group, "vllm")) == (80_000, 160_000)
    assert (on_first_mb(group, LARGE, "exact"), on_first_mb(group, spread, "exact")) == (100_000, 50_000)
    # Before it has said how much memory it has, nothing is known against it.
    assert cannot_hold(replace(group, memory_mb=0), LARGE, "fast") is None


def test_what_a_group_evicts_is_foreseen_by_its_first_gpu() -> None:
    # Two models of 1,000 MB beside each other: on one GPU of 1,500 MB they cannot be, whatever the others have.
    for gpus, memory_mb, gone in ((1, 3000, []), (2, 3000, [A.digest]), (2, 4000, [])):
        cluster = Placing().join(worker("a", A, memory_mb=memory_mb, gpus=gpus))
        cluster.want(demand("j", 10**6), demand("k", 10**6, model=B))
        ledger = cluster.policy.ledger
        assert list(ledger.victims(ledger.workers["a"], ledger.queues[B.digest, "fast"])) == gone


def test_a_forecast_gives_a_group_the_memory_of_one_gpu() -> None:
    # Both models fit beside each other into 400 MB, and not into half of that: then they are loaded in turn.
    def seconds(gpus: int) -> float:
        group = [replace(one, memory_mb=400, gpus=gpus) for one in crew(1)]
        found = forecast("mine", cluster(group, wants(seconds=100), wants("x", 100, model=1, tenant="other")))
        assert found is not None
        return found.p50_s

    assert 200 < 2 * MODELS[0].memory_mb() < 400
    assert seconds(2) > 1.05 * seconds(1)


def test_who_asks_why_is_told_of_one_gpus_memory() -> None:
    found = told(beat(memory_mb=2000, gpus=2), mine=wanted(rows=10))
    assert found.eta is not None
    found = told(beat(memory_mb=1200, gpus=2), mine=wanted(rows=10))
    [cannot] = found.passes[0].cannot
    assert (cannot.why, cannot.need_mb, cannot.have_mb) == ("too_small", 483, 300)
    assert cannot.words == "tiny@1 does not fit into one GPU of its group, and 'encoder' uses one"


def test_a_beat_tells_of_the_group_and_an_older_workers_is_of_one_device() -> None:
    said = Beat(worker="w", boot="b", seq=1, memory_mb=1000, gpus=4, spreads=("vllm",))
    heard = Beat.decode(said.encode())
    assert (heard.gpus, heard.spreads) == (4, ("vllm",))
    [one] = workers({"w": heard}, (), 0.5)
    assert (one.memory_mb, one.gpus, one.spreads) == (500, 4, ("vllm",))
    # A stranger's number is divided by.
    assert Beat.decode(replace(said, gpus=0).encode()).gpus == 1


def test_of_the_engines_installed_here_vllm_alone_spreads() -> None:
    engines = InstalledEngines()
    assert engines.spreading() == ("vllm",)
    assert not spreads(engines.find("causal"))


def test_a_group_counts_as_often_as_its_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="Card", total_memory=gb << 30, major=9, minor=0) for gb in (80, 40)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    monkeypatch.setattr(devices, "fast_formats", lambda _: ("bf16",))
    found = devices.probe("cuda")
    assert (found.gpus, found.memory_mb, found.name) == (2, 2 * 40 * 1024, "2 x Card")


@dataclass
class Spreading(FakeEngine):
    """The same, over all GPUs of the group."""

    spreads: bool = True


@pytest.mark.parametrize(("engine", "gone"), [(FakeEngine, ["trunk"]), (Spreading, [])])
def test_a_worker_reckons_with_its_first_gpu(engine: type[FakeEngine], gone: Sequence[str]) -> None:
    house = House(budget_mb=100, device=Device("cuda", "2 x a fake", "cpu", 200, gpus=2))
    house.engine = engine(house.clock, size_mb=80)
    other = replace(an_order("bb").model, name="other", trunk="o")
    orders = [an_order("a"), an_order("bb", model=other)]
    for order in orders:
        house.submit(order)
        house.steps()
    assert [answers(outcome) for outcome in house.outcomes().values()] == [[1.0], [2.0]]
    assert house.engine.unloads == gone


def test_a_model_larger_than_one_gpu_is_refused_where_the_engine_uses_one() -> None:
    for engine, failed in ((FakeEngine, True), (Spreading, False)):
        house = House(budget_mb=100, device=Device("cuda", "2 x a fake", "cpu", 200, gpus=2))
        house.engine = engine(house.clock, size_mb=150)
        house.submit(an_order("a"))
        house.steps()
        [outcome] = house.outcomes().values()
        assert outcome.verdict == ("failed" if failed else "done")
