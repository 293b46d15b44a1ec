"""How weights come onto a device, and in which formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scheduler.policy.capability import need_mb
from tests.tiny_language import a_llama
from tests.unit.test_causal_engine import files_of
from tests.unit.test_place import model, worker
from tests.unit.test_worker_engines import tiny_bert
from tests.unit.test_worker_executor import an_order
from workers.engines.trunk import load_transformer
from workers.run.device import half_format
from workers.run.work import format_for


@pytest.mark.parametrize("kind", ["encoder", "language"])
def test_weights_come_onto_a_device_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a device that is not the host's memory; here one that has no memory at all."""
    folder = a_llama(tmp_path) if kind == "language" else tiny_bert(tmp_path)
    seen: list[set[str]] = []
    moved = nn.Module.to

    def spied(module: nn.Module, *given: object, **more: object) -> nn.Module:
        seen.append({one.device.type for one in module.parameters()})
        return moved(module, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "to", spied)
    name = "AutoModelForCausalLM" if kind == "language" else "AutoModel"
    loaded = load_transformer(name, files_of(folder), device="meta", in_format="fp16", may_miss=("pooler.",))
    assert seen
    assert all(devices == {"meta"} for devices in seen)
    assert {one.device.type for one in loaded.parameters()} == {"meta"}
    assert {one.dtype for one in loaded.parameters()} == {torch.float16}


@pytest.mark.parametrize(("capability", "half"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_before_ampere_are_offered_fp16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], half: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert half_format("cuda:0") == half
    assert half_format("cpu") == "bf16"


def test_a_model_whose_fp16_was_checked_runs_in_it_and_takes_half_the_memory() -> None:
    both = model("m", 1000, formats=("bf16", "fp16"))
    turing = worker("t", formats=("fp16",))
    assert need_mb(turing, both, "fast") == need_mb(worker("h", formats=("bf16",)), both, "fast")
    assert need_mb(turing, both, "fast") < need_mb(turing, both, "exact")
    assert need_mb(turing, model("m", 1000, formats=("bf16",)), "fast") == need_mb(turing, both, "exact")
    assert format_for(an_order("a", model=both), ("fp16",)) == "fp16"


def test_a_format_that_this_cpu_cannot_compute_is_imitated(tmp_path: Path) -> None:
    folder = a_llama(tmp_path)
    exact, half = (
        load_transformer("AutoModelForCausalLM", files_of(folder), device="cpu", in_format=name)
        for name in ("fp32", "fp16")
    )
    given = torch.arange(3, 40)[None]
    with torch.inference_mode():
        one, other = exact(given).logits, half(given).logits.float()
    assert 0 < float((one - other).abs().max()) < 0.05 * float(one.abs().max())
