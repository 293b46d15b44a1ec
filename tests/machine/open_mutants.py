"""Seeded faults of open jobs, each with a play that kills it: see ``mutants.py``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, text

from motet.states import Skip, State
from scheduler.blocks import IncomingPart
from scheduler.store import dropping, endings, feeds, folds, keeping, landing, outcomes, sealing
from scheduler.store.database import Database
from scheduler.store.feeds import LandedAsk, NewAsk
from scheduler.store.folds import Folding
from scheduler.store.landing import LoadingJob
from scheduler.store.leadership import fence
from scheduler.store.sealing import BlockAnswers
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
        connection: Connection, job: LoadingJob, part: IncomingPart, asks: Sequence[NewAsk], **more: Any
    ) -> tuple[list[LandedAsk], bool]:
        rows = connection.execute(text(statement), {"job": job.id, "keys": [a.key for a in asks]}).all()
        known = [row._mapping for row in rows if row.key is not None]
        if known:
            return [LandedAsk(**row) for row in known], False
        return land(connection, job, part, asks, **more)

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
        SELECT job.state, before.n_rows, job.n_blocks, job.blocks_done, NULL AS row_quota FROM job, {before}
         WHERE id = :job AND tenant_id = :tenant FOR NO KEY UPDATE OF job"""
    patch.setattr(feeds, "_LOCK", text(lock))


def lands_in_one_statement_without_a_lock(patch: Patch) -> None:
    patch.setattr(feeds, "_LOCK", text(str(feeds._LOCK).replace("FOR NO KEY UPDATE OF j", "")))


def answers_before_all_is_sealed(patch: Patch) -> None:
    patch.setattr(feeds, "_LOOK", feeds._LOOK.replace("AND b.passes_open = 0", ""))


def answers_with_the_rows_of_another(patch: Patch) -> None:
    """It forgets where in the block an ask begins, once it has landed before."""
    patch.setattr(feeds, "_KNOWN", text(str(feeds._KNOWN).replace("a.lo,", "0 AS lo,")))


def lets_succeed(state: State) -> Callable[[Patch], None]:
    """Jobs in this state, whose rows may still grow, end once all that they have is answered."""
    runs = text(
        f"UPDATE job SET state = 'running', closed = now() WHERE id = ANY(:jobs) AND state = '{state}'"
        " AND blocks_done = n_blocks"
    )

    def lets_it(patch: Patch) -> None:
        append = sealing.append

        def early(connection: Connection, answers: Sequence[BlockAnswers], *rest: Any, **more: Any) -> int:
            sealed = append(connection, answers, *rest, **more)
            jobs = {answer.job for answer in answers}
            connection.execute(runs, {"jobs": sorted(jobs)})
            sealing.succeed(connection, jobs)
            return sealed

        patch.setattr(outcomes, "append", early)

    return lets_it


def closes_and_forgets_to_succeed(patch: Patch) -> None:
    patch.setattr(landing, "succeed", lambda connection, jobs: None)


def lands_in_a_job_that_is_closed(patch: Patch) -> None:
    patch.setattr(
        feeds, "_LOCK", text(str(feeds._LOCK).replace("SELECT j.state,", "SELECT 'open' AS state,"))
    )


def forgets_to_count_what_lands(patch: Patch) -> None:
    stored = str(feeds._STORE).replace("rows_waiting + k.n_rows,", "rows_waiting,")
    patch.setattr(feeds, "_STORE", text(stored))


def loses_the_errors_of_rows_that_came_broken(patch: Patch) -> None:
    patch.setattr(
        feeds, "_STORE", text(str(feeds._STORE).replace("cells_error + :errors", "cells_error + 0 * :errors"))
    )


def forgets_blocks_that_are_not_answered(patch: Patch) -> None:
    """It deletes by number alone whatever is old."""
    front = str(keeping._FRONT).replace("b.done_number,", "b.number + 1 AS done_number,")
    front = front.replace("b.done_at < :until AS due", "true AS due").replace("s.state = 'open'", "false")
    front = front.replace(
        "b.done_number > :past_done AND b.done_number <= :past_done + :limit",
        ":limit > 0 AND :past_done >= 0 AND :until IS NOT NULL",
    )
    patch.setattr(keeping, "_FRONT", text(front.replace("ORDER BY b.done_number", "ORDER BY b.number")))


def forgets_what_it_counted_when_a_job_ends(patch: Patch) -> None:
    patch.setattr(
        endings,
        "_END",
        text(
            str(endings._END)
            .replace("past_ok +", "")
            .replace("past_error +", "")
            .replace("- past_ok", "")
            .replace("- past_error", "")
        ),
    )


def forgets_to_count_what_it_deletes(patch: Patch) -> None:
    patch.setattr(keeping, "_MOVE", text(str(keeping._MOVE).replace("past_ok + :ok", "past_ok + 0 * :ok")))


def forgets_the_front_of_a_closed_job(patch: Patch) -> None:
    for name in ("_DUE", "_HOLD"):
        patch.setattr(keeping, name, text(str(getattr(keeping, name)).replace("= 'open'", "<> 'loading'")))


def forgets_to_say_where_rows_begin(patch: Patch) -> None:
    patch.setattr(
        keeping,
        "_MOVE",
        text(str(keeping._MOVE).replace("THEN :next_row ELSE", "THEN first_row + 0 * :next_row ELSE")),
    )


def folds_a_key_again(patch: Patch) -> None:
    land = feeds.land_asks

    def eager(
        connection: Connection, job: LoadingJob, part: IncomingPart, asks: Sequence[NewAsk], **more: Any
    ) -> tuple[list[LandedAsk], bool]:
        landed, stored = land(connection, job, part, asks, **more)
        if job.folds and not stored:
            _write(connection, job, folds.fold(connection, job, part))
        return landed, stored

    patch.setattr(feeds, "land_asks", eager)


def folds_outside_the_lock(patch: Patch) -> None:
    land, read = feeds.land_asks, folds.fold
    early: dict[int, Folding] = {}

    def hasty(
        connection: Connection, job: LoadingJob, part: IncomingPart, asks: Sequence[NewAsk], **more: Any
    ) -> tuple[list[LandedAsk], bool]:
        if job.folds:
            early[id(part)] = read(connection, job, part)
        return land(connection, job, part, asks, **more)

    patch.setattr(feeds, "land_asks", hasty)
    patch.setattr(folds, "fold", lambda connection, job, part: early[id(part)])


def commits_state_apart_from_its_rows(patch: Patch) -> None:
    read = folds.fold

    def apart(connection: Connection, job: LoadingJob, part: IncomingPart) -> Folding:
        folding = read(connection, job, part)
        with connection.engine.begin() as own:
            _write(own, job, folding)
        return folding

    patch.setattr(folds, "fold", apart)


def _write(connection: Connection, job: LoadingJob, folding: Folding) -> None:
    connection.execute(text(folds.WRITE), {"job": job.id, **folding.written})


def folds_rows_of_one_landing_side_by_side(patch: Patch) -> None:
    """Each row of it is given what was before the landing."""
    read = folds.fold

    def blind(connection: Connection, job: LoadingJob, part: IncomingPart) -> Folding:
        folding = read(connection, job, part)
        alone = [read(connection, job, _row(part, i)).part.columns for i in range(len(part))]
        columns = {name: [row[name][0] for row in alone] for name in folding.part.columns}
        return replace(folding, part=replace(folding.part, columns=columns))

    patch.setattr(folds, "fold", blind)


def _row(part: IncomingPart, i: int) -> IncomingPart:
    bad = {0: part.bad[i]} if i in part.bad else {}
    return IncomingPart(columns={name: [values[i]] for name, values in part.columns.items()}, bad=bad)


def forgets_state_when_it_sweeps(patch: Patch) -> None:
    patch.setattr(folds, "_OF_CLOSED", text("DELETE FROM fold WHERE :limit > 0"))


def expires_what_was_leased(patch: Patch) -> None:
    skip = dropping._skip
    patch.setattr(dropping, "_LATE", text(str(dropping._LATE).replace("AND p.cursor = 0", "")))
    patch.setattr(dropping, "_skip", lambda c, places, closed, why: skip(c, places, closed, Skip.LATE))

    def expire(database: Database, epoch: int, blocks: Collection[dropping.BlockKey]) -> None:
        with database.transaction() as connection:
            fence(connection, epoch)
            for job, number in blocks:
                dropping.abandon(connection, job, [number])

    patch.setattr(dropping, "expire", expire)


def abandons_and_lets_it_run(patch: Patch) -> None:
    """Then its outcome, which comes too late, finds an open sub-task."""
    patch.setattr(dropping, "_CLOSE", text("SELECT CAST(:ids AS bigint[])"))
    patch.setattr(dropping, "_DROP_LEASES", text("SELECT CAST(:ids AS bigint[])"))


def keeps_the_key_of_what_was_given_up(patch: Patch) -> None:
    patch.setattr(dropping, "_FORGET_ASKS", text(f"{dropping._FORGET_ASKS} AND false"))


def counts_nothing_that_is_given_up(patch: Patch) -> None:
    patch.setattr(dropping, "_COUNT", text(str(dropping._COUNT).replace("+ :n", "+ 0 * :n")))


def gives_up_rows_that_wait_and_counts_them_on(patch: Patch) -> None:
    patch.setattr(dropping, "more_waits", lambda connection, waits: None)


# -- the plays ---------------------------------------------------------------------------------------

_OPEN = ("open", (0,))
_ASK = ("ask", (0, 0, 1, 20))
#: Two processes with the same key at once; with a key each.
_SAME_KEY, _OTHER_KEYS = ("race", (0, 0, 0)), ("race", (0, 0, 1))
_ROUND = ("round", (7,))
#: A month later, two steps of a dispatcher.
_MONTH = (("forget_front", (0,)), ("tick", (0,)), ("tick", (0,)))
#: A job with state; asks of three rows and of one, by two keys.
_FOLDING, _ASKS = ("open", (2,)), ("ask", (0, 0, 5, 20))
_ASK_DROP, _EXPIRE, _ABANDON = ("ask_drop", (0, 0, 1)), ("expire", (0,)), ("abandon", (0, 0, 7))
_TICK = ("tick", (0,))

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
    Mutant("lets an open job succeed", lets_succeed(State.OPEN), (_OPEN, _ASK, _ROUND), 16),
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
    Mutant(
        "forgets blocks that are not answered",
        forgets_blocks_that_are_not_answered,
        (_OPEN, _ASK, _ROUND, _ROUND, ("ask", (0, 0, 0, 20)), *_MONTH),
        19,
    ),
    Mutant(
        "forgets what it counted when a job ends",
        forgets_what_it_counted_when_a_job_ends,
        (_OPEN, _ASK, _ROUND, _ROUND, *_MONTH, _ASK, _ROUND, _ROUND, ("cancel", (0,))),
        2,
    ),
    Mutant(
        "forgets to count what it deletes",
        forgets_to_count_what_it_deletes,
        (_OPEN, _ASK, _ROUND, _ROUND, *_MONTH),
        19,
    ),
    Mutant(
        "forgets the front of a closed job",
        forgets_the_front_of_a_closed_job,
        (_OPEN, _ASK, _ROUND, _ROUND, ("close", (0, 0, 7)), *_MONTH),
        19,
    ),
    Mutant(
        "forgets to say where rows begin",
        forgets_to_say_where_rows_begin,
        (_OPEN, _ASK, _ROUND, _ROUND, *_MONTH),
        19,
    ),
    Mutant("state folded twice", folds_a_key_again, (_FOLDING, _ASK, ("ask_again", (0, 0, 0))), 20),
    Mutant(
        "folds outside the lock",
        folds_outside_the_lock,
        (_FOLDING, ("race", (0, 0, 1)), ("race", (0, 0, 1))),
        20,
    ),
    Mutant(
        "commits state apart from its rows",
        commits_state_apart_from_its_rows,
        (_FOLDING, _ASK, ("land_crash", (0, 0, 0, 0))),
        20,
    ),
    Mutant(
        "folds rows of one landing side by side",
        folds_rows_of_one_landing_side_by_side,
        (_FOLDING, _ASKS),
        20,
    ),
    Mutant("forgets state when it sweeps", forgets_state_when_it_sweeps, (_FOLDING, _ASKS, _ROUND, _ASK), 20),
    Mutant("expires what was leased", expires_what_was_leased, (_OPEN, _ASK_DROP, _TICK, _EXPIRE), 21),
    Mutant("abandons and lets it run", abandons_and_lets_it_run, (_OPEN, _ASK_DROP, _TICK, _ABANDON), 5),
    Mutant(
        "keeps the key of what was given up",
        keeps_the_key_of_what_was_given_up,
        (_OPEN, _ASK_DROP, _ABANDON),
        22,
    ),
    Mutant(
        "counts nothing that is given up",
        counts_nothing_that_is_given_up,
        (("open", (4,)), _ASK_DROP, _ABANDON),
        2,
    ),
    Mutant(
        "gives up rows that wait and counts them on",
        gives_up_rows_that_wait_and_counts_them_on,
        (_OPEN, _ASK_DROP, _EXPIRE),
        5,
    ),
)
