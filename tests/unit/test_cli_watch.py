"""What `motet watch` draws, and how it follows a job; against a small API over a real socket."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from motet.cli.drawing import bar, number
from motet.cli.watch import picture
from motet.messages.activity import JobActivity
from tests.unit.fake_api import FakeApi
from tests.unit.test_cli_commands import TOPIC, Shell, api, motet, tickets

__all__ = ["api", "motet", "tickets"]


def a_job(state: str = "running", **more: Any) -> dict[str, Any]:
    return {
        "id": "0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57",
        "name": "support tickets",
        "state": state,
        "reason": "",
        "rows": 3000,
        "tasks": {"topic": {}, "tone": {}},
        "cells": {"total": 6000, "ok": 1500, "error": 12, "skipped": 0, "reused": 300},
        "started": "2026-11-23T18:33:00Z",
        "finished": None if state == "running" else "2026-11-23T18:34:40Z",
        "eta_s": 61.0 if state == "running" else None,
        "usage": {"attempts_lost": 0},
        **more,
    }


def a_pass(
    kind: str = "encoder all-MiniLM-L6-v2", tasks: tuple[str, ...] = ("topic", "tone")
) -> dict[str, Any]:
    return {
        "number": 0,
        "kind": kind,
        "tasks": list(tasks),
        "blocks": {"total": 3, "sealed": 1},
        "rows": {"total": 3000, "waiting": 900, "open": 350, "done": 1750},
        "subtasks": {"open": 4, "done": 20, "lost": 0, "failed": 0},
        "tokens": 98_000,
        "unfused_tokens": 196_000,
        "busy_s": 30.0,
    }


def a_device(worker: str = "host-gpu0", **more: Any) -> dict[str, Any]:
    return {
        "worker": worker,
        "device_name": "NVIDIA H200",
        "state": "ready",
        "subtasks": 17,
        "open": 2,
        "rows": 1200,
        "tokens": 60_000,
        "busy_s": 20.0,
        "tokens_s": 1_250_000.0,
        "share": 0.97,
        "utilisation": 0.5,
        "backlog_s": 2.14,
        **more,
    }


def an_error(error: str = "too_long", **more: Any) -> dict[str, Any]:
    return {"task": "tone", "error": error, "count": 12, "first_row": 17, "message": "300 tokens", **more}


def facts(**more: Any) -> dict[str, Any]:
    return {
        "job": a_job(),
        "now_s": 42.0,
        "passes": [a_pass()],
        "devices": [a_device()],
        "timeline": [],
        "throughput": [],
        "errors": [an_error()],
        **more,
    }


def drawn(told: dict[str, Any], width: int = 120, **how: Any) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False, emoji=False)
    console.print(picture(JobActivity.of(told), width=width, **how))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(shown: str, begin: str) -> str:
    return next(found for found in shown.splitlines() if found.startswith(begin))


def test_a_running_job_shows_its_passes_devices_and_errors() -> None:
    shown = drawn(facts(), note="Ctrl-C leaves it running")
    assert line(shown, "support tickets") == f"support tickets  running for 0:42  {a_job()['id']}"
    assert "25 % · " in shown
    assert "1:01 left" in shown
    assert line(shown, "6,000 cells") == "6,000 cells: 1,500 ok · 12 errors · 300 reused"
    one_pass = line(shown, "encoder")
    assert "2 fused: topic, tone" in one_pass
    assert one_pass.split()[-4:] == ["1/3", "4", "98.0", "k"]
    assert "1,750/3,000" in one_pass
    device = line(shown, "host-gpu0")
    assert "NVIDIA H200  ready" in device
    assert device.split()[4:9] == ["17+2", "1,200", "1.2", "M", "97%"]
    assert device.split()[-3:] == ["50%", "2.1", "s"]
    assert line(shown, "too_long").split() == ["too_long", "tone", "12", "17", "300", "tokens"]
    assert shown.splitlines()[-1] == "Ctrl-C leaves it running"


def test_a_succeeded_job_says_what_fusion_saved_and_nothing_of_now() -> None:
    cells = {"total": 6000, "ok": 5988, "error": 12, "skipped": 0, "reused": 0}
    shown = drawn(facts(job=a_job("succeeded", cells=cells)))
    assert "succeeded in 0:42" in shown
    assert "100 % · 30 rows/s" in shown
    assert "98.0 k tokens read; a pass per task would have read 196.0 k" in shown
    assert "backlog" not in shown
    assert "left" not in shown


def test_tokens_written_are_told_where_there_are_any() -> None:
    usage = {"attempts_lost": 0, "tokens": 120_000, "tokens_cached": 54_000, "tokens_out": 9_800}
    assert "9,800 tokens written · 120.0 k read, 45 % of them from cache\n" in drawn(
        facts(job=a_job(usage=usage))
    )
    chosen = usage | {"tokens_out": 0}
    assert "0 tokens written · 120.0 k read, 45 %" in drawn(facts(job=a_job(usage=chosen)))
    assert "written" not in drawn(facts())


def test_a_pass_that_waits_says_for_which_answers() -> None:
    planned = [{"tasks": ["topic", "tone"], "needs": []}, {"tasks": ["reply"], "needs": ["mood", "topic"]}]
    shown = drawn(facts(job=a_job(passes=planned), passes=[a_pass(), a_pass("causal qwen3", ("reply",))]))
    assert "reply ◀ mood, topic" in line(shown, "causal")
    assert "◀" not in line(shown, "encoder")


def test_cells_that_were_skipped_stand_among_the_errors_with_their_reason() -> None:
    cells = {"total": 6000, "ok": 5980, "error": 12, "skipped": 8, "reused": 0}
    upstream = an_error("upstream", task="reply", count=8, message="mood is an error")
    shown = drawn(facts(job=a_job("succeeded", cells=cells), errors=[an_error(), upstream]))
    assert "12 errors · 8 skipped" in shown
    assert line(shown, "upstream").split()[:3] == ["upstream", "reply", "8"]
    assert "mood is an error" in line(shown, "upstream")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_an_ended_job_says_why(state: str) -> None:
    assert "no device can load it" in drawn(facts(job=a_job(state, reason="no device can load it")))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_nothing_is_wider_than_the_screen_and_numbers_are_never_cut(width: int) -> None:
    told = facts(
        job=a_job(name="a name that goes on " * 9),
        passes=[a_pass(tasks=tuple(f"task_number_{i}" for i in range(12)))],
        devices=[
            a_device("a-host-with-a-long-name-gpu0"),
            a_device("b-gpu1", utilisation=None, backlog_s=None),
        ],
        errors=[an_error(message="much to be said " * 20)],
    )
    shown = drawn(told, width, note="a note " * 40)
    assert all(len(one) <= width for one in shown.splitlines())
    assert "1,750/3,000" in shown
    assert "1.2 M" in shown


def test_what_does_not_fit_on_the_screen_is_counted() -> None:
    told = facts(
        devices=[a_device(f"gpu{i:03}", open=int(i == 77)) for i in range(200)],
        errors=[an_error(f"class_{i}") for i in range(30)],
    )
    shown = drawn(told, height=40, note="note").splitlines()
    assert len(shown) <= 40
    assert any(one.startswith("gpu077") for one in shown), "those that work come first"
    devices = sum(one.startswith("gpu") for one in shown)
    errors = sum(one.startswith("class_") for one in shown)
    assert f"and {200 - devices} devices more" in shown
    assert f"and {30 - errors} kinds of errors more" in shown


def test_words_of_others_can_neither_style_nor_steer_the_terminal() -> None:
    shown = drawn(
        facts(job=a_job(name="[bold]\x1b[2Jtickets"), errors=[an_error(message="\x1b]0;owned\x07")])
    )
    assert "[bold]\N{REPLACEMENT CHARACTER}[2Jtickets" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_errors_of_blocks_that_are_not_sealed_are_not_passed_over() -> None:
    assert "once their block is sealed" in drawn(facts(errors=[]), height=14)


def test_a_job_without_rows_or_devices_can_be_drawn() -> None:
    cells = dict.fromkeys(("total", "ok", "error", "skipped", "reused"), 0)
    empty = facts(job=a_job("running", rows=0, cells=cells, eta_s=None), passes=[], devices=[], errors=[])
    assert "starting" in drawn(empty, 60)


@pytest.mark.parametrize(("share", "full"), [(-1.0, 0), (0.0, 0), (0.99, 9), (1.0, 10), (7.0, 10)])
def test_a_bar_is_full_only_at_the_end(share: float, full: int) -> None:
    assert bar(share, 10).plain == "━" * full + "─" * (10 - full)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (7.25, "7.2"),
        (950, "950"),
        (9_999, "9,999"),
        (12_345, "12.3 k"),
        (4.5e6, "4.5 M"),
        (2e9, "2.0 G"),
    ],
)
def test_numbers_keep_three_digits(value: float, words: str) -> None:
    assert number(value) == words


# -- the command


@pytest.fixture
def active(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """An API that tells what happens in a job."""
    plain = api.answer

    def answer(
        method: str, path: str, query: dict[str, str], body: bytes, key: str | None
    ) -> tuple[int, Any]:
        if method == "GET" and path.endswith("/activity"):
            status, job = plain(method, path.removesuffix("/activity"), {}, body, key)
            return status, facts(job=job) if status == 200 else job
        return plain(method, path, query, body, key)

    monkeypatch.setattr(api, "answer", answer)
    return api


def test_in_a_pipe_an_ended_job_prints_its_last_picture(active: FakeApi, motet: Shell, tickets: str) -> None:
    motet("submit", tickets, *TOPIC, "--name", "tickets")
    said = motet("watch", "job-1")
    assert said.code == 0
    assert "tickets  succeeded in 0:42" in said.out
    assert "host-gpu0" in said.out
    assert "\x1b" not in said.out


def test_a_cancelled_job_prints_its_picture_and_fails(active: FakeApi, motet: Shell, tickets: str) -> None:
    active.eager = False
    motet("submit", tickets, *TOPIC)
    motet("cancel", "job-1")
    said = motet("watch", "job-1")
    assert (said.code, said.err) == (1, "error: job job-1: cancelled: cancelled by its owner\n")
    assert "cancelled in 0:42" in said.out


def test_json_is_a_line_per_change_with_passes_devices_and_errors(
    active: FakeApi, motet: Shell, tickets: str
) -> None:
    motet("submit", tickets, *TOPIC)
    (told,) = [json.loads(one) for one in motet("watch", "job-1", "--json").out.splitlines()]
    assert (told["job"], told["state"], told["ok"], told["total"]) == ("job-1", "succeeded", 30, 30)
    assert told["passes"] == [a_pass()]
    assert told["devices"] == [a_device()]
    assert told["errors"] == [an_error()]


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(
    active: FakeApi, motet: Shell, tickets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: Any, timeout: float | None = None) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    active.eager = False
    motet("submit", tickets, *TOPIC)
    monkeypatch.setattr("motet.job.Job.watch", interrupted)
    said = motet("watch", "job-1")
    assert (said.code, said.out) == (130, "")
    assert said.err.strip() == "job job-1 goes on; come back to it with: motet watch job-1"
    assert active.jobs["job-1"].state == "running"


def test_a_server_that_is_too_old_to_tell_still_shows_how_far_a_job_is(
    api: FakeApi, motet: Shell, tickets: str, tmp_path: Path
) -> None:
    motet("submit", tickets, *TOPIC)
    assert motet("watch", "job-1").out.startswith("succeeded · 30 of 30 cells")


def test_an_open_job_shows_its_last_minute_and_from_where_rows_are_kept() -> None:
    minute = {
        "at_s": 42.0,
        "asks_s": 12.34,
        "rows_s": 20.0,
        "late": 2,
        "refused": 0,
        "failed": 1,
        "waiting": 7,
        "p50_s": 0.0271,
        "p99_s": 1.234,
    }
    shown = drawn(facts(job=a_job("open", first_row=1234), asks={"minute": minute, "spans": []}))
    assert "kept from row 1,234 on" in shown
    assert (
        line(shown, "12 asks/s")
        == "12 asks/s · half of them answered in 27.1 ms, 99 % in 1.23 s · 7 rows wait to be stored · 2 late · 1 failed"
    )
