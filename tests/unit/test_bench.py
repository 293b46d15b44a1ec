"""What benchmarks keep: figures of whole runs, which others can read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_a_run_that_would_be_kept_without_some_rival_is_refused_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    rivals = importlib.import_module("rivals")
    monkeypatch.setattr(sys, "argv", ["rivals.py"])
    monkeypatch.setattr(rivals, "_pythons", lambda chosen, venv: dict.fromkeys(list(chosen)[:-1], "python"))
    with pytest.raises(SystemExit, match="expected all of them"):
        rivals.main()


def test_the_growth_benchmark_reads_what_the_dispatch_benchmark_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    told = importlib.import_module("growth").live_path()
    assert told is not None
    assert "sub-tasks/s at 64 a step" in told


def test_the_table_of_ablations_tells_those_that_the_kept_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    simulate = importlib.import_module("simulate")
    kept = {
        f"{case} / {who}": {"efficiency": [0.9, 0.9]}
        for case in simulate.CASES_MAIMED
        for who in ("motet", "nothing cloned")
    }
    assert [line.split("|")[1].strip() for line in simulate.markdown(kept)] == [
        "changed",
        "---",
        "(motet)",
        "nothing cloned",
    ]


def test_a_smaller_run_is_never_kept_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    harness = importlib.import_module("harness")
    options = harness.options("a benchmark")
    inside = str(BENCH / "results" / "tax.json")
    for smaller in ("--smoke", "--quick"):
        with pytest.raises(SystemExit):
            options.parse_args([smaller, "--save", inside])
        assert "expected a file outside bench/results" in capsys.readouterr().err
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.finish("tax", {"figure": 1}, options.parse_args(["--smoke"]))
    harness.finish("tax", {"figure": 1}, options.parse_args([]), whole=False)
    assert not (tmp_path / "results").exists()
    harness.finish("tax", {"figure": 1}, options.parse_args([]))
    harness.finish(
        "tax", {"figure": 2}, options.parse_args(["--smoke", "--save", str(tmp_path / "own.json")])
    )
    found = [
        json.loads(file.read_text("utf-8"))["figure"]
        for file in (tmp_path / "results" / "tax.json", tmp_path / "own.json")
    ]
    assert found == [1, 2]


def test_a_command_in_two_trees_is_compared_by_the_cpu_of_all_its_processes(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    for tree, content in (
        ("old", ""),
        ("new", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"),
    ):
        (tmp_path / tree).mkdir()
        (tmp_path / tree / "change.py").write_text(content, "utf-8")
    done = ab("--rounds", "1", tmp_path / "old", tmp_path / "new", "python", "-P", "-c", "import change")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["old_cpu_s"] < 0.5 <= told["new_cpu_s"]
    assert told["ratio"] == told["least"] == told["most"] > 1


def test_a_command_that_fails_in_one_tree_is_told_with_the_tree_and_what_it_said(tmp_path: Path) -> None:
    trees = [tmp_path / "old", tmp_path / "new"]
    for tree in trees:
        tree.mkdir()
    (trees[0] / "there").touch()
    done = ab(
        *trees, "python", "-c", "import os, sys; os.path.exists('there') or sys.exit('nothing is there')"
    )
    assert done.returncode == 1
    assert f"{trees[1]}: ended with exit code 1" in done.stdout
    assert "nothing is there" in done.stdout


def ab(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "ab.py"), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": f"{BENCH.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_what_compression_gains_is_speed_where_a_form_is_faster_and_else_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.registrar.compress import COMPRESSED, Measured, Report

    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("compress")

    def a_report(speed: float, memory_mb: float) -> Report:
        def form(name: str, memory_mb: float) -> Measured:
            return Measured(
                form=name,
                in_format="bf16",
                file_mb=1.0,
                memory_mb=memory_mb,
                scores={"h": 90.0},
                kept={"h": 1.0},
                vectors={},
            )

        return Report(
            forms=(form("fp32", 80.0), form("bf16", 40.0), form(COMPRESSED, memory_mb)),
            rows={"h": 10},
            speeds={"fp32": [1.0], "bf16": [2.0], COMPRESSED: [2.0 * speed]},
        )

    slow_and_small, fast, faster = a_report(0.9, 20.0), a_report(1.2, 30.0), a_report(1.5, 35.0)
    assert bench.chosen({"a": slow_and_small, "b": fast, "c": faster}) == {
        "compressed_gain": 1.5,
        "compressed_in": "speed",
        "compressed_by": "c",
        "compressed_memory": 1.143,
        "compressed_loss": 0.0,
    }
    alone = bench.chosen({"a": slow_and_small})
    assert (alone["compressed_gain"], alone["compressed_in"], alone["compressed_by"]) == (2.0, "memory", "a")
    assert bench.chosen({})["compressed_gain"] is None
