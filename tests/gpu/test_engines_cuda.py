"""Every engine on a GPU answers what it answers on a CPU, and what runs out of memory there recovers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Choose, Embed, Extract, Generate, Task
from tests.tiny_language import a_llama
from tests.tiny_pictures import a_lite
from tests.unit import test_trainer as training
from tests.unit import test_worker_executor as executing
from tests.unit.test_causal_engine import TEXTS, files_of, told
from tests.unit.test_trainer import ROWS, trunk, vectors  # noqa: F401 - fixtures
from tests.unit.test_worker_engines import tiny_bert
from workers.engine import Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.engines.causal.runs import flash
from workers.engines.encoder.classifier import ClassifierEngine
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.image.image import ImageEngine
from workers.engines.image.pictures import trial_pictures
from workers.engines.packed import pack
from workers.engines.proved import within
from workers.registrar.accuracy import SENTENCES
from workers.registrar.describe import Described, describe_folder
from workers.run.batch_adapter import run_to_the_end
from workers.run.batching import PATIENCE
from workers.run.device import Device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

GPU = "cuda:0"
SCHEMA = {
    "type": "object",
    "properties": {"who": {"type": "string", "maxLength": 8}, "good": {"type": "boolean"}},
    "required": ["who", "good"],
    "additionalProperties": False,
}
#: Every kind of answer of a language model.
TASKS: dict[str, Task] = {
    "summary": Generate("tiny", prompt="Summarise this.", max_tokens=8, system="You are a careful reader."),
    "drawn": Generate("tiny", prompt="Go on.", max_tokens=8, temperature=1.0),
    "mood": Choose("tiny", labels=("good", "not good at all", "bad"), scores=True),
    "facts": Extract("tiny", schema=SCHEMA, max_tokens=40),
}


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> None:
    """As `probe` has it: fp32 means fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def answers(engine: Any, folder: Path, tasks: Mapping[str, Task], device: str, in_format: str) -> Any:
    """Plain values of each task, as a worker on the device would give them."""
    model = describe_folder(folder, name="tiny", version="1", licence="", source={}).manifest
    handle = engine.load(model, files_of(folder), device=device, in_format=in_format)
    orders = tuple(TaskOrder(name=n, spec=t.to_json(), manifest=model) for n, t in tasks.items())
    pass_ = Pass(handle, orders, 0)
    rows = [row for row in engine.prepare(pass_, TEXTS) if isinstance(row, Prepared)]
    try:
        return told(run_to_the_end(engine, pass_, rows), tasks)
    finally:
        engine.unload(handle)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_a_language_model_writes_and_chooses_as_on_a_cpu(tmp_path: Path, kind: str) -> None:
    folder = a_llama(tmp_path, kind=kind, window=16 if kind == "mistral" else None)
    here, there = (answers(CausalEngine(), folder, TASKS, device, "fp32") for device in ("cpu", GPU))
    for name in ("summary", "facts", "drawn"):
        assert here[name] == there[name]
    for one, other in zip(here["mood"], there["mood"], strict=True):
        assert one[2] == pytest.approx(other[2], abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_kernel_for_many_sequences_keeps_rows_apart(tmp_path: Path, kind: str) -> None:
    half = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    folder = a_llama(tmp_path, kind=kind, window=32 if kind == "mistral" else None)
    model = describe_folder(folder, name="tiny", version="1", licence="", source={}).manifest
    engine = CausalEngine()
    handle = engine.load(model, files_of(folder), device=GPU, in_format=half)
    if half == "bf16":
        assert handle.varlen is not None, "FlashAttention's kernel is not there, or computes something else"
    assert within(engine.among_others(handle, SENTENCES[:20]), half)
    handle.varlen = None
    assert within(engine.among_others(handle, SENTENCES[:20]), half)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no kernel for many sequences",
)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 8, 64), (32, 8, 128), (4, 2, 32), (8, 1, 256)])
def test_the_kernel_is_there_for_heads_of_usual_models(heads: int, key_heads: int, width: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert flash(GPU, dtype, heads, key_heads, width, width) is not None


def test_a_classifier_scores_as_on_a_cpu(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, classifier=True)
    model = describe_folder(folder, name="tiny", version="1", licence="", source={}).manifest
    scores = []
    for device in ("cpu", GPU):
        engine = ClassifierEngine()
        handle = engine.load(model, files_of(folder), device=device, in_format="fp32")
        pass_ = Pass(handle, (), 0)
        rows = [row for row in engine.prepare(pass_, SENTENCES[:32]) if isinstance(row, Prepared)]
        scores.append(engine._logits(handle, rows))
        engine.unload(handle)
    assert np.abs(scores[0] - scores[1]).max() < 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_eight_bits_answer_as_on_a_cpu(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_bert(tmp_path)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        linear = name.endswith(".weight") and tensor.ndim == 2 and "embeddings" not in name
        if linear:
            stored, scale = pack(tensor, kind)
            packed |= {f"{name}_{kind}": stored, f"{name}_scale": scale}
        else:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors")
    tasks = {"v": Embed("tiny")}
    here, there = (answers(EncoderEngine(), folder, tasks, device, "fp32") for device in ("cpu", GPU))
    assert np.abs(np.array(here["v"]) - np.array(there["v"])).max() < 1e-3


@pytest.mark.parametrize("tune", ["heads", "all"])
def test_training_on_a_gpu_gives_models_as_good_as_on_a_cpu(
    tmp_path: Path,
    trunk: Described,  # noqa: F811
    vectors: Any,  # noqa: F811
    tune: str,
) -> None:
    """Not the same bits: sums are added up in another order. What is told of them is what they answer."""
    told_of = {}
    for device in ("cpu", GPU):
        stage = training.Stage(trunk, training.Memory([text for text, *_ in ROWS], vectors), device=device)
        made = stage.fit(training.recipe(tune=tune))
        home = tmp_path / device.replace(":", "")
        home.mkdir()
        said = training.answers(stage, made, home)
        moods = [mood for _, mood, _ in ROWS[200:]]
        right = np.mean([label == mood for (label, _), mood in zip(said["mine.mood"], moods, strict=True)])
        told_of[device] = made["scores"]["mood"]["accuracy"]
        assert right == pytest.approx(told_of[device], abs=0.03)
        stage.engine.unload(stage.handle)
    assert told_of[GPU] == pytest.approx(told_of["cpu"], abs=0.1)


# -- memory


class OnGpu(executing.House):
    """An executor that owns the GPU, with real engines and models in folders."""

    def __init__(self, models: Mapping[str, Path], budget_mb: int) -> None:
        self.folders = models
        self.models = {
            name: describe_folder(path, name=name, version="1", licence="", source={}).manifest
            for name, path in models.items()
        }
        self.real = {"encoder": EncoderEngine(), "causal": CausalEngine()}
        super().__init__(budget_mb=budget_mb, device=Device("cuda", "a GPU", GPU, budget_mb))
        self.executor._shelf._files = self  # type: ignore[assignment]
        self.executor._files = self  # type: ignore[assignment]

    def find(self, name: str) -> Any:
        return self.real[name]

    def fetch(self, model: Manifest) -> None:
        return None

    @contextmanager
    def folder(self, model: Manifest) -> Iterator[Mapping[str, Path]]:
        yield files_of(self.folders[model.name])

    def run(self, model: str, task: Task, *texts: str) -> list[Any]:
        order = executing.an_order(*texts, model=self.models[model], tasks={"it": task})
        self.submit(order)
        self.steps()
        return list(values(self.outcomes()[order.key].columns["it"]))

    def pace(self, model: str) -> Any:
        [loaded] = [one for one in self.executor._shelf.loaded.values() if one.model.name == model]
        return loaded.stream.pace


@contextmanager
def memory_for(more_mb: int) -> Iterator[None]:
    """So much more memory than is in use now, and none beyond."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (more_mb << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_lack_of_memory_makes_steps_smaller_loses_no_row_and_is_got_over(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    house = OnGpu({"m": folder}, 4000)
    texts = [" ".join(SENTENCES[i : i + 8]) for i in range(200)]
    expected = np.array(house.run("m", Embed("m"), *texts))
    pace = house.pace("m")
    pace.budget = replace(pace.budget, tokens=1 << 16, settled=True, before=None)
    with memory_for(48):
        found = np.array(house.run("m", Embed("m"), *texts))
    assert np.abs(found - expected).max() < 1e-4
    assert pace.budget.tokens < 1 << 16 == pace.budget.before
    # There is memory again: after enough steps that filled it, it has grown.
    small = pace.budget.tokens
    for _ in range(PATIENCE):
        pace.observed(small, small, 0.01)
    assert pace.budget.tokens == 2 * small
    assert np.abs(np.array(house.run("m", Embed("m"), *texts)) - expected).max() < 1e-4


def test_a_language_model_without_memory_for_more_rows_lets_fewer_in(tmp_path: Path) -> None:
    house = OnGpu({"lm": a_llama(tmp_path)}, 4000)
    task = Generate("lm", prompt="Summarise this.", max_tokens=8)
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 20)]
    expected = house.run("lm", task, *texts)
    [loaded] = house.executor._shelf.loaded.values()
    loaded.stream.handle.pool.lay_out(0, 0)
    with memory_for(4):
        assert house.run("lm", task, *texts) == expected


def test_two_models_that_do_not_fit_together_evict_each_other_and_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for layers, folder in enumerate((first, second), 4):
        folder.mkdir()
        tiny_bert(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers)
    models = {"a": first, "b": second}
    need_mb = max(OnGpu(models, 1).models[name].memory_mb() for name in models)
    house = OnGpu(models, int(1.5 * need_mb))
    expected = {name: house.run(name, Embed(name), *SENTENCES[:20]) for name in models}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        for name in models:
            assert np.array(house.run(name, Embed(name), *SENTENCES[:20])) == pytest.approx(
                np.array(expected[name]), abs=1e-5
            )
            assert [one.model.name for one in house.executor._shelf.loaded.values()] == [name]
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


def test_a_language_model_has_what_others_leave_and_gives_it_back(tmp_path: Path) -> None:
    language, encoder = tmp_path / "lm", tmp_path / "m"
    language.mkdir()
    encoder.mkdir()
    house = OnGpu({"lm": a_llama(language), "m": tiny_bert(encoder)}, 2000)
    task = Generate("lm", prompt="Summarise this.", max_tokens=8)
    expected = house.run("lm", task, *TEXTS)
    [loaded] = house.executor._shelf.loaded.values()
    alone = loaded.stream.handle.room
    house.run("m", Embed("m"), *TEXTS)
    assert 16_384 < loaded.stream.handle.room < alone
    assert house.run("lm", task, *TEXTS) == expected


def test_pictures_look_on_a_gpu_as_they_do_on_a_cpu(tmp_path: Path) -> None:
    lite = describe_folder(a_lite(tmp_path), name="tiny", version="1", licence="", source={})
    engine, pictures = ImageEngine(), trial_pictures(12)
    task = Embed("tiny", input="{photo}", features="stages")
    order = TaskOrder(name="look", spec=task.to_json(), manifest=lite.manifest)
    found = {}
    for device in ("cpu", GPU):
        handle = engine.load(lite.manifest, lite.files, device=device, in_format="fp32")
        pass_ = Pass(handle, (order,), 0, values=pictures)
        rows = [row for row in engine.prepare(pass_, [""] * len(pictures)) if isinstance(row, Prepared)]
        found[device] = np.array(list(values(engine.run(pass_, rows)["look"])))
        engine.unload(handle)
    np.testing.assert_allclose(found[GPU], found["cpu"], atol=1e-3)
