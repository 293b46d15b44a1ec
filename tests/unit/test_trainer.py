"""The trainer on a tiny random encoder: what it learns, what it hands on, and that an interruption changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.protocol.columns import Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Fit, Number, Task
from motet.training.recipe import Recipe, Target
from tests.unit.test_worker_engines import tiny_bert
from workers.engine import Engine, Pass, Prepared, Step
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.training import run as training
from workers.engines.training.learner import Hopeless
from workers.engines.training.run import RowSlice, TryAgain
from workers.engines.training.state import RunState
from workers.engines.training.trainer import TrainerEngine
from workers.registrar.describe import Described, describe_folder, trainer_of
from workers.run.batch_adapter import run_to_the_end

WORDS = {"good": 1.0, "fine": 0.5, "bad": -1.0, "awful": -2.0}
FILLERS = ["the day was", "a meal is", "this film seems", "that train had been", "my answer to it is"]


def sentences(n: int) -> list[tuple[str, str, float]]:
    """Text, whether it is glad or sad, and how much so."""
    words = list(WORDS)
    found = []
    for i in range(n):
        word = words[i * 7 % 4]
        found.append(
            (f"{FILLERS[i % 5]} {word} " * (1 + i % 3), "glad" if WORDS[word] > 0 else "sad", WORDS[word])
        )
    return found


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Described:
    folder = tiny_bert(tmp_path_factory.mktemp("trunk"))
    return describe_folder(folder, name="tiny", version="1", licence="", source={})


ROWS = sentences(240)


@pytest.fixture(scope="module")
def vectors(trunk: Described) -> np.ndarray[Any, np.dtype[np.float32]]:
    engine = EncoderEngine()
    handle = engine.load(trunk.manifest, trunk.files, device="cpu", in_format="fp32")
    rows = [
        r for r in engine.prepare(Pass(handle, (), 0), [text for text, *_ in ROWS]) if isinstance(r, Prepared)
    ]
    return engine._pooled(handle, rows).numpy()


@dataclass
class Memory:
    """A journal in memory, which can be out of reach."""

    texts: Sequence[str]
    vectors: np.ndarray[Any, np.dtype[np.float32]]
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    saved: bytes | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    kept: Sequence[str] = ()
    #: Calls until one fails.
    fails_in: int = -1
    size: int = 100

    def _tap(self) -> None:
        self.fails_in -= 1
        if self.fails_in == 0:
            raise TryAgain("not now")

    def block(self, number: int, *, texts: bool) -> RowSlice | None:
        self._tap()
        at = slice(number * self.size, (number + 1) * self.size)
        found = self.vectors[at]
        return RowSlice(self.texts[at] if texts else (), found) if len(found) else None

    def checkpoint(self) -> bytes | None:
        self._tap()
        return self.saved

    def report(self, key: str, report: Mapping[str, Any], checkpoint: RunState | None) -> None:
        self._tap()
        if report:
            self.reports[key] = report
        self.saved = b"".join(checkpoint.slices()) if checkpoint else self.saved

    def store(self, content: bytes | Path) -> str:
        self._tap()
        raw = content if isinstance(content, bytes) else content.read_bytes()
        sha256 = hashlib.sha256(raw).hexdigest()
        self.files[sha256] = raw
        return sha256

    def keep(self, files: Sequence[str]) -> None:
        self.kept = files

    def close(self) -> None:
        return None


def recipe(**changed: Any) -> Recipe:
    n = changed.get("train_rows", 200)
    facts = {
        "name": "mine", "version": "3", "trunk": "tiny@1", "job": "j", "train_rows": n, "test_rows": len(ROWS) - n,
        "hidden": 8, "head_epochs": 4, "epochs": 2, "patience": 0, "rate": 1e-3, "batch_rows": 16,
    }  # fmt: skip
    targets = (
        Target.single("mood", ["glad", "sad"], [mood for _, mood, _ in ROWS]),
        Target.multi("tags", ["strong", "sad"], [_tags(mood, much) for _, mood, much in ROWS]),
        Target.number("much", [much for *_, much in ROWS]),
    )
    return Recipe(**{**facts, "targets": targets, **changed})


def _tags(mood: str, much: float) -> list[str]:
    return [*(["strong"] if abs(much) >= 1 else []), *(["sad"] if mood == "sad" else [])]


class Stage:
    """The engine with a loaded trunk and a journal."""

    def __init__(
        self, trunk: Described, journal: Memory, in_format: str = "fp32", device: str = "cpu"
    ) -> None:
        self.trunk, self.journal = trunk, journal
        self.engine = TrainerEngine(lambda lease, row, job: journal)
        described = trainer_of(trunk)
        self.manifest = described.manifest
        self.handle = self.engine.load(self.manifest, described.files, device=device, in_format=in_format)
        self.order = TaskOrder(name="fit", spec=Fit(self.manifest.ref).to_json(), manifest=self.manifest)
        self.pass_ = Pass(self.handle, (self.order,), 0, indices=(0,), lease="1.1.n")

    def fit(self, asked: Recipe) -> dict[str, Any]:
        [row] = self.engine.prepare(self.pass_, [asked.dumps()])
        assert isinstance(row, Prepared)
        column = run_to_the_end(self.engine, self.pass_, [row])["fit"]
        assert not column.errors, column.errors
        return dict(json.loads(column.arrays["bytes"]))

    def steps(self, asked: Recipe) -> Iterator[Step]:
        [row] = self.engine.prepare(self.pass_, [asked.dumps()])
        assert isinstance(row, Prepared)
        assert self.engine.admit(self.pass_, row, "ticket", urgent=False)
        while True:
            step = self.engine.step(self.handle, 1000)
            yield step
            if step.ended:
                return


@pytest.fixture
def stage(trunk: Described, vectors: Any) -> Stage:
    return Stage(trunk, Memory([text for text, *_ in ROWS], vectors))


def answers(stage: Stage, made: Mapping[str, Any], tmp_path: Path) -> dict[str, list[Any]]:
    """What an encoder engine says with the models that were made, out of the files that were stored."""
    engine = EncoderEngine()
    manifests = [Manifest.from_json(model) for model in made["models"]]
    trunks = [m for m in manifests if not m.trunk_model]
    files = stage.trunk.files if not trunks else _written(trunks[0], stage.journal.files, tmp_path)
    base = trunks[0] if trunks else stage.trunk.manifest
    handle = engine.load(base, files, device="cpu", in_format="fp32")
    tasks = []
    for manifest in manifests:
        if manifest.trunk_model:
            assert (manifest.trunk, manifest.trunk_model) == (base.trunk, base.ref)
            task: Task = Number("x") if manifest.answers == "number" else Classify("x")
            order = TaskOrder(name=manifest.name, spec=task.to_json(), manifest=manifest)
            engine.attach(handle, order, _written(manifest, stage.journal.files, tmp_path))
            tasks.append(order)
    pass_ = Pass(handle, tuple(tasks), 0)
    rows = [r for r in engine.prepare(pass_, [text for text, *_ in ROWS[200:]]) if isinstance(r, Prepared)]
    columns = engine.run(pass_, rows)
    return {task.name: list(values(columns[task.name], task.manifest.labels)) for task in tasks}


def _written(manifest: Manifest, stored: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    home = folder / manifest.ref
    home.mkdir(exist_ok=True)
    for name, sha256 in manifest.files.items():
        (home / name).write_bytes(stored[sha256])
    return {name: home / name for name in manifest.files}


@pytest.mark.parametrize("tune", ["heads", "lora", "all"])
def test_the_models_that_come_out_answer_with_the_scores_that_are_told(
    stage: Stage, tmp_path: Path, tune: str
) -> None:
    made = stage.fit(recipe(tune=tune))
    told = made["scores"]
    said = answers(stage, made, tmp_path)
    moods = [mood for _, mood, _ in ROWS[200:]]
    right = np.mean([label == mood for (label, _), mood in zip(said["mine.mood"], moods, strict=True)])
    assert right == pytest.approx(told["mood"]["accuracy"], abs=1e-6)
    much = np.array([m for *_, m in ROWS[200:]])
    assert np.abs(np.array(said["mine.much"]) - much).mean() == pytest.approx(told["much"]["mae"], abs=1e-4)
    given = [{label for label, _ in labels} for labels in said["mine.tags"]]
    both = [(label in g) == (label in _tags(mood, m)) for g, (_, mood, m) in zip(given, ROWS[200:], strict=True)
            for label in ("strong", "sad")]  # fmt: skip
    assert np.mean(both) == pytest.approx(told["tags"]["accuracy"], abs=1e-6)
    assert set(stage.journal.kept) == {sha for m in made["models"] for sha in m["files"].values()}
    assert [m["name"] for m in made["models"]] == [
        *(["mine"] if tune != "heads" else []), "mine.mood", "mine.tags", "mine.much"
    ]  # fmt: skip
    assert {m["version"] for m in made["models"]} == {"3"}


def test_a_trunk_that_learns_is_better_than_heads_alone_where_there_is_something_to_learn(
    stage: Stage,
) -> None:
    made = stage.fit(recipe(tune="all", epochs=6))
    assert made["scores"]["mood"]["accuracy"] >= made["frozen"]["mood"]["accuracy"]
    assert made["scores"]["mood"]["accuracy"] > 0.9
    assert made["scores"]["much"]["mae"] < made["frozen"]["much"]["mae"]


def test_the_same_recipe_gives_the_same_models_and_another_seed_others(
    trunk: Described, vectors: Any
) -> None:
    texts = [text for text, *_ in ROWS]
    a, b, c = (
        Stage(trunk, Memory(texts, vectors)).fit(recipe(tune="lora", seed=seed))["models"]
        for seed in (0, 0, 1)
    )
    assert a == b
    assert [m["files"] for m in a] != [m["files"] for m in c]


@pytest.mark.parametrize("tune", ["lora", "all"])
@pytest.mark.parametrize("steps", [9, 29])
def test_a_run_that_is_killed_goes_on_from_its_checkpoint_to_the_same_models(
    trunk: Described, vectors: Any, monkeypatch: pytest.MonkeyPatch, tune: Any, steps: int
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)  # after each step that the journal keeps up with
    texts = [text for text, *_ in ROWS]
    whole = Stage(trunk, Memory(texts, vectors)).fit(recipe(tune=tune))
    journal = Memory(texts, vectors)
    killed = Stage(trunk, journal)
    computed = 0
    for step in killed.steps(recipe(tune=tune)):
        computed += step.computed_tokens > 0
        if computed == steps:
            break
    else:
        pytest.fail("it ended before it could be killed")
    assert int(killed.handle.run is not None) == 1
    killed.engine.abort(killed.handle, ["ticket"])
    assert int(killed.handle.run is not None) == 0
    again = Stage(trunk, journal).fit(recipe(tune=tune))
    assert [m["files"] for m in again["models"]] == [m["files"] for m in whole["models"]]
    assert again["scores"] == whole["scores"]
    assert list(journal.reports) == [*(f"heads {n:04}" for n in range(1, 5)), f"{tune} 0001", f"{tune} 0002"]


@pytest.mark.parametrize("fails_in", [1, 3, 5, 9, 12])
def test_a_journal_that_is_out_of_reach_for_a_moment_costs_time_only(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, fails_in: int
) -> None:
    monkeypatch.setattr("workers.engines.training.trainer._PAUSE_S", 0.01)
    whole = stage.fit(recipe(tune="all"))
    stage.journal.saved = None
    stage.journal.fails_in = fails_in
    assert stage.fit(recipe(tune="all"))["models"] == whole["models"]
    assert stage.journal.fails_in < 0


def test_rows_without_a_label_teach_the_other_tasks_only(stage: Stage) -> None:
    some = [mood if i % 3 else None for i, (_, mood, _) in enumerate(ROWS)]
    one = replace(recipe(), targets=(Target.single("mood", ["glad", "sad"], some), *recipe().targets[1:]))
    assert stage.fit(one)["scores"]["mood"]["accuracy"] > 0.5
    nobody = replace(
        one, targets=(Target.single("mood", ["glad", "sad"], [None] * len(ROWS)), *recipe().targets[1:])
    )
    assert "mood" not in stage.fit(nobody)["scores"]


def test_rare_labels_count_for_more_where_that_is_asked(stage: Stage) -> None:
    rare = ["glad" if i % 12 == 0 else "sad" for i in range(len(ROWS))]
    weights = []
    for balance in (False, True):
        target = Target.single("mood", ["glad", "sad"], rare, balance=balance)
        made = stage.fit(replace(recipe(head_epochs=2, hidden=0), targets=(target,)))
        weights.append([m["files"] for m in made["models"]])
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"train_rows": 100, "test_rows": 20}, "240 rows"), ({"train_rows": 239, "test_rows": 5}, "240 rows")],
)
def test_a_recipe_for_other_rows_is_an_error_of_its_cell(stage: Stage, change: Any, words: str) -> None:
    n = change["train_rows"] + change["test_rows"]
    target = Target.single("mood", ["glad", "sad"], ["glad", "sad"] * (n // 2) + ["glad"] * (n % 2))
    [row] = stage.engine.prepare(stage.pass_, [replace(recipe(**change), targets=(target,)).dumps()])
    assert isinstance(row, Prepared)
    column: Column = run_to_the_end(stage.engine, stage.pass_, [row])["fit"]
    assert column.errors[0].error == "cannot_train"
    assert words in column.errors[0].message


def test_a_row_without_a_vector_is_named(stage: Stage) -> None:
    stage.journal.vectors = stage.journal.vectors.copy()
    stage.journal.vectors[17] = np.nan
    with pytest.raises(AssertionError, match="row 17 of job j has no vector"):
        stage.fit(recipe())


def test_what_is_no_recipe_is_an_error_of_its_cell(stage: Stage) -> None:
    [bad, good] = stage.engine.prepare(replace(stage.pass_, indices=(0, 1)), ["no recipe", recipe().dumps()])
    assert getattr(bad, "error", "") == "bad_recipe"
    assert isinstance(good, Prepared)


def test_it_keeps_the_contract_of_a_continuous_engine_one_run_at_a_time(stage: Stage) -> None:
    assert isinstance(stage.engine, Engine)
    steps = stage.steps(recipe())
    next(steps)
    [row] = stage.engine.prepare(stage.pass_, [recipe().dumps()])
    assert isinstance(row, Prepared)
    assert not stage.engine.admit(stage.pass_, row, "second", urgent=True)
    stage.engine.abort(stage.handle, ["second"])
    assert int(stage.handle.run is not None) == 1
    last = list(steps)[-1]
    assert last.ended[0].spent["fit"][0] > 0
    stage.engine.unload(stage.handle)
    assert not stage.handle.trunk.model.embeddings.word_embeddings.weight.is_cuda


def test_hopeless_is_not_tried_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(number: int, *, texts: bool) -> RowSlice | None:
        calls.append(number)
        raise Hopeless("it is gone")

    monkeypatch.setattr(stage.journal, "block", refuse)
    with pytest.raises(AssertionError, match="it is gone"):
        stage.fit(recipe())
    assert calls == [0]


def test_a_loss_that_is_no_number_ends_the_run_with_what_to_do(stage: Stage) -> None:
    with pytest.raises(AssertionError, match=r"the loss became nan in epoch . of all; choose a lower rate"):
        stage.fit(recipe(tune="all", rate=1e30))


def test_low_rank_changes_are_merged_without_a_change_of_what_is_computed() -> None:
    from workers.engines.training.lora import LowRank, merge, put_in

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 4))
    x = torch.randn(5, 8)
    before = model(x)
    put_in(model, rank=3, seed=0)
    assert torch.equal(model(x), before), "it begins as it was"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.down",
        "0.up",
        "2.down",
        "2.up",
    }
    for layer in model:
        if isinstance(layer, LowRank):
            torch.nn.init.normal_(layer.up)
    changed = model(x)
    merge(model)
    assert [type(layer).__name__ for layer in model] == ["Linear", "GELU", "Linear"]
    assert torch.allclose(model(x), changed, atol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-3)
