"""Every example runs as it stands, against a server that the environment names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fake_api import LABELS, TOKEN, serving

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstart", "4 tasks in one pass"),
        ("dataframe", "kettle"),
        ("stream_results", "5,000 rows so far"),
        ("resume", "one job under one key: True"),
    ],
)
def test_an_example_runs(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "dataframe":
        pytest.importorskip("pandas")
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
