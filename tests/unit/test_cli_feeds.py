"""The commands of open jobs: open, ask, tail, close; and how other commands show such a job."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motet.messages.jobs import JobRecord
from motet.progress import Progress
from tests.unit.fake_api import TOKEN, FakeApi
from tests.unit.test_cli_commands import TWO, Shell, api, motet
from tests.unit.test_cli_top import drawn as top_drawn
from tests.unit.test_cli_top import seen
from tests.unit.test_cli_watch import a_job, drawn, facts

__all__ = ["api", "motet"]


def opened(motet: Shell) -> str:
    ran = motet("open", *TWO, "--name", "risk")
    assert (ran.code, ran.err) == (0, "")
    return ran.out.strip()


def test_open_prints_the_id_and_the_same_again_gives_the_same(api: FakeApi, motet: Shell) -> None:
    assert opened(motet) == opened(motet) == "job-1"
    opening = api.jobs["job-1"].opening
    assert (opening["open"], opening["priority"], list(opening["tasks"])) == (
        True,
        "interactive",
        ["topic", "vector"],
    )
    assert json.loads(motet("open", *TWO, "--name", "risk", "--json").out)["state"] == "open"
    ran = motet("open", *TWO, "--name", "risk", "--priority", "bulk")
    assert (ran.code, ran.out) == (1, "")


def test_ask_prints_the_row(api: FakeApi, motet: Shell) -> None:
    opened(motet)
    told = json.loads(motet("ask", "risk", "My card was charged twice.", "--key", "t-1").out)
    assert (told["row"], told["topic"], told["topic_score"]) == (0, "sport", 0.75)
    assert (
        json.loads(motet("ask", "job-1", '{"text": "My card was charged twice."}', "--key", "t-1").out)
        == told
    )
    assert json.loads(motet("ask", "risk", "{no JSON").out)["row"] == 1
    assert [columns["text"] for columns in api.jobs["job-1"].columns] == [
        ["My card was charged twice."],
        ["{no JSON"],
    ]
    for wrong, words in (
        (("ask", "fraud", "a"), "no open job is called fraud"),
        (("ask", "risk", '{"other": 1}'), "no such field"),
        (("ask", "risk", "-", "--key", "k"), "--key names one row"),
        (("ask", "risk", "a", "--within", "0"), "--within"),
    ):
        ran = motet(*wrong)
        assert ran.code in (1, 2)
        assert words in ran.err


def test_lines_are_answered_in_order_and_a_refused_one_alone(
    api: FakeApi, motet: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(motet)
    api.ask_s = 0.01
    lines = [*(f"line {n}" for n in range(50)), "", '{"other": 1}', '{"text": "last"}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ran = motet("ask", "risk", "-")
    assert ran.code == 1
    assert "some lines have no answer" in ran.err
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert len(told) == 52
    texts = [columns["text"][0] for columns in api.jobs["job-1"].columns]
    assert [texts[row["row"]] for row in told if "row" in row] == [*lines[:50], "last"]
    assert "no such field" in told[50]["error"]


def test_a_line_that_is_no_utf8_is_refused_alone(
    api: FakeApi, motet: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the command, and all lines behind it had no answer."""
    opened(motet)
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nna\xc3\xafve\n"), encoding="utf-8")
    )
    ran = motet("ask", "risk", "-")
    first, second = (json.loads(line) for line in ran.out.splitlines())
    assert "UTF-8" in first["error"]
    assert second["row"] == 0
    assert [columns["text"] for columns in api.jobs["job-1"].columns] == [["naïve"]]


def test_a_line_is_answered_before_the_next_one_is_there(api: FakeApi, motet: Shell, tmp_path: Path) -> None:
    opened(motet)
    env = {**os.environ, "MOTET_URL": api.url, "MOTET_TOKEN": TOKEN}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    asking = subprocess.Popen(
        [sys.executable, "-c", "from motet.cli import main; main()", "ask", "risk", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert asking.stdin is not None
    assert asking.stdout is not None
    for n in range(3):
        asking.stdin.write(f"line {n}\n")
        asking.stdin.flush()
        assert json.loads(asking.stdout.readline())["row"] == n
    asking.stdin.close()
    assert asking.wait(20) == 0


def test_tail_prints_every_row_with_its_cursor_and_close_ends_it(api: FakeApi, motet: Shell) -> None:
    job = opened(motet)
    for n in range(4):
        motet("ask", "risk", f"row {n}")
    ran = motet("close", "risk")
    assert (ran.code, ran.out) == (0, "succeeded · 8 of 8 cells · 2 rows/s\n")
    told = [json.loads(line) for line in motet("tail", job).out.splitlines()]
    assert [row["row"] for row in told] == [0, 1, 2, 3]
    rest = motet("tail", job, "--after", str(told[1]["cursor"])).out.splitlines()
    assert [json.loads(line) for line in rest] == told[2:]
    assert "no open job is called risk" in motet("tail", "risk").err


# -- how it is shown elsewhere


def an_open_job(**more: Any) -> dict[str, Any]:
    cells = {"total": 120, "ok": 110, "error": 2, "skipped": 0, "reused": 0}
    return {**a_job(), "state": "open", "name": "risk", "rows": 60, "cells": cells, "eta_s": None, **more}


def test_of_an_upload_that_goes_on_what_is_done_is_told_and_no_share_of_a_whole(
    api: FakeApi, motet: Shell
) -> None:
    loading = an_open_job(state="loading")
    assert str(Progress.of(JobRecord.of(loading))) == (
        "loading · 60 rows so far · 112 of their 120 cells · 2 errors"
    )
    head = drawn(facts(job=loading)).partition("pass")[0]
    assert "60 rows so far · 8 cells wait" in head
    assert "%" not in head
    assert "8 wait" in top_drawn(seen(jobs=[loading]))


def test_of_an_open_job_neither_share_nor_time_left_is_told(api: FakeApi, motet: Shell) -> None:
    assert str(Progress.of(JobRecord.of(an_open_job()))) == "open · 60 rows · 8 cells wait · 2 errors"
    shown = drawn(facts(job=an_open_job()))
    assert "60 rows so far · 8 cells wait" in shown
    head = shown.partition("pass")[0]
    assert "%" not in head
    assert "left" not in head
    assert "8 wait" in top_drawn(seen(jobs=[an_open_job()]))
    opened(motet)
    motet("ask", "risk", "a")
    listed = motet("jobs", "--state", "open").out
    assert "risk" in listed
    assert "/" not in listed.splitlines()[-1].partition("2026")[0]
    assert [job["name"] for job in json.loads(motet("top", "--json").out)["jobs"]] == ["risk"]
