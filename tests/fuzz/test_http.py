"""The real API process under machine-made requests: nothing that a stranger sends is the server's own failure.

`schemathesis` reads the API's own description and makes requests of it, well formed and not; beside it go bodies of
rows that were torn and bytes that are no HTTP. FUZZ_REQUESTS and FUZZ_SEED size and repeat a run (`make fuzz`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgpack
import psutil
import pytest
import requests
import schemathesis
import schemathesis.hooks
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from motet.local.children import Child
from motet.local.places import free_port
from scheduler.store import leadership
from scheduler.store.database import Database
from tests.integration.api_house import CLASSIFY, DICE, SPEAKER, TWO, House, furnish, squeezed
from tests.integration.landing import register
from tests.integration.test_api_fits import EMBED, EPOCH, FIT, TRAINER, lease_of

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "4000"))
pytestmark = pytest.mark.timeout(max(1500, REQUESTS // 10))
SEED = int(os.environ.get("FUZZ_SEED", "5"))
#: Requests of a torn body, and connections that begin with no HTTP at all.
BODIES = max(500, REQUESTS // 10)
RUBBISH = 200
#: Megabytes that the process may grow by from the first tenth of the requests to the last.
GROWTH_MB = 50

#: How often each asks. ``none`` and ``wrong`` are turned away at the door.
ASKERS = {"admin": 8, "user": 8, "read": 2, "worker": 4, "stranger": 2, "none": 1, "wrong": 1}
#: What every answer is held to. The others (which input must be refused) are what tests/integration is for.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@dataclass
class Seen:
    """What the server answered so far."""

    requests: int = 0
    #: Digests of the requests that schemathesis made up, and of those that were varied from them, whoever sent them.
    made_up: set[bytes] = field(default_factory=set)
    varied: set[bytes] = field(default_factory=set)
    by_status: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def answer(self, what: str, status: int, body: bytes, headers: Any) -> None:
        self.requests += 1
        self.by_status[status] += 1
        if b"Traceback" in body or b'File "' in body:
            self.wrong.append(f"{what}: a traceback in the body")
        if status >= 500 and not (status == 503 and "retry-after" in headers):
            self.wrong.append(f"{what}: {status} {body[:300]!r}")
        if status >= 400 and b'"error"' not in body and b"<html" not in body and body:
            self.wrong.append(f"{what}: {status} without our form: {body[:300]!r}")


@dataclass
class Server:
    """One API process with its log."""

    house: House
    process: psutil.Process
    log: Path

    @property
    def memory_mb(self) -> float:
        return self.process.memory_info().rss / 1e6

    def is_unharmed(self) -> None:
        """It lives, answers at once, and has met nothing that it did not expect."""
        assert self.process.is_running()
        began = time.monotonic()
        assert self.house.call("GET", "/v1/jobs").status_code == 200
        assert time.monotonic() - began < 5
        log = self.log.read_text("utf-8", "replace")
        failed = [line[:2000] for line in log.splitlines() if "request failed" in line or "Traceback" in line]
        assert not failed, failed[:3]


@pytest.fixture
def server(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Server]:
    """A real `python -m scheduler api`, with models, tokens of every scope and a job in every state."""
    port = free_port()
    env = {
        **os.environ,
        "MOTET_DATABASE_URL": database_url,
        "MOTET_REDIS_URL": redis_url,
        "MOTET_BLOB_DIR": str(tmp_path / "blobs"),
        "MOTET_API_PORT": str(port),
        "MOTET_MIN_FREE_MB": "0",
        # That a token asks too often is tests/security's.
        "MOTET_MAX_REQUESTS_S": "0",
    }
    log = tmp_path / "api.log"
    api = Child("api", [sys.executable, "-P", "-m", "scheduler", "api"], env=env, log=log)
    api.start()
    database = Database(database_url, pool=2)
    try:
        with httpx.Client(timeout=60, trust_env=False, verify=False) as line:
            house = House(f"http://127.0.0.1:{port}", _settings(env), database, line)
            until = time.monotonic() + 60
            while not _answers(house):
                assert api.alive, api.tail()
                assert time.monotonic() < until
                time.sleep(0.05)
            furnish(house)
            register(database, SPEAKER, TRAINER)
            # Somebody leads, so that /readyz has an answer that is no refusal.
            leadership.lead(database, "fuzz", None, 3600.0)
            yield Server(house, psutil.Process(api.pid), log)
    finally:
        api.stop(10)
        database.close()


def _settings(env: dict[str, str]) -> Any:
    from motet.protocol.settings import Settings

    return Settings.from_env(env)


def _answers(house: House) -> bool:
    try:
        return house.call("GET", "/healthz", token=None).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(autouse=True)
def deaf() -> Iterator[None]:
    """Hooks are schemathesis' own globals: none outlives its test."""
    yield
    schemathesis.hooks.unregister_all()


def jobs_of_every_state(house: House) -> list[str]:
    """Ids of jobs that load, run, have ended in each way, and of one that never was."""
    loading = house.open(TWO)["id"]
    house.put(loading, 0, ["a", "b"])
    running = house.submit(["c", "d"], TWO)["id"]
    done = house.submit(["e", "f"], CLASSIFY)["id"]
    house.answer(done, 0)
    embedded = house.submit(["h", "i"], EMBED)["id"]
    house.answer(embedded, 0)
    cancelled = house.submit(["g"], CLASSIFY)["id"]
    house.call("POST", f"/v1/jobs/{cancelled}/cancel")
    return [loading, running, done, embedded, cancelled, "00000000-0000-4000-8000-000000000000"]


def a_training_job(house: House) -> tuple[str, str]:
    """Its id, and a lease of it that outlives the test."""
    job = house.submit(["a recipe"], FIT)["id"]
    lease = lease_of(house, job)
    house.sql("UPDATE lease SET until = now() + interval '1 day'")
    return job, lease


def test_made_up_requests_meet_no_failure_of_the_server(server: Server) -> None:
    seen, dice = Seen(), random.Random(SEED)
    began = time.monotonic()
    memory_early = 0.0
    failures: list[str] = []
    rounds = 0
    training, lease = a_training_job(server.house)
    listen(server.house, seen, dice, lease)
    while seen.requests < REQUESTS:
        stream = from_schema(described(server, dice, SEED + rounds, training)).execute()
        for event in stream:
            failures += failures_of(event)
            if seen.requests >= REQUESTS:
                stream.stop()
            if not memory_early and seen.requests >= REQUESTS / 10:
                memory_early = server.memory_mb
        rounds += 1
        assert rounds < 1000
    took_s = time.monotonic() - began
    growth_mb = server.memory_mb - memory_early
    print(
        f"\n{len(seen.made_up)} distinct requests made up, {len(seen.varied)} varied from them, {seen.requests} sent"
        f" in {took_s:.0f} s, {rounds} rounds, answers {dict(sorted(seen.by_status.items()))},"
        f" memory {growth_mb:+.1f} MB"
    )
    assert not seen.wrong, "\n".join(seen.wrong[:20])
    assert not failures, "\n\n".join(sorted(set(failures))[:20])
    # A conflict needs two requests that meet, which a short run may not make up.
    conflict = {409} if REQUESTS >= 20_000 else set()
    assert set(seen.by_status) >= {200, 201, 202, 401, 403, 404, 422} | conflict, (
        "it went deep enough to mean something"
    )
    assert growth_mb < GROWTH_MB
    server.is_unharmed()


def described(server: Server, dice: random.Random, seed: int, training: str) -> Any:
    """The API's description, with hooks that ask about what is really there; nobody ends the training job."""
    house = server.house
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "checks": {"enabled": False, **{check: {"enabled": True} for check in CHECKS}},
            "generation": {"max-examples": 60, "no-shrink": True, "database": "none"},
            "continue-on-failure": True,
            "request-timeout": 60,
        }
    )
    schema = schemathesis.openapi.from_url(f"{house.url}/openapi.json", config=config)
    there: dict[str, list[Any]] = {
        "job": jobs_of_every_state(house),
        "ref": ["topics", "tiny@1", "tones", "dice", "topics@prod"],
        "name": ["topics", "tiny"],
        "alias": ["prod"],
        "number": [0, 1, 2],
        "row": [0, 0, 1],
        "worker": ["nobody"],
        "sha256": ["0" * 64, "b" * 64],
    }

    @schema.hook
    def map_path_parameters(context: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
        spared = context.operation.method.upper() == "DELETE" and "ref" in path_parameters
        if context.operation.path.endswith("/fits") and dice.random() < 0.5:
            return {"job": training}
        return {
            name: value if spared or name not in there or dice.random() < 0.4 else dice.choice(there[name])
            for name, value in (path_parameters or {}).items()
        }

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        """Half of them begin from one that would be taken: a body of chance is refused at its first key."""
        whole = WHOLE.get((context.operation.method.upper(), context.operation.path))
        if whole is None or dice.random() < 0.5:
            return body
        try:
            json.dumps(body)
        except (TypeError, ValueError):  # bytes, or nothing at all
            body = None
        return nearly(whole, body, dice)

    @schema.hook
    def map_query(context: Any, query: dict[str, Any]) -> dict[str, Any]:
        """Nobody waits for news in this test."""
        wait = (query or {}).get("wait_s")
        return {**query, "wait_s": 0.01} if isinstance(wait, (int, float)) and wait > 0.01 else query

    return schema


#: Bodies that are taken, where the description knows no more than that they are objects.
WHOLE: dict[tuple[str, str], Any] = {
    ("POST", "/v1/jobs"): {
        "tasks": {
            "topic": {"kind": "classify", "model": "topics"},
            "vector": {"kind": "embed", "model": "tiny"},
            "facts": {"kind": "extract", "model": "speaker", "schema": {"type": "object"}},
            "mood": {"kind": "choose", "model": "speaker", "labels": ["good", "bad"], "first": "text"},
            "reply": {
                "kind": "generate",
                "model": "speaker",
                "prompt": "Of {topic}, {mood}.",
                "temperature": 0.5,
            },
        },
        "mean_bytes": {"text": 10.5},
        "rows": ["a", {"text": "b"}],
        "name": "n",
        "priority": "bulk",
        "reuse": False,
        "bad_rows": "error",
        "deadline_s": 60,
        "retention_days": 1,
    },
    ("POST", "/v1/plan"): {"tasks": TWO, "rows": ["a", "b"], "total_rows": 10, "total_bytes": 100},
    ("POST", "/v1/jobs/{job}/close"): {"parts": 1, "rows": 2},
    ("POST", "/v1/tokens"): {"name": "n", "scope": "user", "tenant": "default", "expires_days": 1},
    ("POST", "/v1/models"): DICE.to_json(),
    ("PUT", "/v1/models/{name}/aliases/{alias}"): {"version": "1"},
    ("PUT", "/v1/fits/{row}"): {"key": "heads 0001", "report": EPOCH, "checkpoint": None, "files": []},
}
#: Values that JSON can say and few expect.
ODD = (
    *(
        None,
        True,
        -1,
        0,
        2**31,
        2**53,
        2**63,
        10**400,
        1e308,
        0.5,
        "",
        "\0",
        "\ud800",
        "é" * 500,
        "x" * 70_000,
    ),
    *([], [[]], {}, {"a": {}}, [None] * 300, "../..", "%s%n", "'; DROP TABLE job; --", "${jndi}", "<script>"),
)


def nearly(whole: Any, stray: Any, dice: random.Random) -> Any:
    """A copy of ``whole`` in which up to two values are ``stray``, odd, or gone."""
    copy = deepcopy(whole)
    for _ in range(dice.randrange(3)):
        holder, key = copy, dice.choice(list(copy)) if copy else None
        while (
            key is not None and isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.7
        ):
            holder = holder[key]
            key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if key is not None:
            holder[key] = dice.choice([stray, *ODD])
            if dice.random() < 0.2:
                del holder[key]
    return copy


@schemathesis.serializer("application/msgpack", "application/x-ndjson")
def as_it_is(context: Any, value: Any) -> bytes:
    """Rows travel in forms that schemathesis does not write: what it made of strings goes out as their bytes."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def listen(house: House, seen: Seen, dice: random.Random, lease: str) -> None:
    """From now on each request is somebody's, goes out once more in a variation, and each answer is looked at.

    Workers show this lease.

    To make a request up, and to hold its answer to the description, takes ten times as long as to send it.
    """
    line = requests.Session()
    line.trust_env = False
    askers, weights = zip(*ASKERS.items(), strict=True)

    def introduce(headers: Any) -> None:
        headers.pop("Authorization", None)
        headers.pop("Motet-Lease", None)
        asker = dice.choices(askers, weights)[0]
        if asker == "worker":
            headers["Motet-Lease"] = lease
        if asker != "none":
            headers["Authorization"] = f"Bearer {house.tokens.get(asker, 'a.b')}"

    @schemathesis.hook
    def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
        introduce(case.headers)

    @schemathesis.hook
    def after_call(context: Any, case: Any, response: Any) -> None:
        what = f"{case.method} {case.formatted_path}"
        seen.made_up.add(digest_of(response.request))
        seen.answer(what, response.status_code, response.content or b"", response.headers)
        again = varied(response.request, dice)
        introduce(again.headers)
        seen.varied.add(digest_of(again))
        answer = line.send(again, timeout=60, allow_redirects=False)
        seen.answer(what, answer.status_code, answer.content or b"", answer.headers)


#: Headers that tell who sends a request, and not what it is.
_PERSONAL = ("authorization", "x-schemathesis-testcaseid")
#: Parameters that some routes know and others do not.
_PARAMETERS = ("wait_s", "limit", "after", "order", "tasks", "state", "version", "from_block", "x")


def digest_of(request: requests.PreparedRequest) -> bytes:
    """What a request is, but for who sends it."""
    headers = sorted((k.lower(), v) for k, v in request.headers.items() if k.lower() not in _PERSONAL)
    body = request.body if isinstance(request.body, bytes) else str(request.body).encode()
    told = repr((request.method, request.url, headers)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(told + b"\0" + body).digest()


def varied(request: requests.PreparedRequest, dice: random.Random) -> requests.PreparedRequest:
    """The same request with another body, or with another parameter where it has none."""
    again = request.copy()
    if not request.body:
        value = dice.choice(
            [0, -1, 0.01, "done", f"{dice.getrandbits(40):x}", "%00", "%ff", "1e400", "%F0%9F%92%A1"]
        )
        mark = "&" if "?" in str(again.url) else "?"
        again.url = f"{again.url}{mark}{dice.choice(_PARAMETERS)}={value}"
        return again
    raw = (
        request.body
        if isinstance(request.body, bytes)
        else str(request.body).encode("utf-8", "surrogatepass")
    )
    try:
        body = json.dumps(nearly(json.loads(raw), dice.getrandbits(70), dice)).encode()
    except (ValueError, TypeError, IndexError, RecursionError):
        body = raw
    again.body = twisted(body, dice) if body == raw or dice.random() < 0.2 else body
    again.headers["Content-Length"] = str(len(again.body))
    return again


def failures_of(event: Any) -> list[str]:
    """What schemathesis holds against the server, in words."""
    if isinstance(event, events.NonFatalError | events.FatalError):
        return [f"schemathesis: {getattr(event, 'value', event)!r}"]
    if not isinstance(event, events.ScenarioFinished) or event.status is not Status.FAILURE:
        return []
    found = []
    for case_id, checks in event.recorder.checks.items():
        for check in checks:
            if check.failure_info is not None:
                failure, case = check.failure_info.failure, event.recorder.cases[case_id].value
                found.append(
                    f"{check.name}: {case.method} {case.path}: {failure.title}: {failure.message[:600]}"
                )
    return found


# -- what no description holds


def test_torn_and_twisted_rows_are_refused_or_taken_and_never_fail(server: Server) -> None:
    house, dice, seen = server.house, random.Random(SEED), Seen()
    job = house.open(TWO, bad_rows="error")["id"]
    next_part = 0
    for _ in range(BODIES):
        kind, body = whole_part(dice)
        coding = dice.choice(["", "", "zstd", "gzip", "br"])
        if coding == "zstd":
            body = squeezed(body)
        if dice.random() < 0.9:
            body = twisted(body, dice)
        number = dice.choice([next_part, next_part, next_part, 0, next_part + 1, 2**40])
        answer = house.put_raw(job, number, body, kind, coding or None)
        seen.answer(f"{kind} {coding} {body[:80]!r}", answer.status_code, answer.content, answer.headers)
        if answer.status_code == 200:
            next_part = max(next_part, answer.json()["next_part"])
    assert not seen.wrong, "\n".join(seen.wrong[:20])
    assert set(seen.by_status) >= {200, 409, 422}, seen.by_status
    stored = house.job(job)["rows"]
    assert house.close(job, next_part, stored).status_code == 202
    server.is_unharmed()


def whole_part(dice: random.Random) -> tuple[str, bytes]:
    """A part as a client sends it, in one of both forms."""
    texts = [
        "".join(dice.choices('aé\u2028 \\"{}\n', k=dice.randrange(30))) for _ in range(dice.randrange(5))
    ]
    if dice.random() < 0.5:
        odd = dice.choice([None, None, True, -1, 2**63, 1e308, b"\xff", [texts], {"text": 1}])
        part = {"columns": {"text": [*texts, odd] if odd is not None else texts}, "first_row": 0}
        if dice.random() < 0.3:
            part["bad"] = {dice.choice([0, "0", -1, 2**40]): ["bad_row", "no row"]}
        if dice.random() < 0.3:
            offsets = dice.choice([[0], [], [-1], [2**40], ["0"], 0, None])
            part["bad_fields"] = {dice.choice(["text", "x", 7]): [["bad_row", "no text", offsets]]}
        return "application/msgpack", msgpack.packb(part)
    rows = [dice.choice([text, {"text": text}, {"text": None}, [text], 3, {}]) for text in texts]
    return "application/x-ndjson", "\n".join(map(json.dumps, rows)).encode()


def twisted(body: bytes, dice: random.Random) -> bytes:
    """The same bytes with a few of them flipped, cut, doubled or strewn with what parsers stumble over."""
    torn = bytearray(body)
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(torn) + 1)
        match dice.randrange(5):
            case 0 if torn:
                torn[at % len(torn)] ^= 1 << dice.randrange(8)
            case 1:
                del torn[at:]
            case 2:
                torn[at:at] = torn[: dice.randrange(64)]
            case 3:
                torn[at:at] = dice.choice(NASTY)
            case _:
                torn[at:at] = dice.randbytes(dice.randrange(16))
    return bytes(torn)


#: What parsers, databases and regular expressions have stumbled over.
NASTY = (
    *(
        b"\0",
        b"\\u0000",
        b"\\ud800",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"NaN",
        b"-Infinity",
        b"1e999999",
        b"\r\n\r\n",
    ),
    *(
        b"9" * 400,
        b"[" * 2000,
        b'{"a":' * 500,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\x7f\xff\xff\xff",
        b"\x1f\x8b\x08",
    ),
    b"\x28\xb5\x2f\xfd\x84\xff\xff\xff\xff",
)


def test_bytes_that_are_no_http_harm_nobody_else(server: Server) -> None:
    dice = random.Random(SEED)
    at = ("127.0.0.1", httpx.URL(server.house.url).port or 0)
    whole = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        + server.house.tokens["user"].encode()
        + b"\r\nContent-Type: application/json\r\nContent-Length: 44\r\n\r\n"
        + b'{"tasks": {"t": {"kind": "classify", "model"'
    )
    for _ in range(RUBBISH):
        with socket.create_connection(at, timeout=10) as line:
            line.sendall(
                dice.randbytes(dice.randrange(1, 200)) if dice.random() < 0.3 else twisted(whole, dice)
            )
            line.shutdown(socket.SHUT_WR)
            answer = b""
            # Some requests are whole by chance; all are answered or hung up on.
            while chunk := line.recv(65536):
                answer += chunk
        assert b"Traceback" not in answer
        assert not answer.startswith(b"HTTP/1.1 5"), answer[:500]
    server.is_unharmed()
