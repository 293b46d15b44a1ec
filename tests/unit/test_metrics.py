"""Counters over jobs that come and go; and what deploy/ says of metrics is true of the ones there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from scheduler.api.metrics import FAMILIES, Tally
from scheduler.store.metrics import JobFigures

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "motet.json"
PROMETHEUS = DEPLOY / "prometheus"
#: Of Prometheus itself, and of prometheus_client's collector of the process.
FOREIGN = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
#: Labels that Prometheus adds.
ADDED = {"job", "instance", "le"}


def job(number: int, state: str = "running", **counts: Any) -> JobFigures:
    zero = dict.fromkeys(
        ("n_rows", "n_cells", "cells_ok", "cells_error", "cells_skipped", "cells_reused", "tokens"), 0
    )
    more = {"computed_tokens": 0, "busy_s": 0.0, "subtasks": 0, "attempts_lost": 0}
    return JobFigures(id=UUID(int=number), state=state, **{**zero, **more, **counts})


def test_counting_begins_with_what_is_there_at_the_first_look() -> None:
    tally = Tally()
    tally.look([job(1, cells_ok=100), job(2, "succeeded", cells_ok=5)])
    assert tally.totals["cells_ok"] == 0
    assert not tally.ended
    tally.look([job(1, cells_ok=130), job(2, "succeeded", cells_ok=5)])
    assert tally.totals["cells_ok"] == 30
    assert not tally.ended


def test_a_job_that_came_and_ended_between_two_looks_is_counted_once() -> None:
    tally = Tally()
    tally.look([])
    quick = job(1, "succeeded", n_rows=3, cells_ok=3)
    for _ in range(3):
        # It ended lately for a while: the looks overlap, so that none is missed.
        tally.look([quick])
    tally.look([])
    assert tally.ended == {"succeeded": 1}
    assert (tally.totals["n_rows"], tally.totals["cells_ok"]) == (3, 3)


def test_a_counter_stands_still_where_a_job_loses_cells_or_goes() -> None:
    tally = Tally()
    tally.look([job(1)])
    tally.look([job(1, cells_ok=50, n_rows=100)])
    # Cancelled: what was not sealed is skipped.
    tally.look([job(1, "cancelled", cells_ok=40, cells_skipped=60, n_rows=100)])
    tally.look([])
    assert tally.totals["cells_ok"] == 50
    assert tally.totals["cells_skipped"] == 60
    assert tally.ended == {"cancelled": 1}


def test_seconds_and_tokens_are_added_up_over_jobs() -> None:
    tally = Tally()
    first, second = job(1), job(2)
    tally.look([first, second])
    tally.look([replace(first, busy_s=1.5, tokens=10), replace(second, busy_s=0.25, tokens=7)])
    assert tally.totals["busy_s"] == pytest.approx(1.75)
    assert tally.totals["tokens"] == 17


# -- deploy/


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel, variable and alert."""
    board = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']!r}", target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield (
                f"variable {variable['name']}",
                re.sub(r"label_values\((.*), (\w+)\)", r"\1", variable["definition"]),
            )
    for name, expression in re.findall(
        r"alert: (\w+)\n\s+expr: (.+)", (PROMETHEUS / "alerts.yml").read_text("utf-8")
    ):
        yield f"alert {name}", expression


def names(expression: str) -> set[str]:
    """Names of metrics in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:motet|process)_\w+|\bup\b", bare))


def family(name: str) -> str | None:
    """The family of a metric's name; None where there is no such metric."""
    base = re.sub("_(bucket|sum|count)$", "", name)
    if base != name and base in FAMILIES and FAMILIES[base].kind == "histogram":
        return base
    return name if name in FAMILIES and FAMILIES[name].kind != "histogram" else None


def test_every_metric_that_deploy_names_is_there() -> None:
    found = list(expressions())
    assert len(found) > 40
    for where, expression in found:
        assert names(expression), where
        for name in names(expression) - FOREIGN:
            assert family(name), f"{where} names {name}, which /metrics does not tell"


def test_every_label_that_deploy_selects_by_is_there() -> None:
    for where, expression in expressions():
        for name, selector in re.findall(r"\b(motet_\w+)\{((?:[^{}\"]|\"[^\"]*\")*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)))
            assert labels <= set(FAMILIES[family(name) or ""].labels) | ADDED, (where, name, labels)


def test_only_counters_are_given_to_rate_and_only_gauges_to_delta() -> None:
    for where, expression in expressions():
        for function, name in re.findall(r"\b(rate|increase|delta|deriv)\((motet_\w+)", expression):
            kind = FAMILIES[family(name) or ""].kind
            assert (kind in ("counter", "histogram")) == (function in ("rate", "increase")), (where, name)


def test_every_metric_is_named_and_explained_as_prometheus_asks() -> None:
    for name, one in FAMILIES.items():
        assert re.fullmatch(r"motet_[a-z_]+", name)
        assert name.endswith("_total") == (one.kind == "counter"), name
        assert name.endswith("_info") == (one.kind == "info"), name
        assert not re.search(r"_(ms|mb|percent|minutes)\b", name), f"{name}: base units"
        assert one.words[0].isupper() or one.words[0].isdigit()
        assert not one.words.endswith(".")


def test_the_dashboard_lies_on_its_grid_and_asks_the_source_that_was_chosen() -> None:
    board = json.loads(DASHBOARD.read_text("utf-8"))
    assert board["templating"]["list"][0]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_what_was_asked_for_is_on_the_dashboard() -> None:
    shown = set().union(*(names(expression) for where, expression in expressions() if "panel" in where))
    ours = {family(name) for name in shown} - {None}
    assert set(FAMILIES) - ours <= {"motet_build_info", "motet_rows", "motet_rows_landed_total"} | {
        "motet_busy_seconds_total",
        "motet_worker_attempts_held",
    }
