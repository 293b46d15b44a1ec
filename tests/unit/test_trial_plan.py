"""Where a model is tried when it is registered: what memory and other people's work allow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import pytest

from motet.errors import SetupError
from workers.registrar.trial_plan import TrialDevice, TrialPlan, halves, look_around, plan_trial, shown

#: A model of 70 billion parameters, in MB.
LARGE: Mapping[str, int] = {"fp32": 286_720, "bf16": 143_360}


def cpu(free_mb: int) -> TrialDevice:
    return TrialDevice(name="cpu", mask="", free_mb=free_mb)


def gpu(number: int, free_mb: int, *, idle: bool = True) -> TrialDevice:
    return TrialDevice(name=f"cuda:{number}", mask=str(number), free_mb=free_mb, idle=idle)


def plan(
    *devices: TrialDevice, wanted: str = "auto", wants_gpu: bool = False, need: Mapping[str, int] = LARGE
) -> TrialPlan:
    return plan_trial(wanted, devices, tuple(need), lambda device, name: need[name], wants_gpu=wants_gpu)


def on(found: TrialPlan) -> tuple[str, tuple[str, ...]]:
    return found.device.name if found.device else "", found.formats


def test_a_model_that_no_device_holds_is_not_tried_and_it_is_said_why() -> None:
    found = plan(cpu(24_576), gpu(0, 81_920))
    assert on(found) == ("", ())
    assert found.left_out == {
        "fp32": "needs 280 GB, cuda:0 here has 80 GB free",
        "bf16": "needs 140 GB, cuda:0 here has 80 GB free",
    }
    assert found.to_json() == {"formats": [], "not_tried": found.left_out}


def test_the_cpu_is_taken_before_a_gpu_that_workers_may_want() -> None:
    assert on(plan(cpu(300_000), gpu(0, 300_000))) == ("cpu", ("fp32", "bf16"))


def test_a_format_that_does_not_fit_is_left_out_and_the_device_that_holds_most_is_taken() -> None:
    found = plan(cpu(24_576), gpu(0, 100_000), gpu(1, 143_771))
    assert on(found) == ("cuda:1", ("bf16",))
    assert found.left_out == {"fp32": "needs 280 GB, cuda:1 here has 140 GB free"}
    assert found.to_json() == {"on": "cuda:1", "formats": ["bf16"], "not_tried": found.left_out}
    assert on(plan(cpu(150_000), gpu(0, 300_000))) == ("cuda:0", ("fp32", "bf16"))


def test_a_gpu_on_which_something_runs_is_taken_by_name_alone() -> None:
    busy = gpu(0, 500_000, idle=False)
    assert on(plan(cpu(24_576), busy)) == ("", ())
    assert on(plan(cpu(24_576), busy, wanted="cuda:0")) == ("cuda:0", ("fp32", "bf16"))


def test_vllm_is_tried_on_an_idle_gpu_and_on_the_cpu_only_where_there_is_no_gpu() -> None:
    small = {"fp32": 5000, "bf16": 4500}
    assert on(plan(cpu(9000), gpu(0, 8000), gpu(1, 9000), wants_gpu=True, need=small))[0] == "cuda:1"
    busy = plan(cpu(9000), gpu(0, 8000, idle=False), wants_gpu=True, need=small)
    assert on(busy) == ("", ())
    assert "every GPU of this host is in use; --try cuda:N" in busy.left_out["fp32"]
    assert on(plan(cpu(9000), wants_gpu=True, need=small)) == ("cpu", ("fp32", "bf16"))


def test_nothing_is_tried_where_that_was_asked_for() -> None:
    found = plan(cpu(300_000), wanted="none")
    assert on(found) == ("", ())
    assert set(found.left_out.values()) == {"as it was asked for"}


def test_a_device_that_was_named_and_does_not_do_is_refused_with_what_does() -> None:
    with pytest.raises(SetupError, match="--try: got cuda:3; expected one of auto, none, cpu, cuda:0"):
        plan(cpu(1), gpu(0, 1), wanted="cuda:3")
    with pytest.raises(SetupError, match=r"needs 140 GB, cpu here has 500 MB free in bf16; .* --try none"):
        plan(cpu(500), gpu(0, 300_000), wanted="cpu")


def test_fp16_is_tried_where_a_gpu_here_has_no_bf16_and_where_the_cpu_is_named() -> None:
    turing = replace(gpu(1, 8000), half="fp16")
    assert halves("auto", [cpu(1)]) == ("bf16",)
    assert halves("auto", [cpu(1), gpu(0, 8000)]) == ("bf16",)
    assert halves("auto", [cpu(1), gpu(0, 8000), turing]) == ("bf16", "fp16")
    assert halves("cpu", [cpu(1), gpu(0, 8000)]) == ("bf16", "fp16")
    assert halves("none", [cpu(1), turing]) == ("bf16", "fp16"), "and it is said that it was not"


def test_a_trial_sees_its_device_alone_and_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with shown(TrialDevice(name="cuda:1", mask="3", free_mb=1)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    with shown(cpu(1)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_DEVICE_ORDER" not in os.environ


def test_this_host_has_a_cpu_with_some_memory_and_no_gpu_behind_an_empty_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = look_around()
    assert found.name == "cpu"
    assert found.free_mb > 100
