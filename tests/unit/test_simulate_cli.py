"""`motet simulate`: what it prints, writes and refuses. The scheduler's own process runs behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_api import FakeApi
from tests.unit.test_cli_commands import TOPIC, Shell, api, motet, tickets
from tests.unit.test_trace import a_line, a_subtask, an_activity

__all__ = ["api", "motet", "tickets"]


@pytest.fixture
def jobs(tmp_path: Path) -> str:
    path = tmp_path / "jobs.jsonl"
    lines = a_line(), a_line(name="later", model="encoder", at_s=30, deadline_s=20)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_two_clusters_are_compared_and_told_apart(motet: Shell, jobs: str, tmp_path: Path) -> None:
    picture = tmp_path / "out.html"
    ran = motet(
        *("simulate", "--gpus", "2xL4", "--gpus", "4xL4", "--jobs", jobs),
        *("--seeds", "2", "--price", "L4=0.8", "--html", str(picture)),
    )
    assert ran.code == 0
    comparison, *rest = ran.out.split("simulated 2 times")
    assert len(rest) == 2
    assert comparison.index("2xL4") < comparison.index("4xL4")
    assert "later" in rest[0]
    assert "idle" in rest[0]
    assert picture.read_text("utf-8").startswith("<!doctype html>")


def test_json_tells_all_of_it(motet: Shell, jobs: str) -> None:
    ran = motet("simulate", "--gpus", "2xL4", "--jobs", jobs, "--seeds", "1", "--json")
    (cluster,) = json.loads(ran.out)["clusters"]
    assert cluster["devices"] == 2
    assert [job["name"] for job in cluster["jobs"]] == ["topics", "later"]
    assert cluster["makespan_s"]["p50"] > 30


def test_without_jobs_an_example_is_run_and_a_guess_is_called_one(motet: Shell) -> None:
    ran = motet("simulate", "--gpus", "8xH200", "--seeds", "1")
    assert "nightly-embeddings" in ran.out
    assert "is a guess from its size" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8xZ80"], "--gpus: got the kind 'Z80'; expected H200"),
        (["--gpus", "L4", "--jobs", "nowhere.jsonl"], "cannot read 'nowhere.jsonl'"),
        (["--gpus", "L4", "--price", "H200=3"], "--price: got 'H200=3'; expected KIND=PRICE"),
        (["--gpus", "2xTiny=10:4"], "no GPU of 2xTiny=10:4 fits 'writer-8b': it needs"),
    ],
)
def test_a_mistake_is_told_in_a_line(motet: Shell, arguments: list[str], words: str) -> None:
    ran = motet("simulate", *arguments)
    assert ran.code == 2
    assert f"error: {words}" in ran.err


def test_a_cluster_must_be_named_and_so_must_what_is_recorded(motet: Shell) -> None:
    assert "--gpus is missing" in motet("simulate").err
    assert "name the jobs to record" in motet("simulate", "--record").err
    assert "with --record" in motet("simulate", "job-1").err


def test_a_job_that_ran_is_recorded_and_can_be_simulated(
    api: FakeApi,
    motet: Shell,
    tickets: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = api.answer

    def answer(
        method: str, path: str, query: dict[str, str], body: bytes, key: str | None
    ) -> tuple[int, Any]:
        if path.endswith("/activity"):
            told = an_activity(passes=[{"model": "fake@1", "tasks": ["topic"]}])
            _, record = plain("GET", path.removesuffix("/activity"), {}, b"", None)
            told["job"] = {**record, **told["job"]}
            return 200, {**told, "left_out": {"timeline": 5000, "devices": 3, "errors": 0}}
        if path.endswith("/subtasks"):
            after, limit = int(query["after"]), int(query["limit"])
            page = [
                {**a_subtask(i % 16), "subtask": i} for i in range(after + 1, min(5000, after + limit) + 1)
            ]
            return 200, {"subtasks": page, "next": after + limit if after + limit < 5000 else None}
        return plain(method, path, query, body, key)

    monkeypatch.setattr(api, "answer", answer)
    motet("submit", tickets, *TOPIC)
    trace = tmp_path / "recorded.jsonl"
    recorded = motet("simulate", "--record", "job-1")
    assert recorded.code == 0, recorded.err
    trace.write_text(recorded.out)
    line = json.loads(trace.read_text())
    assert line["model"]["name"] == "fake@1"
    assert line["rows"] == 5000 * a_subtask(0)["rows"], "all of them, page by page"
    assert ": the hardware of 3 workers is not known" in recorded.err
    ran = motet("simulate", "--gpus", "2xL4", "--jobs", str(trace), "--seeds", "1")
    assert ran.code == 0
    assert "took then" in ran.out
