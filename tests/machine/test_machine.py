"""Any order of work and faults keeps the invariants, and ends well once the faults do."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from tests.machine.machine import EXAMPLES, SECONDS, SEED, perform, search
from tests.machine.oracle import check, look
from tests.machine.stage import Stage
from tests.machine.world import AGGREGATOR_FAULTS, DISPATCHER_FAULTS, Play, World

#: Plays that share a seed.
_AT_ONCE = 20
#: Fewer moves prove nothing: a slow machine plays on until they are made.
_LEAST_MOVES = 600


@pytest.mark.timeout(0)
def test_no_order_of_work_and_faults_breaks_an_invariant(stage: Stage) -> None:
    began, plays, moves = time.monotonic(), 0, Counter[str]()
    while plays < EXAMPLES and (time.monotonic() - began < SECONDS or moves.total() < _LEAST_MOVES):
        seed = SEED * 100_000 + plays
        found, more = search(stage, plays=min(_AT_ONCE, EXAMPLES - plays), seed=seed)
        plays, moves = plays + _AT_ONCE, moves + more
        assert found is None, f"with seed {seed}: {found.why}\nreplay: {list(found.play)}"
    print(f"\n{plays} plays, {moves.total()} moves, {time.monotonic() - began:.0f} s: {moves}")
    assert moves.total() >= _LEAST_MOVES


def test_the_clock_of_the_database_stands_still_until_it_is_moved(stage: Stage) -> None:
    world = World(stage, check)
    world.do("submit", 3, 0, 0, 20, 5)
    world.do("tick", 0)
    query = "SELECT clock_timestamp() - j.created, clock_timestamp() - l.leased FROM job j, lease l LIMIT 1"
    for moved_s in (0.0, 3600.0):
        stage.advance(moved_s)
        with world.database.transaction() as connection:
            [(of_job, of_lease)] = connection.exec_driver_sql(query)
        assert (of_job.total_seconds(), of_lease.total_seconds()) == (0.5 + moved_s, moved_s)


#: Something of everything.
_MIXED: Play = (
    ("submit", (9, 2, 3, 3, 5)),
    ("submit", (9, 2, 1, 4, 1)),
    ("round", (5,)),
    ("tick_fault", (0, 3, 0)),
    ("begin", (1, 0, 0, 2, 1)),
    ("die", (1, 1, 0)),
    ("tick_fault", (1, 4, 4)),
    ("round", (7,)),
    ("clone", (0, 1)),
    ("wipe", (3,)),
    ("round", (2,)),
    ("late", (1, 5)),
    ("aggregate_fault", (1, 1)),
    ("cancel", (3,)),
)


#: So that there is something to take back and to double, to find lost, to extend, and to delete.
_EVERYTHING: Play = (
    ("submit", (11, 5, 0, 20, 4)),
    ("tick", (0,)),
    ("recall", (0,)),
    ("tick", (0,)),
    *(("take", (i,)) for i in (0, 1, 2) for _ in range(3)),
    ("clone", (0, 0)),
    ("clone", (0, 1)),
    ("tick", (0,)),
    *[("tick", (0,))] * 10,
    *(("work", (i,)) for i in (0, 1, 2)),
    ("aggregate", (0,)),
    ("open", (0,)),
    ("ask", (0, 0, 1, 20)),
    *[("round", (7,))] * 4,
    ("forget_front", (0,)),
    ("tick", (0,)),
    *_MIXED,
    ("delete", (0,)),
    ("tick", (0,)),
)


def test_a_play_goes_the_same_way_each_time(stage: Stage) -> None:
    def perform() -> Any:
        world = World(stage, check)
        seen = []
        for rule, numbers in _MIXED:
            world.do(rule, *numbers)
            seen.append({name: sorted(map(_plain, rows)) for name, rows in look(world).tables.items()})
        return seen

    assert perform() == perform()


#: Everything of the dispatcher and the aggregator that commits, in a play in which all of it comes to pass.
_COMMITS = (
    *(
        "lead",
        "extend_all",
        "record_transport",
        "extend",
        "_close",
        "lease",
        "recall",
        "clone",
        "_chores",
        "sweep",
        "_forget_front",
    ),
    "record",
)


def test_a_process_may_die_at_each_of_its_commits(stage: Stage) -> None:
    """Each that there is in the mixed play, in the first move in which it comes: before it, and after it."""
    world = World(stage, check)
    first: dict[str, Play] = {}
    for number, (rule, numbers) in enumerate(_EVERYTHING):
        for tap in stage.taps.values():
            tap.commits.clear()
        world.do(rule, *numbers)
        for role in ("A", "B"):
            for at, caller in stage.taps[role].commits:
                move = ("tick_fault", ("AB".index(role), at, 0))
                first.setdefault(caller, (*_EVERYTHING[:number], move))
        for role in ("agg0", "agg1"):
            for _, caller in stage.taps[role].commits:
                first.setdefault(caller, (*_EVERYTHING[:number], ("aggregate_fault", (int(role[-1]), 0))))
    print("\n", {caller: play[-1] for caller, play in first.items()})
    assert set(first) == set(_COMMITS)
    for caller, (*before, (rule, numbers)) in first.items():
        faults = DISPATCHER_FAULTS if rule == "tick_fault" else AGGREGATOR_FAULTS
        for fault in ("crash before", "crash after", "away before", "away after"):
            for tap in stage.taps.values():
                tap.broken.clear()
            play = (*before, (rule, (*numbers[:-1], faults.index(fault))))
            assert perform(stage, play) is None, (caller, fault)
            struck = {name for tap in stage.taps.values() for _, name in tap.broken}
            assert struck == {caller}, "the fault befell what it was meant for"


def _plain(row: dict[str, Any]) -> str:
    """A row without what is drawn at random: a nonce, and who leads."""
    return str({name: value for name, value in row.items() if name != "nonce"})
