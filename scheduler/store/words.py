"""Words: what a transaction tells the leading dispatcher, so that its quick step looks at what changed and nothing else.

They travel as the payload of NOTIFY, which Postgres delivers when the transaction has committed, once, in order, to
whoever listens at that moment. What is none of these words, also one of another version, means that anything may have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from scheduler.store.database import JOB, WORK, Asked, notifying

#: Bytes of one payload; Postgres takes fewer than 8,000.
_MOST_BYTES = 7_900


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What was heard since the last step."""

    #: Words were missed or not understood: all has to be read anew.
    everything: bool = False
    #: Jobs of which rows may have come to wait, or that ended.
    landed: frozenset[UUID] = frozenset()
    #: Jobs that ended: nothing of them waits or runs.
    ended: frozenset[UUID] = frozenset()
    #: Sub-tasks that closed, and their jobs.
    done: frozenset[int] = frozenset()
    done_of: frozenset[UUID] = frozenset()
    #: Workers were drained, or resumed.
    drains: bool = False

    def __or__(self, more: Words) -> Words:
        return Words(
            everything=self.everything or more.everything,
            landed=self.landed | more.landed,
            ended=self.ended | more.ended,
            done=self.done | more.done,
            done_of=self.done_of | more.done_of,
            drains=self.drains or more.drains,
        )


#: Nothing was missed, and nothing was said.
SILENCE = Words()
#: Nobody listened, or the line broke.
EVERYTHING = Words(everything=True)


#: Workers were drained, or resumed.
DRAINS = "drains"


def land(job: UUID) -> str:
    """Rows of a job have come to wait."""
    return f"land {job}"


def end(job: UUID) -> str:
    """A job ended before its time, or was removed."""
    return f"end {job}"


def done(job: UUID, subtasks: Iterable[int]) -> str:
    """Sub-tasks of a job closed."""
    return " ".join(("done", str(job), *map(str, subtasks)))


def tell(connection: Connection, words: Collection[str], changed: Iterable[UUID] = ()) -> None:
    """Say these when (and only if) this transaction commits; and to watchers, that these jobs have changed."""
    connection.execute(*telling(words, changed))


def telling(words: Collection[str], changed: Iterable[UUID] = ()) -> Asked:
    """The statement of ``tell``."""
    together = "\n".join(words)
    # A word that is too long is one that nobody understands.
    payloads = (
        [together] if len(together) <= _MOST_BYTES else [w if len(w) <= _MOST_BYTES else "" for w in words]
    )
    return notifying([*((JOB, str(job)) for job in changed), *((WORK, payload) for payload in payloads)])


def heard(payloads: Iterable[str]) -> Words:
    """What these payloads say together."""
    landed, ended, done_of = set[UUID](), set[UUID](), set[UUID]()
    done = set[int]()
    drains = False
    for word in (word for payload in payloads for word in payload.split("\n")):
        if word == DRAINS:
            drains = True
            continue
        kind, *rest = word.split(" ")
        try:
            job = UUID(rest[0])
            match kind:
                case "land":
                    landed.add(job)
                case "end":
                    ended.add(job)
                case "done":
                    done_of.add(job)
                    done.update(map(int, rest[1:]))
                case _:
                    return EVERYTHING
        except (ValueError, IndexError):
            return EVERYTHING
    return Words(
        landed=frozenset(landed),
        ended=frozenset(ended),
        done=frozenset(done),
        done_of=frozenset(done_of),
        drains=drains,
    )
