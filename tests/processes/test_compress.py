"""`python -m workers compress` against an API of models and blobs: measured, refused or registered, and run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from motet.artefacts import digests
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify
from tests.processes.test_worker_register import Api, api, trunk_folder
from workers.__main__ import main
from workers.engines.encoder.encoder import EncoderEngine
from workers.registrar.accuracy import SENTENCES, Trial

__all__ = ["api"]


@dataclass
class House:
    """An API with a tiny encoder and a head on it, and labelled rows."""

    api: Api
    rows: Path

    def compress(self, *arguments: str) -> int:
        return main(
            [
                "compress",
                "tiny",
                "--rows",
                str(self.rows),
                "--task",
                "side=label",
                "--threads",
                "1",
                *arguments,
            ]
        )


@pytest.fixture
def house(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    monkeypatch.setenv("MOTET_URL", api.url)
    monkeypatch.setenv("MOTET_TOKEN", "admin.secret")
    monkeypatch.setenv("MOTET_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    trunk, head = tmp_path / "trunk", tmp_path / "head"
    BertModel(shape).save_pretrained(trunk)
    shutil.copy(trunk_folder() / "tokenizer.json", trunk)
    head.mkdir()
    save_file({"weight": torch.randn(2, 16), "bias": torch.zeros(2)}, head / "head.safetensors")
    weights = digests({"w": trunk / "model.safetensors"})["w"]
    spec = {
        "name": "side",
        "version": "1",
        "head": "single",
        "labels": ["news", "rest"],
        "trunk": "tiny",
        "trunk_weights_sha256": weights,
        "pooling": "mean",
        "max_tokens": 64,
        "licence": "MIT",
    }
    (head / "head.json").write_text(json.dumps(spec))
    assert main(["register", str(trunk), "--name", "tiny", "--licence", "MIT"]) == 0
    assert main(["register", str(head)]) == 0
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for text in SENTENCES:
            label = "news" if "announced" in text or "Shares" in text else "rest"
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return House(api, rows)


def test_a_packed_model_is_registered_with_its_heads_and_answers_as_the_original(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert house.compress("--to", "int8", "--tolerance", "5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [m["ref"] for m in told["models"]] == ["tiny-int8@1", "tiny-int8-trainer@1", "side-int8@1"]
    assert told["rows"] == {"side": len(SENTENCES)}
    before, after = told["forms"][0], told["forms"][-1]
    assert (before["form"], after["form"]) == ("fp32", "compressed")
    assert after["memory_mb"] < 0.4 * before["memory_mb"]
    trunk, head = house.api.manifest("tiny-int8@1"), house.api.manifest("side-int8@1")
    assert (head.trunk, head.trunk_model, head.packed_width) == (trunk.trunk, trunk.ref, 1)
    assert head.files == house.api.manifest("side@1").files
    assert trunk.source["compressed"] == "tiny@1"
    assert (trunk.licence, trunk.packed_width) == ("MIT", 1)
    assert head.scores["compressed"]["score"] == after["scores"]["side"]
    # From what the registry has, and nothing else, the engine answers as it was measured.
    assert labels(house, trunk, head) == pytest.approx(after["kept"]["side"], abs=0.02)

    # The same again is there already.
    assert house.compress("--to", "int8", "--tolerance", "5", "--json") == 0
    assert {m["state"] for m in json.loads(capsys.readouterr().out)["models"]} == {"present"}


def labels(house: House, trunk: Manifest, head: Manifest) -> float:
    """Share of labels that are those of the original, from the registry's files alone."""
    was = [house.api.manifest(ref) for ref in ("tiny@1", "side@1")]
    found = []
    for one, on in ((trunk, head), (was[0], was[1])):
        places = []
        for model in (one, on):
            folder = house.rows.parent / model.digest
            folder.mkdir(exist_ok=True)
            for name, sha256 in model.files.items():
                (folder / name).write_bytes(house.api.blobs[sha256])
            places.append({name: folder / name for name in model.files})
        task = TaskOrder(name="side", spec=Classify(on.ref).to_json(), manifest=on)
        trial = Trial(EncoderEngine(), one, places[0], [(task, places[1])])
        found.append(trial.answers("fp32")["side"].arrays["codes"])
    codes = [memoryview(one).cast("H") for one in found]
    return sum(a == b for a, b in zip(*codes, strict=True)) / len(codes[0])


def test_what_loses_too_much_is_refused_by_task_and_points_unless_forced(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(house.api.models)
    assert house.compress("--to", "int8", "--tolerance", "-101") == 2
    assert set(house.api.models) == before
    printed = capsys.readouterr()
    assert re.search(
        r"nothing was registered: side loses -?\d+\.\d\d points; tolerated are -101", printed.err
    )
    assert "points on held-out rows" in printed.out
    assert house.compress("--to", "fp8", "--tolerance", "-101", "--force", "--name", "small") == 0
    assert set(house.api.models) - before == {"small@1", "small-trainer@1", "side-fp8@1"}


def test_after_a_cut_heads_learn_from_rows_that_must_be_named(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert house.compress("--to", "layers:1") == 2
    assert "--fit is missing" in capsys.readouterr().err
    assert house.compress("--to", "layers:1,int8", "--fit", str(house.rows)) == 0
    head = house.api.manifest("side-layers1-int8@1")
    assert head.trunk_model == "tiny-layers1-int8@1"
    assert head.files != house.api.manifest("side@1").files
    assert head.scores["compressed"]["score"] > 80


def test_what_cannot_be_done_is_said_in_words(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(house.rows)
    measured = ["--to", "int8", "--rows", rows]
    for arguments, said in (
        (["nobody", "--to", "int8"], "nobody is not registered"),
        (["side", "--to", "int8"], "answers label; expected an encoder that heads sit on, such as tiny@1"),
        (["tiny", "--to", "int8"], "--rows is missing"),
        (["tiny", "--to", "int8", "--task", "side=label"], "--rows is missing; --task and --fit"),
        (["tiny", "--to", "int3"], "got 'int3'; expected int8"),
        (["tiny", *measured], "--task: got none; expected HEAD=FIELD"),
        (["tiny", *measured, "--task", "mood=label"], "which are side"),
        (["tiny", *measured, "--task", "side"], "got 'side'; expected HEAD=FIELD"),
        (["tiny", *measured[:2], "--rows", "none.jsonl", "--task", "side=label"], "does not exist"),
        (
            ["tiny", *measured, "--task", "side=label", "--tolerance", "nan"],
            "expected a finite number of points",
        ),
        (
            ["tiny", "--to", "layers:2", "--rows", rows, "--fit", rows, "--task", "side=label"],
            "has 2 layers",
        ),
    ):
        assert main(["compress", *arguments]) == 2
        assert said in capsys.readouterr().err
