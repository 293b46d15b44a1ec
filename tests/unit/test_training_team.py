"""Devices of a group that learn together: the same steps as one alone, and no process left behind. Two of them are CPUs."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.unit.test_trainer import ROWS, Memory, Stage, recipe, trunk, vectors
from tests.unit.test_worker_engines import tiny_bert
from workers.engine import DeviceBroken, Pass, Prepared
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.training import heads as heads_module
from workers.engines.training import run as training
from workers.engines.training import team as team_module
from workers.engines.training.heads import Heads
from workers.engines.training.learner import Learner
from workers.engines.training.team import Team
from workers.engines.training.truth import Parts, Truth
from workers.engines.trunk import load_transformer
from workers.registrar.describe import describe_folder

__all__ = ["trunk", "vectors"]


#: Nothing is left out at chance: only then can one device be compared with two.
STILL = """
from workers.engines.training import heads, team
heads._DROP_IN = heads._DROP_HIDDEN = 0.0
team.main()
"""


def members() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "training" in " ".join(p.cmdline())]


def test_two_devices_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "PROGRAM", ("-c", STILL))
    monkeypatch.setattr(heads_module, "_DROP_IN", 0.0)
    monkeypatch.setattr(heads_module, "_DROP_HIDDEN", 0.0)
    folder = tiny_bert(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    described = describe_folder(folder, name="tiny", version="1", licence="", source={})
    engine = EncoderEngine()
    handle = engine.load(described.manifest, described.files, device="cpu", in_format="fp32")
    texts = [text for text, *_ in ROWS]
    rows = [r for r in engine.prepare(Pass(handle, (), 0), texts) if isinstance(r, Prepared)]
    asked = recipe(tune="all", rate=1e-2)
    features = torch.randn(len(ROWS), 16, generator=torch.Generator().manual_seed(0))
    trunk = (
        load_transformer("AutoModel", described.files, device="cpu", in_format="fp32")
        .train()
        .requires_grad_(True)
    )
    trunk.pooler.requires_grad_(False)
    heads = Heads(
        asked, [Truth.of(target) for target in asked.targets], features, Parts.of(asked).train
    ).train()
    alone, leader = (
        Learner(
            asked, copy.deepcopy(trunk), copy.deepcopy(heads), pooling="mean", pad=0, device="cpu", fast=False
        )
        for _ in range(2)
    )
    for learner in (alone, leader):
        learner.texts += rows
        for group in learner.adam.param_groups:
            group["eps"] = 1.0  # else a step is as long for a gradient that is nothing but rounding
    team = Team(leader, ["cpu"])
    try:
        team.gather()
        team.join()
        # Even shares, uneven ones, and a row for one device only.
        for step, size in enumerate((16, 16, 15, 1, 2, 16)):
            batch = torch.arange(step * 16, step * 16 + size)
            alone.learn(batch, 1, step, 6)
            team.learn(batch, 1, step, 6)
    finally:
        team.close()
        team.close()
    assert not members()
    assert not torch.distributed.is_initialized()
    begun = dict(trunk.named_parameters())
    moved = 0.0
    for (name, one), other in zip(
        alone.both.trunk.named_parameters(), leader.both.trunk.parameters(), strict=True
    ):
        moved = max(moved, float((one - begun[name]).detach().abs().max()))
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)
    assert moved > 1e-4
    torch.testing.assert_close(alone.both.heads.out.weight, leader.both.heads.out.weight, atol=1e-6, rtol=0)


def test_a_run_whose_group_loses_a_device_goes_on_from_its_checkpoint(
    trunk: Any, vectors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    journal = Memory([text for text, *_ in ROWS], vectors)
    stage = Stage(trunk, journal)
    stage.handle.trunk = replace(stage.handle.trunk, others=("cpu",))
    computed = 0

    def until_one_is_lost() -> None:
        nonlocal computed
        for step in stage.steps(recipe(tune="all", epochs=4)):
            computed += step.computed_tokens > 1
            if computed == 12:
                [member] = members()
                member.send_signal(signal.SIGKILL)
                member.wait()

    with pytest.raises(DeviceBroken):
        until_one_is_lost()
    stage.engine.abort(stage.handle, ["ticket"])
    assert not members()
    assert journal.saved is not None
    assert "all 0004" not in journal.reports
    made = stage.fit(recipe(tune="all", epochs=4))
    assert made["scores"]["mood"]["accuracy"] > 0.9
    assert "all 0004" in journal.reports
    assert not members()
