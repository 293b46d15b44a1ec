"""Real processes, a real model, real text: what the README promises, attacked where it promises most."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest

from motet import Classify, Client, Embed
from motet.local.cluster import Cluster

ROOT = Path(__file__).parents[2]
#: Sentences of this repository's own documents: real text that is always here.
SENTENCES = [
    line.strip()
    for name in ("README.md", "docs/life-of-a-job.md", "docs/http.md", "CHANGELOG.md", "LICENSE")
    for line in re.split(r"(?<=[.:;|])\s+|\n", (ROOT / name).read_text("utf-8"))
    if len(line.strip()) > 20
]
TASKS = {
    "topic": Classify("news-topics"),
    "sentiment": Classify("review-sentiment"),
    "tone": Classify("tone"),
    "vector": Embed("all-MiniLM-L6-v2", dtype="fp16"),
}


def rows(n: int, mark: str = "") -> list[str]:
    """n texts; a mark makes them ones that were never submitted before."""
    return [f"{SENTENCES[i % len(SENTENCES)]} {mark}{i}" for i in range(n)]


def workers_of(cluster: Cluster) -> list[psutil.Process]:
    launcher = psutil.Process(cluster.pids["workers"])
    return [p for p in launcher.children() if "workers.run.app" in p.cmdline()]


def until(condition: object, timeout_s: float, what: str) -> None:
    """Poll until the condition holds; fail with words where it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.05)


def test_four_tasks_cost_one_pass_and_every_cell_is_there(client: Client) -> None:
    texts = rows(300, "a")
    plan = client.plan(texts, TASKS)
    assert len(plan.passes) == 1
    job = client.submit(texts, TASKS)
    merged = list(job.results())
    assert [row.index for row in merged] == list(range(300))
    assert job.progress.ok == 1200
    assert len(merged[0]["vector"].vector) == 384
    assert str(merged[0]["topic"]) in ("business", "entertainment", "politics", "sports", "tech")
    one = client.submit(texts, {"topic": TASKS["topic"]}, reuse=False)
    one.wait()
    assert job.usage["tokens"] == one.usage["tokens"]


def test_many_threads_ask_one_open_job_and_each_is_answered(client: Client) -> None:
    texts = rows(50, "open")
    with client.open(TASKS, name="acceptance") as feed, ThreadPoolExecutor(8) as threads:
        answered = list(threads.map(lambda n: feed.ask(texts[n], within_s=60, key=f"k{n}"), range(50)))
        again = list(threads.map(lambda n: feed.ask(texts[n], within_s=60, key=f"k{n}"), range(50)))
    assert sorted(row.index for row in answered) == list(range(50))
    assert [row.index for row in again] == [row.index for row in answered]
    assert all(row.ok for row in answered)
    job = feed.close().wait(timeout=60)
    assert (job.state, job.rows, job.progress.ok) == ("succeeded", 50, 200)
    told = {row.index: row for row in client.feed(job.id).rows()}
    assert {i: str(row["topic"]) for i, row in told.items()} == {
        row.index: str(row["topic"]) for row in answered
    }


def test_the_same_job_again_runs_nothing_and_says_the_same(client: Client) -> None:
    texts = rows(60, "b")
    first = client.submit(texts, TASKS)
    labels = [str(row["topic"]) for row in first.results()]
    again = client.submit(texts, TASKS)
    again.wait()
    assert again.progress.reused == 240
    assert again.usage["tokens"] == 0
    assert [str(row["topic"]) for row in again.results()] == labels


def test_a_killed_worker_costs_repeated_work_and_no_cell(cluster: Cluster, client: Client) -> None:
    job = client.submit(rows(900, "k"), TASKS)
    until(lambda: job.progress.ok > 0 or any(w.held for w in client.workers()), 60, "work under way")
    victim = workers_of(cluster)[0]
    victim.send_signal(signal.SIGKILL)
    assert len(list(job.results())) == 900
    assert (job.state, job.progress.ok, job.progress.error) == ("succeeded", 3600, 0)


def test_killed_scheduler_processes_come_back_and_the_job_ends(cluster: Cluster, client: Client) -> None:
    job = client.submit(rows(600, "s"), {"topic": TASKS["topic"]})
    for name in ("dispatch", "aggregate", "api"):
        os.kill(cluster.pids[name], signal.SIGKILL)
    job.wait(timeout=120)
    assert job.progress.ok == 600


@pytest.mark.parametrize("server", ["valkey", "postgres"])
def test_a_killed_server_comes_back_and_no_cell_is_lost(
    cluster: Cluster, client: Client, server: str
) -> None:
    job = client.submit(rows(600, server), TASKS)
    until(lambda: any(w.held for w in client.workers()), 60, "work under way")
    os.kill(cluster.pids[server], signal.SIGKILL)
    job.wait(timeout=180)
    assert (job.state, job.progress.ok) == ("succeeded", 2400)
    assert [row.index for row in job.results()] == list(range(600))


def test_results_and_merged_answer_to_sql(cluster: Cluster, client: Client) -> None:
    job = client.submit(["A fine match.", "The prime minister resigned."], TASKS)
    job.wait()
    with psycopg.connect(cluster.database_url) as sql:
        seen = sql.execute(
            "SELECT row, task, status, value FROM results WHERE job_id = %s ORDER BY row, task", [job.id]
        ).fetchall()
        assert [(row, task, status) for row, task, status, _ in seen] == [
            (row, task, "ok") for row in (0, 1) for task in sorted(TASKS)
        ]
        vector = next(value for row, task, _, value in seen if (row, task) == (0, "vector"))
        assert vector == pytest.approx(next(iter(job.results()))["vector"].vector, abs=1e-3)
        [cells] = sql.execute(
            "SELECT cells FROM merged WHERE job_id = %s AND row = 1", [job.id]
        ).fetchone() or [{}]
        assert cells["topic"]["value"]["label"] == "politics"


def test_cancelling_frees_the_workers(client: Client) -> None:
    job = client.submit(rows(3000, "c"), TASKS)
    until(lambda: any(w.held for w in client.workers()), 60, "work under way")
    job.cancel()
    until(lambda: not any(w.held for w in client.workers()), 10, "free workers")
    assert job.state == "cancelled"
    cells = job.progress
    assert cells.ok + cells.error + cells.skipped == 12_000


def test_the_readme_program_runs_as_printed(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in rows(12, "r")), "utf-8"
    )
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    env = {**os.environ, "MOTET_HOME": str(cluster.data)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 12
    assert (tmp_path / "out.parquet").stat().st_size > 0


def test_the_readme_commands_run_as_printed(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in rows(12, "m")), "utf-8"
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = [
        line.removeprefix("$ ").split("#")[0].strip()
        for line in readme.splitlines()
        if line.startswith("$ .venv/bin/motet") and "motet up" not in line
    ]
    assert len(commands) >= 4
    motet = shutil.which("motet", path=str(Path(sys.executable).parent))
    env = {**os.environ, "MOTET_HOME": str(cluster.data), "NO_COLOR": "1"}
    job = ""
    for command in commands:
        line = command.replace(".venv/bin/motet", str(motet)).replace(" JOB", f" {job}")
        ran = subprocess.run(
            line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, f"{command}: {ran.stderr}"
        if " submit " in line:
            job = ran.stdout.split()[0]
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 12
