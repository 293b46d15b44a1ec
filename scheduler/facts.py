"""What the policy goes by, for whoever asks it: the dispatcher, which acts, and the API, which explains.

Facts from Postgres in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from scheduler.policy.cost import Rates
from scheduler.policy.placing.records import Demand, Refusal, UnderWay
from scheduler.store import drains, leases
from scheduler.store.demand import demand
from scheduler.store.dropping import BlockKey, late_blocks
from scheduler.store.leadership import transport_seen
from scheduler.store.leases import Held, LeaseKey
from scheduler.store.manifests import Manifests
from scheduler.store.rates import rates, refusals


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What Postgres says at one moment."""

    held: list[Held]
    demand: list[Demand]
    refusals: list[Refusal]
    rates: Rates
    #: Workers that an operator drained: they get no more work.
    drained: frozenset[str]


def read(connection: Connection, now: float, manifests: Manifests) -> Facts:
    """The facts; deadlines are told on the clock of ``now``."""
    return Facts(
        held=leases.held(connection),
        demand=demand(connection, now, manifests),
        refusals=refusals(connection),
        rates=rates(connection),
        drained=drains.drained(connection),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """What the leader reads in each beat step, beside the beats: a few rows of each."""

    refusals: Sequence[Refusal] = ()
    drained: frozenset[str] = frozenset()
    #: Identity of Redis as a leader last dealt with it.
    transport: str = ""
    #: Leases that end soon; True: they have ended.
    due: Mapping[LeaseKey, bool] = field(default_factory=dict)
    #: Blocks whose callers' time is over before a worker began them.
    late: Sequence[BlockKey] = ()


def read_flags(connection: Connection, within_s: float) -> Flags:
    """``within_s``: how soon a lease ends that is told."""
    return Flags(
        refusals=refusals(connection),
        drained=drains.drained(connection),
        transport=transport_seen(connection),
        due=leases.due(connection, within_s),
        late=late_blocks(connection),
    )


def under_way(h: Held) -> UnderWay:
    """A lease that another leader gave."""
    return UnderWay(
        key=h.key,
        rows=h.n_rows,
        bytes=h.bytes,
        seconds=h.predicted_s,
        age_s=h.age_s,
        exclusive=h.exclusive,
        clone=h.clone,
    )
