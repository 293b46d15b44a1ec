"""What the doctor makes of the facts of a cluster: Redis, Postgres, workers, models, leader. No clock, no I/O.

Limits stand beside the check that uses them. A remedy is something that can be typed or set.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from motet.doctor import Area, CheckState, Finding
from motet.doctor.checks import CLOCK_S, GB

SERVER, REDIS, POSTGRES, WORKERS, MODELS = map(Area, ("server", "redis", "postgres", "workers", "models"))

# -- Redis -------------------------------------------------------------------------------------------

#: The oldest release that has every command that is used.
REDIS_OLDEST = (6, 2)
#: Seconds of a round trip; with more, the leader's steps take noticeably longer.
RTT_WARN_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """What a role saw of Redis. ``info`` is empty where the role may not ask."""

    #: Kind of trouble that the first command met; empty: Redis answers.
    error: str = ""
    version: str = ""
    #: maxmemory, maxmemory_policy, aof_enabled, used_memory …, as INFO names them.
    info: Mapping[str, str | int | float]
    #: Commands that the role should be allowed and is not.
    denied: tuple[str, ...] = ()
    rtt_s: float = 0.0


_REDIS_REMEDIES = {
    "AuthenticationError": "mend user and password in MOTET_REDIS_URL, or make the user (docs/operations.md)",
    "NoPermissionError": "give the user the rights of its role (docs/operations.md, `A second host`)",
    "OutOfMemoryError": "Redis is full: start another aggregator (python -m scheduler aggregate), or raise maxmemory",
}


def redis(facts: RedisFacts, role: str) -> list[Finding]:
    """Whether Redis answers, is new enough, evicts nothing, has a limit, and lets this role do its work."""
    if facts.error:
        remedy = _REDIS_REMEDIES.get(
            facts.error, "start Redis, open its port to this host, or mend MOTET_REDIS_URL"
        )
        return [REDIS.fail("reach", f"no use of Redis: {facts.error}", remedy)]
    pace: CheckState = "warn" if facts.rtt_s > RTT_WARN_S else "ok"
    what = f"answers in {facts.rtt_s * 1000:.1f} ms"
    found = [REDIS.finding("reach", pace, what, "run the scheduler nearer to Redis")]
    release = tuple(int(part) for part in re.findall(r"\d+", facts.version)[:2])
    if release and release < REDIS_OLDEST:
        what = f"Redis {facts.version}; expected 6.2 or newer (XAUTOCLAIM)"
        found.append(REDIS.fail("version", what, "upgrade Redis, or use Valkey"))
    elif release:
        found.append(REDIS.ok("version", f"Redis {facts.version}"))
    if facts.denied:
        what = f"the user may not {', '.join(facts.denied)}, which the {role} needs"
        remedy = (
            f"give its user the rights of a {role}: docs/operations.md, `A second host`, shows the ACL lines"
        )
        found.append(REDIS.fail("rights", what, remedy))
    else:
        found.append(REDIS.ok("rights", f"enough for the {role}"))
    if not facts.info:
        found.append(REDIS.skipped("memory", f"the {role} may not ask; the server's side looks at it"))
        return found
    return [*found, *_redis_memory(facts.info)]


def _redis_memory(info: Mapping[str, str | int | float]) -> list[Finding]:
    policy, limit = str(info.get("maxmemory_policy", "")), float(info.get("maxmemory", 0))
    used = float(info.get("used_memory", 0))
    persistence = (
        "on: fine, and not needed"
        if int(info.get("aof_enabled", 0))
        else "off: fine, a restart repeats some work"
    )
    return [
        _redis_policy(policy),
        _redis_room(used, limit),
        REDIS.ok("persistence", f"appendonly {persistence}"),
    ]


def _redis_policy(policy: str) -> Finding:
    if policy == "noeviction":
        return REDIS.ok("policy", policy)
    return REDIS.fail(
        "policy",
        f"maxmemory-policy is {policy}: payloads and outcomes may vanish, and their work is repeated",
        "set `maxmemory-policy noeviction` in redis.conf, and CONFIG SET it now",
    )


def _redis_room(used: float, limit: float) -> Finding:
    if limit == 0:
        return REDIS.warn(
            "memory",
            "no maxmemory: a full Redis takes the whole machine's memory",
            "set `maxmemory 1gb` in redis.conf, and CONFIG SET it now",
        )
    if used / limit > 0.7:
        return REDIS.warn(
            "memory",
            f"{used / limit:.0%} of {limit / GB:.1f} GB used: beyond 70 % nothing more is sent to workers",
            "start another aggregator (python -m scheduler aggregate), or raise maxmemory",
        )
    return REDIS.ok("memory", f"{used / 1024**2:.0f} MB of {limit / 1024**2:,.0f} MB used")


# -- workers and models ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker's beat, as far as the doctor reads it."""

    worker: str
    #: ``starting``, ``ready``, ``draining``, ``silent``.
    state: str
    protocol: int


def workers(seen: Sequence[WorkerFacts], protocol: int) -> list[Finding]:
    """Whether any worker can take work, and which cannot."""
    other = [w for w in seen if w.protocol != protocol]
    silent = [w for w in seen if w.state == "silent"]
    fit = [w for w in seen if w not in other and w not in silent]
    ready = [w for w in fit if w.state == "ready"]
    rest = {state: sum(w.state == state for w in fit) for state in ("starting", "draining")}
    more = "".join(f", {n} {state}" for state, n in rest.items() if n)
    if ready:
        found = [WORKERS.ok("ready", f"{len(ready)} ready{more}")]
    elif seen:
        what = f"none of {len(seen)} workers is ready{more}"
        found = [
            WORKERS.fail("ready", what, "`motet workers` lists them; `motet resume WORKER` ends a drain")
        ]
    else:
        found = [WORKERS.warn("ready", "no worker beats: jobs wait", "motet worker --gpus all, or --cpus 2")]
    if silent:
        remedy = (
            "look at their hosts: is the process up, does it reach Redis? They are forgotten after a minute"
        )
        found.append(WORKERS.warn("silent", f"silent: {_names(silent)}", remedy))
    if other:
        what = f"of another protocol than {protocol}, and given no work: {_names(other)}"
        remedy = "install the server's version of motet there and restart them"
        found.append(WORKERS.fail("protocol", what, remedy))
    return found


def _names(some: Sequence[WorkerFacts]) -> str:
    return _few([w.worker for w in some])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def models(count: int) -> Finding:
    """Whether there is a model to name in a task."""
    if count:
        return MODELS.ok("registered", f"{count} registered")
    return MODELS.warn(
        "registered",
        "no model is registered: every job is refused",
        "python -m workers register --builtin, or motet models add FOLDER --name NAME",
    )


# -- Postgres ----------------------------------------------------------------------------------------

#: The oldest release that motet was tried with.
POSTGRES_OLDEST = 15
#: Free connections below which the next API cannot start, and below which running processes are refused theirs.
FREE_CONNECTIONS_WARN, FREE_CONNECTIONS_FAIL = 20, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresFacts:
    """What Postgres says of itself."""

    #: ``server_version_num`` / 10000.
    release: int
    version: str
    fsync: str
    synchronous_commit: str
    full_page_writes: str
    max_connections: int
    #: Connections that are left to a user who is no superuser.
    free_connections: int
    size_bytes: int
    #: Revisions of migrations: of the database (None: never migrated), and the newest of this code.
    revision: str | None
    head: str
    #: Postgres' clock less that of this process.
    clock_s: float


def postgres(f: PostgresFacts) -> list[Finding]:
    """Whether Postgres is new enough, keeps its promises, has room for connections, and has motet's tables."""
    found = [_release(f), _migrations(f), _durability(f)]
    state: CheckState = "ok"
    if f.free_connections < FREE_CONNECTIONS_WARN:
        state = "fail" if f.free_connections < FREE_CONNECTIONS_FAIL else "warn"
    remedy = "raise max_connections (an API takes up to 17, a dispatcher or aggregator up to 5)"
    found.append(
        POSTGRES.finding("connections", state, f"{f.free_connections} of {f.max_connections} left", remedy)
    )
    if abs(f.clock_s) > CLOCK_S:
        what = f"{abs(f.clock_s):.1f} s apart from the API's; leases and tokens follow Postgres' own"
        found.append(POSTGRES.warn("clock", what, "timedatectl set-ntp true on both hosts"))
    return found


def _release(f: PostgresFacts) -> Finding:
    if f.release < POSTGRES_OLDEST:
        what = f"Postgres {f.version}; expected {POSTGRES_OLDEST} or newer"
        return POSTGRES.fail("version", what, "upgrade Postgres (pg_upgrade)")
    return POSTGRES.ok("version", f"Postgres {f.version}, {f.size_bytes / GB:.2f} GB of motet's")


def _migrations(f: PostgresFacts) -> Finding:
    if f.revision == f.head:
        return POSTGRES.ok("migrations", f"at {f.head}, the newest")
    remedy = "python -m scheduler migrate"
    if f.revision is not None and f.revision > f.head:
        remedy = "install the newer motet here too: an old one must not write a newer database"
    what = f"the database is at {f.revision or 'nothing'}, this motet at {f.head}"
    return POSTGRES.fail("migrations", what, remedy)


def _durability(f: PostgresFacts) -> Finding:
    off = [name for name in ("fsync", "synchronous_commit", "full_page_writes") if getattr(f, name) == "off"]
    if not off:
        return POSTGRES.ok("durability", "fsync, synchronous_commit and full_page_writes are on")
    what = f"{', '.join(off)} off: a power cut loses jobs that were answered with 202"
    remedy = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off) + "; SELECT pg_reload_conf()"
    return POSTGRES.fail("durability", what, remedy)


# -- the server --------------------------------------------------------------------------------------


def in_clear(url: str) -> Finding | None:
    """A warning where token and texts would cross the open internet unencrypted."""
    parts = urlsplit(url)
    try:
        public = ipaddress.ip_address(parts.hostname or "").is_global
    except ValueError:
        return None
    if parts.scheme != "http" or not public:
        return None
    return SERVER.warn(
        "encryption",
        f"{url}: token and texts travel in clear to a public address",
        "put a TLS proxy before the API and use https://, or a VPN",
    )


def versions(mine: str, theirs: str, my_protocol: int, their_protocol: int) -> Finding:
    """motet here and there. Workers of another protocol get no work; another version is fine."""
    if my_protocol != their_protocol:
        return SERVER.fail(
            "version",
            f"motet {mine} here speaks protocol {my_protocol}, the server's {theirs} speaks {their_protocol}",
            "install the server's version here: a worker of another protocol gets no work",
        )
    if mine != theirs:
        return SERVER.warn(
            "version",
            f"motet {mine} here, {theirs} at the server; their protocol is the same",
            "fine while you upgrade; then give both the same version",
        )
    return SERVER.ok("version", f"motet {mine} here and there")


def leader(leads: bool, holder: str, epoch: int) -> Finding:
    """Whether a dispatcher leads."""
    if leads:
        return SERVER.ok("leader", f"{holder} leads, epoch {epoch}")
    return SERVER.fail(
        "leader",
        "no dispatcher leads: nothing is given to workers",
        "start one: python -m scheduler dispatch; its log says what stops it",
    )


#: Outcomes that may wait; with more, the aggregators do not keep up.
BACKLOG_WARN = 1000


def backlog(entries: int) -> Finding:
    """Whether outcomes are merged as fast as they come."""
    if entries <= BACKLOG_WARN:
        return SERVER.ok("outcomes", f"{entries} wait to be merged")
    return SERVER.warn(
        "outcomes",
        f"{entries:,} outcomes wait to be merged; nothing more is sent to workers meanwhile",
        "start another aggregator: python -m scheduler aggregate",
    )


def webhooks(count: int, failing: Mapping[str, float], behind: int, behind_s: float) -> list[Finding]:
    """Whether events reach those that wait for them.

    ``failing``: webhooks that fail for long -> seconds. ``behind``: events that are due since ``behind_s`` seconds at most,
    though their webhooks take others.
    """
    found = []
    if failing:
        longest = max(failing.values())
        what = f"{_few(sorted(failing, key=lambda one: -failing[one]))} took nothing for up to {longest / 3600:.1f} h"
        remedy = "mend the receiver, then `motet webhooks replay ID`; or `motet webhooks remove ID`"
        found.append(SERVER.warn("webhooks", what, f"`motet webhooks list` says why; {remedy}"))
    if behind:
        what = f"{behind:,} events are due for up to {behind_s:.0f} s, and are not delivered"
        remedy = "an API process delivers them: is one up, and what does its log say? python -m scheduler api"
        found.append(SERVER.fail("deliveries", what, remedy))
    if count and not found:
        found.append(SERVER.ok("webhooks", f"{count} webhooks, none of which fails for long"))
    return found


#: An aggregator asks twice a second; one that commits a very large batch may take this long.
READ_S = 15.0


def aggregator(asked_s: float | None) -> Finding:
    """Whether an aggregator runs. ``asked_s``: seconds since one asked for outcomes; None: none ever did."""
    if asked_s is not None and asked_s <= READ_S:
        return SERVER.ok("aggregator", f"asked {asked_s:.1f} s ago")
    when = "ever asked for outcomes" if asked_s is None else f"asked for outcomes for {asked_s:.0f} s"
    return SERVER.fail(
        "aggregator",
        f"no aggregator {when}: what workers compute is not recorded",
        "start one: python -m scheduler aggregate; its log says what stops it",
    )
