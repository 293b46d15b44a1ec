"""One database with a clock of its own for all plays of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import make_url

from tests.machine.stage import Stage


@pytest.fixture(scope="session")
def stage(postgres_url: str, migrated: psycopg.Connection) -> Iterator[Stage]:
    migrated.execute("CREATE DATABASE machine TEMPLATE migrated")
    made = Stage(make_url(postgres_url).set(database="machine").render_as_string(hide_password=False))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of rescues and of broken connections are nothing to tell of here."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
