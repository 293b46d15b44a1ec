"""What `motet top` draws, and what it says to programs; against a small API over a real socket."""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from motet.cli.top import ClusterView, frame
from motet.client import Client
from motet.errors import Unreachable
from motet.messages.cluster import Worker
from motet.messages.jobs import JobRecord
from tests.unit.fake_api import TOKEN, FakeApi
from tests.unit.test_cli_commands import TOPIC, Shell, api, motet, tickets
from tests.unit.test_cli_watch import a_job

__all__ = ["api", "motet", "tickets"]
#: By name: motet.cli.top is also the command.
top = importlib.import_module("motet.cli.top")

JOB = a_job()["id"]


def a_worker(worker: str = "host-gpu0", **more: Any) -> Worker:
    known: dict[str, Any] = {
        "state": "ready",
        "device_kind": "cuda",
        "device_name": "NVIDIA H200",
        "memory_mb": 143_360,
        "memory_used_mb": 71_680,
        "utilisation": 0.97,
        "resident": ("all-MiniLM-L6-v2@1",),
        "backlog_s": 3.84,
        "held": 3,
        "rows_done": 1_200_000,
        "rate_tokens_s": 1_250_000.0,
        "running": ({"job": JOB, "pass": "encoder all-MiniLM-L6-v2", "subtasks": 2, "rows": 900},),
        "running_other": 1,
    }
    return Worker.of({"worker": worker, **known, **more})


def seen(workers: list[Worker] | None = None, jobs: list[dict[str, Any]] | None = None) -> ClusterView:
    return ClusterView(
        url="http://127.0.0.1:8700",
        workers=[a_worker()] if workers is None else workers,
        jobs=[JobRecord.of(job) for job in ([a_job()] if jobs is None else jobs)],
    )


def drawn(cluster: ClusterView, width: int = 140, **how: Any) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False, emoji=False)
    console.print(frame(cluster, width=width, **how))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(shown: str, begin: str) -> str:
    return next(found for found in shown.splitlines() if found.startswith(begin))


def test_devices_show_what_they_hold_and_jobs_where_they_run() -> None:
    shown = drawn(seen(), note="q ends")
    assert line(shown, "motet").startswith(
        "motet  1 of 1 device ready · 97% busy · 1 job under way · 1 sub-task of others  http://"
    )
    device = line(shown, "host-gpu0")
    assert (
        "NVIDIA H200  ready  ━━━─── 70.0/140 GiB  ━━━━━─  97%    3.8 s     3     1.2 M      1.2 M" in device
    )
    assert device.rstrip().endswith("all-MiniLM-L6-v2@1")
    job = line(shown, "0198f2c4-7a51")
    assert "support tickets  running  3,000  ━━────────  25%" in job
    assert job.rstrip().endswith("1:01  host-gpu0 ×2")
    assert shown.splitlines()[-1] == "q ends"


def test_an_empty_cluster_says_what_to_do() -> None:
    shown = drawn(seen([], []))
    assert "motet worker --gpus all" in shown
    assert "no job is under way" in shown


def test_a_job_on_many_devices_is_summed_up() -> None:
    shown = drawn(seen([a_worker(f"gpu{i}") for i in range(8)]))
    assert "8 devices, 16 sub-tasks" in line(shown, "0198f2c4")


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_nothing_is_wider_than_the_screen_and_states_are_never_cut(width: int) -> None:
    workers = [
        a_worker("a-host-with-a-long-name-gpu0", resident=tuple(f"model-{i}@1" for i in range(9))),
        a_worker("gone-cpu1", state="incompatible", memory_mb=0, rate_tokens_s=None, device_name=""),
    ]
    shown = drawn(seen(workers, [a_job(name="a name that goes on " * 9)]), width, note="a note " * 40)
    assert all(len(one) <= width for one in shown.splitlines())
    assert "incompatible" in shown
    assert "running" in shown


def test_what_does_not_fit_is_counted_and_devices_in_trouble_are_seen_first() -> None:
    workers = [a_worker(f"gpu{i:03}", state="silent" if i == 150 else "ready") for i in range(200)]
    jobs = [a_job(id=f"{i:08}-job") for i in range(60)]
    shown = drawn(seen(workers, jobs), height=30, note="q ends").splitlines()
    assert len(shown) <= 30
    assert any(one.startswith("gpu150") for one in shown)
    devices, listed = sum(one.startswith("gpu") for one in shown), sum("-job" in one for one in shown)
    assert f"and {200 - devices} devices more" in shown
    assert f"and {60 - listed} jobs more" in shown


# -- the command


def test_once_prints_one_frame_and_json_one_document(api: FakeApi, motet: Shell, tickets: str) -> None:
    api.eager = False
    motet("submit", tickets, *TOPIC, "--name", "nightly")
    for how in (("--once",), ()):  # in a pipe there is nothing to redraw
        said = motet("top", *how)
        assert said.code == 0
        assert "1 job under way" in said.out
        assert "nightly" in said.out
        assert "\x1b" not in said.out
    told = json.loads(motet("top", "--json").out)
    assert [job["id"] for job in told["jobs"]] == ["job-1"]
    assert [worker["state"] for worker in told["workers"]] == ["ready"]


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Write keys to it: stdin is the other end of this terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", closefd=True) as typed:
        monkeypatch.setattr("sys.stdin", typed)
        yield ours
    os.close(ours)


def test_a_server_that_goes_away_is_waited_for_until_q(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, keyboard: int
) -> None:
    screen = Console(width=100, height=30, file=io.StringIO(), force_terminal=True, markup=False)
    answers: list[ClusterView | None] = [None, seen([a_worker("host-gpu7")]), None]

    def look(client: Client, before: ClusterView | None = None) -> ClusterView:
        said = answers.pop(0)
        if not answers:
            os.write(keyboard, b"q")
        if said is None:
            raise Unreachable("no connection")
        return said

    monkeypatch.setattr(top, "look", look)
    monkeypatch.setattr(top, "REDRAW_S", 0.01)
    ended = threading.Event()

    def follow() -> None:
        with Client(api.url, TOKEN) as client:
            top._follow(client, seen(), screen)
        ended.set()

    threading.Thread(target=follow, daemon=True).start()
    assert ended.wait(30), "q does not end it"
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    away, back = shown.index("the server does not answer"), shown.index("host-gpu7")
    assert away < back < shown.rindex("the server does not answer")
