"""The worst pictures: which they are, and that they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from motet.errors import InvalidJob
from motet.evaluation.worst import draw_worst, wrong_answers
from motet.media.sheet import THUMB, WORDS_HIGH, contact_sheet
from tests.nasty_pictures import halves, nasty, saved


class Said:
    """A cell with a label."""

    ok, kind = True, "label"

    def __init__(self, label: str, score: float, ok: bool = True) -> None:
        self.label, self.score, self.ok = label, score, ok

    def __str__(self) -> str:
        return self.label


class Answered(SimpleNamespace):
    """A job of one task."""

    def results(self, tasks: Any = None) -> Iterator[Any]:
        for index, cell in enumerate(self.cells):
            yield type("Row", (dict,), {"index": index})({"object": cell})


LABELS = [
    {"object": true, "photo": f"{i}.jpg"} for i, true in enumerate(("cat", "dog", "dog", None, "cat", "cat"))
]
JOB = Answered(
    cells=[Said("cat", 0.9), Said("cat", 0.6), Said("cat", 0.8), Said("cat", 0.99), Said("x", 0.5, ok=False), Said("dog", 0.7)]
)  # fmt: skip


def test_the_surest_wrong_label_comes_first() -> None:
    wrong = wrong_answers(JOB, LABELS, {"object": "object"}, picture="photo")
    assert [(one.row, one.said, one.true, one.picture) for one in wrong] == [
        (2, "cat", "dog", "2.jpg"),
        (5, "dog", "cat", "5.jpg"),
        (1, "cat", "dog", "1.jpg"),
    ]


def test_rows_are_found_by_their_index_where_labels_name_one() -> None:
    some = [{"at": 5, "object": "cat", "photo": "a.jpg"}]
    [one] = wrong_answers(JOB, some, {"object": "object"}, picture="photo", index="at")
    assert (one.row, one.picture) == (5, "a.jpg")


def test_labels_of_a_table_are_read_as_the_evaluation_reads_them(tmp_path: Path) -> None:
    """Its indices are text, case and spaces tell no label apart, and an empty cell is no label."""
    path = tmp_path / "labels.csv"
    path.write_text("at,object,photo\n5,Cat,a.jpg\n1,CAT ,b.jpg\n2,,c.jpg\n")
    [one] = wrong_answers(JOB, str(path), {"object": "object"}, picture="photo", index="at")
    assert (one.row, one.picture) == (5, "a.jpg")


def test_they_are_drawn_on_one_sheet_from_below_the_folder_alone(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(saved(halves(), "JPEG"))
    wrong = wrong_answers(JOB, LABELS, {"object": "object"}, picture="photo")
    assert draw_worst(wrong, tmp_path / "sheet.png", root=tmp_path) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * THUMB, THUMB + WORDS_HIGH)
    (tmp_path / "inside").mkdir()
    with pytest.raises(InvalidJob, match="media_root"):
        draw_worst(wrong, tmp_path / "sheet.png", root=tmp_path / "inside")


def test_a_picture_that_cannot_be_read_leaves_its_place_grey() -> None:
    sheet = contact_sheet([nasty()["svg"].data], ["what?"])
    assert sheet.getpixel((THUMB // 2, THUMB // 2)) == (211, 211, 211)
