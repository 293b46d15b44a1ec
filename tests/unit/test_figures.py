"""README's figures are those of bench/results: made, not typed; and all of them can be measured again."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="figures")
def _figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("figures")


@pytest.fixture(name="pages")
def _pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("pages")


def test_all_pages_show_what_was_measured(figures: ModuleType) -> None:
    stale = figures.write(ROOT, changing=False)
    assert not stale, f"{stale} differ from bench/results: bench/figures.py --tables writes them"


def test_every_page_with_a_mark_is_written(figures: ModuleType, pages: ModuleType) -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    marked = {str(file.relative_to(ROOT)) for file in files if pages.MARK.search(file.read_text("utf-8"))}
    assert marked == set(figures.PAGES)


def test_a_figure_that_was_typed_is_undone(figures: ModuleType, pages: ModuleType) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    tax = figures.results()["tax"]["framework_tax"]
    typed = page.replace(f"{tax:.2f} ×", "0.50 ×", 1)
    assert typed != page
    assert pages.written(typed, figures.results(), figures.heads()) == page


def test_another_result_makes_another_figure(figures: ModuleType, pages: ModuleType) -> None:
    results = {**figures.results()}
    results["storage"] = {**results["storage"], "rows_vs_copy": 0.123}
    made = pages.written("<!-- figures: bench -->\n<!-- end of figures -->", results, {})
    assert "| rows over HTTP into committed blocks ÷ bare COPY | `bench/storage.py` | 0.12 |" in made


def test_what_was_not_measured_is_left_out_and_never_made_up(figures: ModuleType, pages: ModuleType) -> None:
    kept = figures.results()
    results = {"fusion": {**kept["fusion"], "fusion_cost_k1": None}}
    page = "".join(f"<!-- figures: {name} -->\n<!-- end of figures -->\n" for name in ("bench", "one-job"))
    made = pages.written(page, results, {})
    assert "four tasks unfused ÷ fused" in made
    assert "one task alone" not in made
    assert "bench/tax.py" not in made
    assert "*Not measured yet: `bench/scale.py`.*" in made


def test_a_mark_that_nobody_knows_is_refused(pages: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 'speed'; expected one of bench, rivals"):
        pages.written("<!-- figures: speed -->\n<!-- end of figures -->", {}, {})


def test_where_a_benchmark_fails_the_others_run_and_the_next_call_runs_it_alone(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("first", "second", "third"):
        script = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        (tmp_path / f"{name}.py").write_text(script, "utf-8")
    (tmp_path / "second.py").write_text("raise SystemExit('no disk')", "utf-8")
    for at, other in (
        ("BENCH", tmp_path),
        ("BENCHES", ("first", "second", "third")),
        ("DONE", tmp_path / "done.json"),
        ("PAGES", ()),
    ):
        monkeypatch.setattr(figures, at, other)

    def call() -> tuple[int, dict[str, list[str]]]:
        monkeypatch.setattr(sys, "argv", ["figures.py"])
        code = figures.main()
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    code, told = call()
    assert (code, told["failed"], told["done"]) == (1, ["second"], ["first", "third"])

    (tmp_path / "second.py").write_text(
        (tmp_path / "first.py").read_text("utf-8").replace("first", "second"), "utf-8"
    )
    code, told = call()
    assert (code, told["failed"]) == (0, [])
    assert (tmp_path / "ran").read_text("utf-8").split() == ["first", "third", "second"]

    call()  # all are done: it begins anew
    assert (tmp_path / "ran").read_text("utf-8").split()[3:] == ["first", "second", "third"]
