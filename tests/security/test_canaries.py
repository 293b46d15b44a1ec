"""Twenty canaries are put into a real cluster, as texts, answers, names, tokens and passwords; then all is searched.

What may hold them: Postgres and its folder, payloads and outcomes in Redis, the answers to their owner, and for
secrets the private files and the environment of the very process that needs them. Nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from motet import Client, Function
from motet.local.children import MARK
from motet.local.cluster import Cluster
from motet.protocol.transport import OUTCOMES, WORKERS
from motet.protocol.wire import Beat
from tests.acceptance.test_flower import Browser, answers, until
from tests.fuzz.small_cluster import eventually, redis_of, small_cluster
from tests.pictures import png
from tests.trace_receiver import PATH, Receiver, receiving

pytest.importorskip("flower")

#: Before any cluster was started: what is written from now on is looked through.
BEFORE = time.time() - 1
#: What users say, by where they say it; the answers are the words of ``secretly`` below.
TEXTS = {
    "in a row": "canary-row-8d1f02",
    "in a row that raises": "canary-raise-77ab31",
    "in a row that returns no JSON": "canary-bytes-51c9e0",
    "in a row that kills": "canary-kill-0d5b6e",
    "in a row that is too long": "canary-long-e4a7c2",
    "in a row with a NUL": "canary-nul-93f1d8",
    "in a row that is no text": "canary-object-2b60aa",
    "in a part that is torn": "canary-torn-c81e47",
    "in an answer": "canary-answer-6f3d95",
    "in a picture": "canary-pixel-b7714e",
    "in a picture that is refused": "canary-torn-pixel-20c9da",
}
#: Names that a user gives. Their owner sees them again; logs, metrics, queues and Flower do not.
NAMES = {
    "name of the job": "canary-job-15d7f9",
    "name of a task": "canary_task_b3802e",
    "name of a field": "canary_field_7e49c1",
    "idempotency key": "canary-key-d26a58",
    "in a query": "canary-query-f08b34",
    "path of a picture": "canary-path-6e0d73.png",
}

ENGINE = f"""
import os, signal, sys, time

def secretly(texts):
    for text in texts:
        if "kills" in text:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
    return [answer(text) for text in texts]

def answer(text):
    return "{TEXTS["in an answer"]} " + text[::-1]

def sees(pictures):
    return [len(picture) for picture in pictures]

def singly(text):
    if "raises" in text:
        raise ValueError(text)
    if "bytes" in text:
        return text.encode()
    return answer(text)

singly.per_row = True
"""


@pytest.fixture(scope="module")
def sink() -> Iterator[Receiver]:
    with receiving() as sink:
        yield sink


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, sink: Receiver) -> Iterator[Cluster]:
    """With all logs at their most talkative."""
    more = {"MOTET_TRACES": sink.url + PATH, "MOTET_LOG_LEVEL": "DEBUG"}
    folder = tmp_path_factory.mktemp("canaries")
    with small_cluster(
        folder, ENGINE, ("secretly", "singly", "sees"), cpus=1, flower=True, env=more
    ) as running:
        yield running


@dataclass
class Place:
    """Where something was found, and what is there."""

    where: str
    content: bytes


class Watch:
    """Looks into Redis all the while: what was there for a moment was there."""

    def __init__(self, cluster: Cluster) -> None:
        self.seen: dict[str, Place] = {}
        self.looks = 0
        self._bus = redis_of(cluster, "scheduler")
        self._heard = self._bus.pubsub()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._look, self._listen)]

    def __enter__(self) -> Watch:
        self._heard.psubscribe("*")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._heard.close()
        self._bus.close()

    def _keep(self, where: str, content: bytes) -> None:
        self.seen[f"{where} {hash(content)}"] = Place(where, content)

    def _listen(self) -> None:
        while not self._stop.is_set():
            heard = self._heard.get_message(timeout=0.1)
            if heard and isinstance(heard["data"], bytes):
                self._keep(f"event {heard['channel']!r}", heard["channel"] + heard["data"])

    def _look(self) -> None:
        while not self._stop.is_set():
            for key in self._bus.scan_iter(count=1000):
                self._keep(f"key {key!r}", key)
                if b":in:" not in key and key != OUTCOMES.encode():
                    with contextlib.suppress(redis.ResponseError):  # gone meanwhile, or of another type
                        self._keep(f"value of {key!r}", self._value(key))
            self.looks += 1

    def _value(self, key: bytes) -> bytes:
        match self._bus.type(key):
            case b"string":
                return self._bus.get(key) or b""
            case b"list":
                # A message's body is JSON in base64: looked into as well.
                return b"\n".join(_unwrapped(each) for each in self._bus.lrange(key, 0, -1))
            case b"set":
                return b"\n".join(self._bus.smembers(key))
            case b"stream":
                return repr(self._bus.xrange(key)).encode()
            case b"zset":
                return repr(self._bus.zrange(key, 0, -1)).encode()
            case b"hash":
                return repr(self._bus.hgetall(key)).encode()
            case _:
                return b""


def _unwrapped(message: bytes) -> bytes:
    try:
        return message + b"\n" + base64.b64decode(json.loads(message)["body"])
    except (ValueError, KeyError, TypeError):
        return message


# -- where it is looked for

#: Where processes leave what they were not told to write: temporary files, and cores where they run.
STRAY = [Path(folder) for folder in ("/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), ".")]


def files(cluster: Cluster) -> Iterator[Place]:
    """Every file that was written meanwhile: in the cluster's folder but for Postgres' and the blobs, and strays."""
    spared = {cluster.data / "postgres", cluster.data / "blobs"}
    for folder, folders, names in os.walk(cluster.data):
        folders[:] = [name for name in folders if Path(folder, name) not in spared]
        yield from _written(Path(folder, name) for name in names)
    for root in {path.resolve() for path in STRAY}:
        # And one level deeper; further down are the folders of other programs.
        yield from _written([*root.glob("*"), *(path for path in root.glob("*/*") if root != Path.cwd())])


def _written(paths: Iterable[Path]) -> Iterator[Place]:
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime >= BEFORE and status.st_size < 1 << 28:
                yield Place(f"file {path}", path.read_bytes())


def private(cluster: Cluster) -> set[Path]:
    """Files that are there to hold secrets: only their owner may read them."""
    return {
        cluster.data / name
        for name in ("tokens.json", "client.json", "flower.json", "valkey/passwords.json")
        if (cluster.data / name).exists()
    }


def processes(cluster: Cluster) -> Iterator[tuple[str, bytes]]:
    """(name, environment) of every process of the cluster; a child has the name of its parent."""
    names = {pid: name for name, pid in cluster.pids.items()} | dict.fromkeys(worker_pids(cluster), "worker")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            env = Path(f"/proc/{process.pid}/environ").read_bytes()
            if f"{MARK}={cluster.data}".encode() in env:
                yield names.get(process.pid) or _under(process, names), env


def _under(process: psutil.Process, names: Mapping[int, str]) -> str:
    return next((names[parent.pid] for parent in process.parents() if parent.pid in names), "another")


def worker_pids(cluster: Cluster) -> set[int]:
    """The processes that beat now, by their own word: however they were started."""
    with redis_of(cluster, "scheduler") as bus:
        names = [name.decode() for name in bus.smembers(WORKERS)]
        beats = [Beat.decode(raw) for name in names if (raw := bus.get(f"motet:w:{name}:beat"))]
    return {beat.pid for beat in beats if beat.pid and psutil.pid_exists(beat.pid)}


def command_lines() -> Iterator[Place]:
    """Of every process of this machine."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            yield Place(f"command line of {process.pid}", Path(f"/proc/{process.pid}/cmdline").read_bytes())


def pages_of_flower(browser: Browser) -> Iterator[Place]:
    table = "/tasks/datatable?draw=1&start=0&length=1000&order[0][column]=0&columns[0][data]=name"
    tasks = browser.json("/api/tasks")
    for path in (
        *("/", "/workers", "/workers?json=1", "/tasks", table, "/broker", "/metrics"),
        *("/api/workers", "/api/tasks", "/api/task/types", "/api/queues/length"),
        *(f"/worker/{name}" for name in browser.json("/api/workers")),
        *(f"/task/{task}" for task in tasks),
        *(f"/api/task/info/{task}" for task in tasks),
    ):
        yield Place(f"Flower's {path}", browser.page(path).encode())


def told_to_others(cluster: Cluster, stranger: str) -> Iterator[Place]:
    """What the API tells to whoever is not the owner."""
    for token, paths in (
        (cluster.tokens["admin"], ("/metrics",)),
        (stranger, ("/v1/jobs", "/v1/workers", "/v1/cluster", "/v1/doctor", "/v1/models", "/jobs")),
        ("nobody.nothing", ("/healthz", "/readyz", "/openapi.json", "/v1/jobs", "/metrics")),
    ):
        for path in paths:
            answer = httpx.get(cluster.url + path, headers={"Authorization": f"Bearer {token}"})
            yield Place(f"the API's {path}", answer.content)


# -- the test


@dataclass
class Run:
    """What was collected while a job ran."""

    watch: Watch
    refusals: list[Place]
    stranger: str
    secrets: Mapping[str, str]


@pytest.fixture(scope="module")
def run(cluster: Cluster) -> Iterator[Run]:
    with Client(cluster.url, cluster.tokens["admin"]) as admin:
        stranger = admin.create_token("stranger", "user", tenant="other").token
    with Watch(cluster) as watch:
        refusals = provoke(cluster)
        work(cluster)
        until(lambda: watch.looks > 5, "looks into Redis")
        # What Flower and the receiver of traces hear comes a moment later.
        browser = Browser(cluster.flower_url)
        until(lambda: answers(browser) and browser.json("/api/tasks"), "tasks in Flower")
        yield Run(watch, refusals, stranger, secrets_of(cluster, stranger))


def secrets_of(cluster: Cluster, stranger: str) -> dict[str, str]:
    passwords = json.loads((cluster.data / "valkey" / "passwords.json").read_text())
    flower = json.loads((cluster.data / "flower.json").read_text())
    return {
        **{f"token of {scope}": token.partition(".")[2] for scope, token in cluster.tokens.items()},
        "token of a stranger": stranger.partition(".")[2],
        **{f"Redis password of {role}": password for role, password in passwords.items()},
        "Flower's password": flower["password"],
        "Flower's cookie secret": flower["cookie_secret"],
    }


def work(cluster: Cluster) -> None:
    """Jobs with rows that work, raise, return nonsense and kill; their messages wait in a queue for a moment."""
    task, name, field_ = NAMES["name of a task"], NAMES["name of the job"], NAMES["name of a field"]
    texts = [f"{TEXTS['in a row']} {i}" for i in range(400)]
    angry = [f"raises {TEXTS['in a row that raises']}", f"bytes {TEXTS['in a row that returns no JSON']}"]
    kills = [*texts[:2], f"kills {TEXTS['in a row that kills']}"]
    picture = png(comment=TEXTS["in a picture"])
    with Client(cluster.url, cluster.tokens["user"]) as client:

        def submit(function: str, rows: list[Any], **more: Any) -> Any:
            tasks = {task: Function(function, input=f"{{{field_}}}")}
            return client.submit([{field_: row} for row in rows], tasks, name=name, **more)

        with frozen(cluster):
            job = submit("secretly", texts, key=NAMES["idempotency key"])
            # They are sent while nobody takes them, and lie in the queue to be seen.
            time.sleep(2)
        job.wait(timeout=120)
        assert job.progress.ok == len(texts)
        assert TEXTS["in an answer"] in str(next(iter(job.results()))[task].value)
        seen = submit("sees", [{"bytes": picture, "path": NAMES["path of a picture"]}])
        assert [row[task].value for row in seen.results()] == [len(picture)]
        for function, rows, wrong in (("singly", [*texts[:40], *angry], 2), ("secretly", kills, 1)):
            one = submit(function, rows, reuse=False)
            one.wait(timeout=240)
            assert (one.progress.ok, one.progress.error) == (len(rows) - wrong, wrong)
            told = str([row.errors for row in one.results() if row.errors])
            assert told != "[]"
            assert not found_in(
                [Place("errors", told.encode())], {what: word.encode() for what, word in TEXTS.items()}
            )


@contextlib.contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    """The worker takes nothing meanwhile."""
    found = [psutil.Process(pid) for pid in eventually(lambda: worker_pids(cluster), words="a worker")]
    for process in found:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in found:
            process.send_signal(signal.SIGCONT)


def provoke(cluster: Cluster) -> list[Place]:
    """Refusals of requests that hold canaries, in every way that a row can be wrong."""
    said: list[Place] = []
    with httpx.Client(
        base_url=cluster.url, headers={"Authorization": f"Bearer {cluster.tokens['user']}"}
    ) as line:
        tasks = {"loud": {"kind": "function", "model": "secretly"}}

        def ask(what: str, method: str, path: str, **more: Any) -> Any:
            answer = line.request(method, path, **more)
            assert answer.status_code >= 400, (what, answer.status_code)
            said.append(Place(f"refusal of {what}", answer.content + str(answer.headers).encode()))
            return answer

        long = f"{TEXTS['in a row that is too long']} " + "x" * 300_000
        nul = f"{TEXTS['in a row with a NUL']}\0"
        for what, row in (
            ("a long row", long),
            ("a NUL", nul),
            ("an object", {"a": [TEXTS["in a row that is no text"]]}),
        ):
            ask(what, "POST", "/v1/jobs", json={"tasks": tasks, "rows": [row]})
        job = line.post("/v1/jobs", json={"tasks": tasks}).json()["id"]
        torn = b'{"text": "' + TEXTS["in a part that is torn"].encode()
        for kind in ("application/x-ndjson", "application/msgpack"):
            ask("a torn part", "PUT", f"/v1/jobs/{job}/parts/0", content=torn, headers={"Content-Type": kind})
        broken = TEXTS["in a picture that is refused"].encode()
        ask("a torn picture", "PUT", f"/v1/media/{'0' * 64}", content=broken)
        packed = {"Content-Type": "application/msgpack"}
        ask("torn pictures", "POST", "/v1/media", content=b"\x81\xa5media" + broken, headers=packed)
        ask("a query", "GET", "/v1/jobs", params={"state": "x" * 100 + NAMES["in a query"]})
        ask("another's secret", "GET", "/v1/jobs", headers={"Authorization": f"Bearer x.{TEXTS['in a row']}"})
        line.delete(f"/v1/jobs/{job}")
    return said


def canaries(run: Run) -> dict[str, bytes]:
    return {what: word.encode() for what, word in {**TEXTS, **NAMES, **run.secrets}.items()}


def found_in(places: Any, words: Mapping[str, bytes]) -> list[str]:
    """Where canaries sing. Texts are looked for backwards too, for that is what the answers say."""
    return [
        f"{what} in {place.where}"
        for place in places
        for what, word in words.items()
        if word in place.content or word[::-1] in place.content
    ]


def test_there_are_twenty_canaries(run: Run) -> None:
    assert len(canaries(run)) >= 20
    assert all(len(word) >= 12 for word in canaries(run).values())


def test_no_canary_is_in_a_file(cluster: Cluster, run: Run) -> None:
    spared = {f"file {path}" for path in private(cluster)}
    places = [place for place in files(cluster) if place.where not in spared]
    assert sum(place.where.endswith(".log") for place in places) >= 6, "the logs are among them"
    assert not found_in(places, canaries(run))


def test_private_files_are_their_owners_alone_and_hold_no_text(cluster: Cluster, run: Run) -> None:
    assert stat.S_IMODE(cluster.data.stat().st_mode) & 0o077 == 0 or all(
        stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private(cluster)
    )
    texts = {what: word.encode() for what, word in {**TEXTS, **NAMES}.items()}
    assert not found_in([Place(str(path), path.read_bytes()) for path in private(cluster)], texts)


def test_no_canary_is_in_redis_beside_payloads_and_outcomes(run: Run) -> None:
    places = list(run.watch.seen.values())
    kinds = [place.where.split()[0] for place in places]
    assert kinds.count("event") > 3, "events of Celery were heard"
    assert any("value of b'motet.gpu." in place.where for place in places), "a message was seen in its queue"
    assert any(f"key {WORKERS.encode()!r}" == place.where for place in places)
    assert not found_in(places, canaries(run))


def test_flower_shows_no_canary(cluster: Cluster, run: Run) -> None:
    browser = Browser(cluster.flower_url)
    places = list(pages_of_flower(browser))
    assert any("/task/" in place.where for place in places)
    assert not found_in(places, canaries(run))


def test_no_canary_is_told_to_others_or_measured(cluster: Cluster, run: Run) -> None:
    places = list(told_to_others(cluster, run.stranger))
    assert any(b"motet_" in place.content for place in places), "metrics"
    assert not found_in(places, canaries(run))


def test_no_refusal_repeats_a_text_or_a_secret(run: Run) -> None:
    assert len(run.refusals) >= 7
    words = {what: word.encode() for what, word in {**TEXTS, **run.secrets}.items()}
    assert not found_in(run.refusals, words)


def test_no_canary_is_in_a_trace(run: Run, sink: Receiver) -> None:
    eventually(lambda: len(sink.bodies) >= 3, 30, "traces")
    assert not found_in([Place("a trace", body) for body in sink.bodies], canaries(run))


def test_no_canary_is_on_a_command_line(run: Run) -> None:
    assert not found_in(command_lines(), canaries(run))


#: Which process may know which secret; by its environment, where only it and root can look.
KNOWN_TO = {
    "Redis password of scheduler": {"api", "dispatch", "aggregate"},
    "Redis password of worker": {"workers", "worker"},
    "Redis password of flower": {"flower"},
    "token of worker": {"workers", "worker"},
    "Flower's password": {"flower"},
    "Flower's cookie secret": {"flower"},
}


def test_each_process_knows_its_own_secrets_and_no_others(cluster: Cluster, run: Run) -> None:
    seen = set()
    for name, env in processes(cluster):
        seen.add(name)
        held = {what for what, word in run.secrets.items() if word.encode() in env}
        allowed = {what for what, names in KNOWN_TO.items() if name in names}
        assert held <= allowed, (name, held - allowed)
        assert not found_in(
            [Place(name, env)], {what: word.encode() for what, word in {**TEXTS, **NAMES}.items()}
        )
        if name in ("worker", "workers", "flower"):
            assert b"DATABASE_URL" not in env, f"{name} has the address of the database"
            assert b"postgresql" not in env, name
    assert {"worker", "workers", "flower", "api", "dispatch", "aggregate"} <= seen


def test_a_worker_has_no_way_to_the_database(cluster: Cluster) -> None:
    """Neither an address, nor an open connection, nor a driver that it has loaded."""
    workers = worker_pids(cluster)
    assert workers
    for worker in workers:
        maps = Path(f"/proc/{worker}/maps").read_text()
        assert "psycopg" not in maps
        assert "sqlalchemy" not in maps
        sockets = Path(f"/proc/{worker}/net/unix").read_text()
        open_files = [os.readlink(link) for link in Path(f"/proc/{worker}/fd").iterdir() if link.is_symlink()]
        inodes = {link[8:-1] for link in open_files if link.startswith("socket:[")}
        peers = [
            row.split()[-1] for row in sockets.splitlines() if any(f" {inode}" in row for inode in inodes)
        ]
        assert not [peer for peer in peers if "PGSQL" in peer]


# -- a search that finds nothing proves nothing until it has found something


def test_every_search_finds_what_is_planted(cluster: Cluster, run: Run, sink: Receiver) -> None:
    planted = {"planted": b"canary-planted-3c5e88"}
    word = planted["planted"].decode()
    # In a log, another file, a key, a value, a queue, an event, a trace, a command line and an environment.
    log = cluster.data / "logs" / "aggregate.log"
    stray = Path("/var/tmp") / f"motet-test-{os.getpid()}"
    with log.open("a") as lines:
        lines.write(f"{word}\n")
    stray.write_text(word)
    bus = redis_of(cluster, "scheduler")
    looks = run.watch.looks
    bus.set("motet:w:planted:control", word, ex=30)
    bus.set(f"motet:{word}", "x", ex=30)
    bus.lpush("motet.gpu.planted", json.dumps({"body": base64.b64encode(word.encode()).decode()}))
    bus.publish("/0.celeryev/planted", word)
    httpx.post(sink.url + PATH, content=word.encode())
    program = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", word],
        env={MARK: str(cluster.data), "PLANTED": word, "PATH": os.environ["PATH"]},
    )
    try:
        until(lambda: run.watch.looks > looks + 2, "looks into Redis")
        found = found_in(files(cluster), planted)
        assert f"planted in file {log}" in found
        assert f"planted in file {stray}" in found
        seen = found_in(run.watch.seen.values(), planted)
        for where in (
            "value of b'motet:w:planted:control'",
            f"key b'motet:{word}'",
            "value of b'motet.gpu.planted'",
        ):
            assert f"planted in {where}" in seen
        assert any("event" in each for each in seen)
        assert found_in([Place("a trace", body) for body in sink.bodies], planted)
        assert f"planted in command line of {program.pid}" in found_in(command_lines(), planted)
        assert any(word.encode() in env for _, env in processes(cluster))
        assert found_in([*run.refusals, Place("a refusal", word[::-1].encode())], planted)
    finally:
        program.kill()
        program.wait()
        stray.unlink()
        bus.unlink("motet.gpu.planted", "motet:w:planted:control", f"motet:{word}")
        bus.close()
