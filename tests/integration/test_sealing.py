"""Sealed columns in a real Postgres: what SQL reads of them, and whose reuse key it is."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from motet.protocol.columns import CellError, Column
from motet.protocol.transport import Entry
from scheduler.aggregator import batches
from scheduler.merge import errors_column
from scheduler.store.database import Database
from scheduler.store.registry import tenant_named
from scheduler.store.sealing import Keyed, store_column, store_columns

KEY, OTHER = b"k" * 32, b"a" * 32


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, pool=2)
    yield database
    database.close()


def labels(*codes: int) -> Column:
    n = len(codes)
    return Column(
        kind="label",
        status=bytes(n),
        arrays={"codes": struct.pack(f"<{n}h", *codes), "scores": struct.pack(f"<{n}f", *[0.5] * n)},
    )


def keys(database: Database) -> dict[int, bytes | None]:
    with database.transaction() as connection:
        found = connection.execute(text("SELECT id, key FROM sealed_column"))
        return {row.id: None if row.key is None else bytes(row.key) for row in found}


def somebody_waits(database: Database) -> bool:
    """Asked in a transaction of its own: within one, Postgres goes on telling what it saw first."""
    with database.transaction() as connection:
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return bool(connection.execute(text(waits)).scalar_one())


def test_sql_reads_the_arrays_as_plain_arrays_from_one(database: Database) -> None:
    spans = Column(
        kind="spans",
        status=b"\0\0",
        arrays={
            "offsets": struct.pack("<3i", 0, 1, 1),
            "starts": struct.pack("<1i", 2**31 - 1),
            "ends": struct.pack("<1i", -(2**31)),
            "codes": struct.pack("<1h", -(2**15)),
            "scores": struct.pack("<1f", 1e-45),
        },
    )
    number = Column(kind="number", status=b"\0", arrays={"numbers": struct.pack("<1d", 5e-324)})
    nothing = Column(kind="labels", status=b"\0", arrays={"offsets": bytes(8), "codes": b"", "scores": b""})
    with database.transaction() as connection:
        tenant = tenant_named(connection, "default")
        ids = store_columns(connection, [Keyed(tenant, c, None) for c in (spans, number, nothing)])
        query = (
            "SELECT id, offsets, starts, ends, codes, scores, numbers, codes[1] AS first FROM sealed_column"
        )
        rows = {row.id: row[1:] for row in connection.execute(text(query))}
    of_spans, of_number, of_nothing = (rows[i] for i in ids)
    assert of_spans[:4] == ([0, 1, 1], [2**31 - 1], [-(2**31)], [-(2**15)])
    assert of_spans[4][0] == pytest.approx(1e-45, rel=0.5)
    assert (of_spans[5], of_spans[6]) == (None, -(2**15))
    assert of_number[5] == [5e-324]
    assert (of_nothing[0], of_nothing[3], of_nothing[6]) == ([0, 0], None, None)


def test_a_key_belongs_to_the_first_column_of_a_tenant(database: Database) -> None:
    with database.transaction() as connection:
        ours, theirs = tenant_named(connection, "ours"), tenant_named(connection, "theirs")
        before = store_column(connection, ours, labels(1), OTHER)
        together = store_columns(
            connection,
            [
                Keyed(ours, labels(0), KEY),
                Keyed(ours, labels(1), KEY),
                Keyed(ours, labels(2), OTHER),
                Keyed(theirs, labels(3), KEY),
            ],
        )
        codes = connection.execute(text("SELECT id, codes[1] AS code FROM sealed_column"))
        answers = {row.id: row.code for row in codes}
    assert [answers[i] for i in together] == [0, 1, 2, 3]
    assert keys(database) == dict(zip([before, *together], [OTHER, KEY, None, None, KEY], strict=True))


def test_an_error_that_may_pass_is_not_offered_for_reuse(database: Database) -> None:
    with database.transaction() as connection:
        tenant = tenant_named(connection, "default")
        lasting = store_column(connection, tenant, errors_column("label", [CellError("bad_row", "")]), KEY)
        passing = store_column(connection, tenant, errors_column("label", [CellError("engine", "")]), OTHER)
    assert keys(database) == {lasting: KEY, passing: None}


def test_of_two_transactions_that_seal_the_same_work_one_has_the_key(database: Database) -> None:
    stored: list[int] = []

    def second() -> None:
        with database.transaction() as connection:
            stored.extend(
                store_columns(connection, [Keyed(tenant, labels(1), KEY), Keyed(tenant, labels(2, 2), OTHER)])
            )

    with database.transaction() as connection:
        tenant = tenant_named(connection, "default")
    with database.transaction() as connection:
        first = store_column(connection, tenant, labels(0), KEY)
        thread = threading.Thread(target=second)
        thread.start()
        # It has looked for the key, found none, and waits for us to commit or not.
        while not somebody_waits(database):
            assert thread.is_alive(), "the second did not wait"
    thread.join()
    assert keys(database) == {first: KEY, stored[0]: None, stored[1]: OTHER}


def test_outcomes_are_taken_together_as_far_as_their_bytes_go() -> None:
    entries = [Entry(str(i), bytes(size)) for i, size in enumerate((4, 4, 4, 11, 1, 9, 1))]
    sizes = [[len(e.body) for e in batch] for batch in batches(entries, most_bytes=10)]
    assert sizes == [[4, 4], [4], [11], [1, 9], [1]]
    assert list(batches([])) == []
