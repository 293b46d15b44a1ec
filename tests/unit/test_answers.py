"""What stands in a prompt where another task's answer is named."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from motet.protocol.columns import CellError, Column
from motet.templates import resolved
from scheduler.answers import as_texts, as_values, part_text


def of_json(*answers: Any) -> Column:
    raw = [json.dumps(a).encode() for a in answers]
    ends = [0]
    for value in raw:
        ends.append(ends[-1] + len(value))
    arrays = {"offsets": struct.pack(f"<{len(ends)}i", *ends), "bytes": b"".join(raw)}
    return Column(kind="json", status=bytes(len(raw)), arrays=arrays)


LABELS = Column(
    kind="labels",
    status=bytes(3),
    arrays={
        "offsets": struct.pack("<4i", 0, 2, 2, 3),
        "codes": struct.pack("<3h", 1, 0, 1),
        "scores": struct.pack("<3f", 0.9, 0.8, 0.7),
        "all": b"",
    },
)
LABEL = Column(
    kind="label",
    status=bytes([0, 1]),
    arrays={"codes": struct.pack("<2h", 1, 0), "scores": struct.pack("<2f", 0.9, 0)},
    errors={1: CellError("engine", "no luck")},
)


@pytest.mark.parametrize(
    ("column", "spec", "texts"),
    [
        (LABEL, {"kind": "classify"}, ["good", ""]),
        (LABELS, {"kind": "classify"}, ["good, bad", "", "good"]),
        (
            Column(kind="number", status=bytes(2), arrays={"numbers": struct.pack("<2d", 0.1, 3)}),
            {"kind": "number"},
            ["0.1", "3.0"],
        ),
        (of_json({"text": "Hello {you}", "finish": "stop"}), {"kind": "generate"}, ["Hello {you}"]),
        (of_json({"text": "Hi", "finish": "length"}), {"kind": "chat"}, ["Hi"]),
        (of_json({"text": 1}), {"kind": "generate", "schema": {}}, ['{"text":1}']),
        (
            of_json({"text": "é", "n": [1, 2]}, "plain", None),
            {"kind": "function"},
            ['{"text":"é","n":[1,2]}', "plain", ""],
        ),
    ],
)
def test_an_answer_is_text_as_people_would_write_it(
    column: Column, spec: dict[str, Any], texts: list[str]
) -> None:
    assert as_texts(column, spec, ("bad", "good")) == texts


def test_labels_with_every_score_are_their_names_too() -> None:
    every = Column(
        kind="labels", status=LABELS.status, arrays={**LABELS.arrays, "all": struct.pack("<6f", *([0.5] * 6))}
    )
    assert as_texts(every, {"kind": "classify"}, ("bad", "good")) == ["good, bad", "", "good"]


SPANS = Column(
    kind="spans",
    status=bytes([0, 0, 1]),
    arrays={
        "offsets": struct.pack("<4i", 0, 2, 2, 2),
        "starts": struct.pack("<2i", 0, 10),
        "ends": struct.pack("<2i", 3, 15),
        "codes": struct.pack("<2h", 0, 1),
        "scores": struct.pack("<2f", 0.5, 0.25),
    },
    errors={2: CellError("engine", "no luck")},
)


def test_an_answer_is_a_value_with_its_parts() -> None:
    every = Column(
        kind="label",
        status=bytes(1),
        arrays={
            "codes": struct.pack("<h", 1),
            "scores": struct.pack("<f", 0.5),
            "all": struct.pack("<2f", 0.25, 0.5),
        },
    )
    assert as_values(every, ("bad", "good")) == [
        {"label": "good", "score": 0.5, "scores": {"bad": 0.25, "good": 0.5}}
    ]
    assert [v and v["label"] for v in as_values(LABEL, ("bad", "good"))] == ["good", None]
    assert [[one["label"] for one in v] for v in as_values(LABELS, ("bad", "good"))] == [
        ["good", "bad"],
        [],
        ["good"],
    ]
    read = ["Ann lives in Paris", "", ""]
    ann, paris = (
        {"text": "Ann", "label": "person", "score": 0.5, "start": 0, "end": 3},
        {"text": "in Pa", "label": "place", "score": 0.25, "start": 10, "end": 15},
    )
    assert as_values(SPANS, ("person", "place"), read) == [[ann, paris], [], None]
    vectors = Column(
        kind="vector", status=bytes(1), arrays={"vectors": struct.pack("<2f", 0.5, 2)}, dim=2, dtype="fp32"
    )
    assert as_values(vectors, ()) == [[0.5, 2.0]]


@pytest.mark.parametrize(
    ("column", "written", "text"),
    [
        (SPANS, "it[0]", "Ann"),
        (SPANS, "it[0].label", "person"),
        (SPANS, "it[:]", "Ann, in Pa"),
        (SPANS, "it[5]", ""),
        (LABELS, "it[0]", "good"),
        (LABELS, "it[:2]", "good, bad"),
        (LABELS, "it[1].label", "bad"),
        (LABEL, "it.label", "good"),
        (of_json({"text": "Hi", "finish": "stop"}), "it.finish", "stop"),
        (of_json({"who": ["a", {"b": 1}]}), "it.who[1].b", "1"),
    ],
)
def test_a_part_of_an_answer_is_text_as_people_would_write_it(
    column: Column, written: str, text: str
) -> None:
    read = ["Ann lives in Paris", "", ""] if column is SPANS else ()
    every = as_values(column, ("person", "place") if column is SPANS else ("bad", "good"), read)
    assert part_text(column.kind, every[0], resolved(written, {"it"}).steps) == text
