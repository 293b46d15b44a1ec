"""Seeded faults of uploads that are run while they go on, each with a play that kills it: see ``mutants.py``."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import text

from motet.states import State
from scheduler.store import landing, outcomes
from tests.machine.mutants import Mutant, Patch
from tests.machine.open_mutants import lets_succeed

# -- the seeds ---------------------------------------------------------------------------------------


def closes_and_forgets_what_was_counted_early(patch: Patch) -> None:
    patch.setattr(
        landing, "_CLOSE", text(str(landing._CLOSE).replace("SET state", "SET cells_ok = 0, state"))
    )


def closes_and_forgets_to_succeed(patch: Patch) -> None:
    patch.setattr(landing, "succeed", lambda connection, jobs: None)


def forgets_cells_of_rows_that_an_earlier_part_had_too(patch: Patch) -> None:
    patch.setattr(landing, "_GROW", text(str(landing._GROW).replace("cells_ok + :ok", "cells_ok + 0 * :ok")))


def forgets_that_a_block_was_done_as_it_landed(patch: Patch) -> None:
    patch.setattr(
        landing, "_GROW", text(str(landing._GROW).replace("blocks_done + :done", "blocks_done + 0 * :done"))
    )


def drops_what_was_answered_early(patch: Patch) -> None:
    patch.setattr(outcomes, "_LIVE", text(str(outcomes._LIVE).replace("'loading', ", "")))


def forgets_to_count_what_lands(patch: Patch) -> None:
    patch.setattr(landing, "more_waits", lambda connection, waits: None)


# -- the plays ---------------------------------------------------------------------------------------

#: Three rows in two blocks, of one task; and as many more, or the same again.
_UPLOAD = ("upload", (2, 0, 0, 12))
_PART, _SAME = ("part", (0, 0, 2, 12, 1, 7)), ("part", (0, 0, 2, 12, 0, 7))
_ROUND = ("round", (7,))
_CLOSE = ("close_late", (0, 0, 7))

UPLOAD_MUTANTS: Collection[Mutant] = (
    Mutant("lets an upload succeed", lets_succeed(State.LOADING), (_UPLOAD, _ROUND, _ROUND), 18),
    Mutant(
        "closes and forgets what was counted early",
        closes_and_forgets_what_was_counted_early,
        (_UPLOAD, _ROUND, _ROUND, _PART, _CLOSE),
        2,
    ),
    Mutant(
        "closes an upload and forgets to succeed",
        closes_and_forgets_to_succeed,
        (_UPLOAD, _ROUND, _ROUND, _CLOSE),
        17,
    ),
    Mutant(
        "forgets cells of rows that an earlier part had too",
        forgets_cells_of_rows_that_an_earlier_part_had_too,
        (_UPLOAD, _ROUND, _ROUND, _SAME),
        2,
    ),
    Mutant(
        "forgets that a block was done as it landed",
        forgets_that_a_block_was_done_as_it_landed,
        (_UPLOAD, _ROUND, _ROUND, _SAME, _CLOSE),
        7,
    ),
    Mutant("drops what was answered early", drops_what_was_answered_early, (_UPLOAD, _ROUND, _ROUND), 5),
    Mutant("forgets to count what a part brings", forgets_to_count_what_lands, (_UPLOAD,), 5),
)
