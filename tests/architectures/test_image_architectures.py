"""Ten architectures of transformers that read pictures, tiny and random, saved and loaded offline: as classifier and as trunk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from motet.errors import SetupError
from motet.media.decoding import decode
from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Choose, Classify, Embed, Task
from tests.tiny_pictures import ARCHITECTURES, LABELS, a_lite, an_image_model, two_towers
from workers.engine import Pass, Prepared
from workers.engines.image.classifier import ImageClassifierEngine
from workers.engines.image.hub import _side
from workers.engines.image.image import ImageEngine
from workers.engines.image.pictures import trial_pictures
from workers.registrar.describe import Described, describe_folder

PICTURES = trial_pictures(5)
#: Those whose first token stands for the whole picture.
CLS = {"vit", "deit", "dinov2", "beit"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _described(folder: Path) -> Described:
    return describe_folder(folder, name="tiny", version="1", licence="", source={})


def answered(engine: Any, folder: Path, tasks: dict[str, Task]) -> tuple[Manifest, dict[str, list[Any]]]:
    model = _described(folder)
    handle = engine.load(model.manifest, model.files, device="cpu", in_format="fp32")
    orders = tuple(
        TaskOrder(name=name, spec=task.to_json(), manifest=model.manifest) for name, task in tasks.items()
    )
    pass_ = Pass(handle, orders, 0, values=PICTURES)
    rows = engine.prepare(pass_, [""] * len(PICTURES))
    columns = engine.run(pass_, [row for row in rows if isinstance(row, Prepared)])
    assert engine.among_others(handle, ()) < 1e-4
    engine.unload(handle)
    return model.manifest, {
        name: list(values(column, getattr(tasks[name], "labels", model.manifest.labels)))
        for name, column in columns.items()
    }


def plain(folder: Path, auto: str) -> tuple[Any, Any]:
    """The model as transformers loads it, and what its own processor makes of our pictures."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
    return model, processor(images=[decode(one, _side(processor)) for one in PICTURES], return_tensors="pt")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_classifier_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = an_image_model(tmp_path, kind)
    manifest, found = answered(ImageClassifierEngine(), folder, {"c": Classify("tiny", scores=True)})

    model, pixels = plain(folder, "AutoModelForImageClassification")
    with torch.no_grad():
        expected = model(**pixels).logits.softmax(1).numpy()
    assert manifest.labels == LABELS
    np.testing.assert_allclose([list(every.values()) for _, _, every in found["c"]], expected, atol=2e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_trunk_gives_one_vector_of_each_picture(kind: str, tmp_path: Path) -> None:
    folder = an_image_model(tmp_path, kind, trunk=True)
    manifest, found = answered(ImageEngine(), folder, {"look": Embed("tiny", normalize=False)})

    model, pixels = plain(folder, "AutoModel")
    with torch.no_grad():
        hidden = model(**pixels).last_hidden_state
    pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0] if kind in CLS else hidden.mean(1)
    assert (manifest.pooling, manifest.dim) == ("cls" if kind in CLS else "mean", pooled.shape[1])
    np.testing.assert_allclose(np.array(found["look"]), pooled.numpy(), atol=2e-4)


def test_labels_that_repeat_are_told_apart_by_their_code(tmp_path: Path) -> None:

    folder = an_image_model(tmp_path, "resnet")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "crane", "1": "cat", "2": "crane"}
    (folder / "config.json").write_text(json.dumps(config))
    assert _described(folder).manifest.labels == ("crane (0)", "cat", "crane (2)")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers_choose_among_labels_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = two_towers(tmp_path, kind)
    model = _described(folder)
    assert (model.manifest.answers, model.manifest.reads) == ("match", "image")
    labels = ("good weather", "a Monday", "bad")
    tasks: dict[str, Task] = {
        "c": Choose("tiny", labels=labels, about="{photo}", scores=True),
        "look": Embed("tiny"),
    }
    _, answers = answered(ImageEngine(), folder, tasks)

    plain = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=[decode(one, _side(processor)) for one in PICTURES], return_tensors="pt")[
        "pixel_values"
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    if kind == "siglip":
        tokenizer.enable_padding(length=40, pad_id=0)
    with torch.no_grad():
        rows = [
            plain(
                pixel_values=pixels, input_ids=torch.tensor([tokenizer.encode(label.lower()).ids])
            ).logits_per_image
            if kind == "siglip"
            else plain(
                pixel_values=pixels, input_ids=torch.tensor([tokenizer.encode(label).ids])
            ).logits_per_image
            for label in labels
        ]
    logits = torch.cat(rows, 1)
    expected = (logits.sigmoid() if kind == "siglip" else logits.softmax(1)).numpy()
    found = np.array([list(every.values()) for _, _, every in answers["c"]])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    lengths = np.linalg.norm(np.array(answers["look"]), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_a_model_whose_pictures_need_torchvision_is_refused_with_that_word(tmp_path: Path) -> None:

    a_lite(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"]})
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DINOv3ViTImageProcessor"})
    )
    with pytest.raises(SetupError, match="torchvision"):
        _described(tmp_path)
