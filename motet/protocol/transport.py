"""Redis, and every key in it. Transport only: all of it may be lost at any moment and no row is.

Two implementations keep one contract, proved by one suite: `RedisTransport`, and `MemoryTransport` for tests
and the simulator. Keys:

    motet:workers                      set of worker names that ever beat
    motet:w:<worker>:beat              newest Beat, expires
    motet:w:<worker>:control           newest Control, expires
    motet:w:<worker>:running           Running: rows of the micro-batch under way (evidence for poison)
    motet:w:<worker>:in:<sub>:<att>    payload of one attempt, expires
    motet:outcomes                     stream of outcomes, read by the group "aggregators"
    motet:dead                         the last few entries that could not be read
    motet:canary                       random value; another one means that Redis was emptied
    motet.gpu.<worker>                 Celery's queue of the worker: ids and counts only
"""

from __future__ import annotations

import base64
import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from motet.protocol.wire import Assignment, BadMessage, Beat, Control, Running

if TYPE_CHECKING:
    import redis

#: The Celery task that workers register; the scheduler publishes it by name and never imports it.
ENTRY_POINT = "motet.run"
OUTCOMES, DEAD, WORKERS, CANARY = "motet:outcomes", "motet:dead", "motet:workers", "motet:canary"
GROUP = "aggregators"
#: Unreadable entries kept for an operator to look at.
DEAD_KEPT = 100
#: Entries of the stream read at once when only their names are wanted: each is a whole outcome.
_PAGE = 16
#: Entries that may be under settlement at once; the dispatcher stops far below it.
_MANY = 100_000
#: Seconds for which a consumer is left alone after it read: two that inherit from it do not take from each other.
_FRESH_S = 0.3
#: So far ahead of Redis' own clock an entry's id may be: that clock can be set back.
_AHEAD_S = 3600
#: Workers that are gone are forgotten so many at a time.
_FORGOTTEN_AT_ONCE = 20
#: A consumer of another host that asked for nothing for so long, and holds nothing, is forgotten.
_FORGOTTEN_S = 86_400
#: Bytes of payloads that are held encoded at once while a step is sent.
_SENT_AT_ONCE = 8 * 1024 * 1024
#: A beat that was not renewed for so long expires, and its worker is forgotten.
_BEAT_EXPIRES_S = 60


#: Attempt that an entry of the stream is of; None where it does not say.
_Key = tuple[int, int] | None


def queue_name(worker: str) -> str:
    """Celery queue of one worker."""
    return f"motet.gpu.{worker}"


def _key(worker: str, *rest: object) -> str:
    return ":".join(("motet:w", worker, *map(str, rest)))


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the outcome stream, not yet acknowledged."""

    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the aggregators are behind."""

    #: Entries on the outcome stream.
    entries: int
    #: Seconds that the oldest of them has been there; 0 where there is none.
    oldest_s: float


class TransportLost(Exception):
    """Redis does not answer; nothing is known about what was under way. Try again later."""


class SchedulerTransport(Protocol):
    """What the dispatcher and the aggregator need. Every method may raise TransportLost."""

    def identity(self) -> str:
        """Changes when Redis was restarted or emptied: then whatever was under way in it is gone."""
        ...

    def beats(self) -> dict[str, Beat]:
        """Newest beat of every worker that has one. One whose beat has expired is forgotten."""
        ...

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        """Payload, then Celery message, for each. Twice is harmless: the worker runs an attempt once.

        What Redis refuses for one worker is sent to the others all the same, before TransportLost is raised.
        """
        ...

    def queued(self, worker: str) -> set[tuple[int, int]]:
        """Attempts whose message still waits in the worker's queue."""
        ...

    def control(self, controls: Mapping[str, Control]) -> None:
        """Replace the control word of these workers."""
        ...

    def running(self, worker: str) -> Running | None:
        """Rows that ran in the worker's last micro-batch, if it never said that the batch ended."""
        ...

    def forget(self, worker: str) -> None:
        """Drop everything of a worker that is gone: its queue, payloads and words."""
        ...

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        """Entries for this consumer: first those another consumer left for ``reclaim_s``, then new ones."""
        ...

    def inherit(self, consumer: str, gone: Callable[[str], bool], count: int) -> list[Entry]:
        """Entries that consumers which are ``gone`` had read and not settled, for this consumer, at most ``count``.

        Those first that count as read by this consumer itself, and never reached it: the answer was lost on the way.
        So ask only when everything that was read is settled. Consumers that are gone and left nothing are forgotten.
        """
        ...

    def acknowledge(self, entries: Iterable[str]) -> None:
        """Remove entries whose outcome is committed. Only ever call this after COMMIT."""
        ...

    def bury(self, entry: Entry, why: str) -> None:
        """Remove an entry that cannot be read; of the last DEAD_KEPT such the reasons are kept, while there is room."""
        ...

    def waiting_outcomes(self) -> set[tuple[int, int]]:
        """(sub-task, attempt) of outcomes on the stream: these must not be rescued, only merged."""
        ...

    def outcome_backlog(self) -> int:
        """Entries on the stream."""
        ...

    def outcome_lag(self) -> Lag:
        """Entries on the stream, and how long the oldest has waited there by the transport's own clock."""
        ...

    def dead_letters(self) -> int:
        """Unreadable entries that are kept, at most DEAD_KEPT."""
        ...

    def memory_share(self) -> float:
        """Used share of Redis' own memory limit; 0 where it has none."""
        ...


class WorkerTransport(Protocol):
    """What one worker needs. Every method may raise TransportLost."""

    def beat(self, beat: Beat) -> Control | None:
        """Say the beat, hear the newest control word."""
        ...

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        """Payload of an attempt, or None where it has expired or was lost."""
        ...

    def mark_running(self, running: Running | None) -> None:
        """Before a micro-batch: its rows. After it: None."""
        ...

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        """Put an encoded outcome on the stream, and drop the attempt's payload."""
        ...


class _Redis:
    """A connection pool that turns every connection trouble into TransportLost."""

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        from motet.protocol.redis_url import redis_py_url

        self._errors = (redis.RedisError, OSError)
        self.client: redis.Redis = redis.Redis.from_url(
            redis_py_url(url),
            # Without these a half-open connection hangs for ever (reference: reliability 0.4).
            socket_timeout=timeout_s,
            socket_connect_timeout=3,
            health_check_interval=5,
            retry=Retry(NoBackoff(), 1),
        )

    def call(self, act: Callable[[redis.Redis], Any]) -> Any:
        try:
            return act(self.client)
        except self._errors as error:
            raise TransportLost(type(error).__name__) from error

    def close(self) -> None:
        self.client.close()


class RedisTransport:
    """The scheduler's side of Redis."""

    def __init__(self, url: str, *, payload_ttl_s: int = 900) -> None:
        # A leader that waits for a dead line and then takes another one must lead on.
        self._redis = _Redis(url, timeout_s=3.0)
        self._payload_ttl_s = payload_ttl_s
        self._group_made = False
        #: Entry of the stream -> its attempt: those that were looked at.
        self._named: dict[bytes, _Key] = {}

    def close(self) -> None:
        self._redis.close()

    def ping(self) -> None:
        self._redis.call(lambda r: r.ping())

    def identity(self) -> str:
        def ask(r: redis.Redis) -> str:
            pipe = r.pipeline(transaction=False)
            pipe.info("server")
            pipe.get(CANARY)
            info, canary = pipe.execute()
            if canary is None:  # only then is anything written, for a full Redis refuses that
                r.set(CANARY, secrets.token_hex(8), nx=True)
                canary = r.get(CANARY)
            return f"{info['run_id']}:{(canary or b'').decode()}"

        return str(self._redis.call(ask))

    def beats(self) -> dict[str, Beat]:
        def ask(r: redis.Redis) -> tuple[list[str], list[bytes | None]]:
            members: Any = r.smembers(WORKERS)
            names = sorted(bytes(n).decode("utf-8", "replace") for n in members)
            if nameless := [n for n in members if n.decode("utf-8", "replace").encode() != n]:
                r.srem(WORKERS, *nameless)
            raw: Any = r.mget([_key(n, "beat") for n in names]) if names else []
            return names, raw

        names, raw = self._redis.call(ask)
        found: dict[str, Beat] = {}
        for name in [name for name, body in zip(names, raw, strict=True) if body is None][
            :_FORGOTTEN_AT_ONCE
        ]:
            self.forget(name)
        for name, body in zip(names, raw, strict=True):
            try:
                beat = Beat.decode(body or b"")
            except BadMessage:
                continue
            if beat.worker == name:
                found[name] = beat
        return found

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        def send(r: redis.Redis) -> None:
            refused: list[Exception] = []
            pipe, held = r.pipeline(transaction=False), 0

            def flush() -> None:
                answers = pipe.execute(raise_on_error=False)
                refused.extend(answer for answer in answers if isinstance(answer, Exception))

            for worker, assignments in by_worker.items():
                for a in assignments:
                    payload = a.encode()
                    pipe.set(_key(worker, "in", a.subtask, a.attempt), payload, ex=self._payload_ttl_s)
                    # Kombu's own list format, written here so that a step is one round trip and no connection of
                    # Celery's is needed on this side; the contract suite reads it back with a real Celery worker.
                    pipe.lpush(queue_name(worker), celery_message(worker, a))
                    held += len(payload)
                    if held > _SENT_AT_ONCE:
                        flush()
                        held = 0
            flush()
            if refused:
                raise refused[0]

        if by_worker:
            self._redis.call(send)

    def queued(self, worker: str) -> set[tuple[int, int]]:
        raw = self._redis.call(lambda r: r.lrange(queue_name(worker), 0, -1))
        return {key for body in raw if (key := _key_of_message(body)) is not None}

    def control(self, controls: Mapping[str, Control]) -> None:
        def send(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=False)
            for worker, control in controls.items():
                pipe.set(_key(worker, "control"), control.encode(), ex=60)
            pipe.execute()

        if controls:
            self._redis.call(send)

    def running(self, worker: str) -> Running | None:
        raw = self._redis.call(lambda r: r.get(_key(worker, "running")))
        try:
            return Running.decode(raw) if raw else None
        except BadMessage:
            return None

    def forget(self, worker: str) -> None:
        def drop(r: redis.Redis) -> None:
            keys = [queue_name(worker), *r.scan_iter(match=_key(_glob_safe(worker), "*"), count=1000)]
            r.unlink(*keys)
            r.srem(WORKERS, worker)

        self._redis.call(drop)

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        def read(r: redis.Redis) -> list[Entry]:
            claimed = r.xautoclaim(OUTCOMES, GROUP, consumer, int(reclaim_s * 1000), count=count)[1]
            found = [_entry(i, fields) for i, fields in claimed if fields]
            if not found:
                # Blocking longer than the socket's own time-out would look like a lost connection.
                fresh = r.xreadgroup(
                    GROUP, consumer, {OUTCOMES: ">"}, count=count, block=max(1, int(min(block_s, 2.0) * 1000))
                )
                found = [_entry(i, fields) for _, entries in _pairs(fresh) for i, fields in entries]
            if not found:
                self._mend_numbers(r)
            return found

        return self._in_group(read)  # type: ignore[no-any-return]

    def _mend_numbers(self, r: redis.Redis) -> None:
        """Begin an empty stream anew that somebody gave an entry of a far later time.

        Ids only grow: behind the last possible one Redis takes no outcome any more, and its rule outlives the entry.
        """
        pipe = r.pipeline(transaction=False)
        pipe.time()
        pipe.xinfo_stream(OUTCOMES)
        (now_s, _), stream = pipe.execute()
        if not stream["length"] and _order(stream["last-generated-id"])[0] > (now_s + _AHEAD_S) * 1000:
            r.unlink(OUTCOMES)
            self._make_group(r)

    def inherit(self, consumer: str, gone: Callable[[str], bool], count: int) -> list[Entry]:
        def take(r: redis.Redis) -> list[Entry]:
            consumers: Any = r.xinfo_consumers(OUTCOMES, GROUP)
            for one in consumers:
                name, idle_s = bytes(one["name"]).decode("utf-8", "replace"), one["idle"] / 1000
                mine = name == consumer
                if not mine and idle_s < _FRESH_S:
                    continue
                if one["pending"] and (mine or gone(name)):
                    left: Any = r.xpending_range(OUTCOMES, GROUP, "-", "+", count, consumername=one["name"])
                    ids = [entry["message_id"] for entry in left]
                    # The least idle time keeps two heirs from taking the same: the first one makes them fresh.
                    fresh_ms = 0 if mine else int(_FRESH_S * 1000)
                    taken: Any = r.xclaim(OUTCOMES, GROUP, consumer, fresh_ms, ids) if ids else []
                    if found := [_entry(i, fields) for i, fields in taken if fields]:
                        return found
                if not one["pending"] and not mine and (gone(name) or idle_s > _FORGOTTEN_S):
                    r.xgroup_delconsumer(OUTCOMES, GROUP, one["name"])
            return []

        return self._in_group(take)  # type: ignore[no-any-return]

    def _in_group(self, act: Callable[[redis.Redis], Any]) -> Any:
        """Act with the group of aggregators in place: where Redis was emptied it is made again."""

        def in_group(r: redis.Redis) -> Any:
            if not self._group_made:
                self._make_group(r)
            return act(r)

        try:
            return self._redis.call(in_group)
        except TransportLost as lost:
            # Redis answered that there is no such group, or not even the stream.
            if not any(words in str(lost.__cause__) for words in ("NOGROUP", "no such key")):
                raise
            self._group_made = False
            return self._redis.call(in_group)

    def acknowledge(self, entries: Iterable[str]) -> None:
        ids = list(entries)

        def settle(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=True)
            pipe.xack(OUTCOMES, GROUP, *ids)
            pipe.xdel(OUTCOMES, *ids)
            pipe.execute()

        if ids:
            self._redis.call(settle)

    def bury(self, entry: Entry, why: str) -> None:
        def keep(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=True)
            # The body may hold a user's text: its length and the reason are kept, the bytes are not.
            pipe.lpush(DEAD, json.dumps({"id": entry.id, "bytes": len(entry.body), "why": why}))
            pipe.ltrim(DEAD, 0, DEAD_KEPT - 1)
            pipe.execute()

        self.acknowledge([entry.id])
        with suppress(TransportLost):  # a full Redis refuses it, and must be emptied all the same
            self._redis.call(keep)

    def waiting_outcomes(self) -> set[tuple[int, int]]:
        # An entry is a whole outcome, and Redis has no way to tell less of it; so each is read once at most, and from
        # then on it is enough to know which are there: those read and not settled, and those that nobody has read.
        def look(r: redis.Redis) -> set[tuple[int, int]]:
            pipe = r.pipeline(transaction=True)
            pipe.xinfo_stream(OUTCOMES)
            pipe.xinfo_groups(OUTCOMES)
            pipe.xpending_range(OUTCOMES, GROUP, "-", "+", _MANY)
            stream, groups, pending = pipe.execute()
            [given] = [_order(g["last-delivered-id"]) for g in groups if g["name"] == GROUP.encode()]
            standing = {p["message_id"] for p in pending}
            top = stream["last-generated-id"]
            # What lies beyond its last id was in a stream that has been begun anew since.
            known = {i: key for i, key in self._named.items() if _order(i) <= _order(top)}
            unseen = sorted(standing - known.keys())
            for at in range(0, len(unseen), _PAGE):
                pages = r.pipeline(transaction=False)
                for i in unseen[at : at + _PAGE]:
                    pages.xrange(OUTCOMES, i, i)
                known.update(named for page in pages.execute() for named in _named(page))
            unread = {i: key for i, key in known.items() if _order(i) > given}
            self._read_names(r, unread, max(map(_order, unread), default=given), top)
            if len(unread) > stream["length"] - len(standing):  # somebody cut the stream
                unread = {}
                self._read_names(r, unread, given, top)
            self._named = {i: key for i, key in known.items() if i in standing} | unread
            return {key for key in self._named.values() if key is not None}

        return self._in_group(look)  # type: ignore[no-any-return]

    @staticmethod
    def _read_names(r: redis.Redis, into: dict[bytes, _Key], after: tuple[int, int], top: bytes) -> None:
        """Page by page, for an outcome may be large."""
        read: Any = r.xrange
        # Redis refuses a range that would begin behind the last possible id.
        while after < _order(top) and (page := read(OUTCOMES, "({}-{}".format(*after), top, _PAGE)):
            into.update(_named(page))
            after = _order(page[-1][0])

    def outcome_backlog(self) -> int:
        return int(self._redis.call(lambda r: r.xlen(OUTCOMES)))

    def outcome_lag(self) -> Lag:
        def ask(r: redis.Redis) -> list[Any]:
            pipe = r.pipeline(transaction=False)
            pipe.time()
            pipe.xlen(OUTCOMES)
            pipe.xrange(OUTCOMES, count=1)
            return pipe.execute()

        (seconds, micros), entries, oldest = self._redis.call(ask)
        if not oldest:
            return Lag(0, 0.0)
        # An entry's id begins with Redis' own clock in milliseconds.
        since_ms = int(oldest[0][0].partition(b"-")[0])
        return Lag(int(entries), max(0.0, seconds + micros / 1e6 - since_ms / 1000))

    def dead_letters(self) -> int:
        return int(self._redis.call(lambda r: r.llen(DEAD)))

    def readers(self) -> dict[str, float]:
        """Every aggregator that ever asked for outcomes -> seconds since it last did. For health checks."""

        consumers = self._in_group(lambda r: r.xinfo_consumers(OUTCOMES, GROUP))
        return {bytes(one["name"]).decode("utf-8", "replace"): one["idle"] / 1000 for one in consumers}

    def memory_share(self) -> float:
        """Used share of Redis' own memory limit; 0 where it has none."""
        info = self._redis.call(lambda r: r.info("memory"))
        return float(info["used_memory"]) / float(info["maxmemory"]) if info.get("maxmemory") else 0.0

    def _make_group(self, r: redis.Redis) -> None:
        import redis as library

        try:
            r.xgroup_create(OUTCOMES, GROUP, id="0", mkstream=True)
        except library.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._group_made = True


class RedisWorkerTransport:
    """One worker's side of Redis."""

    def __init__(self, url: str, worker: str) -> None:
        self._redis = _Redis(url)
        self._worker = worker

    def close(self) -> None:
        self._redis.close()

    def beat(self, beat: Beat) -> Control | None:
        def say(r: redis.Redis) -> bytes | None:
            pipe = r.pipeline(transaction=False)
            pipe.set(_key(self._worker, "beat"), beat.encode(), ex=_BEAT_EXPIRES_S)
            pipe.sadd(WORKERS, self._worker)
            pipe.get(_key(self._worker, "control"))
            return pipe.execute()[2]  # type: ignore[no-any-return]

        raw = self._redis.call(say)
        try:
            return Control.decode(raw) if raw else None
        except BadMessage:
            return None

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        return self._redis.call(lambda r: r.get(_key(self._worker, "in", subtask, attempt)))  # type: ignore[no-any-return]

    def mark_running(self, running: Running | None) -> None:
        key = _key(self._worker, "running")
        if running is None:
            self._redis.call(lambda r: r.delete(key))
        else:
            self._redis.call(lambda r: r.set(key, running.encode(), ex=3600))

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        def send(r: redis.Redis) -> None:
            pipe = r.pipeline(transaction=True)
            pipe.xadd(OUTCOMES, {"s": subtask, "a": attempt, "m": outcome})
            pipe.delete(_key(self._worker, "in", subtask, attempt))
            pipe.execute()

        self._redis.call(send)

    def probe(self, what: Literal["queue", "outcomes"]) -> int:
        """How many wait in its own queue, or on the stream of outcomes. For ``motet doctor``, which tries its rights."""
        if what == "queue":
            return int(self._redis.call(lambda r: r.llen(queue_name(self._worker))))
        return int(self._redis.call(lambda r: r.xlen(OUTCOMES)))


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker as a looker-on sees it."""

    beat: Beat
    #: Messages that wait in its queue.
    queued: int


class RedisReader:
    """A looker-on's side of Redis: Flower's, whose rights hold nothing that changes anything."""

    def __init__(self, url: str) -> None:
        self._redis = _Redis(url)

    def close(self) -> None:
        self._redis.close()

    def workers(self) -> dict[str, Seen]:
        """Newest beat and length of the queue of every worker that beats. Raises TransportLost."""

        def ask(r: redis.Redis) -> tuple[list[str], list[Any]]:
            members: Any = r.smembers(WORKERS)
            names = sorted(bytes(n).decode("utf-8", "replace") for n in members)
            pipe = r.pipeline(transaction=False)
            for name in names:
                pipe.get(_key(name, "beat"))
                pipe.llen(queue_name(name))
            return names, pipe.execute()

        names, answers = self._redis.call(ask)
        found: dict[str, Seen] = {}
        for name, raw, queued in zip(names, answers[::2], answers[1::2], strict=True):
            try:
                beat = Beat.decode(raw or b"")
            except BadMessage:
                continue
            if beat.worker == name:
                found[name] = Seen(beat, int(queued))
        return found


@dataclass
class MemoryTransport:
    """The same contract without Redis: the scheduler's side, and a worker's side through ``worker(name)``."""

    payloads: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    queues: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    newest_beats: dict[str, Beat] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    under_way: dict[str, Running] = field(default_factory=dict)
    entries: dict[str, tuple[tuple[int, int], bytes]] = field(default_factory=dict)
    #: Entry -> (consumer, when it was read).
    pending: dict[str, tuple[str, float]] = field(default_factory=dict)
    #: Entry -> when it was put on the stream.
    reported_at: dict[str, float] = field(default_factory=dict)
    buried: list[tuple[Entry, str]] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    canary: str = "0"
    _next: int = 0

    def identity(self) -> str:
        return self.canary

    def beats(self) -> dict[str, Beat]:
        return dict(self.newest_beats)

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        for worker, assignments in by_worker.items():
            for a in assignments:
                self.payloads[worker, a.subtask, a.attempt] = a.encode()
                self.queues.setdefault(worker, []).append(a.key)

    def queued(self, worker: str) -> set[tuple[int, int]]:
        return set(self.queues.get(worker, ()))

    def control(self, controls: Mapping[str, Control]) -> None:
        self.controls.update(controls)

    def running(self, worker: str) -> Running | None:
        return self.under_way.get(worker)

    def forget(self, worker: str) -> None:
        for store in (self.queues, self.newest_beats, self.controls, self.under_way):
            store.pop(worker, None)
        self.payloads = {key: p for key, p in self.payloads.items() if key[0] != worker}

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        now = self.clock()
        idle = [i for i, (_, since) in self.pending.items() if now - since >= reclaim_s]
        chosen = (idle or [i for i in self.entries if i not in self.pending])[:count]
        self.pending.update((i, (consumer, now)) for i in chosen)
        return [Entry(i, self.entries[i][1]) for i in chosen]

    def inherit(self, consumer: str, gone: Callable[[str], bool], count: int) -> list[Entry]:
        chosen = [i for i, (name, _) in self.pending.items() if name == consumer or gone(name)][:count]
        self.pending.update((i, (consumer, self.clock())) for i in chosen)
        return [Entry(i, self.entries[i][1]) for i in chosen]

    def acknowledge(self, entries: Iterable[str]) -> None:
        for i in entries:
            for store in (self.entries, self.pending, self.reported_at):
                store.pop(i, None)

    def bury(self, entry: Entry, why: str) -> None:
        self.buried.append((entry, why))
        self.acknowledge([entry.id])

    def waiting_outcomes(self) -> set[tuple[int, int]]:
        return {key for key, _ in self.entries.values()}

    def outcome_backlog(self) -> int:
        return len(self.entries)

    def outcome_lag(self) -> Lag:
        oldest = min(self.reported_at.values(), default=None)
        return Lag(len(self.entries), 0.0 if oldest is None else max(0.0, self.clock() - oldest))

    def dead_letters(self) -> int:
        return min(len(self.buried), DEAD_KEPT)

    def memory_share(self) -> float:
        return 0.0

    def empty(self) -> None:
        """Lose everything, as FLUSHALL or a restart of Redis does."""
        for store in (self.payloads, self.queues, self.newest_beats, self.controls, self.under_way):
            store.clear()
        for kept in (self.entries, self.pending, self.reported_at):
            kept.clear()
        self.buried.clear()
        self.canary = str(int(self.canary) + 1)

    def worker(self, name: str) -> MemoryWorkerTransport:
        return MemoryWorkerTransport(self, name)


@dataclass
class MemoryWorkerTransport:
    """One worker's side of a MemoryTransport."""

    shared: MemoryTransport
    name: str

    def beat(self, beat: Beat) -> Control | None:
        self.shared.newest_beats[self.name] = beat
        return self.shared.controls.get(self.name)

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        return self.shared.payloads.get((self.name, subtask, attempt))

    def mark_running(self, running: Running | None) -> None:
        if running is None:
            self.shared.under_way.pop(self.name, None)
        else:
            self.shared.under_way[self.name] = running

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        self.shared._next += 1
        entry = f"{self.shared._next}-0"
        self.shared.entries[entry] = ((subtask, attempt), outcome)
        self.shared.reported_at[entry] = self.shared.clock()
        self.shared.payloads.pop((self.name, subtask, attempt), None)

    def take(self) -> tuple[int, int] | None:
        """Pop the next message, as Celery does for a real worker."""
        queue = self.shared.queues.get(self.name)
        return queue.pop(0) if queue else None


def celery_message(worker: str, assignment: Assignment) -> str:
    """One Celery message (protocol 2) as kombu stores it in a Redis list. Ids and counts, no text."""
    a = assignment
    task_id = str(uuid.uuid4())
    args = [a.subtask, a.attempt, a.job, len(a.texts)]
    body = json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": ENTRY_POINT,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "shadow": a.pass_kind,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": f"(subtask={a.subtask}, attempt={a.attempt}, rows={len(a.texts)})",
                "kwargsrepr": "{}",
                "origin": "motet-dispatcher",
                "ignore_result": True,
                "motet": [a.subtask, a.attempt],
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue_name(worker)},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def _key_of_message(body: bytes) -> tuple[int, int] | None:
    try:
        subtask, attempt = json.loads(body)["headers"]["motet"]
        return int(subtask), int(attempt)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None


def _order(entry: bytes) -> tuple[int, int]:
    """An entry's place on the stream."""
    ms, _, number = entry.partition(b"-")
    return int(ms), int(number)


def _named(page: Any) -> Iterator[tuple[bytes, _Key]]:
    return ((entry, _key_of_outcome(fields)) for entry, fields in page)


def _key_of_outcome(fields: Mapping[bytes, bytes]) -> _Key:
    try:
        return int(fields[b"s"]), int(fields[b"a"])
    except (ValueError, KeyError):
        return None


def _entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    return Entry(entry_id.decode(), fields.get(b"m", b""))


def _pairs(read: Any) -> Iterable[tuple[Any, Any]]:
    """XREADGROUP answers a list of pairs under RESP2 and a mapping under RESP3."""
    if isinstance(read, Mapping):
        return [(name, [e for batch in batches for e in batch]) for name, batches in read.items()]
    return read or []


def _glob_safe(worker: str) -> str:
    return "".join(f"[{c}]" if c in "*?[]\\" else c for c in worker)
