"""What Postgres knows of how full the cluster is."""

from __future__ import annotations

from sqlalchemy import Connection, text

from motet.states import LIVE, State
from scheduler.store.schema import spelt

_UNFINISHED_ROWS = text(f"""
    SELECT CAST(coalesce(sum(n) FILTER (WHERE state IN {spelt([State.OPEN, State.RUNNING])}), 0) AS bigint) AS running,
           CAST(coalesce(sum(n) FILTER (WHERE state = '{State.LOADING}'), 0) AS bigint) AS loading
      FROM (SELECT state, n_rows - (cells_ok + cells_error + cells_skipped) / n_tasks AS n FROM job
             WHERE state IN {spelt(LIVE)}) unfinished""")
# Only over a unix socket is its disk one of this machine's, and only some roles may know where it is.
_DATA_FOLDER = text("""
    SELECT CASE WHEN inet_server_addr() IS NULL AND pg_has_role(current_user, 'pg_read_all_settings', 'USAGE')
                THEN current_setting('data_directory') END""")


def unfinished_rows(connection: Connection) -> tuple[int, int]:
    """Rows without all their answers, of all tenants: of jobs that run, and of jobs that are loading."""
    running, loading = connection.execute(_UNFINISHED_ROWS).one()
    return int(running), int(loading)


def data_folder(connection: Connection) -> str | None:
    """Where Postgres keeps its files on this machine; None where it is another, or may not be known."""
    folder: str | None = connection.execute(_DATA_FOLDER).scalar_one()
    return folder
