"""What stands in a prompt where another task's answer is named."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from motet.protocol.columns import CellError, Column
from scheduler.answers import as_texts


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
