"""Bring a database to the newest version of the data model (Alembic), or take it down again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text

import migrations

#: Any number will do: one migration at a time, whoever starts first.
_LOCK = 0x6D6F746574


def upgrade(database_url: str, revision: str = "head") -> None:
    """Upgrade to a revision. Two processes that start at once take turns."""
    _run(database_url, lambda config: command.upgrade(config, revision))


def downgrade(database_url: str, revision: str = "base") -> None:
    """Downgrade to a revision; ``base`` removes every table of motet."""
    _run(database_url, lambda config: command.downgrade(config, revision))


def _run(database_url: str, act: Callable[[Config], None]) -> None:
    engine = create_engine(database_url)
    try:
        with engine.connect() as connection:
            # A migration may rewrite a table: the limits that guard the running system do not hold here.
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("SET lock_timeout = 0"))
            connection.execute(text("SET idle_in_transaction_session_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
            connection.commit()
            act(_config(connection))
            connection.commit()
    finally:
        engine.dispose()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    return config
