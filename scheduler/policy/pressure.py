"""Pressure: how near the cluster is to its limits, what the door says then, and how much the dispatcher still sends.

Pure. Between a soft and a hard limit the dispatcher sends less and less of its usual rate; at a hard limit it sends
nothing, and the API takes no new rows until what is under way has landed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from motet.messages.cluster import Overload, Reason

if TYPE_CHECKING:
    from motet.protocol.transport import Lag

#: Soft and hard limit of the outcomes that no aggregator has recorded yet.
OUTCOMES = (250, 1000)
#: Soft and hard limit of the used share of Redis' memory: a full Redis refuses the outcomes of finished work.
REDIS_MEMORY = (0.5, 0.7)
#: A burst of outcomes is recorded within seconds; at the hard limit, one that is older than this tells of a jam.
_JAM_S = 5.0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureFacts:
    """What is known of the cluster at one moment."""

    #: Rows without all their answers, of running jobs of all tenants.
    rows_running: int
    #: The same, of jobs whose rows are still coming in.
    rows_loading: int
    max_waiting_rows: int
    #: None where Redis does not answer: then it is no reason to refuse, for Postgres alone holds jobs.
    lag: Lag | None
    #: Used share of Redis' memory limit, 0 where it has none; None where Redis does not answer.
    memory_share: float | None
    #: Free bytes on the disk of Postgres; None where the API cannot see it, or was told not to mind.
    free_bytes: int | None
    min_free_bytes: int


def throttle(outcomes: int, memory_share: float) -> float:
    """The share of its usual rate at which the dispatcher sends, 1 to 0: of outcomes that wait, and Redis' memory."""
    return 1.0 - max(_ramp(outcomes, *OUTCOMES), _ramp(memory_share, *REDIS_MEMORY))


def pressures(facts: PressureFacts) -> Mapping[Reason, float]:
    """Each known reason's way from its soft limit, 0, to its hard limit, 1."""
    rows = facts.rows_running + facts.rows_loading
    found: dict[Reason, float] = {"rows": _ramp(rows, facts.max_waiting_rows / 2, facts.max_waiting_rows)}
    if facts.lag is not None:
        found["outcomes"] = _ramp(facts.lag.entries, *OUTCOMES)
    if facts.memory_share is not None:
        found["redis_memory"] = _ramp(facts.memory_share, *REDIS_MEMORY)
    if facts.free_bytes is not None:
        found["disk"] = _ramp(-facts.free_bytes, -2 * facts.min_free_bytes, -facts.min_free_bytes)
    return found


def overloads(
    facts: PressureFacts, *, interactive: bool = False, uploading: bool = False
) -> Iterator[Overload]:
    """Why new rows are refused, the worst reason first; nothing where they are taken.

    ``interactive`` rows pass where only too many rows wait: they are few, and do not wait behind the others.
    ``uploading``: the rows of an upload that was let in wait for jobs that run, never for other uploads, which
    might wait for this one.
    """
    pressed = {reason for reason, pressure in pressures(facts).items() if pressure >= 1}
    if "disk" in pressed and facts.free_bytes is not None:
        yield Overload(
            reason="disk",
            what=f"the disk of Postgres has {facts.free_bytes // _MIB:,} MB left,"
            f" and {facts.min_free_bytes // _MIB:,} must stay free",
            remedy="remove old jobs with `motet rm`, or make room",
            retry_after_s=30.0,
        )
    if "redis_memory" in pressed and facts.memory_share is not None:
        yield Overload(
            reason="redis_memory",
            what=f"Redis uses {facts.memory_share:.0%} of its memory limit, at most {REDIS_MEMORY[1]:.0%} is safe",
            remedy="wait until work under way has ended, or raise its maxmemory",
            retry_after_s=5.0,
        )
    if "outcomes" in pressed and facts.lag is not None and facts.lag.oldest_s >= _JAM_S:
        yield Overload(
            reason="outcomes",
            what=f"{facts.lag.entries:,} outcomes wait to be recorded, the oldest for {facts.lag.oldest_s:,.0f} s",
            remedy="wait until they are, or start another aggregator",
            retry_after_s=5.0,
        )
    rows = facts.rows_running if uploading else facts.rows_running + facts.rows_loading
    if rows >= facts.max_waiting_rows and not interactive:
        yield Overload(
            reason="rows",
            what=f"{rows:,} rows of unfinished jobs wait, and {facts.max_waiting_rows:,} may",
            remedy="wait until jobs have ended; interactive jobs are still taken",
            retry_after_s=5.0,
        )


def _ramp(value: float, soft: float, hard: float) -> float:
    return min(1.0, max(0.0, (value - soft) / (hard - soft)))
