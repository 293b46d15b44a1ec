"""The real Flower beside real workers: what it shows of them, and that it shows no text and nothing to strangers."""

from __future__ import annotations

import json
import stat
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from motet import Classify, Client, Embed
from motet.local.cluster import Cluster
from motet.local.valkey import ValkeyUrls
from tests.conftest import copy_of
from tests.integration.stand_in import StandIn

pytest.importorskip("flower")

#: Stands in every row, and must stand on no page.
SECRET = "zebra-7f3a"
ROWS = [f"The {SECRET} parcel came {i} days late, but support was kind." for i in range(400)]
PASS_KIND = "encoder all-MiniLM-L6-v2"


class Browser:
    """Somebody who knows the password, or does not."""

    def __init__(self, url: str) -> None:
        self._at = urlsplit(url)
        self._login = b64encode(f"{self._at.username}:{self._at.password}".encode()).decode()

    def ask(
        self, path: str, method: str = "GET", login: bool = True, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        line = HTTPConnection("127.0.0.1", self._at.port or 80, timeout=30)
        sent = {**({"Authorization": f"Basic {self._login}"} if login else {}), **(headers or {})}
        try:
            line.request(method, path, headers=sent, body=b"" if method == "POST" else None)
            answer = line.getresponse()
            return answer.status, answer.read().decode()
        finally:
            line.close()

    def page(self, path: str) -> str:
        status, body = self.ask(path)
        assert status == 200, (path, status, body[:500])
        return body

    def json(self, path: str) -> Any:
        return json.loads(self.page(path))


@pytest.fixture(scope="module")
def cluster(with_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    data = copy_of(with_models, tmp_path_factory.mktemp("flower"))
    with Cluster(data, cpus=2, port=0, flower_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def browser(cluster: Cluster) -> Browser:
    """Flower, once it has heard of both workers."""
    browser = Browser(cluster.flower_url)
    until(lambda: answers(browser) and len(browser.json("/api/workers?status=1")) == 2, "both workers seen")
    return browser


@pytest.fixture(scope="module")
def tasks(cluster: Cluster, browser: Browser) -> dict[str, dict[str, Any]]:
    """Flower's tasks, by id, after a job whose every row holds the secret."""
    with Client(cluster.url, cluster.tokens["user"]) as client:
        job = client.submit(ROWS, {"topic": Classify("news-topics"), "vector": Embed("all-MiniLM-L6-v2")})
        job.wait()
        assert job.progress.ok == 800
        done = job.usage["subtasks"]

    def seen() -> dict[str, dict[str, Any]]:
        return dict(browser.json("/api/tasks"))

    until(lambda: sum(t["state"] == "SUCCESS" for t in seen().values()) >= done, "every sub-task seen")
    return seen()


def answers(browser: Browser) -> bool:
    try:
        return browser.ask("/healthcheck", login=False) == (200, "OK")
    except OSError:
        return False


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def workers(cluster: Cluster) -> list[Any]:
    with Client(cluster.url, cluster.tokens["user"]) as client:
        return client.workers()


def test_every_device_is_there_with_its_queue(cluster: Cluster, browser: Browser) -> None:
    names = [worker.worker for worker in workers(cluster)]
    assert len(names) == 2
    queues = {q["name"]: q for q in browser.json("/api/queues/length")["active_queues"]}
    assert queues.keys() == {f"motet.gpu.{name}" for name in names}
    assert all(q["consumers"] == 1 and q["messages_ready"] == 0 for q in queues.values())
    shown = browser.page("/broker")
    assert all(queue in shown for queue in queues)
    listed = browser.json("/workers?json=1")["data"]
    assert {(w["hostname"], w["status"]) for w in listed} == {(f"motet@{name}", True) for name in names}


def test_a_workers_page_says_what_its_device_is(cluster: Cluster, browser: Browser) -> None:
    def told() -> dict[str, Any]:
        return dict(browser.json("/api/workers"))

    # One that has just started beats before it knows its device; Flower looks every other second.
    until(
        lambda: (
            {name: one["stats"]["pool"]["device"] for name, one in told().items()}
            == {f"motet@{worker.worker}": [worker.device_name] for worker in workers(cluster)}
        ),
        "every device",
    )
    for worker in workers(cluster):
        queues = told()[f"motet@{worker.worker}"]["active_queues"]
        assert [q["name"] for q in queues] == [f"motet.gpu.{worker.worker}"]
        page = browser.page(f"/worker/motet@{worker.worker}")
        assert worker.device_name in page
        assert "Utilisation" in page


def test_every_subtask_is_a_task_named_by_its_pass_kind(
    cluster: Cluster, tasks: dict[str, dict[str, Any]]
) -> None:
    assert {task["name"] for task in tasks.values()} == {PASS_KIND}
    assert {task["worker"] for task in tasks.values()} <= {f"motet@{w.worker}" for w in workers(cluster)}
    assert all(task["args"].startswith("(subtask=") for task in tasks.values())


def test_no_text_of_a_user_is_anywhere(browser: Browser, tasks: dict[str, dict[str, Any]]) -> None:
    table = "/tasks/datatable?draw=1&start=0&length=1000&order[0][column]=0&columns[0][data]=name"
    pages = [
        *("/", "/workers", "/workers?json=1", "/tasks", table, "/broker", "/metrics"),
        *("/api/workers", "/api/workers?refresh=1", "/api/tasks", "/api/task/types", "/api/queues/length"),
        *(f"/worker/{name}" for name in browser.json("/api/workers")),
        *(f"/task/{task}" for task in tasks),
        *(f"/api/task/info/{task}" for task in tasks),
    ]
    told = {path: browser.page(path) for path in pages}
    assert PASS_KIND in told[table]
    assert f'task="{PASS_KIND}"' in told["/metrics"]
    assert not [path for path, page in told.items() if SECRET in page or "parcel" in page]


def test_strangers_see_nothing(browser: Browser) -> None:
    for path in (
        *(
            "/",
            "/workers",
            "/tasks",
            "/broker",
            "/metrics",
            "/api/workers",
            "/api/tasks",
            "/api/queues/length",
        ),
        *("/api/task/types", "/worker/motet@x", "/task/x", "/workers?json=1"),
    ):
        assert browser.ask(path, login=False)[0] == 401, path
        wrong = {"Authorization": "Basic " + b64encode(b"motet:wrong").decode()}
        assert browser.ask(path, login=False, headers=wrong)[0] == 401, path
    assert browser.ask("/healthcheck", login=False) == (200, "OK")


def test_nobody_can_change_anything(cluster: Cluster, browser: Browser) -> None:
    name = f"motet@{workers(cluster)[0].worker}"
    for path in (f"/api/worker/shutdown/{name}", "/api/task/send-task/motet.run", "/api/task/revoke/x"):
        assert browser.ask(path, "POST")[0] == 403, path
    assert browser.ask("/api/task/revoke/x", "POST", headers={"Origin": "http://elsewhere"})[0] == 403


def test_password_and_cookie_secret_outlive_a_restart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    passwords, kept = [], data / "flower.json"
    secrets = []
    for _ in range(2):
        with StandIn(data, port=0, flower_port=0) as cluster:
            browser = Browser(cluster.flower_url)
            until(lambda: answers(browser), "flower")  # noqa: B023 - called before the next round
            assert browser.ask("/tasks")[0] == 200
            passwords.append(urlsplit(cluster.flower_url).password)
            secrets.append(json.loads(kept.read_text())["cookie_secret"])
            assert secrets[-1] not in Path(f"/proc/{cluster.pids['flower']}/cmdline").read_text()
    assert passwords[0] == passwords[1]
    assert secrets[0] == secrets[1]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "command",
    ["GET motet:w:w0:in:1:1", "GET motet:w:w0:running", "SET motet:w:w0:beat 1", "SMEMBERS motet:x"],
)
def test_flowers_rights_hold_beats_and_no_payload(redis_urls: ValkeyUrls, command: str) -> None:
    with redis.Redis.from_url(redis_urls.flower) as flower:
        assert flower.get("motet:w:w0:beat") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            flower.execute_command(*command.split())


def test_who_runs_what_is_told_to_the_tenant_and_only_counted_for_others(
    cluster: Cluster, browser: Browser
) -> None:
    with Client(cluster.url, cluster.tokens["admin"]) as admin:
        other = admin.create_token("other", "user", tenant="other").token
    with Client(cluster.url, cluster.tokens["user"]) as client, Client(cluster.url, other) as stranger:
        job = client.submit([f"{row} once more" for row in ROWS * 4], {"topic": Classify("news-topics")})
        until(lambda: any(w.running for w in client.workers()), "leases")
        told, counted = client.workers(), stranger.workers()
        job.cancel()
    runs = [run for worker in told for run in worker.running]
    assert {(run["job"], run["pass"]) for run in runs} == {(job.id, PASS_KIND)}
    assert all(run["rows"] >= run["subtasks"] > 0 for run in runs)
    assert all(worker.running_other == 0 for worker in told)
    assert sum(worker.running_other for worker in counted) > 0
    assert not [run for worker in counted for run in worker.running]
