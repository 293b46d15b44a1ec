"""How a training run begins: its trunk is looked up, its rows are read and embedded, and its recipe becomes a row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import UUID

from motet.errors import InvalidJob, NotFound, Problem
from motet.job import Job
from motet.messages.message import expectations, misfits
from motet.protocol.manifest import Manifest, trainer_name
from motet.rows import MAX_ROW_BYTES
from motet.sources import Source
from motet.tasks import Embed, Features, Fit, short
from motet.training.lesson import Learned, Lesson, read_lesson
from motet.training.recipe import Recipe, Tune
from motet.training.run import TrainRun

#: Ends the name of the job in which a run's rows are embedded.
VECTORS = ": vectors"
#: The field under which pictures are sent to be embedded.
_PICTURE = "image"


class Submits(Protocol):
    """What a training run needs of a client."""

    def model(self, name: str) -> Manifest: ...

    def models(self) -> list[Manifest]: ...

    @property
    def submit(self) -> Callable[..., Job]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a user asks for; see ``Client.train``."""

    name: str
    trunk: str
    tasks: Mapping[str, Learned]
    train: Source
    test: Source | None
    tune: Tune
    epochs: int | None
    text: str | Sequence[str]
    numbers: Sequence[str]
    image: str | None
    features: Features
    media_root: str | os.PathLike[str] | None
    version: str | None
    seed: int
    progress: bool | None
    command: str
    licence: str
    #: Further fields of the recipe.
    more: Mapping[str, Any] = field(default_factory=dict)


def start(client: Submits, asked: Training) -> TrainRun:
    """Read, embed, and let learn. Raises what ``Client.train`` raises."""
    base, trainer = _models(client, asked)
    version = asked.version or _next_version(client, asked.name)
    _check_names(asked, version)
    pictures = base.reads != "text"
    image = asked.image or _PICTURE if pictures else None
    lesson = read_lesson(
        asked.train,
        asked.test,
        asked.tasks,
        text=asked.text,
        numbers=asked.numbers,
        image=image,
        seed=asked.seed,
    )
    recipe = _recipe(asked, base, lesson, version)
    rows: Sequence[Any] = [{_PICTURE: one} for one in lesson.inputs] if pictures else lesson.inputs
    embed = Embed(base.ref, normalize=False)
    embedded = client.submit(
        rows,
        {"vector": replace(embed, input=f"{{{_PICTURE}}}", features=asked.features) if pictures else embed},
        name=f"{asked.name}{VECTORS}",
        progress=asked.progress,
        **({"media_root": asked.media_root} if pictures else {}),
    ).wait()
    if embedded.progress.error:
        cell = next(iter(embedded.errors()))
        raise InvalidJob.of(
            "train",
            f"{cell.error}: {cell.message}",
            "rows that the trunk reads",
            "leave it out",
            cell.row // recipe.texts,
        )
    row = replace(recipe, job=embedded.id).dumps()
    job = client.submit(
        [row], {"fit": Fit(trainer.ref)}, name=asked.name, reuse=False, progress=asked.progress
    )
    return TrainRun(job, asked.name, list(asked.tasks))


def _models(client: Submits, asked: Training) -> tuple[Manifest, Manifest]:
    """The trunk, and what trains on it. Raises InvalidJob, NotFound for the trunk."""
    base = client.model(asked.trunk)
    try:
        trainer = client.model(f"{trainer_name(base.name)}@{base.version}")
    except NotFound:
        raise InvalidJob.of(
            "trunk",
            short(base.ref),
            "an encoder that was registered with what trains on it",
            "register it again, as it was: motet models add, with --builtin for those that motet ships",
        ) from None
    wrong = []
    if base.reads == "text" and asked.image is not None:
        wrong.append(
            Problem(
                "image",
                f"{short(asked.image)} for {base.ref}, which reads texts",
                "null",
                "name the field of the text in text, or a trunk that reads pictures, such as efficientnet-lite0",
            )
        )
    if base.reads != "text" and asked.tune != "heads":
        wrong.append(
            Problem(
                "tune",
                f"{asked.tune} of {base.ref}, which reads pictures",
                "heads",
                'leave it out; features="stages" gives heads more to learn from',
            )
        )
    if base.reads != "text" and (asked.numbers or not isinstance(asked.text, str)):
        wrong.append(
            Problem(
                "numbers" if asked.numbers else "text",
                f"{'numbers' if asked.numbers else 'several texts'} for {base.ref}, which reads pictures",
                "one picture, in the field that image names",
                "leave them out",
            )
        )
    if asked.features == "stages" and not base.stage_dim:
        wrong.append(
            Problem(
                "features",
                f"stages of {base.ref}, which has none",
                "last",
                "leave it out, or choose another trunk",
            )
        )
    if wrong:
        raise InvalidJob(wrong)
    return base, trainer


def _check_names(asked: Training, version: str) -> None:
    """Raises InvalidJob for names under which the models could not be registered once they are learned."""
    wanted = expectations(Manifest)
    problems: dict[tuple[str, str], Problem] = {}
    for task in asked.tasks:
        told = {"name": f"{asked.name}.{task}", "version": version, "licence": asked.licence}
        for option in told.keys() & misfits(Manifest, told):
            got = short(told[option])
            problems[option, got] = Problem(option, got, wanted[option], "name it otherwise")
    if problems:
        raise InvalidJob([*problems.values()])


def _next_version(client: Submits, name: str) -> str:
    taken = {m.version for m in client.models() if m.name == name or m.name.startswith(f"{name}.")}
    return str(1 + max((int(v) for v in taken if v.isdigit()), default=0))


def _recipe(asked: Training, base: Manifest, lesson: Lesson, version: str) -> Recipe:
    """Raises InvalidJob for options that make none, and for labels that no row holds."""
    epochs = (
        {} if asked.epochs is None else {"head_epochs" if asked.tune == "heads" else "epochs": asked.epochs}
    )
    try:
        recipe = Recipe(
            name=asked.name,
            version=version,
            trunk=base.ref,
            # As long as the name of the job that will be there.
            job=str(UUID(int=0)),
            train_rows=lesson.train_rows,
            test_rows=lesson.rows - lesson.train_rows,
            targets=lesson.targets,
            inputs=lesson.templates,
            numbers=lesson.numbers,
            tune=asked.tune,
            features=asked.features,
            seed=asked.seed,
            data=lesson.digest,
            command=asked.command,
            licence=asked.licence,
            **dict[str, Any](epochs),
            **asked.more,
        )
        size = len(Recipe.loads(recipe.dumps()).dumps().encode())
    except (TypeError, ValueError) as error:
        raise InvalidJob.of(
            "train", str(error)[:200], "options of a training run", "see motet.training.recipe.Recipe"
        ) from None
    if size > MAX_ROW_BYTES:
        raise InvalidJob.of(
            "train",
            f"labels{' and numbers' if asked.numbers else ''} of {size:,} bytes, packed",
            f"at most {MAX_ROW_BYTES:,}",
            "train on fewer rows, or fewer tasks at once",
        )
    return recipe
