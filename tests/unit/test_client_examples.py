"""Every example runs as it stands, against a server that the environment names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motet import datasets
from tests.unit.fake_api import LABELS, TOKEN, serving

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstart", "4 tasks in one pass"),
        ("dataframe", "kettle"),
        ("stream_results", "5,000 rows so far"),
        ("resume", "one job under one key: True"),
        ("open_job", "both times: True"),
        ("language_model", "Ben is content (0.75)"),
        ("train", "2 tasks in one pass"),
        ("zero_shot_pictures", "motorcycle_left"),
    ],
)
def test_an_example_runs(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "dataframe":
        pytest.importorskip("pandas")
    if name == "train" and not (datasets.cache_dir() / datasets.VADER.filename).is_file():
        pytest.skip("its texts are not on this machine; `make demo` fetches them")
    if name == "zero_shot_pictures" and not (datasets.cache_dir() / datasets.SCIKIT_IMAGE.filename).is_file():
        pytest.skip("its pictures are not on this machine; `motet demo --media` fetches them")
    monkeypatch.setitem(LABELS, "object", ["tabby", "espresso", "missile"])
    monkeypatch.setitem(LABELS, "sentiment", ["negative", "positive"])
    with serving() as api:
        (tmp_path / "client.json").write_text(json.dumps({"url": api.url, "token": TOKEN}))
        env = {k: v for k, v in os.environ.items() if not k.startswith("MOTET_")} | {
            "MOTET_HOME": str(tmp_path)
        }
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py"], env=env, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_the_readmes_language_model_job_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "README.md").read_text("utf-8").partition("## Language models\n")[2]
    [program, *_] = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    (tmp_path / "tickets.jsonl").write_text('{"text": "It broke."}\n')
    monkeypatch.chdir(tmp_path)
    with serving() as api:
        monkeypatch.setenv("MOTET_URL", api.url)
        monkeypatch.setenv("MOTET_TOKEN", TOKEN)
        known: dict[str, Any] = {}
        exec(program, known)
        [row] = known["job"].results()
    assert [str(cell) for cell in row.values()] == [
        "angry",
        "summary of row 0",
        "french of row 0",
        "reply of row 0",
    ]
