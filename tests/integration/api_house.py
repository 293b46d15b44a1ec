"""A running API over a real Postgres, with a registry of small models and a hand that answers blocks. For tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import msgpack
import pytest
from sqlalchemy import text

from motet.client import Client
from motet.protocol.columns import CellError, Column, Kind
from motet.protocol.envelope import zstd
from motet.protocol.manifest import Manifest, column_kind
from motet.protocol.settings import Settings
from motet.results import Block, read_frames, writes_text
from scheduler.api.app import server as api_server
from scheduler.api.auth import new_token
from scheduler.merge import errors_column
from scheduler.store import endings, registry, sealing
from scheduler.store.database import JOB, Database, notify
from scheduler.store.dependence import absents
from tests.serving import in_a_thread

TRUNK = "a" * 64
TINY = Manifest(
    name="tiny",
    version="1",
    engine="encoder",
    answers="vector",
    trunk=TRUNK,
    max_tokens=16,
    dim=2,
    pooling="mean",
)
TOPICS = Manifest(
    name="topics",
    version="1",
    engine="encoder",
    answers="label",
    files={"head.safetensors": "b" * 64},
    trunk=TRUNK,
    trunk_model="tiny@1",
    max_tokens=16,
    labels=("business", "sport"),
)
TONES = Manifest(
    name="tones",
    version="1",
    engine="encoder",
    answers="labels",
    files={"head.safetensors": "c" * 64},
    trunk=TRUNK,
    trunk_model="tiny@1",
    max_tokens=16,
    labels=("glad", "sad"),
    thresholds=(0.5, 0.5),
)
DICE = Manifest(
    name="dice",
    version="1",
    engine="dice",
    answers="json",
    deterministic=False,
    source={"function": "dice:roll"},
)
MODELS = (TINY, TOPICS, TONES, DICE)
#: A head for a number and one for spans; whoever asks them registers them.
STARS = replace(TOPICS, name="stars", answers="number", labels=())
NAMES = replace(TOPICS, name="names", answers="spans", labels=("PER", "ORG"))
#: A cross-encoder; whoever asks it registers it.
RANKER = replace(TINY, name="ranker", engine="classifier", answers="ranking", trunk="", dim=0, pooling="")
#: A language model; whoever asks it registers it.
SPEAKER = Manifest(
    name="speaker",
    version="1",
    engine="causal",
    answers="text",
    files={"model.safetensors": "d" * 64},
    max_tokens=2048,
    parameters=1_000_000,
)

CLASSIFY = {"topic": {"kind": "classify", "model": "topics"}}
TWO = {**CLASSIFY, "vector": {"kind": "embed", "model": "tiny"}}


@dataclass
class House:
    """One API with its database. ``call`` speaks as the user of the first tenant unless told otherwise."""

    url: str
    settings: Settings
    database: Database
    line: httpx.Client
    tokens: dict[str, str] = field(default_factory=dict)
    tenants: dict[str, UUID] = field(default_factory=dict)

    def call(self, method: str, path: str, *, token: str | None = "user", **more: Any) -> httpx.Response:
        headers = dict(more.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {self.tokens.get(token, token)}"
        return self.line.request(method, self.url + path, headers=headers, **more)

    def open(
        self, tasks: Mapping[str, Any] = CLASSIFY, *, key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """The record of a job that waits for its parts, or that ran off with its rows."""
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.call("POST", "/v1/jobs", json={"tasks": tasks, **options}, headers=headers)
        assert answer.status_code in (201, 202), answer.text
        return answer.json()

    def put(
        self, job: str, number: int, texts: Sequence[Any], *, first_row: int | None = None, **more: Any
    ) -> httpx.Response:
        """One part of msgpack columns, of the field ``text``."""
        body: dict[str, Any] = {"columns": {"text": list(texts)}, **more}
        if first_row is not None:
            body["first_row"] = first_row
        return self.put_raw(job, number, msgpack.packb(body, unicode_errors="surrogatepass"))

    def put_raw(
        self, job: str, number: int, raw: bytes, kind: str = "application/msgpack", coding: str | None = None
    ) -> httpx.Response:
        headers = {"Content-Type": kind, **({"Content-Encoding": coding} if coding else {})}
        return self.call("PUT", f"/v1/jobs/{job}/parts/{number}", content=raw, headers=headers)

    def close(self, job: str, parts: int, rows: int) -> httpx.Response:
        return self.call("POST", f"/v1/jobs/{job}/close", json={"parts": parts, "rows": rows})

    def submit(
        self, texts: Sequence[str], tasks: Mapping[str, Any] = CLASSIFY, **options: Any
    ) -> dict[str, Any]:
        """A running job, loaded in parts of 1,024 rows."""
        job = self.open(tasks, **options)["id"]
        starts = range(0, len(texts), 1024)
        for number, lo in enumerate(starts):
            answer = self.put(job, number, texts[lo : lo + 1024], first_row=lo)
            assert answer.status_code == 200, answer.text
        closed = self.close(job, len(starts), len(texts))
        assert closed.status_code == 202, closed.text
        return closed.json()

    def job(self, job: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/jobs/{job}").json()

    def results(self, job: str, **params: Any) -> tuple[list[Block], dict[str, Any]]:
        """The blocks of one answer, and its end."""
        answer = self.call("GET", f"/v1/jobs/{job}/results", params=params)
        assert answer.status_code == 200, answer.text
        *frames, end = read_frames(answer.content)
        tasks = self.job(job)["tasks"]
        return [Block.from_wire(frame, tasks) for frame in frames], dict(end)

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with self.database.transaction() as connection:
            result = connection.execute(text(statement), values)
            return list(result.all()) if result.returns_rows else []

    def answer(self, job: str, block: int, failing: Mapping[int, CellError] | None = None) -> None:
        """Seal every open pass of a block, as the aggregator does when the last of its rows came back."""
        with self.database.transaction() as connection:
            at = {"job": UUID(job), "block": block}
            one = connection.execute(
                text("SELECT * FROM block WHERE job_id = :job AND number = :block"), at
            ).one()
            tenant = connection.execute(text("SELECT tenant_id FROM job WHERE id = :job"), at).scalar_one()
            tasks = connection.execute(text(_TASKS), at).all()
            shapes = {
                shape.number: shape
                for number in {task.pass_number for task in tasks}
                for shape in sealing.task_shapes(connection, UUID(job), number)
            }
            bad = absents(one, {number: shape.reads for number, shape in shapes.items()})
            for task in tasks:
                absent = {i: CellError(*why) for i, why in bad[task.number].items()} | dict(failing or {})
                kind = column_kind(task.spec, Manifest.from_json(task.manifest).answers)
                column = answers_of(kind, one.n_rows, absent, task.spec, len(task.labels))
                key = one.keys[task.number] if task.number < len(one.keys) else None
                stored = sealing.store_column(connection, tenant, column, key)
                connection.execute(text(_SHOW), {**at, "task": task.number, "column": stored})
                ok, error, _, _ = column.counts()
                connection.execute(text(_COUNT), {**at, "ok": ok, "error": error - len(bad[task.number])})
            connection.execute(text(_SEAL), at)
            connection.execute(text(_FINISH), at)
            endings.succeed(connection, [UUID(job)])
            notify(connection, JOB, job)


_TASKS = """
    SELECT t.number, t.pass_number, t.kind, t.spec, t.labels, m.manifest FROM task t JOIN model m ON m.id = t.model_id
      JOIN block_pass p ON p.job_id = t.job_id AND p.pass_number = t.pass_number AND p.block_number = :block
     WHERE t.job_id = :job AND p.state = 'ready' AND (p.todo >> t.number) & 1 = 1 ORDER BY t.number"""
_SHOW = "INSERT INTO block_column VALUES (:job, :block, :task, :column)"
_COUNT = "UPDATE job SET cells_ok = cells_ok + :ok, cells_error = cells_error + :error, version = version + 1 WHERE id = :job"
_SEAL = """
    UPDATE block_pass SET state = 'sealed', cursor = n, done = n WHERE job_id = :job AND block_number = :block"""
_FINISH = """
    WITH j AS (UPDATE job SET blocks_done = blocks_done + 1 WHERE id = :job RETURNING blocks_done)
    UPDATE block SET done_number = j.blocks_done, passes_open = 0 FROM j WHERE job_id = :job AND number = :block"""


def answers_of(
    kind: Kind,
    n: int,
    absent: Mapping[int, CellError],
    spec: Mapping[str, Any] | None = None,
    n_labels: int = 2,
) -> Column:
    """A column that can be told by heart: label i % 2, score i / n; tones glad, both or none; vector (i, 0.5); number i.

    Where no row has an answer, a vector has no length, as with real engines.
    """
    spec = spec or {}
    status = bytes(1 if i in absent else 0 for i in range(n))
    every = {"all": struct.pack(f"<{n * n_labels}f", *[0.5] * (n * n_labels))} if spec.get("scores") else {}
    match kind:
        case "label":
            arrays = {
                "codes": struct.pack(f"<{n}h", *(i % 2 for i in range(n))),
                "scores": struct.pack(f"<{n}f", *(i / n for i in range(n))),
                **every,
            }
        case "labels":
            given = [[], [0], [0, 1]]
            ends, codes = _laid(n, absent, lambda i: given[i % 3])
            arrays = {
                "offsets": ends,
                "codes": struct.pack(f"<{len(codes)}h", *codes),
                "scores": struct.pack(f"<{len(codes)}f", *(0.75 for _ in codes)),
                **every,
            }
        case "number":
            arrays = {"numbers": struct.pack(f"<{n}d", *range(n))}
        case "vector":
            if len(absent) == n:
                return errors_column(kind, [absent[i] for i in range(n)])
            dtype = spec.get("dtype", "fp32")
            one = "<2f" if dtype == "fp32" else "<2e"
            return Column(
                kind=kind,
                status=status,
                arrays={"vectors": b"".join(struct.pack(one, i, 0.5) for i in range(n))},
                errors=absent,
                dim=2,
                dtype=dtype,
            )
        case "spans":
            ends, codes = _laid(n, absent, lambda i: [i % 2])
            k = len(codes)
            arrays = {
                "offsets": ends,
                "starts": struct.pack(f"<{k}i", *[0] * k),
                "ends": struct.pack(f"<{k}i", *[1] * k),
                "codes": struct.pack(f"<{k}h", *codes),
                "scores": struct.pack(f"<{k}f", *[0.5] * k),
            }
        case "json":
            ends, written = _laid(n, absent, lambda i: json.dumps(_value(spec, i)).encode())
            arrays = {"offsets": ends, "bytes": bytes(written)}
    return Column(kind=kind, status=status, arrays=arrays, errors=absent)


def _laid(
    n: int, absent: Mapping[int, CellError], of: Callable[[int], Sequence[int]]
) -> tuple[bytes, list[int]]:
    """The offsets of values of various lengths, none where a row is absent, and the values end to end."""
    laid = [[] if i in absent else list(of(i)) for i in range(n)]
    ends = [0, *accumulate(len(one) for one in laid)]
    return struct.pack(f"<{n + 1}i", *ends), [x for one in laid for x in one]


def _value(spec: Mapping[str, Any], row: int) -> Any:
    if spec.get("kind") == "rank":
        return [{"index": 1, "score": 0.75}, {"index": 0, "score": 0.25}]
    # Rows with options of their own count what they consumed.
    counted = {"usage": [7, 2, 3]} if spec.get("options") else {}
    return {"text": f"row {row}", "finish": "stop", **counted} if writes_text(spec) else {"row": row}


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """A real uvicorn with this API in a thread; its URL."""
    server = api_server(settings)

    def send_home() -> None:
        server.use.bell.stopping = True

    with in_a_thread(server, send_home) as url:
        yield url


@contextmanager
def a_house(database_url: str, folder: Path, **settings: Any) -> Iterator[House]:
    """A house with two tenants, a token of each scope, and MODELS registered."""
    chosen = Settings(database_url=database_url, blob_dir=str(folder / "blobs"), api_port=0, **settings)
    database = Database(database_url, pool=2)
    # No certificates to read: it speaks plain HTTP to this machine, and reading them takes longer than most tests.
    with running(chosen) as url, httpx.Client(timeout=60, trust_env=False, verify=False) as line:
        house = House(url, chosen, database, line)
        furnish(house)
        yield house
    database.close()


def furnish(house: House) -> None:
    """Two tenants, a token of each scope, and MODELS."""
    with house.database.transaction() as connection:
        for tenant, names in (("default", ("user", "read", "admin", "worker")), ("other", ("stranger",))):
            house.tenants[tenant] = registry.tenant_named(connection, tenant)
            for name in names:
                token = new_token()
                house.tokens[name] = token.shown
                registry.add_token(
                    connection,
                    token_id=token.id,
                    tenant=house.tenants[tenant],
                    name=name,
                    scope="user" if name == "stranger" else name,
                    secret_sha256=token.digest,
                )
        for model in MODELS:
            registry.add_model(connection, model)


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path) as house:
        yield house


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    """The first tenant's user."""
    with Client(house.url, house.tokens["user"], timeout=20) as client:
        yield client


def problems(answer: httpx.Response, status: int = 422) -> list[dict[str, Any]]:
    """The problems of a refusal."""
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["problems"]


def squeezed(raw: bytes) -> bytes:
    return zstd.compress(raw, 1)
