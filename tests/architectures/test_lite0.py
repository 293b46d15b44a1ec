"""EfficientNet-Lite0 as it is shipped by packages: what it sees on known photographs, and what heads learn from it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from motet import datasets
from motet.demo import pictures
from motet.media.sheet import contact_sheet
from motet.protocol.columns import values
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Embed, Task
from motet.training.recipe import Recipe, Target
from tests.unit.test_trainer import Memory, Stage
from workers.engine import Pass, Prepared
from workers.engines.image.image import ImageEngine, ImageTrunk
from workers.registrar.describe import Described, describe_folder, read_head
from workers.registrar.efficientnet import LITES, folders

#: Of the digits these many are learned from, and tested.
TRAIN, TEST = 700, 200
#: Least accuracy by the last features, and by those of the stages: of all 1,797 digits 0.958 and 0.991 were measured.
LAST, STAGES = 0.88, 0.975


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite0() -> tuple[Described, Described]:
    """The trunk and its head."""
    trunk, head = folders(LITES["lite0"])
    described = describe_folder(trunk, name="tiny", version="1", licence="", source={})
    found = read_head(head)
    assert found is not None
    found.spec["trunk"]
    return described, found.on(described.manifest)


def seen(
    lite0: tuple[Described, Described], task: Task, pictures: Sequence[bytes], in_format: str
) -> list[Any]:
    trunk, head = lite0
    engine = ImageEngine()
    handle: ImageTrunk = engine.load(trunk.manifest, trunk.files, device="cpu", in_format=in_format)
    model = head if isinstance(task, Classify) else trunk
    order = TaskOrder(name="t", spec=task.to_json(), manifest=model.manifest)
    engine.attach(handle, order, head.files)
    found: list[Any] = []
    for lo in range(0, len(pictures), 16):
        pass_ = Pass(handle, (order,), 0, values=pictures[lo : lo + 16])
        rows = [row for row in engine.prepare(pass_, [""] * len(pass_.values)) if isinstance(row, Prepared)]
        found += values(engine.run(pass_, rows)["t"], model.manifest.labels)
    return found


@pytest.mark.parametrize("in_format", ["fp32", "bf16"])
def test_it_names_what_known_photographs_show(lite0: tuple[Described, Described], in_format: str) -> None:
    photographs = datasets.photographs()
    names = ("coffee", "camera", "chelsea")
    task = Classify("imagenet", input="{photo}", scores=True)
    coffee, camera, chelsea = (
        every for *_, every in seen(lite0, task, [photographs[n] for n in names], in_format)
    )

    assert coffee["espresso"] >= 0.8
    assert camera["tripod"] >= 0.8
    assert sum(list(chelsea.values())[281:286]) >= 0.8, "chelsea is a cat"


def test_its_thousand_classes_have_names_of_their_own(lite0: tuple[Described, Described]) -> None:
    labels = lite0[1].manifest.labels
    assert (len(labels), len(set(labels))) == (1000, 1000)
    assert [label for label in labels if label.startswith("crane")] == [
        "crane (n02012849)",
        "crane (n03126707)",
    ]


def test_heads_tell_digits_apart_better_by_the_stages(
    lite0: tuple[Described, Described], tmp_path: Path
) -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))[: TRAIN + TEST]
    task = Embed("efficientnet-lite0", input="{photo}", normalize=False, features="stages")
    stages = np.array(seen(lite0, task, [_drawn(digits.images[i]) for i in order], "bf16"), np.float32)
    truth = [str(digits.target[i]) for i in order]
    dim = lite0[0].manifest.dim
    found = {
        features: _accuracy(lite0[0], np.ascontiguousarray(vectors), truth, features)
        for features, vectors in (("last", stages[:, -dim:]), ("stages", stages))
    }
    assert found["last"] >= LAST
    assert found["stages"] >= STAGES


def _drawn(grey: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    pixels = (255 - grey * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


def _accuracy(trunk: Described, vectors: Any, truth: Sequence[str], features: Any) -> float:
    stage = Stage(trunk, Memory([], vectors))
    made = stage.fit(
        Recipe(
            name="mine",
            version="1",
            trunk="tiny@1",
            job="j",
            train_rows=TRAIN,
            test_rows=TEST,
            features=features,
            targets=(Target.single("digit", sorted(set(truth)), truth),),
        )
    )
    return float(made["scores"]["digit"]["accuracy"])


def test_the_demo_cuts_out_the_same_pictures_each_time_and_draws_them_on_one_sheet() -> None:
    rows = pictures.choose(21)
    assert rows == pictures.choose(21)
    assert len({row.photo for row in rows}) == 21

    sheet = contact_sheet([row.photo for row in rows], [row.of for row in rows])

    assert sheet.size == (20 * 96, 2 * 110)
    assert np.asarray(sheet)[:110, :96].min() < 255, "the first picture is there"
    assert np.asarray(sheet)[110:, 96:].min() == 255, "and nothing behind the last one"
