"""The states of a job and the moves between them, declared once: for the client, the pages, the policy and the store.

Postgres holds the moves whatever statement makes them (trigger ``job_moves``), and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a job is in its life, in the order in which it goes through them."""

    #: Rows keep coming until it is closed.
    OPEN = "open"
    #: An upload is under way.
    LOADING = "loading"
    RUNNING = "running"
    #: Its rows wait, by its budget; nothing is lost.
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: A job that ended before its rows were all answered.
ENDED_EARLY = frozenset({State.FAILED, State.CANCELLED})
#: State -> the states that may follow it. Only a running job succeeds.
MOVES: Mapping[State, frozenset[State]] = {
    State.OPEN: ENDED_EARLY | {State.RUNNING, State.PAUSED},
    State.LOADING: ENDED_EARLY | {State.RUNNING},
    State.RUNNING: ENDED_EARLY | {State.PAUSED, State.SUCCEEDED},
    State.PAUSED: ENDED_EARLY | {State.OPEN, State.RUNNING},
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
#: No job leaves these.
ENDED = frozenset(state for state, following in MOVES.items() if not following)
#: Jobs that have not ended, in the order of their states.
LIVE = tuple(state for state in State if state not in ENDED)
#: Jobs to which rows are still coming: what they have so far is no whole.
GROWING = (State.OPEN, State.LOADING)
#: Jobs whose rows are carved: of an upload those that have landed, while the others are on their way.
CARVED = (*GROWING, State.RUNNING)
#: States that jobs of this version come to: what filters offer.
REACHED = tuple(state for state in State if state is not State.PAUSED)


class Skip(StrEnum):
    """Why a cell was skipped."""

    #: A cell that it reads has no answer.
    UPSTREAM = "upstream"
    #: The condition of its task does not hold for the row.
    CONDITION = "condition"
    #: Its task has nothing to read in the row.
    NO_INPUT = "no_input"
    #: It was not done by the row's deadline.
    LATE = "late"
    #: Its caller gave it up.
    ABANDONED = "abandoned"
    #: Its job's budget was spent.
    BUDGET = "budget"
    #: Its job ended before.
    ENDED = "ended"
