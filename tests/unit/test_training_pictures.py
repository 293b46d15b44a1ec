"""Heads on a trunk that reads pictures: learned from its vectors, last ones or stages, and asked in its passes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motet.errors import InvalidJob
from motet.protocol.columns import CellError, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Embed
from motet.training.lesson import Labels, read_lesson
from motet.training.recipe import Recipe, Target
from tests.nasty_pictures import saved
from tests.tiny_pictures import DIM, STAGE_DIM, a_lite
from tests.unit.test_trainer import Memory, Stage
from workers.engine import Pass, Prepared
from workers.engines.image.image import ImageEngine
from workers.registrar.describe import Described, describe_folder, trainer_of

COLOURS = {"red": (210, 30, 30), "green": (30, 190, 40), "blue": (30, 50, 220)}
LABELS = [list(COLOURS)[i % 3] for i in range(90)]


def picture(number: int) -> bytes:
    dice = np.random.default_rng(number)
    pixels = dice.normal(COLOURS[LABELS[number]], 40, (40, 40, 3)).clip(0, 255).astype(np.uint8)
    return saved(Image.fromarray(pixels), "PNG")


PICTURES = [picture(i) for i in range(len(LABELS))]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Described:
    folder = a_lite(tmp_path_factory.mktemp("trunk"))
    return describe_folder(folder, name="tiny", version="1", licence="", source={})


def vectors(trunk: Described, features: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    engine, task = ImageEngine(), Embed("tiny", input="{photo}", normalize=False, features=features)
    handle = engine.load(trunk.manifest, trunk.files, device="cpu", in_format="fp32")
    order = TaskOrder(name="v", spec=task.to_json(), manifest=trunk.manifest)
    pass_ = Pass(handle, (order,), 0, values=PICTURES)
    rows = [row for row in engine.prepare(pass_, [""] * len(PICTURES)) if isinstance(row, Prepared)]
    return np.array(list(values(engine.run(pass_, rows)["v"])), np.float32)


def recipe(**changed: Any) -> Recipe:
    facts = {
        "name": "mine", "version": "3", "trunk": "tiny@1", "job": "j", "train_rows": 60, "test_rows": 30,
        "hidden": 8, "head_epochs": 12, "patience": 0,
        "targets": (Target.single("colour", list(COLOURS), LABELS),),
    }  # fmt: skip
    return Recipe(**{**facts, **changed})


@pytest.mark.parametrize(("features", "dim"), [("last", DIM), ("stages", STAGE_DIM)])
def test_a_head_answers_in_the_trunks_pass_with_the_score_that_was_told(
    features: Any, dim: int, trunk: Described, tmp_path: Path
) -> None:
    stage = Stage(trunk, Memory([], vectors(trunk, features)))
    made = stage.fit(recipe(features=features))

    [head] = map(Manifest.from_json, made["models"])
    assert (head.engine, head.reads, head.trunk, head.trunk_model) == (
        "image",
        "image",
        trunk.manifest.trunk,
        "tiny@1",
    )
    assert head.pooling == ("stages" if features == "stages" else "mean")
    path = tmp_path / "head.safetensors"
    path.write_bytes(stage.journal.files[head.files["head.safetensors"]])
    engine = ImageEngine()
    handle = engine.load(trunk.manifest, trunk.files, device="cpu", in_format="fp32")
    order = TaskOrder(name="c", spec=Classify("mine.colour", input="{photo}").to_json(), manifest=head)
    engine.attach(handle, order, {"head.safetensors": path})
    pass_ = Pass(handle, (order,), 0, values=PICTURES[60:])
    rows = [row for row in engine.prepare(pass_, [""] * 30) if isinstance(row, Prepared)]
    said = [label for label, _ in values(engine.run(pass_, rows)["c"], head.labels)]
    right = np.mean([a == b for a, b in zip(said, LABELS[60:], strict=True)])
    assert right == pytest.approx(made["scores"]["colour"]["accuracy"])
    assert right > 0.5


def test_a_trunk_of_pictures_does_not_learn_itself(trunk: Described) -> None:
    stage = Stage(trunk, Memory([], np.zeros((90, DIM), np.float32)))
    [row] = stage.engine.prepare(stage.pass_, [recipe(tune="lora").dumps()])
    assert isinstance(row, CellError)
    assert "tune heads" in row.message
    [row] = stage.engine.prepare(stage.pass_, [recipe(inputs=("{a}", "{b}")).dumps()])
    assert isinstance(row, CellError)
    assert "one picture" in row.message


def test_vectors_of_the_other_features_are_refused_in_words(trunk: Described) -> None:
    stage = Stage(trunk, Memory([], np.zeros((90, DIM), np.float32)))
    steps = list(stage.steps(recipe(features="stages")))
    [ended] = steps[-1].ended
    [error] = ended.columns["fit"].errors.values()
    assert error.error == "cannot_train"
    assert str(STAGE_DIM) in error.message


def test_its_trainer_needs_no_copies_of_its_weights(trunk: Described) -> None:
    trainer = trainer_of(trunk).manifest
    assert (trainer.name, trainer.answers, trainer.reads) == ("tiny-trainer", "models", "text")
    assert trainer.parameters == trunk.manifest.parameters


def rows(n: int) -> list[dict[str, Any]]:
    return [{"photo": PICTURES[i], "colour": LABELS[i]} for i in range(n)]


def test_a_lesson_is_read_from_pictures_and_named_by_their_content() -> None:
    tasks = {"colour": Labels("colour")}
    lesson = read_lesson(rows(40), rows(3), tasks, image="photo")
    assert (lesson.train_rows, list(lesson.inputs)) == (40, PICTURES[:40] + PICTURES[:3])
    other = [{**row, "photo": row["photo"] + b"\0"} for row in rows(40)]
    assert read_lesson(other, rows(3), tasks, image="photo").digest != lesson.digest
    assert hashlib.sha256(b"").hexdigest() != lesson.digest


def test_a_row_without_a_picture_is_named() -> None:
    some: list[dict[str, Any]] = [*rows(30), {"colour": "red"}, {"photo": "", "colour": "red"}]
    with pytest.raises(InvalidJob) as refused:
        read_lesson(some, rows(3), {"colour": Labels("colour")}, image="photo")
    assert [(p.field, p.row) for p in refused.value.problems] == [("train.photo", 30), ("train.photo", 31)]
    assert "no picture" in str(refused.value)
