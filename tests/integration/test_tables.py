"""The schema stands once: a migrated database is what scheduler/store/tables says, down to comments and indexes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, make_url, text

from scheduler.store import tables  # noqa: F401 - for it fills what follows
from scheduler.store.schema import metadata

#: Everything of a table that the catalog knows and Alembic does not compare.
CATALOG = {
    "comments": """
        SELECT c.relname || coalesce('.' || a.attname, ''), d.description FROM pg_description d
          JOIN pg_class c ON c.oid = d.objoid AND d.classoid = 'pg_class'::regclass
          LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.objsubid AND d.objsubid > 0
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'""",
    "columns": """
        SELECT c.relname || '.' || a.attname, concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                                                            pg_get_expr(d.adbin, d.adrelid))
          FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'alembic_version'""",
    "constraints": """
        SELECT conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid) FROM pg_constraint
         WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
           AND conrelid::regclass::text <> 'alembic_version'""",
    "indexes": """
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'""",
    "options": """
        SELECT relname, reloptions::text FROM pg_class WHERE relnamespace = 'public'::regnamespace
           AND relkind = 'r' AND reloptions IS NOT NULL""",
}


@pytest.fixture
def migrated_one(database_url: str) -> Iterator[Connection]:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def declared_one(postgres_url: str, migrated: psycopg.Connection) -> Iterator[Connection]:
    """A database that was made from the tables alone."""
    migrated.execute("CREATE DATABASE declared")
    engine = create_engine(make_url(postgres_url).set(database="declared"))
    with engine.connect() as connection:
        metadata.create_all(connection)
        yield connection
    engine.dispose()
    migrated.execute("DROP DATABASE declared")


def look(connection: Connection, question: str) -> dict[str, str]:
    return {name: re.sub(r"\s+", " ", found) for name, found in connection.execute(text(question)).all()}


def test_alembic_finds_nothing_to_migrate(migrated_one: Connection) -> None:
    context = MigrationContext.configure(migrated_one, opts={"compare_type": True})
    assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("what", CATALOG)
def test_the_migrated_database_is_the_declared_one(
    what: str, migrated_one: Connection, declared_one: Connection
) -> None:
    ours, theirs = (look(connection, CATALOG[what]) for connection in (declared_one, migrated_one))
    assert theirs
    assert ours == theirs


def test_large_values_that_are_compressed_already_are_stored_as_they_are(migrated_one: Connection) -> None:
    stored = migrated_one.execute(
        text("""
        SELECT c.relname, a.attname FROM pg_class c
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND a.attstorage = 'e'
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'""")
    )
    said = {(t.name, c.name) for t in metadata.tables.values() for c in t.c if c.info.get("external")}
    assert {(table, column) for table, column in stored} == said
