"""Seeded faults of open jobs, each with a play that kills it: see ``mutants.py``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from scheduler.blocks import EncodedBlock
from scheduler.store import feeds, landing, sealing
from scheduler.store.feeds import LandedAsk, NewAsk
from scheduler.store.landing import LoadingJob
from tests.machine.mutants import Mutant, Patch

# -- the seeds ---------------------------------------------------------------------------------------

_KNOWN_BEFORE = """
    SELECT a.key, a.digest, a.block_number AS block, a.lo, a.n_rows, b.first_row
      FROM job j LEFT JOIN ask a ON a.job_id = j.id AND a.key = ANY(:keys)
      LEFT JOIN block b ON b.job_id = a.job_id AND b.number = a.block_number WHERE j.id = :job"""
_KNOWN_NEVER = text(str(feeds._KNOWN) + " AND false")


def checks_keys_before_it_locks(patch: Patch) -> None:
    _look_first(patch, _KNOWN_BEFORE)


def checks_keys_in_the_statement_that_locks(patch: Patch) -> None:
    _look_first(patch, f"{_KNOWN_BEFORE} FOR NO KEY UPDATE OF j")


def _look_first(patch: Patch, statement: str) -> None:
    """Look for the keys in this statement, and not behind the lock."""
    land = feeds.land_asks

    def hasty(
        connection: Connection, job: LoadingJob, block: EncodedBlock, asks: Sequence[NewAsk]
    ) -> tuple[list[LandedAsk], bool]:
        rows = connection.execute(text(statement), {"job": job.id, "keys": [a.key for a in asks]}).all()
        known = [row._mapping for row in rows if row.key is not None]
        if known:
            return [LandedAsk(**row) for row in known], False
        return land(connection, job, block, asks)

    patch.setattr(feeds, "land_asks", hasty)
    patch.setattr(feeds, "_KNOWN", _KNOWN_NEVER)


def forgets_keys(patch: Patch) -> None:
    """It lands what is there, and the table of keys keeps the first."""
    rows = "k (key, digest, lo, n_rows)"
    stored = str(feeds._STORE).replace(f"{rows})", f"{rows} ON CONFLICT DO NOTHING)")
    patch.setattr(feeds, "_STORE", text(stored))
    patch.setattr(feeds, "_KNOWN", _KNOWN_NEVER)


def numbers_rows_outside_the_lock(patch: Patch) -> None:
    before = "(SELECT n_rows FROM job WHERE id = :job) before"
    lock = f"""
        SELECT job.state, before.n_rows, job.n_blocks, job.blocks_done FROM job, {before}
         WHERE id = :job AND tenant_id = :tenant FOR NO KEY UPDATE OF job"""
    patch.setattr(feeds, "_LOCK", text(lock))


def lands_in_one_statement_without_a_lock(patch: Patch) -> None:
    patch.setattr(feeds, "_LOCK", text(str(feeds._LOCK).replace("FOR NO KEY UPDATE", "")))


def answers_before_all_is_sealed(patch: Patch) -> None:
    patch.setattr(feeds, "_LOOK", feeds._LOOK.replace("AND b.passes_open = 0", ""))


def answers_with_the_rows_of_another(patch: Patch) -> None:
    """It forgets where in the block an ask begins, once it has landed before."""
    patch.setattr(feeds, "_KNOWN", text(str(feeds._KNOWN).replace("a.lo,", "0 AS lo,")))


def lets_an_open_job_succeed(patch: Patch) -> None:
    succeed = sealing.succeed
    runs = text(
        "UPDATE job SET state = 'running', closed = now() WHERE id = ANY(:jobs) AND state = 'open' AND blocks_done = n_blocks"
    )

    def early(connection: Connection, jobs: Collection[UUID]) -> None:
        connection.execute(runs, {"jobs": sorted(jobs)})
        succeed(connection, jobs)

    patch.setattr(sealing, "succeed", early)


def closes_and_forgets_to_succeed(patch: Patch) -> None:
    patch.setattr(landing, "succeed", lambda connection, jobs: None)


def lands_in_a_job_that_is_closed(patch: Patch) -> None:
    patch.setattr(feeds, "_LOCK", text(str(feeds._LOCK).replace("SELECT state,", "SELECT 'open' AS state,")))


def forgets_to_count_what_lands(patch: Patch) -> None:
    stored = str(feeds._STORE).replace("rows_waiting + k.n_rows,", "rows_waiting,")
    patch.setattr(feeds, "_STORE", text(stored))


def loses_the_errors_of_rows_that_came_broken(patch: Patch) -> None:
    patch.setattr(
        feeds, "_STORE", text(str(feeds._STORE).replace("cells_error + :errors", "cells_error + 0 * :errors"))
    )


# -- the plays ---------------------------------------------------------------------------------------

_OPEN = ("open", (0,))
_ASK = ("ask", (0, 0, 1, 20))
#: Two processes with the same key at once; with a key each.
_SAME_KEY, _OTHER_KEYS = ("race", (0, 0, 0)), ("race", (0, 0, 1))
_ROUND = ("round", (7,))

OPEN_MUTANTS: Collection[Mutant] = (
    Mutant("checks keys before it locks", checks_keys_before_it_locks, (_OPEN, _SAME_KEY), 13),
    Mutant(
        "checks keys in the statement that locks",
        checks_keys_in_the_statement_that_locks,
        (_OPEN, _SAME_KEY),
        13,
    ),
    Mutant("forgets keys", forgets_keys, (_OPEN, _ASK, ("ask_again", (0, 0, 0))), 13),
    Mutant("numbers rows outside the lock", numbers_rows_outside_the_lock, (_OPEN, _OTHER_KEYS), 14),
    Mutant("lands without a lock", lands_in_one_statement_without_a_lock, (_OPEN, _OTHER_KEYS), 13),
    Mutant(
        "answers before all is sealed",
        answers_before_all_is_sealed,
        (("open", (4,)), _ASK, _ROUND),
        15,
    ),
    Mutant(
        "answers with the rows of another",
        answers_with_the_rows_of_another,
        (_OPEN, _ASK, ("ask_again", (0, 0, 0))),
        13,
    ),
    Mutant("lets an open job succeed", lets_an_open_job_succeed, (_OPEN, _ASK, _ROUND), 16),
    Mutant(
        "closes and forgets to succeed",
        closes_and_forgets_to_succeed,
        (_OPEN, ("close", (0, 0, 7))),
        17,
    ),
    Mutant("lands in a job that is closed", lands_in_a_job_that_is_closed, (_OPEN, ("race", (0, 0, 3))), 13),
    Mutant("forgets to count what lands", forgets_to_count_what_lands, (_OPEN, _ASK), 5),
    Mutant(
        "loses the errors of rows that came broken",
        loses_the_errors_of_rows_that_came_broken,
        (_OPEN, ("ask", (0, 0, 0, 0))),
        2,
    ),
)
