"""What benchmarks keep: figures of whole runs, which others can read."""

from __future__ import annotations

import importlib
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


def test_what_compression_gains_is_speed_where_a_form_is_faster_and_else_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.compress import COMPRESSED, Measured, Report

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
