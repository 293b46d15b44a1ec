"""The image engines on tiny random models: what they see does not depend on neighbours, heads share one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from motet.errors import SetupError
from motet.protocol.columns import CellError, Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Embed, Number, Task
from tests.nasty_pictures import halves, nasty, saved
from tests.tiny_pictures import DIM, LABELS, SIDE, STAGE_DIM, a_lite, lite_weights
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.image import converting, seeing
from workers.engines.image import lite as lite_module
from workers.engines.image.classifier import ImageClassifierEngine
from workers.engines.image.image import ImageEngine, ImageTrunk
from workers.engines.image.lite import Lite
from workers.engines.image.pictures import trial_pictures
from workers.engines.image.seeing import trial_rows
from workers.registrar.accuracy import compare_seeing
from workers.registrar.describe import Described, describe_folder, sitting_on
from workers.registrar.efficientnet import class_names

PICTURES = trial_pictures(6)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker of one core has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def described(folder: Path, name: str = "tiny") -> Described:
    return describe_folder(folder, name=name, version="1", licence="", source={})


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Described:
    return described(a_lite(tmp_path_factory.mktemp("lite")))


@pytest.fixture(scope="module")
def loaded(lite: Described) -> ImageTrunk:
    return ImageEngine().load(lite.manifest, lite.files, device="cpu", in_format="fp32")


def order(name: str, task: Task, model: Manifest) -> TaskOrder:
    return TaskOrder(name=name, spec=task.to_json(), manifest=model)


def a_head(
    folder: Path, trunk: Manifest, *, stages: bool = False, seed: int = 0, labels: Sequence[str] = LABELS
) -> Described:
    dice = torch.Generator().manual_seed(seed)
    dim = trunk.stage_dim if stages else trunk.dim
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "head.safetensors"
    save_file(
        {"weight": torch.randn(len(labels), dim, generator=dice), "bias": torch.zeros(len(labels))}, path
    )
    pooling = {"pooling": "stages"} if stages else {}
    return sitting_on(
        trunk,
        {"head.safetensors": path},
        name=folder.name,
        version="1",
        answers="label",
        labels=tuple(labels),
        **pooling,
    )


def seen(
    engine: ImageEngine | ImageClassifierEngine,
    handle: object,
    tasks: Sequence[TaskOrder],
    pictures: Sequence[object],
) -> dict[str, Column]:
    pass_ = Pass(handle, tuple(tasks), 0, values=pictures)  # type: ignore[arg-type]
    rows = engine.prepare(pass_, [""] * len(pictures))
    return dict(engine.run(pass_, [row for row in rows if isinstance(row, Prepared)]))


def vectors(column: Column) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array(list(values(column)))


def test_the_folder_of_a_lite_says_what_it_reads_and_how_long_its_vectors_are(lite: Described) -> None:
    m = lite.manifest
    assert (m.engine, m.reads, m.answers, m.pooling) == ("image", "image", "vector", "mean")
    assert (m.dim, m.stage_dim, m.max_tokens) == (DIM, STAGE_DIM, SIDE * SIDE // 256)
    assert m.trunk


def test_a_picture_is_seen_alike_alone_and_among_others(loaded: ImageTrunk, lite: Described) -> None:
    engine, task = ImageEngine(), order("look", Embed("tiny", normalize=False), lite.manifest)
    together = vectors(seen(engine, loaded, [task], PICTURES)["look"])
    alone = np.concatenate([vectors(seen(engine, loaded, [task], [one])["look"]) for one in PICTURES])

    assert together.shape == (len(PICTURES), DIM)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.std(together, axis=0).max() > 0.01, "all pictures look the same to it"
    assert engine.among_others(loaded, ()) < 1e-5


def test_heads_on_both_kinds_of_features_and_vectors_share_one_pass(
    loaded: ImageTrunk, lite: Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ImageEngine()
    last, stages = (
        a_head(tmp_path / "last", lite.manifest),
        a_head(tmp_path / "stages", lite.manifest, stages=True),
    )
    tasks = [
        order("a", Classify("last", scores=True), last.manifest),
        order("b", Classify("stages", scores=True), stages.manifest),
        order("look", Embed("tiny", normalize=False), lite.manifest),
        order("all", Embed("tiny", normalize=False, features="stages"), lite.manifest),
    ]
    for task, head in zip(tasks, (last, stages), strict=False):
        engine.attach(loaded, task, head.files)
    forwards: list[int] = []
    real = Lite.forward
    monkeypatch.setattr(Lite, "forward", lambda *args, **kw: (forwards.append(1), real(*args, **kw))[1])

    columns = seen(engine, loaded, tasks, PICTURES)

    assert len(forwards) == 1
    look, whole = vectors(columns["look"]), vectors(columns["all"])
    assert whole.shape == (len(PICTURES), STAGE_DIM)
    np.testing.assert_allclose(whole[:, -DIM:], look, atol=1e-6)
    for name, head, features in (("a", last, look), ("b", stages, whole)):
        weight = loaded.heads[head.manifest.digest].weight.numpy()
        expected = np.array(LABELS)[(features @ weight.T).argmax(1)]
        assert [label for label, *_ in values(columns[name], LABELS)] == expected.tolist()


def test_pictures_go_through_a_few_at_a_time_and_come_back_in_order(
    loaded: ImageTrunk, lite: Described, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = order("look", Embed("tiny"), lite.manifest)
    whole = vectors(seen(ImageEngine(), loaded, [task], PICTURES)["look"])
    monkeypatch.setattr(seeing, "CPU_PIXELS", 4 * SIDE * SIDE)
    np.testing.assert_allclose(
        vectors(seen(ImageEngine(), loaded, [task], PICTURES)["look"]), whole, atol=1e-5
    )


def test_what_is_no_picture_is_an_error_of_its_row_alone(loaded: ImageTrunk, lite: Described) -> None:
    pass_ = Pass(loaded, (order("look", Embed("tiny"), lite.manifest),), 0, values=(PICTURES[0], nasty()["svg"].data, "a text", None, PICTURES[1]))  # fmt: skip
    rows = ImageEngine().prepare(pass_, [""] * 5)

    assert [type(row) for row in rows] == [Prepared, CellError, CellError, CellError, Prepared]
    assert {row.error for row in rows if isinstance(row, CellError)} == {"bad_image"}
    assert [row.row for row in rows if isinstance(row, Prepared)] == [0, 4]


def test_a_model_without_pictures_in_its_pass_says_so() -> None:
    engine = ImageEngine()
    with pytest.raises(CannotLoad, match=r"config\.json"):
        engine.load(
            Manifest(name="a", version="1", engine="image", answers="vector"),
            {},
            device="cpu",
            in_format="fp32",
        )


def test_vectors_of_another_length_than_the_manifest_says_are_refused(lite: Described) -> None:
    from dataclasses import replace

    wrong = replace(lite.manifest, stage_dim=STAGE_DIM + 1)
    with pytest.raises(CannotLoad, match=str(STAGE_DIM)):
        ImageEngine().load(wrong, lite.files, device="cpu", in_format="fp32")


def test_a_head_made_for_the_last_features_does_not_fit_the_stages(
    loaded: ImageTrunk, lite: Described, tmp_path: Path
) -> None:
    from dataclasses import replace

    head = a_head(tmp_path / "last", lite.manifest)
    told = replace(head.manifest, pooling="stages")
    with pytest.raises(CannotLoad, match="expected"):
        ImageEngine().attach(loaded, order("a", Classify("last"), told), head.files)


def test_bf16_answers_nearly_as_fp32_does(lite: Described, loaded: ImageTrunk) -> None:
    engine, task = ImageEngine(), order("look", Embed("tiny"), lite.manifest)
    half = engine.load(lite.manifest, lite.files, device="cpu", in_format="bf16")
    exact, fast = (seen(engine, handle, [task], PICTURES)["look"] for handle in (loaded, half))
    passed, measured = compare_seeing(exact, fast, lite.manifest)
    assert passed, measured
    assert vectors(exact).tolist() != vectors(fast).tolist()


def test_packed_convolutions_answer_as_torchs_own_do(
    loaded: ImageTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = trial_rows(loaded.sight.preparation)
    engine = ImageEngine()
    packed = engine._seen(loaded, rows, stages=True)
    monkeypatch.setattr(lite_module, "_is_packed", lambda *_: False)
    plain = engine._seen(loaded, rows, stages=True)
    assert torch.allclose(packed.last, plain.last, atol=1e-4)
    assert packed.stages is not None
    assert plain.stages is not None
    assert torch.allclose(packed.stages, plain.stages, atol=1e-4)


def test_batch_normalisation_is_folded_into_the_convolution_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, 2, bias=False)
    norm = torch.nn.BatchNorm2d(4, eps=1e-3)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    state = {"_conv_stem.weight": conv.weight.data} | {f"_bn0.{k}": v for k, v in norm.state_dict().items()}

    folded = converting._folded(state)

    x = torch.randn(2, 3, 9, 9)
    expected = norm.eval()(conv(x))
    found = torch.nn.functional.conv2d(x, folded["stem.weight"], folded["stem.bias"], 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_stride_pads_as_tensorflow_does_more_at_the_right_and_the_bottom() -> None:
    model = Lite.of(lite_weights())
    torch.nn.init.zeros_(model.stem.weight)
    torch.nn.init.zeros_(model.stem.bias)
    with torch.no_grad():
        model.stem.weight[:, :, 2, 2] = 1.0  # the corner of the window at the right and the bottom
    seen_by_stem = model.stem(torch.ones(1, 3, 4, 4))
    assert seen_by_stem[0, 0].tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_weights_of_something_else_are_refused_in_words(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(SetupError, match="no weights of an EfficientNet-Lite"):
        converting.convert_lite(tmp_path / "other.pth", tmp_path / "out", side=SIDE)


def test_classes_get_names_of_their_own() -> None:
    synsets = "n1\nn2\nn3\nn4\nn5\n"
    lemmas = "n1\tcrane\nn2\tmaillot\nn3\tmaillot, tank suit\nn4\tcrane\nn5\ttabby, tabby cat\n"
    assert class_names(synsets, lemmas) == (
        "crane (n1)",
        "maillot",
        "maillot, tank suit",
        "crane (n4)",
        "tabby",
    )


def test_numbers_and_one_pixel_pictures_are_seen(loaded: ImageTrunk, lite: Described, tmp_path: Path) -> None:
    head = a_head(tmp_path / "one", lite.manifest, labels=("only",))
    from dataclasses import replace

    manifest = replace(head.manifest, answers="number", labels=())
    task = order("n", Number("one"), manifest)
    engine = ImageEngine()
    engine.attach(loaded, task, head.files)
    column = seen(engine, loaded, [task], [nasty()["one pixel"].data, saved(halves(3000, 31), "PNG")])["n"]
    assert all(np.isfinite(list(values(column))))
