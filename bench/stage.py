"""What storage, memory and scale stand on: real servers and scheduler processes, models without files, made-up load.

No worker of motet runs here; who answers is a stand-in that speaks the real wire (bench/stand_in.py).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg
import redis
from harness import cpu_s, peak_rss_mb
from stand_in import ROW_S

from motet import datasets
from motet.demo.texts import choose
from motet.local.cluster import Cluster
from motet.local.valkey import Valkey, ValkeyUrls
from motet.protocol.manifest import Manifest
from motet.protocol.redis_url import redis_py_url
from motet.tasks import Classify, Task
from scheduler.store.database import Database
from scheduler.store.registry import add_model

HERE = Path(__file__).parent
_TRUNK = "b" * 64
#: Nobody loads it, so no file is named. Its size makes the first predictions those of a small encoder.
ENCODER = Manifest(
    name="bench-encoder",
    version="1",
    engine="encoder",
    answers="vector",
    trunk=_TRUNK,
    max_tokens=256,
    dim=384,
    pooling="mean",
    parameters=22_700_000,
)
LABELS = ("business", "entertainment", "politics", "sport", "tech")
#: Four heads on one encoder: their tasks fuse into one pass, as the demo's do.
HEADS = tuple(
    Manifest(
        name=f"bench-head-{i}",
        version="1",
        engine="encoder",
        answers="label",
        files={"head.safetensors": f"{i:064x}"},
        trunk=_TRUNK,
        trunk_model=ENCODER.ref,
        max_tokens=256,
        labels=LABELS,
    )
    for i in range(4)
)


def label_tasks(count: int) -> dict[str, Task]:
    """So many tasks, four at most, that each give a label and its score; one pass answers all."""
    return {f"label{i}": Classify(head.name) for i, head in enumerate(HEADS[:count])}


class Stage(Cluster):
    """Postgres, Valkey and the processes of the scheduler as `motet up` starts them, without its models and workers."""

    def __init__(self, data: Path, *, aggregates: bool = True) -> None:
        """``aggregates=False``: the benchmark itself steps an aggregator."""
        super().__init__(data, port=0)
        self._aggregates = aggregates

    def command(self, module: str, *arguments: str) -> list[str]:
        if module == "workers":
            return [sys.executable, "-c", "pass"]
        if arguments == ("aggregate",) and not self._aggregates:
            return ["sleep", "infinity"]
        return super().command(module, *arguments)

    @property
    def redis(self) -> ValkeyUrls:
        """Where each role reaches Valkey."""
        return next(w.service.urls for w in self._watched if isinstance(w.service, Valkey))

    @contextmanager
    def database(self) -> Iterator[Database]:
        """The scheduler's own way into Postgres."""
        database = Database(self.database_url.replace("postgresql", "postgresql+psycopg", 1), pool=2)
        try:
            yield database
        finally:
            database.close()

    def sql(self) -> psycopg.Connection[tuple[object, ...]]:
        """A connection of its own, for what a benchmark asks and for its bare COPY. Every statement commits."""
        return psycopg.connect(self.database_url, autocommit=True, options="-c statement_timeout=0")

    def register(self) -> None:
        """Put the models into the registry."""
        with self.database() as database, database.transaction() as connection:
            for model in (ENCODER, *HEADS):
                add_model(connection, model)


def mixed_texts(count: int) -> list[str]:
    """Texts as the demo's: a news article of about 2,300 bytes among nine sentences of about 100. No two are alike."""
    return list(_numbered([t.text for t in choose(2000)], count))


def short_texts(count: int) -> list[str]:
    """Sentences and tweets of about 100 bytes. No two are alike."""
    return list(stream_short_texts(count))


def stream_short_texts(count: int) -> Iterator[str]:
    """The same one by one: whoever reads them holds one."""
    sentences = [t.text for t in datasets.vader()]
    random.Random(datasets.SEED).shuffle(sentences)
    return _numbered(sentences, count)


def _numbered(texts: Sequence[str], count: int) -> Iterator[str]:
    """So many of them, over and over, each with words of its own: no column of one run is reused in another."""
    run = uuid.uuid4().hex[:6]
    return (f"{run} {i:x} {text}" for i, text in zip(range(count), cycle(texts), strict=False))


def size_of(texts: Sequence[str]) -> int:
    """UTF-8 bytes."""
    return sum(len(text.encode()) for text in texts)


# -- one job, end to end ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one job took, from its first row on the client's side to the last result read there."""

    rows: int
    cells: int
    submit_s: float
    #: Until the first row could be read.
    first_result_s: float
    #: From the landing of the first rows to the job's end, as Postgres has it.
    running_s: float
    total_s: float
    #: By process, the client and the stand-ins included.
    cpu_s: Mapping[str, float]
    peaks_mb: Mapping[str, float]
    pss_mb: Mapping[str, float]
    wal_bytes: int
    #: UTF-8 bytes of the rows, and growth of all tables with TOAST and indexes.
    text_bytes: int
    stored_bytes: int
    subtasks: int
    redis_peak_mb: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.total_s


def drive(stage: Stage, rows: int, *, workers: int = 2, tasks: int = 4, row_s: float = ROW_S) -> Run:
    """Run a job of short rows through this stage, with stand-ins for workers and a client in processes of their own.

    ``row_s``: device seconds that the stand-ins say a row took; the slower, the smaller the sub-tasks.
    """
    env = {**os.environ, "MOTET_REDIS_URL": stage.redis.worker}
    with ExitStack() as stack:
        stand_ins = subprocess.Popen(
            [sys.executable, str(HERE / "stand_in.py"), f"--workers={workers}", f"--row-s={row_s}"],
            env=env,
            start_new_session=True,
        )
        stack.callback(_end, stand_ins)
        pids = {**stage.pids, "stand-ins": stand_ins.pid}
        sql = stack.enter_context(stage.sql())
        before = {name: cpu_s([pid]) for name, pid in pids.items()}
        wal, stored = _one(sql, _WAL), table_bytes(sql)
        client = subprocess.run(
            [sys.executable, str(HERE / "client.py"), f"--rows={rows}", f"--tasks={tasks}"],
            env={**os.environ, "MOTET_URL": stage.url, "MOTET_TOKEN": stage.tokens["user"]},
            capture_output=True,
            text=True,
            check=False,
        )
        if client.returncode:
            raise SystemExit(f"the client failed:\n{client.stderr}")
        told = json.loads(client.stdout.splitlines()[-1])
        wal_bytes = int(_one(sql, _WAL) - wal)
        job = sql.execute(_JOB, (told["job"],)).fetchone()
        assert job is not None
        running_s, subtasks, text_bytes = job
        redis_line = redis.Redis.from_url(redis_py_url(stage.redis.scheduler))
        redis_peak_mb = redis_line.info("memory")["used_memory_peak"] / 2**20
        redis_line.close()
        cpu = {name: cpu_s([pid]) - before[name] for name, pid in pids.items()}
        return Run(
            rows=rows,
            cells=told["cells"],
            submit_s=told["submit_s"],
            first_result_s=told["first_result_s"],
            running_s=float(running_s),
            total_s=told["total_s"],
            cpu_s={**cpu, "client": told["cpu_s"]},
            peaks_mb={
                **{n: peak_rss_mb(p) for n, p in pids.items() if n != "postgres"},
                "client": told["peak_mb"],
            },
            pss_mb={**{n: pss_mb(p) for n, p in pids.items() if n != "postgres"}, "client": told["pss_mb"]},
            wal_bytes=wal_bytes,
            text_bytes=int(text_bytes),
            stored_bytes=table_bytes(sql) - stored,
            subtasks=int(subtasks),
            redis_peak_mb=redis_peak_mb,
        )


_WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'"
_JOB = """
    SELECT extract(epoch FROM finished - started), subtasks, (SELECT sum(bytes) FROM block WHERE job_id = job.id)
      FROM job WHERE id = %s"""


def table_bytes(sql: psycopg.Connection[Any]) -> int:
    """All tables of the database with their TOAST, indexes, free space and dead rows."""
    every = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    return int(_one(sql, every))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(10)


def pss_mb(pid: int) -> float:
    """Resident memory, with what several processes share counted in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def _one(sql: psycopg.Connection[Any], query: str, *values: object) -> Any:
    found = sql.execute(query, values).fetchone()
    assert found is not None
    return found[0]
