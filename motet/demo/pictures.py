"""`motet demo --media`: pictures beside texts, in one job: what each shows, its vector, and what the text beside it says.

Rows are cut out of photographs that scikit-image brings, each with a sentence that people have written about something
else: what matters is that two models read a row, each what it needs, and that one table comes back.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet import datasets
from motet.cli.show import console, result_table
from motet.demo.stage import StagedCluster, Story, staged, told_of
from motet.errors import SetupError
from motet.job import Job
from motet.media.sheet import contact_sheet
from motet.messages.jobs import Plan
from motet.results import Row
from motet.tasks import Classify, Embed, Task

if TYPE_CHECKING:
    from PIL.Image import Image

_REGISTER = "--efficientnet=lite0"
TASKS: Mapping[str, Task] = {
    "object": Classify("imagenet", input="{photo}"),
    "look": Embed("efficientnet-lite0", input="{photo}", dtype="fp16"),
    "domain": Classify("text-domain", input="{note}"),
    "sentiment": Classify("review-sentiment", input="{note}"),
}
#: Photographs that rows are cut out of, and what ImageNet calls the things in them, where it knows them.
PHOTOGRAPHS: Mapping[str, frozenset[str]] = {
    "astronaut": frozenset(),
    "brick": frozenset({"stone wall"}),
    "camera": frozenset({"tripod"}),
    "chelsea": frozenset({"tabby", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat", "lynx"}),
    "coffee": frozenset({"espresso", "cup", "coffee mug"}),
    "grass": frozenset(),
    "gravel": frozenset(),
    "motorcycle_left": frozenset(),
    "rocket": frozenset({"missile", "projectile", "space shuttle"}),
}
#: Shares of a photograph that a row shows of each side.
_SHOWN = (0.6, 1.0)
#: Pixels of the longer side of a row's picture.
_SIDE = 400
_ROWS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class PictureRow:
    """A row of the demo."""

    #: The file of a JPEG.
    photo: bytes
    note: str
    #: Name of the photograph that it was cut out of.
    of: str

    def fields(self) -> dict[str, Any]:
        return {"photo": self.photo, "note": self.note}


def run(
    *, data: Path, rows: int = 200, cpus: int = 2, keep: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """As ``motet.demo.texts.run``, with pictures. The first run fetches 35 MB and converts a model for a second."""
    story = Story(quiet)
    with story.phase("cutting pictures out of photographs") as note:
        chosen = choose(rows)
        note(f"{len(chosen):,} rows of a picture and a sentence")
    with staged(data, story, cpus=cpus, keep=keep, models=[_REGISTER]) as stage:
        return _run_job(stage, chosen)


def choose(rows: int, cache: Path | None = None) -> list[PictureRow]:
    """So many rows, always the same ones. Raises SetupError where the packages, or Pillow, are not to be had."""
    image = _pillow()
    files = datasets.photographs(cache)
    photographs = {name: image.open(io.BytesIO(files[name])).convert("RGB") for name in PHOTOGRAPHS}
    _, sentences = datasets.split(datasets.vader(cache))
    dice = random.Random(datasets.SEED)
    dice.shuffle(sentences)
    return [
        PictureRow(_cut_out(photographs[name], dice), " ".join(sentence.text.split()), name)
        for name, sentence in zip(_around(list(PHOTOGRAPHS), rows), sentences, strict=False)
    ]


def _around(names: Sequence[str], rows: int) -> list[str]:
    return [names[i % len(names)] for i in range(rows)]


def _cut_out(photograph: Image, dice: random.Random) -> bytes:
    """A part of a photograph, sometimes mirrored, as a file."""
    width, height = (round(side * dice.uniform(*_SHOWN)) for side in photograph.size)
    left, top = (
        dice.randint(0, whole - part) for whole, part in zip(photograph.size, (width, height), strict=True)
    )
    part = photograph.crop((left, top, left + width, top + height))
    if dice.random() < 0.5:
        part = part.transpose(_pillow().Transpose.FLIP_LEFT_RIGHT)
    part.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    part.save(file, "JPEG", quality=88)
    return file.getvalue()


def _run_job(stage: StagedCluster, chosen: Sequence[PictureRow]) -> dict[str, Any]:
    story = stage.story
    source = [row.fields() for row in chosen]
    plan = stage.plan(source, TASKS)
    job, seconds = stage.run(source, TASKS)
    rows = list(job.results())
    named = [f"{row.of} · {row.note}" for row in chosen]
    story.show(result_table(list(islice(rows, _ROWS_SHOWN)), named, width=console().width))
    sheet = stage.data / "motet-demo-pictures.png"
    with story.phase("drawing the contact sheet") as note:
        contact_sheet([row.photo for row in chosen], [_words(row) for row in rows]).save(sheet)
        note(str(sheet))
    measured = _measure(job, plan, rows, chosen, seconds) | {"sheet": str(sheet)}
    story.say(_summary(measured))
    return measured


def _words(row: Row) -> str:
    cell = row["object"]
    return f"{cell} {cell.score:.2f}" if cell.ok else "–"


def _measure(
    job: Job, plan: Plan, rows: Sequence[Row], chosen: Sequence[PictureRow], seconds: float
) -> dict[str, Any]:
    known = [(str(row["object"]), PHOTOGRAPHS[chosen[row.index].of]) for row in rows if row["object"].ok]
    right = [label in expected for label, expected in known if expected]
    return {
        **told_of(job, seconds),
        "rows_per_s": round(job.rows / seconds, 1),
        "megapixels": round(plan.pixels / 1e6, 1),
        "known_rows": len(right),
        "object_accuracy": round(sum(right) / len(right), 4) if right else None,
        "bytes_sent_per_image": None if job.media is None else round(job.media.bytes_sent_per_image),
    }


def _summary(m: Mapping[str, Any]) -> str:
    lines = [
        f"{m['rows']:,} rows × {m['tasks']} tasks in {m['seconds']:.1f} s: {m['rows_per_s']:,.0f} rows/s in "
        f"{m['passes']} passes, {m['ok']:,} of {m['cells']:,} cells ok",
        f"pictures  {m['megapixels']:,.1f} megapixels seen once for both tasks that read them",
    ]
    if m["object_accuracy"] is not None:
        lines.append(
            f"object    names what is there in {m['object_accuracy']:.0%} of {m['known_rows']:,} pictures of things that "
            "ImageNet has a word for"
        )
    return "\n" + "\n".join(lines)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise SetupError(
            "the demo draws pictures with Pillow, which is not installed: pip install pillow"
        ) from None
    return Image
