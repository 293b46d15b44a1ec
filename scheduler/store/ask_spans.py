"""What became of the asks of open jobs, a few seconds at a time: each API process writes its own, a page adds them up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from sqlalchemy import Connection, text

from scheduler.ask_times import added, no_times

#: Seconds of one span. Shorter: more statements; longer: a page that shows what was, not what is.
SPAN_S = 5
#: Spans of a minute.
MINUTE = 60 // SPAN_S
#: Spans are told for so many seconds, and deleted as much later.
KEPT_S = 600


@dataclass(slots=True, kw_only=True)
class AskSpan:
    """Asks of an open job that ended within SPAN_S seconds: at one API process, or at all of them."""

    #: Seconds since 1970 at which it began: a multiple of SPAN_S.
    at: int
    n_rows: int = 0
    answered: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    #: Rows that wait to land at its end.
    waiting: int = 0
    #: Of the asks that were answered: see ``scheduler.ask_times``.
    times: list[int] = field(default_factory=no_times)


# Whoever deletes a job holds its row: its last span is then not needed, and nobody waits.
_STORE = text("""
    INSERT INTO ask_span (job_id, at, process, n_rows, answered, late, refused, failed, waiting, times)
    SELECT id, to_timestamp(:at), :process, :n_rows, :answered, :late, :refused, :failed, :waiting, CAST(:times AS int[])
      FROM job WHERE id = :job FOR KEY SHARE SKIP LOCKED
    ON CONFLICT DO NOTHING""")
_DROP = text("""
    DELETE FROM ask_span WHERE job_id = ANY(:jobs) AND at < clock_timestamp() - make_interval(secs => :kept_s)""")
_LOOK = text("""
    SELECT CAST(date_part('epoch', at) AS bigint) AS at, n_rows, answered, late, refused, failed, waiting, times
      FROM ask_span WHERE job_id = :job AND at >= to_timestamp(:first)""")
_NOW = text("SELECT CAST(date_part('epoch', clock_timestamp()) AS double precision)")


def store(connection: Connection, process: str, spans: Sequence[tuple[UUID, AskSpan]]) -> None:
    """Keep what ended at a process, and drop what is old of the same jobs. Twice is harmless."""
    if not spans:
        return
    connection.execute(
        _STORE,
        [
            {
                "job": job,
                "process": process,
                "at": span.at,
                "n_rows": span.n_rows,
                "answered": span.answered,
                "late": span.late,
                "refused": span.refused,
                "failed": span.failed,
                "waiting": span.waiting,
                "times": span.times,
            }
            for job, span in sorted(spans, key=lambda one: one[0])
        ],
    )
    connection.execute(_DROP, {"jobs": sorted({job for job, _ in spans}), "kept_s": 2 * KEPT_S})


def look(connection: Connection, job: UUID) -> list[AskSpan]:
    """The last KEPT_S seconds of an open job, over all API processes; the span under way is not among them."""
    now: float = connection.execute(_NOW).scalar_one()
    # The last one that every process has had a second to write.
    last = int(now - 1.0) // SPAN_S * SPAN_S - SPAN_S
    first = last - KEPT_S + SPAN_S
    found: dict[int, list[AskSpan]] = defaultdict(list)
    for row in connection.execute(_LOOK, {"job": job, "first": first}):
        found[row.at].append(AskSpan(**row._mapping))
    return [together(found[at], at) for at in range(first, last + 1, SPAN_S)]


def last_minute(spans: Sequence[AskSpan]) -> AskSpan:
    """The newest spans as one; of rows that wait, as many as do at its end."""
    newest = spans[-MINUTE:]
    return replace(together(newest, newest[0].at), waiting=newest[-1].waiting)


def together(spans: Sequence[AskSpan], at: int) -> AskSpan:
    """What several processes say of one span, or one of several spans; ``at``: where it begins."""
    return AskSpan(
        at=at,
        n_rows=sum(s.n_rows for s in spans),
        answered=sum(s.answered for s in spans),
        late=sum(s.late for s in spans),
        refused=sum(s.refused for s in spans),
        failed=sum(s.failed for s in spans),
        waiting=sum(s.waiting for s in spans),
        times=added([s.times for s in spans]),
    )
