"""Training runs as rows: a recipe goes in, and what comes out are models, stored as files of the registry's form.

The engine is a stream, so the device does other work between the steps of a run, a cancelled run ends at the next
step, and a run whose process was killed goes on from its checkpoint wherever it is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from motet.protocol.columns import CellError
from motet.protocol.manifest import Manifest
from motet.protocol.settings import Settings
from motet.protocol.wire import TaskOrder
from motet.training.recipe import Recipe, Target
from workers import scratch
from workers.engine import Ended, Pass, Prepared, Step
from workers.engines.function import json_column
from workers.engines.proved import inherited
from workers.engines.training.journal import HttpJournal
from workers.engines.training.learner import Hopeless
from workers.engines.training.run import Journal, Run, Trained, Trunk, TryAgain
from workers.engines.trunk import free_cache, load_reader, settle, torch_errors
from workers.registrar.describe import (
    HEAD_ANSWERS,
    TRAINING_COPIES,
    describe_folder,
    encoder_digest,
    sitting_on,
)
from workers.registrar.describe_image import image_digest
from workers.run.device import other_devices

#: How often a run begins again after its journal was out of reach, the pause before, and the seconds that an API which
#: is away takes to be known as such (motet/http.py).
_TRIES, _PAUSE_S, _AWAY_S = 60, 2.0, 35.0

OpenJournal = Callable[[str, int, str], Journal]


@dataclass
class Trainer:
    """A loaded trunk, and the run that is under way on it."""

    trunk: Trunk
    #: Everything of its folder but the weights.
    files: Mapping[str, bytes]
    run: TrainingRow | None = None


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    """A row made ready."""

    recipe: Recipe
    lease: str
    #: Index of the row in its job.
    index: int


class TrainerEngine:
    """Answers fit."""

    longest_wait_s = _TRIES * (_PAUSE_S + _AWAY_S)

    def __init__(self, open_journal: OpenJournal | None = None) -> None:
        """``open_journal``: (lease, row, job) -> where a run reads and reports; the API, unless a test says otherwise."""
        self._open = open_journal or _open

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        # Its manifest counts all copies that training keeps of a parameter.
        return model.memory_mb("fp32")

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Trainer:
        # On a trunk of pictures heads learn alone, from vectors that are there: nothing of it is needed.
        trunk, tokens = (
            (None, None)
            if of_pictures(model)
            else load_reader(
                "AutoModel", model, files, device=device, in_format="fp32", may_miss=("pooler.",)
            )
        )
        beside = {
            name: path.read_bytes() for name, path in files.items() if not name.endswith(".safetensors")
        }
        return Trainer(
            Trunk(
                manifest=model,
                model=trunk,
                tokens=tokens,
                pooling=model.pooling,
                device=device,
                fast=in_format == "bf16",
                others=other_devices(device),
            ),
            beside,
        )

    def attach(self, handle: Trainer, task: TaskOrder, files: Mapping[str, Path]) -> None:
        return None

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        rows: list[Prepared | CellError] = []
        for row, text in enumerate(texts):
            try:
                recipe = Recipe.loads(text)
            except ValueError as error:
                rows.append(CellError("bad_recipe", str(error)))
                continue
            if recipe.tune != "heads" and pass_.handle.trunk.manifest.packed_width:
                words = "weights of eight bits cannot learn; tune heads alone, or the model that it was compressed from"
                rows.append(CellError("bad_recipe", words))
                continue
            if recipe.tune != "heads" and of_pictures(pass_.handle.trunk.manifest):
                words = (
                    "a trunk that reads pictures cannot learn here; tune heads alone, with features=stages"
                )
                rows.append(CellError("bad_recipe", words))
                continue
            if recipe.inputs and of_pictures(pass_.handle.trunk.manifest):
                rows.append(
                    CellError(
                        "bad_recipe", "a head on pictures reads one picture; leave texts and numbers out"
                    )
                )
                continue
            length = (recipe.train_rows + recipe.test_rows) * recipe.texts
            rows.append(Prepared(row, length, False, TrainingOrder(recipe, pass_.lease, pass_.indices[row])))
        return rows

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        if pass_.handle.run is not None:
            return False
        order: TrainingOrder = row.inputs
        pass_.handle.run = TrainingRow(pass_, order, ticket, self._open)
        return True

    def step(self, handle: Trainer, tokens: int) -> Step:
        fit = handle.run
        if fit is None:
            return Step()
        with torch_errors():
            computed = fit.step()
            settle(handle.trunk.device)
        if fit.answer is None:
            return Step(computed_tokens=computed)
        handle.run = None
        fit.close()
        return Step([fit.ended()], computed)

    def abort(self, handle: Trainer, tickets: Collection[Hashable]) -> None:
        if handle.run is not None and handle.run.ticket in tickets:
            handle.run.close()
            handle.run = None

    def unload(self, handle: Trainer) -> None:
        self.abort(handle, [handle.run.ticket] if handle.run else [])
        if handle.trunk.model is not None:
            handle.trunk.model.to("meta")
        free_cache(handle.trunk.device)


class TrainingRow:
    """One recipe inside: its run, begun again where the journal was out of reach, and its answer in the end."""

    def __init__(
        self, pass_: Pass, order: TrainingOrder, ticket: Hashable, open_journal: OpenJournal
    ) -> None:
        self.ticket = ticket
        self.answer: dict[str, Any] | CellError | None = None
        self._pass, self._order, self._open = pass_, order, open_journal
        self._run: Run | None = None
        self._steps: Generator[int, None, dict[str, Any]] | None = None
        self._tries, self._again_at = 0, 0.0
        self._tokens, self._seconds = 0, 0.0

    def step(self) -> int:
        """A little more. Tokens computed, 0 where there was nothing to do but wait."""
        if self._steps is None:
            if time.monotonic() < self._again_at:
                return 0
            self._steps = self._begin()
        began = time.monotonic()
        try:
            computed = next(self._steps)
        except StopIteration as done:
            self.answer, computed = done.value, 1
        except Hopeless as error:
            self.answer, computed = CellError("cannot_train", str(error)), 1
        except TryAgain as error:
            self.close()
            self._tries += 1
            self._again_at = time.monotonic() + _PAUSE_S
            if self._tries >= _TRIES:
                self.answer = CellError("cannot_train", f"the API was out of reach: {error}")
            return 0
        self._tokens += computed
        self._seconds += time.monotonic() - began if computed else 0.0
        return computed

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        if self._run is not None:
            self._run.close()
            self._run = None

    def ended(self) -> Ended:
        column = json_column([self.answer])
        tasks = [task.name for task in self._pass.tasks]
        share = self._seconds / len(tasks)
        return Ended(
            self.ticket,
            dict.fromkeys(tasks, column),
            dict.fromkeys(tasks, (self._tokens, 0, 0, share)),
        )

    def _begin(self) -> Generator[int, None, dict[str, Any]]:
        handle: Trainer = self._pass.handle
        order = self._order
        journal = self._open(order.lease, order.index, order.recipe.job)
        self._run = run = Run(order.recipe, handle.trunk, journal)
        yield from run.go()
        assert run.trained is not None
        with scratch.folder("fit") as folder:
            models, files = made(run.recipe, run.trained, handle, Path(folder))
            yield 1
            for path in files.values():
                yield from run.call(partial(journal.store, path))
        yield from run.call(partial(journal.keep, list(files)))
        return {
            "models": [model.to_json() for model in models],
            "scores": run.trained.scores,
            "frozen": run.trained.frozen,
            "seconds": round(run.trained.seconds, 3),
        }


def made(
    recipe: Recipe, trained: Trained, handle: Trainer, folder: Path
) -> tuple[list[Manifest], dict[str, Path]]:
    """The manifests, a trunk before its heads, and their files by digest, written into the folder."""
    from safetensors.torch import save_file

    files: dict[str, Path] = {}
    models: list[Manifest] = []
    about = {"data": recipe.data, "training": recipe.command, "began_with": recipe.trunk}
    base = _trained_by(handle.trunk.manifest, recipe.trunk)
    if trained.trunk is not None:
        home = folder / "trunk"
        home.mkdir()
        for name, raw in handle.files.items():
            (home / name).write_bytes(raw)
        save_file(dict(trained.trunk), home / "model.safetensors", metadata={"format": "pt"})
        described = describe_folder(
            home,
            name=recipe.name,
            version=recipe.version,
            licence=recipe.licence or base.licence,
            source=about,
        )
        manifest = replace(
            described.manifest,
            pooling=base.pooling,
            max_tokens=base.max_tokens,
            formats=trained.formats,
            scores=dict(trained.scores),
        )
        base = inherited(manifest, base)
        models.append(base)
        files |= {base.files[name]: path for name, path in described.files.items()}
    for target in recipe.targets:
        path = folder / f"{target.name}.safetensors"
        save_file(dict(trained.heads[target.name]), path)
        head = _head(recipe, target, path, base, trained, about)
        models.append(head)
        files[head.files["head.safetensors"]] = path
    return models, files


def _head(
    recipe: Recipe, target: Target, path: Path, trunk: Manifest, trained: Trained, about: Mapping[str, str]
) -> Manifest:
    return sitting_on(
        trunk,
        {"head.safetensors": path},
        name=f"{recipe.name}.{target.name}",
        version=recipe.version,
        answers=HEAD_ANSWERS[target.kind],
        max_tokens=min(recipe.max_tokens or trunk.max_tokens, trunk.max_tokens),
        pooling="stages" if recipe.features == "stages" else trunk.pooling,
        labels=target.labels,
        inputs=recipe.inputs,
        numbers=tuple(one.name for one in recipe.numbers),
        formats=trunk.formats,
        licence=recipe.licence,
        source=dict(about),
        scores={"test": trained.scores.get(target.name, {}), "frozen": trained.frozen.get(target.name, {})},
    ).manifest


def _trained_by(trainer: Manifest, trunk: str) -> Manifest:
    """The trunk that a trainer trains, as it is registered."""
    name, _, version = trunk.partition("@")
    own = replace(trainer, name=name, version=version, answers="vector")
    if of_pictures(trainer):
        return replace(own, engine="image", reads="image", trunk=image_digest(trainer.files))
    return replace(
        own,
        engine="encoder",
        trunk=encoder_digest(trainer.files),
        parameters=trainer.parameters // TRAINING_COPIES,
    )


def of_pictures(trainer: Manifest) -> bool:
    """Whether it trains on a trunk that reads pictures."""
    return trainer.source.get("reads") == "image"


def _open(lease: str, row: int, job: str) -> HttpJournal:
    settings = Settings.from_env()
    return HttpJournal(settings.url, settings.token, lease, row, job)
