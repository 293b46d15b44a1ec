"""Seeded faults of the protocol. A suite that lets one of them live proves nothing; each has a play that kills it.

Each mutant changes the real code in one place, as a careless hand would. Its play is one that the machine found or
that was written by hand; ``make mutants`` lets the machine find one anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

import scheduler.aggregator
import scheduler.dispatcher
import scheduler.sweeper
from motet.protocol.columns import OK, RETURNED
from motet.protocol.wire import Outcome
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import Dispatcher
from scheduler.policy import lifecycle
from scheduler.policy.carve import Range
from scheduler.policy.lifecycle import Return
from scheduler.readable import Readable
from scheduler.store import dependence, endings, leadership, leases, outcomes, payload_rows, words
from scheduler.store.database import Database
from scheduler.store.listening import Listener
from scheduler.store.words import EVERYTHING, SILENCE, Words
from tests.machine.world import Play

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A fault, and a play that shows it: sound code survives the play, the mutant does not."""

    name: str
    seed: Callable[[Patch], None]
    play: Play
    #: Number of the invariant that the play breaks.
    breaks: int


# -- the seeds ---------------------------------------------------------------------------------------


def acknowledges_before_it_commits(patch: Patch) -> None:
    settle = Aggregator._settle

    def early(self: Aggregator, entries: Sequence[Any]) -> None:
        self.transport.acknowledge([entry.id for entry in entries])
        settle(self, entries)

    patch.setattr(Aggregator, "_settle", early)


def counts_what_was_sent(patch: Patch) -> None:
    counts = outcomes._counts

    def sent(job: UUID, total: Any, answers: Sequence[Any]) -> Any:
        all_of = [
            replace(a, columns={n: replace(c, status=_as_ok(c.status)) for n, c in a.columns.items()})
            for a in answers
        ]
        return counts(job, total, all_of)

    patch.setattr(outcomes, "_counts", sent)


def _as_ok(status: bytes) -> bytes:
    return bytes(OK if s == RETURNED else s for s in status)


_NONCE = text("SELECT nonce FROM lease WHERE subtask_id = :subtask AND attempt = :attempt")
_ANY_LEASE = text("SELECT attempt, nonce FROM lease WHERE subtask_id = :subtask ORDER BY attempt LIMIT 1")


def believes_any_nonce(patch: Patch) -> None:
    def believe(connection: Connection, o: Outcome) -> Outcome:
        nonce = connection.execute(_NONCE, {"subtask": o.subtask, "attempt": o.attempt}).scalar()
        return replace(o, nonce=nonce or o.nonce)

    _before_recording(patch, believe)


def accepts_a_stale_failure(patch: Patch) -> None:
    def accept(connection: Connection, o: Outcome) -> Outcome:
        row = connection.execute(_ANY_LEASE, {"subtask": o.subtask}).first()
        return replace(o, attempt=row.attempt, nonce=row.nonce) if o.verdict == "failed" and row else o

    _before_recording(patch, accept)


_REOPEN = text(
    "UPDATE subtask SET state = 'open', closed = NULL WHERE id = :subtask AND state <> 'open' RETURNING id"
)
_LEASE_AGAIN = text("""
    INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)
    VALUES (:subtask, :attempt, 'w0', '', :nonce, 1, clock_timestamp() + interval '8 s') ON CONFLICT DO NOTHING""")


def takes_in_what_was_closed(patch: Patch) -> None:
    def reopen(connection: Connection, o: Outcome) -> Outcome:
        at = {"subtask": o.subtask, "attempt": o.attempt, "nonce": o.nonce}
        if connection.execute(_REOPEN, at).first() is not None:
            connection.execute(_LEASE_AGAIN, at)
        return o

    _before_recording(patch, reopen)


def _before_recording(patch: Patch, change: Callable[[Connection, Outcome], Outcome]) -> None:
    record = scheduler.aggregator.record

    def changed(database: Database, found: Sequence[Outcome]) -> Any:
        with database.transaction() as connection:
            found = [change(connection, o) for o in found]
        return record(database, found)

    patch.setattr(scheduler.aggregator, "record", changed)


def rescues_nothing(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_close", lambda self, epoch, gone, live: ())


def rescues_what_waits_on_the_stream(patch: Patch) -> None:
    close = Dispatcher._close

    def blind(self: Dispatcher, epoch: int, gone: Any, live: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.transport, "waiting_outcomes", set)
            return close(self, epoch, gone, live)

    patch.setattr(Dispatcher, "_close", blind)


def does_not_fence(patch: Patch) -> None:
    for module in (scheduler.dispatcher, scheduler.sweeper, leases, leadership):
        patch.setattr(module, "fence", lambda connection, epoch: None)
    patch.setattr(leases, "must_lead", lambda found: None)


def publishes_before_it_commits(patch: Patch) -> None:
    send, opened = Dispatcher._send, leases._open

    def early(self: Dispatcher, epoch: int, decided: Any) -> int:
        publish = self._publish

        def open_and_publish(connection: Connection, taken: Any, lease_s: float) -> Any:
            found = opened(connection, taken, lease_s)
            publish(found)
            return found

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(leases, "_open", open_and_publish)
            inner.setattr(self, "_publish", lambda leased: None)
            return send(self, epoch, decided)

    patch.setattr(Dispatcher, "_send", early)


_ADVANCE = text("""
    UPDATE block_pass SET cursor = greatest(cursor, :cursor)
     WHERE job_id = :job AND pass_number = :pass AND block_number = :block""")


def moves_the_cursor_in_another_transaction(patch: Patch) -> None:
    lease, opened = leases.lease, leases._open
    cursors: dict[Any, int] = {}

    def without(connection: Connection, taken: Any, lease_s: float) -> Any:
        cursors.update(taken.cursors)
        taken.cursors.clear()
        return opened(connection, taken, lease_s)

    def in_two(database: Database, *rest: Any) -> Any:
        cursors.clear()
        found = lease(database, *rest)
        with database.transaction() as connection:
            for (job, number, block), cursor in cursors.items():
                at = {"job": UUID(job), "pass": number, "block": block, "cursor": cursor}
                connection.execute(_ADVANCE, at)
        return found

    patch.setattr(leases, "_open", without)
    patch.setattr(leases, "lease", in_two)


def blames_all_rows(patch: Patch) -> None:
    lost = lifecycle.lost

    def all_of(ranges: Sequence[Range], **facts: Any) -> Any:
        return lost(ranges, **facts | {"suspects": range(sum(map(len, ranges)))})

    patch.setattr(scheduler.dispatcher, "lost", all_of)


def takes_silence_for_death(patch: Patch) -> None:
    lost = lifecycle.lost
    patch.setattr(
        scheduler.dispatcher, "lost", lambda ranges, **facts: lost(ranges, **facts | {"died": True})
    )


def recalls_without_closing(patch: Patch) -> None:
    patch.setattr(leases, "_UNDO", _nothing("ids"))


def puts_rows_back_twice(patch: Patch) -> None:
    put_back = leases.put_back

    def twice(connection: Connection, job: UUID, pass_number: int, returns: Iterable[Return]) -> None:
        put_back(connection, job, pass_number, [r for r in returns for _ in range(2)])

    patch.setattr(leases, "put_back", twice)
    patch.setattr(outcomes, "put_back", twice)


def cancels_without_closing(patch: Patch) -> None:
    patch.setattr(endings, "_CLOSE_SUBTASKS", _nothing("job"))


def counts_cells_that_a_cancelled_job_loses(patch: Patch) -> None:
    patch.setattr(endings, "_DROP_CELLS", _nothing("job"))


def keeps_the_lease_of_the_slower_one(patch: Patch) -> None:
    both = "DELETE FROM lease USING k WHERE lease.subtask_id = k.id"
    one = f"{both} AND lease.attempt = (SELECT min(o.attempt) FROM lease o WHERE o.subtask_id = k.id)"
    patch.setattr(outcomes, "_CLOSE", text(str(outcomes._CLOSE).replace(both, one)))


def doubles_a_suspect(patch: Patch) -> None:
    careless = str(leases._CLONABLE).replace("AND s.deaths = 0 AND NOT s.exclusive", "")
    patch.setattr(leases, "_CLONABLE", text(careless))


def forgets_to_count_what_came_back(patch: Patch) -> None:
    patch.setattr(leases, "_MORE_WAITS", _nothing("jobs", "passes", "rows", "bytes"))


def gives_up_at_the_first_failure(patch: Patch) -> None:
    patch.setattr(lifecycle, "MAX_TRIES", 1)


def condemns_after_one_death_alone(patch: Patch) -> None:
    patch.setattr(lifecycle, "MAX_DEATHS_ALONE", 1)


def loses_rows_that_came_back_from_a_flaky_attempt(patch: Patch) -> None:
    patch.setattr(outcomes, "put_back", lambda connection, job, pass_number, returns: None)


def releases_before_all_is_sealed(patch: Patch) -> None:
    careful = str(dependence._FREE)
    careless = careful[: careful.index("WHERE NOT EXISTS")] + careful[careful.index("ORDER BY") :]
    patch.setattr(dependence, "_FREE", text(careless))


def holds_conditions_before_all_is_sealed(patch: Patch) -> None:
    careful = str(dependence._FREE)
    careless = careful.replace("WHERE NOT EXISTS", "WHERE p.condition IS NOT NULL OR NOT EXISTS", 1)
    patch.setattr(dependence, "_FREE", text(careless))
    compared, upstream = Readable.compared, dependence.upstream_answers

    def of_what_is_sealed(connection: Connection, places: Sequence[Any]) -> Any:
        found = upstream(connection, places)
        return {place: found.get(place, (None, [])) for place in places}

    def of_what_is_there(self: Readable, written: str, rows: Sequence[int]) -> list[Any]:
        there = self.name_of(written) in {**self.fields, **self.answers}
        return compared(self, written, rows) if there else [None] * len(rows)

    patch.setattr(dependence, "upstream_answers", of_what_is_sealed)
    patch.setattr(Readable, "compared", of_what_is_there)


def runs_rows_whose_condition_does_not_hold(patch: Patch) -> None:
    patch.setattr(dependence, "_hold_conditions", lambda connection, asked, found: None)


def forgets_to_count_what_it_skips(patch: Patch) -> None:
    patch.setattr(
        dependence, "_COUNT_SKIPPED", text("UPDATE job SET version = version WHERE id = :job AND :n < 0")
    )


def carves_rows_that_were_taken_out(patch: Patch) -> None:
    patch.setattr(
        payload_rows,
        "_UPSTREAM",
        text(str(payload_rows._UPSTREAM).replace("w.row_order", "CAST(NULL AS bytea) AS row_order")),
    )


def tells_nobody_that_it_recorded(patch: Patch) -> None:
    said = SimpleNamespace(done=words.done, telling=lambda said, changed=(): (text("SELECT 1"), {}))
    patch.setattr(outcomes, "words", said)


def misses_words_and_does_not_say_so(patch: Patch) -> None:
    wait = Listener.wait
    patch.setattr(Listener, "wait", lambda self, s: replace(wait(self, s), everything=False))


def rescues_in_a_quick_step(patch: Patch) -> None:
    quick = Dispatcher._quick_step

    def hasty(self: Dispatcher, epoch: int, now: float) -> int:
        self._heed(self._read_flags(now))
        self._rescue(epoch, now)
        return quick(self, epoch, now)

    patch.setattr(Dispatcher, "_quick_step", hasty)


def hears_nobody_while_words_come(patch: Patch) -> None:
    step = Dispatcher.step

    def starved(self: Dispatcher, now: float, words: Words = EVERYTHING) -> int:
        if words != SILENCE and not words.everything:
            self._beat_at = now + scheduler.dispatcher.BEAT_STEP_S
        return step(self, now, words)

    patch.setattr(Dispatcher, "step", starved)


def puts_right_in_silence(patch: Patch) -> None:
    put_right = Dispatcher._put_right

    def silent(self: Dispatcher, found: Any, fates: Any, now: float) -> None:
        before = self.differences
        put_right(self, found, fates, now)
        self.differences = before

    patch.setattr(Dispatcher, "_put_right", silent)


def remembers_another_term(patch: Patch) -> None:
    know_nothing = Dispatcher._know_nothing

    def remember(self: Dispatcher, now: float) -> None:
        if hasattr(self, "_book"):
            self._led_at = now
        else:
            know_nothing(self, now)

    patch.setattr(Dispatcher, "_know_nothing", remember)


def _nothing(*names: str) -> Any:
    """A statement that takes these parameters and does nothing."""
    return text("SELECT " + ", ".join(f"CAST(:{n} AS text)" for n in names) + " WHERE false")


# -- the plays ---------------------------------------------------------------------------------------


def _all(rule: str, *numbers: int) -> list[tuple[str, tuple[int, ...]]]:
    """The same of all three workers."""
    return [(rule, (w, *numbers)) for w in range(3)]


_SUBMIT = ("submit", (8, 4, 1, 20, 5))
_TICK = ("tick", (0,))
_AGGREGATE = ("aggregate", (0,))
#: Nine rows and two tasks; each worker has taken what it was sent.
_TAKEN = (_SUBMIT, _TICK, *_all("take"))
#: All processes were killed and replaced, and that was dealt with.
_KILLED = (*_TAKEN, *_all("die", 1, 0), _TICK)

MUTANTS: Collection[Mutant] = (
    Mutant(
        "acknowledges before it commits",
        acknowledges_before_it_commits,
        (*_TAKEN, *_all("finish", 0, 0), ("aggregate_fault", (0, 0))),
        5,
    ),
    Mutant("counts what was sent", counts_what_was_sent, (*_TAKEN, *_all("finish", 0, 7), _AGGREGATE), 2),
    Mutant("believes any nonce", believes_any_nonce, (*_TAKEN, ("forge", (0, 0)), _AGGREGATE), 7),
    Mutant(
        "accepts a stale failure",
        accepts_a_stale_failure,
        (*_TAKEN, ("clone", (0, 1)), _TICK, ("die", (0, 1, 0)), _TICK, ("late", (4, 5)), _AGGREGATE),
        6,
    ),
    Mutant("takes in what was closed", takes_in_what_was_closed, (*_KILLED, ("late", (0, 0)), _AGGREGATE), 5),
    Mutant("rescues nothing", rescues_nothing, (*_TAKEN, *_all("die", 1, 0)), 7),
    Mutant(
        "rescues what waits on the stream",
        rescues_what_waits_on_the_stream,
        (*_TAKEN, *_all("finish", 0, 0), *[_TICK] * 20),
        8,
    ),
    Mutant("does not fence", does_not_fence, (_SUBMIT, ("tick_fault", (0, 1, 4))), 6),
    Mutant("publishes before it commits", publishes_before_it_commits, (_SUBMIT, _TICK), 5),
    Mutant(
        "moves the cursor in another transaction",
        moves_the_cursor_in_another_transaction,
        (_TICK, _SUBMIT, ("tick_fault", (0, 3, 0))),
        5,
    ),
    Mutant("blames all rows", blames_all_rows, _KILLED, 9),
    Mutant(
        "takes silence for death",
        takes_silence_for_death,
        (*_TAKEN, *_all("begin", 0, 0, 3, 0), *_all("freeze"), *[_TICK] * 20),
        9,
    ),
    Mutant("recalls without closing", recalls_without_closing, (_SUBMIT, _TICK, ("recall", (0,)), _TICK), 5),
    Mutant("puts rows back twice", puts_rows_back_twice, _KILLED, 5),
    Mutant("cancels without closing", cancels_without_closing, (*_TAKEN, ("cancel", (0,))), 3),
    Mutant(
        "counts cells that a cancelled job loses",
        counts_cells_that_a_cancelled_job_loses,
        (*_TAKEN, ("finish", (0, 0, 0)), _AGGREGATE, ("cancel", (0,))),
        2,
    ),
    Mutant(
        "keeps the lease of the slower one",
        keeps_the_lease_of_the_slower_one,
        (*_TAKEN, ("clone", (0, 0)), ("clone", (0, 1)), _TICK, *_all("work"), _AGGREGATE),
        5,
    ),
    Mutant(
        "doubles a suspect",
        doubles_a_suspect,
        (
            *_TAKEN,
            *_all("begin", 0, 0, 3, 0),
            *_all("die", 1, 0),
            _TICK,
            _TICK,
            ("clone", (0, 0)),
            ("clone", (0, 1)),
            _TICK,
        ),
        9,
    ),
    Mutant("forgets to count what came back", forgets_to_count_what_came_back, _KILLED, 5),
    Mutant(
        "gives up at the first failure",
        gives_up_at_the_first_failure,
        (*_TAKEN, *_all("finish", 0, 5), _AGGREGATE),
        9,
    ),
    Mutant(
        "condemns after one death alone", condemns_after_one_death_alone, (("submit", (8, 4, 1, 3, 5)),), 9
    ),
    Mutant(
        "releases before all is sealed",
        releases_before_all_is_sealed,
        (("submit", (8, 4, 5, 20, 5)), _TICK, *_all("work"), _AGGREGATE),
        5,
    ),
    Mutant(
        "condition read before its upstream is sealed",
        holds_conditions_before_all_is_sealed,
        (("submit", (0, 4, 8, 20, 5)), _TICK, *_all("take"), ("finish", (0, 0, 0)), _AGGREGATE),
        23,
    ),
    Mutant(
        "runs rows whose condition does not hold",
        runs_rows_whose_condition_does_not_hold,
        (("submit", (8, 4, 7, 20, 5)),),
        23,
    ),
    Mutant(
        "forgets to count what it skips", forgets_to_count_what_it_skips, (("submit", (8, 4, 4, 3, 5)),), 2
    ),
    Mutant(
        "sends rows that were taken out", carves_rows_that_were_taken_out, (("submit", (8, 4, 4, 3, 5)),), 7
    ),
    Mutant(
        "tells nobody that it recorded",
        tells_nobody_that_it_recorded,
        (*_TAKEN, _TICK, *_all("finish", 0, 0), _AGGREGATE, ("audit", (0,))),
        10,
    ),
    Mutant(
        "misses words and does not say so",
        misses_words_and_does_not_say_so,
        (*_TAKEN, _TICK, ("deafen", (0,)), *_all("finish", 0, 0), _AGGREGATE, ("audit", (0,))),
        10,
    ),
    Mutant(
        "rescues in a quick step",
        rescues_in_a_quick_step,
        (*_TAKEN, *_all("freeze"), *[_TICK] * 21, ("advance", (0,)), ("breathe", (0,))),
        11,
    ),
    Mutant("hears nobody while words come", hears_nobody_while_words_come, (_SUBMIT, ("storm", (0,))), 12),
    Mutant("puts right in silence", puts_right_in_silence, (*_TAKEN, _TICK, ("spoil", (0, 0))), 10),
    Mutant(
        "remembers another term",
        remembers_another_term,
        (
            *_TAKEN,
            _TICK,
            ("advance", (5,)),
            ("tick", (1,)),
            *_all("work"),
            _AGGREGATE,
            ("submit", (8, 4, 1, 20, 5)),
            ("tick", (1,)),
            *_all("take"),
            ("advance", (4,)),
            _TICK,
            ("audit", (0,)),
        ),
        10,
    ),
    Mutant(
        "loses rows of a flaky attempt",
        loses_rows_that_came_back_from_a_flaky_attempt,
        (*_TAKEN, *_all("finish", 0, 7), _AGGREGATE),
        5,
    ),
)
