"""Every head in motet/heads is complete, small, safe to load, and says where it comes from."""

from __future__ import annotations

import json
import re
import struct
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import motet

HEADS = sorted(path.parent for path in (Path(motet.__file__).parent / "heads").glob("*/head.json"))
KEYS = [
    "name",
    "version",
    "head",
    "labels",
    "thresholds",
    "trunk",
    "trunk_weights_sha256",
    "pooling",
    "max_tokens",
    "licence",
    "data",
    "training",
    "seed",
    "scores",
]

#: SPDX licences of texts that a head which is for sale may learn from; CC-BY and CC-BY-SA ask for a line in NOTICE.
ALLOWED = {"Apache-2.0", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}

every_head = pytest.mark.parametrize("folder", HEADS, ids=lambda folder: folder.name)


def test_the_heads_of_the_demo_are_shipped() -> None:
    assert [folder.name for folder in HEADS] == ["news-topics", "review-sentiment", "text-domain", "tone"]


@every_head
def test_a_head_has_every_key_in_order_and_thresholds_only_with_several_labels_a_row(folder: Path) -> None:
    record = described(folder)

    expected = [key for key in KEYS if key != "thresholds" or record["head"] == "multi"]
    assert list(record) == expected
    assert record["name"] == folder.name
    assert record["head"] in {"single", "multi", "number"}


@every_head
def test_a_head_names_the_trunk_whose_answers_it_was_trained_on(folder: Path) -> None:
    record = described(folder)

    assert record["trunk"] == "all-MiniLM-L6-v2"
    assert re.fullmatch("[0-9a-f]{64}", record["trunk_weights_sha256"])
    assert (record["pooling"], record["max_tokens"]) == ("mean", 256)


def test_all_heads_share_one_trunk_so_that_they_fuse() -> None:
    assert len({described(folder)["trunk_weights_sha256"] for folder in HEADS}) == 1


@every_head
def test_weight_and_bias_are_float32_with_one_row_per_label(folder: Path) -> None:
    labels = described(folder)["labels"]
    header, content = opened(folder)

    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "weight": ("F32", [len(labels), 384]),
        "bias": ("F32", [len(labels)]),
    }
    assert len(set(labels)) == len(labels)
    numbers = struct.unpack(f"<{len(content) // 4}f", content)
    assert len(numbers) == len(labels) * 385
    assert all(abs(number) < 1e3 for number in numbers)


@every_head
def test_the_weights_are_a_whole_safetensors_file_and_nothing_else_lies_beside_them(folder: Path) -> None:
    header, content = opened(folder)

    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(content)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors"]


@every_head
def test_a_head_is_smaller_than_100_kb(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000


@every_head
def test_a_head_with_several_labels_a_row_has_a_threshold_for_each(folder: Path) -> None:
    record = described(folder)

    if record["head"] == "multi":
        assert len(record["thresholds"]) == len(record["labels"])
        assert all(0 < threshold < 1 for threshold in record["thresholds"])


@every_head
def test_a_head_says_what_it_learned_from_and_under_which_licence(folder: Path) -> None:
    record = described(folder)

    data = record["data"]
    assert {"source", "package", "licence", "citation", "rows_train", "rows_test", "derived"} <= data.keys()
    assert data["rows_train"] > data["rows_test"] > 0
    assert all(data[key] for key in ("source", "package", "licence", "citation"))
    assert record["licence"]
    assert record["training"].startswith("python examples/train_heads.py")


@every_head
def test_the_licence_of_the_texts_lets_a_head_ship_and_notice_names_it(folder: Path) -> None:
    record = described(folder)
    notice = (folder.parent / "NOTICE").read_text("utf-8")
    [about] = [part for part in notice.split("\n\n") if folder.name in part.partition("\n")[0].split(", ")]

    assert record["licence"] == "Apache-2.0"
    assert record["data"]["licence"] in ALLOWED
    assert f"licensed {record['data']['licence']}" in about
    assert record["data"]["package"].replace("==", " ") in about


def test_notice_goes_into_the_wheel() -> None:
    project = tomllib.loads((Path(motet.__file__).parents[1] / "pyproject.toml").read_text("utf-8"))

    assert "motet/heads/NOTICE" in project["project"]["license-files"]
    assert "heads/NOTICE" in project["tool"]["setuptools"]["package-data"]["motet"]


@every_head
def test_a_head_beats_the_commonest_answer_on_its_test_rows(folder: Path) -> None:
    record = described(folder)

    scores = record["scores"]
    assert scores["accuracy"] > scores["majority_accuracy"] > 0
    assert list(scores["labels"]) == record["labels"]


@every_head
def test_a_record_is_pretty_printed_as_the_training_script_writes_it(folder: Path) -> None:
    text = (folder / "head.json").read_text("utf-8")

    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def described(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "head.json").read_text("utf-8"))
    return record


def opened(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and content of the safetensors file, read by hand: this tier needs no torch."""
    file = (folder / "head.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", file[:8])
    header: dict[str, Any] = json.loads(file[8 : 8 + size])
    return header, file[8 + size :]
