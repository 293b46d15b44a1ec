"""What it costs to keep rows and answers safe, beside a bare COPY into the same Postgres.

Embedded Postgres on disk with its default durability (fsync, synchronous_commit, full_page_writes). Sides take
turns; ratios are medians of the rounds'. A CHECKPOINT precedes every timed side. Last line, JSON:

  rows_vs_copy          Input rows/s from a list of texts in this process, through `Client.submit`, HTTP and the API
                        process, into committed blocks of an accepted job, divided by a bare COPY of the same list
                        into one table: one connection, one transaction, COPY ... (FORMAT BINARY) with psycopg's own
                        write_row, (row bigint, text text), no index, no constraint. Texts as in the demo: one
                        news article (2,300 bytes) among nine sentences (100 bytes). The ratio for the sentences
                        alone is in the table.
  cells_vs_copy         Label cells/s from outcomes that wait on the stream in Redis, through the aggregator's step
                        (read, decode, fence, check, cells, merge, seal, commit, acknowledge) to the succeeded job,
                        divided by a bare COPY of the same cells: (job uuid, row bigint, task smallint, label
                        smallint, score real), binary, in buffers that numpy has laid out before the clock starts,
                        so that COPY pays for nothing but COPY. Sub-tasks are 1,500 rows: blocks are cut and merged.
  bytes_per_label_cell  Growth of all tables of the database, their TOAST, indexes, free space and dead rows included,
                        from "all rows are in" to "job succeeded", divided by label cells. So sub-tasks, leases,
                        unsealed cells and new versions of blocks count; blocks and texts do not. No VACUUM comes
                        before the figure; scores are random, which is the worst case for compression.
  bytes_per_asked_row   The same of a row of an open job, asks and rows and all that was said of them included, from
                        nothing to answered: groups of 6 short rows, each with a key of its own, and 4 tasks.
  front_ms_per_block    Milliseconds of one connection to delete such a group from the front of its job, committed:
                        64 of them in a transaction, of which nobody waits for the most part.

    python bench/storage.py            about two minutes
    python bench/storage.py --quick    the same sides on fewer rows, within 60 s
"""

from __future__ import annotations

import gc
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).parent))

from harness import cluster_folder, cpu_s, finish, in_turn, options, ratio, say, table
from stage import LABELS, Stage, label_tasks, mixed_texts, short_texts, size_of, table_bytes

from motet.client import Client
from motet.job import Job
from motet.protocol.columns import Column
from motet.protocol.settings import Settings
from motet.protocol.transport import RedisTransport, RedisWorkerTransport
from motet.protocol.wire import Outcome, Usage
from scheduler.aggregator import Aggregator
from scheduler.blocks import IncomingPart
from scheduler.policy.carve import carve
from scheduler.policy.cost import Price
from scheduler.store import demand, feeds, keeping, landing, leases
from scheduler.store.database import Database
from scheduler.store.endings import delete_job
from scheduler.store.feeds import NewAsk
from scheduler.store.landing import LoadingJob
from scheduler.store.leases import Cut, Leased

TASKS = 4
SUBTASK_ROWS = 1500
#: Rows of a group of an open job: about what 32 callers make.
GROUP_ROWS = 6
_LONG_AGO = text("""
    UPDATE block SET done_at = '-infinity' FROM job j
     WHERE j.id = :job AND block.job_id = j.id AND done_number > past_done AND done_number <= past_done + :n""")
WORKER = "bench-stand-in"
#: Sub-tasks are cut by rows alone, whatever their length.
A_SECOND_A_ROW = Price(start_s=0.0, per_row=1.0, per_byte=0.0, per_square=0.0)


@dataclass
class Cost:
    """What a side used, summed over its rounds, per what it stored."""

    things: int = 0
    client_s: float = 0.0
    api_s: float = 0.0
    postgres_s: float = 0.0
    wal_bytes: int = 0

    def row(self) -> list[str]:
        per = 1e6 / max(1, self.things)
        seconds = (self.client_s, self.api_s, self.postgres_s)
        return [f"{s * per:.2f}" for s in seconds] + [f"{self.wal_bytes / max(1, self.things):.1f}"]


@dataclass
class Bench:
    """One stage, and the sides that run on it."""

    stage: Stage
    client: Client
    sql: psycopg.Connection[Any]
    database: Database
    costs: dict[str, Cost] = field(default_factory=dict)

    # -- rows

    def submit(self, side: str, texts: Callable[[], Sequence[str]]) -> float:
        """Rows/s into an accepted job."""
        rows = texts()
        jobs: list[Job] = []
        rate = self._rate(side, len(rows), lambda: jobs.append(self.client.submit(rows, label_tasks(TASKS))))
        self._expect(len(rows), "SELECT n_rows FROM job WHERE id = %s AND state = 'running'", jobs[0].id)
        self._remove(jobs[0])
        return rate

    def copy_rows(self, side: str, texts: Callable[[], Sequence[str]]) -> float:
        """Rows/s into a bare table."""
        rows = texts()
        self.sql.execute("DROP TABLE IF EXISTS bare_row; CREATE TABLE bare_row (row bigint, text text)")

        def work() -> None:
            statement = "COPY bare_row (row, text) FROM STDIN (FORMAT BINARY)"
            with self.sql.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types(("int8", "text"))
                for row in enumerate(rows):
                    copy.write_row(row)

        rate = self._rate(side, len(rows), work)
        self._expect(len(rows), "SELECT count(*) FROM bare_row")
        self.sql.execute("DROP TABLE bare_row")
        return rate

    # -- an open job

    def keep(self, blocks: int) -> tuple[float, float]:
        """Bytes that a row of an open job takes, and milliseconds for which one block of them is deleted."""
        job = UUID(self.client.open(label_tasks(TASKS), name="kept").job.id)
        with self.database.transaction() as connection:
            tenant = connection.execute(
                text("SELECT tenant_id FROM job WHERE id = :job"), {"job": job}
            ).scalar_one()
            facts = landing.loading(connection, tenant, job)
        before = table_bytes(self.sql)
        rows = short_texts(blocks * GROUP_ROWS)
        for at in range(0, len(rows), GROUP_ROWS):
            self._land(facts, rows[at : at + GROUP_ROWS])
        self._answer(job, GROUP_ROWS)
        self._aggregate()
        self._expect(len(rows) * TASKS, "SELECT cells_ok FROM job WHERE id = %s", str(job))
        size = (table_bytes(self.sql) - before) / len(rows)
        self.sql.execute("VACUUM ANALYZE")
        took_s = 0.0
        for _ in range(blocks // keeping.FRONT_BLOCKS):
            with self.database.transaction() as connection:
                connection.execute(_LONG_AGO, {"job": job, "n": keeping.FRONT_BLOCKS})
                began = time.perf_counter()
                assert keeping.forget_front(connection, job).blocks == keeping.FRONT_BLOCKS
                connection.commit()
                took_s += time.perf_counter() - began
        forgotten = blocks // keeping.FRONT_BLOCKS * keeping.FRONT_BLOCKS
        self.client.feed(str(job)).job.delete()
        return size, 1000 * took_s / max(1, forgotten)

    def _land(self, facts: LoadingJob, rows: Sequence[str]) -> None:
        part = IncomingPart(columns={"text": list(rows)})
        asks = [NewAsk(key=uuid.uuid4().bytes * 2, digest=bytes(32), n_rows=1) for _ in rows]
        with self.database.transaction() as connection:
            feeds.land_asks(connection, facts, part, asks)

    # -- cells

    def _aggregate(self) -> None:
        transport = RedisTransport(self.stage.redis.scheduler)
        aggregator = Aggregator(self.database, transport, Settings(reclaim_s=600))
        while aggregator.step(block_s=0.01):
            pass
        transport.close()

    def seal(self, side: str, rows: int, sizes: list[float] | None = None) -> float:
        """Sealed label cells/s; keeps the bytes that a cell took, where they are asked for."""
        job = self.client.submit(short_texts(rows), label_tasks(TASKS))
        before = table_bytes(self.sql)
        self._answer(UUID(job.id))
        transport = RedisTransport(self.stage.redis.scheduler)
        aggregator = Aggregator(self.database, transport, Settings(reclaim_s=600))

        def work() -> None:
            while aggregator.step(block_s=0.01):
                pass

        rate = self._rate(side, rows * TASKS, work)
        transport.close()
        self._expect(rows * TASKS, "SELECT cells_ok FROM job WHERE id = %s AND state = 'succeeded'", job.id)
        if sizes is not None:
            sizes.append((table_bytes(self.sql) - before) / (rows * TASKS))
        self._remove(job)
        return rate

    def _answer(self, job: UUID, subtask_rows: int = SUBTASK_ROWS) -> None:
        """Lease every row of the job and put its outcomes on the stream, as a worker does."""
        dice = np.random.default_rng(0)
        transport = RedisWorkerTransport(self.stage.redis.worker, WORKER)
        for leased in self._lease_all(job, subtask_rows):
            n = leased.carved.rows
            columns = {
                task: Column(
                    kind="label",
                    status=bytes(n),
                    arrays={
                        "codes": dice.integers(0, len(LABELS), n).astype("<i2").tobytes(),
                        "scores": dice.random(n).astype("<f4").tobytes(),
                    },
                )
                for task in label_tasks(TASKS)
            }
            outcome = Outcome(
                subtask=leased.subtask,
                attempt=leased.attempt,
                nonce=leased.nonce,
                worker=WORKER,
                boot="boot",
                verdict="done",
                columns=columns,
                usage=Usage(
                    tokens=25 * n, computed_tokens=26 * n, text_bytes=leased.carved.bytes, busy_s=n / 1e4
                ),
            )
            transport.report(leased.subtask, leased.attempt, outcome.encode())
        transport.close()

    def _lease_all(self, job: UUID, subtask_rows: int) -> Iterator[Leased]:
        """Every sub-task of the job, leased for an hour in the name of the dispatcher that leads."""
        [(epoch,)] = self.sql.execute("SELECT epoch FROM leader").fetchall()
        while True:
            with self.database.transaction() as connection:
                frontier = demand.frontier(
                    connection, str(job), 0, demand.Lengths(), rows=64 * SUBTASK_ROWS, limit=64
                )
            if frontier.empty:
                return
            cuts: list[Cut] = []
            while carved := carve(frontier, subtask_rows, A_SECOND_A_ROW):
                cuts.append(
                    Cut(
                        job=str(job),
                        pass_number=0,
                        worker=WORKER,
                        boot="boot",
                        device="stand-in",
                        device_kind="cpu",
                        predicted_s=1.0,
                        carved=carved,
                    )
                )
            yield from leases.lease(self.database, int(epoch), cuts, 3600.0)

    def copy_cells(self, side: str, rows: int) -> float:
        """Cells/s into a bare table."""
        self.sql.execute(
            "DROP TABLE IF EXISTS bare_cell;"
            "CREATE TABLE bare_cell (job uuid, row bigint, task smallint, label smallint, score real)"
        )
        buffers = _binary_cells(rows)

        def work() -> None:
            with (
                self.sql.cursor() as cursor,
                cursor.copy("COPY bare_cell FROM STDIN (FORMAT BINARY)") as copy,
            ):
                for buffer in buffers:
                    copy.write(buffer)

        rate = self._rate(side, rows * TASKS, work)
        self._expect(rows * TASKS, "SELECT count(*) FROM bare_cell")
        self.sql.execute("DROP TABLE bare_cell")
        return rate

    # -- measuring

    def _remove(self, job: Job) -> None:
        """Remove a job now: the sweeper would do it slice by slice, while the next side is timed."""
        job.cancel()
        with self.database.transaction() as connection:
            delete_job(connection, UUID(job.id))

    def _rate(self, side: str, things: int, work: Callable[[], object]) -> float:
        cost = self.costs.setdefault(side, Cost())
        self.sql.execute("CHECKPOINT")
        gc.collect()
        api, postgres = [self.stage.pids["api"]], self.stage.pids["postgres"]
        wal = "SELECT pg_current_wal_insert_lsn() - '0/0'"
        wal_before = self.sql.execute(wal).fetchone()
        began = (time.process_time(), cpu_s(api), cpu_s([postgres]))
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        wal_after = self.sql.execute(wal).fetchone()
        assert wal_before is not None
        assert wal_after is not None
        cost.things += things
        cost.client_s += time.process_time() - began[0]
        cost.api_s += cpu_s(api) - began[1]
        cost.postgres_s += cpu_s([postgres]) - began[2]
        cost.wal_bytes += int(wal_after[0] - wal_before[0])
        return things / seconds

    def _expect(self, count: int, query: str, *values: object) -> None:
        found = self.sql.execute(query, values).fetchone()
        assert found == (count,), f"stored {found}, not {count}"


def _binary_cells(rows: int) -> list[bytes]:
    """The cells of a job as Postgres' binary COPY has them: a length before each field, everything big-endian."""
    dice = np.random.default_rng(0)
    fields = [("job", "S16"), ("row", ">i8"), ("task", ">i2"), ("label", ">i2"), ("score", ">f4")]
    layout: list[tuple[str, str]] = [("fields", ">i2")]
    for name, kind in fields:
        layout += [(f"{name}_bytes", ">i4"), (name, kind)]
    n = rows * TASKS
    cells = np.zeros(n, layout)
    cells["fields"] = len(fields)
    for name, kind in fields:
        cells[f"{name}_bytes"] = np.dtype(kind).itemsize
    # No NUL at its end, which numpy would cut off.
    cells["job"] = uuid.uuid4().bytes[:15] + b"\1"
    cells["row"], cells["task"] = np.divmod(np.arange(n), TASKS)
    cells["label"] = dice.integers(0, len(LABELS), n)
    cells["score"] = dice.random(n)
    head = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    body, step = cells.tobytes(), 1 << 20
    return [head, *(body[i : i + step] for i in range(0, len(body), step)), b"\xff\xff"]


def main() -> None:
    arguments = options(__doc__).parse_args()
    mixed, short, cells, blocks, rounds = arguments.size.of(
        full=(200_000, 400_000, 250_000, 3_200, 7),
        quick=(60_000, 100_000, 100_000, 640, 3),
        smoke=(300, 300, 2_000, 64, 1),
    )
    say(f"storage: {mixed:,} mixed and {short:,} short rows, {cells * TASKS:,} cells, {rounds} rounds")
    sizes: list[float] = []
    with cluster_folder() as folder, Stage(folder, aggregates=False) as stage, stage.database() as database:
        stage.register()
        with Client(stage.url, stage.tokens["user"]) as client, stage.sql() as sql:
            bench = Bench(stage, client, sql, database)
            # The first sealing, on a database that has never deleted anything: no free space hides its growth.
            warm_up = bench.seal("warm-up", cells, sizes)
            say(f"  {sizes[0]:.2f} bytes per label cell ({warm_up:,.0f} cells/s)")
            bench.submit("warm-up", lambda: short_texts(5000))
            sides: dict[str, Callable[[], float]] = {
                "motet, mixed rows": lambda: bench.submit("motet, mixed rows", lambda: mixed_texts(mixed)),
                "COPY, mixed rows": lambda: bench.copy_rows("COPY, mixed rows", lambda: mixed_texts(mixed)),
                "motet, short rows": lambda: bench.submit("motet, short rows", lambda: short_texts(short)),
                "COPY, short rows": lambda: bench.copy_rows("COPY, short rows", lambda: short_texts(short)),
                "motet, cells": lambda: bench.seal("motet, cells", cells),
                "COPY, cells": lambda: bench.copy_cells("COPY, cells", cells),
            }
            row_bytes, front_ms = bench.keep(blocks)
            say(
                f"  {row_bytes:,.0f} bytes per asked row; {front_ms:.2f} ms to delete a group of {GROUP_ROWS}"
            )
            rates = in_turn(sides, rounds, lambda side, rate: say(f"  {side:<20}{rate:>14,.0f} /s"))
            costs = bench.costs
    table(
        "medians of the rounds; CPU seconds and WAL bytes per million and per one",
        ("side", "/s", "client CPU s/M", "API CPU s/M", "Postgres CPU s/M", "WAL B each"),
        [(side, f"{sorted(found)[rounds // 2]:,.0f}", *costs[side].row()) for side, found in rates.items()],
    )
    keys = {
        "bytes_per_label_cell": round(sizes[0], 2),
        "bytes_per_asked_row": round(row_bytes),
        "front_ms_per_block": round(front_ms, 3),
        "rows_vs_copy": round(ratio(rates, "motet, mixed rows", "COPY, mixed rows"), 3),
        "cells_vs_copy": round(ratio(rates, "motet, cells", "COPY, cells"), 3),
    }
    details = {
        "short_rows_vs_copy": round(ratio(rates, "motet, short rows", "COPY, short rows"), 3),
        "row_bytes": {
            "mixed": round(size_of(mixed_texts(2000)) / 2000),
            "short": round(size_of(short_texts(20_000)) / 20_000),
        },
        "rates": {side: [round(r) for r in found] for side, found in rates.items()},
        "cpu_s_per_million": {
            side: dict(zip(("client", "api", "postgres", "wal_bytes_each"), cost.row(), strict=True))
            for side, cost in costs.items()
        },
    }
    say(f"short rows: {details['short_rows_vs_copy']} of COPY")
    finish("storage", keys, arguments, details=details)


if __name__ == "__main__":
    main()
