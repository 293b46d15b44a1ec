"""The worst pictures of an evaluation: those of which a task is surest and wrong, on a contact sheet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from motet.errors import InvalidJob
from motet.evaluation.measures import folded
from motet.evaluation.truth import TAKE, TrueLabels
from motet.media.folder import MediaFolder, RefusedPath
from motet.media.sheet import contact_sheet
from motet.results import Row
from motet.sources import Source
from motet.tasks import short

#: Pictures on a sheet.
MOST = 60


class HasRows(Protocol):
    """A job whose rows were answered."""

    def results(self, tasks: Any = None) -> Iterator[Row]: ...


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """A label that is not the true one."""

    task: str
    row: int
    said: str
    score: float
    true: str
    #: What the row of labels holds for its picture.
    picture: Any


def wrong_answers(
    job: HasRows, labels: Source, fields: Mapping[str, str], *, picture: str, index: str | None = None
) -> list[WrongAnswer]:
    """Wrong labels, the surest first. ``fields``: task -> field of its true label; ``picture``: field of the picture.

    Tasks that answer no single label, and rows without a true one, are passed over. Labels and ``index`` are read as an
    evaluation reads them. Raises InvalidJob for those that it refuses.
    """
    table = TrueLabels({**fields, "": picture}, index)
    table.read(labels)
    pictures = dict(zip(table.rows, table.values[picture], strict=True))
    truth: dict[str, dict[int, str]] = {}
    found = []
    for answered in job.results(list(fields)):
        row = answered.index
        for task, field in fields.items():
            cell = answered[task]
            if not cell.ok or cell.kind != "label":
                continue
            if task not in truth:
                truth[task] = table.truth(field, TAKE["label"])
            said, true = str(cell), truth[task].get(row)
            if true is not None and folded(said) != folded(true):
                found.append(WrongAnswer(task, row, said, float(cell.score or 0), true, pictures[row]))
    return sorted(found, key=lambda one: -one.score)


def draw_worst(wrong: list[WrongAnswer], out: Path, *, root: str | os.PathLike[str]) -> int:
    """Draw the first MOST of them into a PNG file, each with what was said and its score; how many are on it.

    Pictures are opened below ``root`` only, as `Client.submit` opens them. Raises InvalidJob where one is not there.
    """
    shown = wrong[:MOST]
    folder = MediaFolder(root)
    try:
        photos = [_opened(folder, one) for one in shown]
    finally:
        folder.close()
    if shown:
        contact_sheet(photos, [f"{one.said} {one.score:.2f}" for one in shown], columns=10).save(out, "PNG")
    return len(shown)


def _opened(folder: MediaFolder, one: WrongAnswer) -> bytes:
    try:
        return folder.read(one.picture if isinstance(one.picture, str) else "")
    except RefusedPath as refused:
        raise InvalidJob.of(
            "labels",
            f"{short(refused.got)}",
            refused.expected,
            "name the field of the pictures' paths",
            one.row,
        ) from None
