"""The scheduler's side of Redis: beats, leases sent, outcomes read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

from motet.protocol.envelope import BadMessage
from motet.protocol.transport.beats import NewestBeats
from motet.protocol.transport.connection import RedisConnection, as_command
from motet.protocol.transport.contract import DEAD_KEPT, Entry, Heard, Lag, TransportLost
from motet.protocol.transport.keys import (
    CANARY,
    DEAD,
    DIFFERENCES,
    GROUP,
    OUTCOMES,
    WORKERS,
    beat_key,
    control_key,
    every_key_of,
    payload_key,
    queue_name,
    running_key,
    worker_key,
)
from motet.protocol.transport.message import attempt_of, celery_message
from motet.protocol.transport.reader import by_name
from motet.protocol.wire import Assignment, Beat, Control, Running

if TYPE_CHECKING:
    import redis

#: Entries of the stream in one read of their names. Each is a whole outcome: more at once is more memory.
_PAGE = 16
#: Pending entries that one read of the group lists at most; the dispatcher stops at far fewer.
_MANY = 100_000
#: What others read and did not settle is looked for so often, in seconds; more often where it is reclaimed sooner. A
#: search at each read is a round trip for nothing.
_CLAIM_S = 1.0
#: Seconds for which a consumer that just read is left alone, so that two heirs do not take from each other.
_FRESH_S = 0.3
#: An entry's id may be this many seconds ahead of Redis' clock, which can be set back, before the stream is begun anew.
_AHEAD_S = 3600
#: Workers without a beat that one read of beats forgets at most; more would hold up the leader's step.
_FORGOTTEN_AT_ONCE = 20
#: A consumer of another host that holds nothing is forgotten after this many seconds without a read.
_FORGOTTEN_S = 86_400
#: Bytes of encoded payloads in one pipeline; more is memory held at once, less is more round trips.
_SENT_AT_ONCE = 8 * 1024 * 1024

_MEMBERS = as_command(b"SMEMBERS", WORKERS.encode())

#: (sub-task, attempt) of an entry on the stream; None where it does not say.
AttemptKey = tuple[int, int] | None


class RedisTransport:
    """The scheduler's side of Redis."""

    def __init__(self, url: str, *, payload_ttl_s: int = 900) -> None:
        # A leader that waits for a dead connection and then opens another must keep its lease meanwhile.
        self._redis = RedisConnection(url, timeout_s=3.0)
        self._payload_ttl_s = payload_ttl_s
        self._group_made = False
        #: When `read_outcomes` looked last for what others left, and found nothing.
        self._claimed_at = -inf
        #: Entry of the stream -> its attempt, for entries that were read once.
        self._named: dict[bytes, AttemptKey] = {}
        self._newest = NewestBeats()
        #: All workers as Redis told them last, the same by name, and what asks for their beats.
        self._members: Any = []
        self._names: list[str] = []
        self._question: list[bytes] = []

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
        self._hear()
        return self._newest.whole()

    def hear(self) -> Heard:
        renewed = self._hear()
        return Heard(dict(self._newest.beats), renewed)

    def _hear(self) -> frozenset[str]:
        members, *raw = self._asked(_MEMBERS, *self._question)
        if members != self._members:
            names, nameless = by_name(members)
            if nameless:
                self._redis.call(lambda r: r.srem(WORKERS, *nameless))
            question = [as_command(b"MGET", *(beat_key(name).encode() for name in names))] if names else []
            raw = self._asked(*question)
            self._members, self._names, self._question = members, names, question
        renewed = self._newest.take_in(self._names, raw[0] if raw else [])
        if silent := self._newest.silent():
            self._forget(silent[:_FORGOTTEN_AT_ONCE])
        return renewed

    def _asked(self, *commands: bytes) -> list[Any]:
        """What Redis answers to each of these. Raises TransportLost, also where it refuses one."""
        answers = self._redis.exchange(commands) if commands else []
        if refused := [a for a in answers if isinstance(a, Exception)]:
            raise TransportLost(type(refused[0]).__name__) from refused[0]
        return answers

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        ttl_s = str(self._payload_ttl_s).encode()
        refused: list[Exception] = []
        commands: list[bytes] = []
        held = 0
        for worker, assignments in by_worker.items():
            queue = queue_name(worker).encode()
            for a in assignments:
                key, payload = payload_key(worker, a.subtask, a.attempt).encode(), a.encode()
                commands.append(as_command(b"SET", key, payload, b"EX", ttl_s))
                # Kombu's own list format, written here so that a step is one round trip and no connection of
                # Celery's is needed on this side; the contract suite reads it back with a real Celery worker.
                commands.append(as_command(b"LPUSH", queue, celery_message(worker, a).encode()))
                held += len(payload)
                if held > _SENT_AT_ONCE:
                    refused += self._sent(commands)
                    commands, held = [], 0
        if commands:
            refused += self._sent(commands)
        if refused:
            raise TransportLost(type(refused[0]).__name__) from refused[0]

    def _sent(self, commands: Sequence[bytes]) -> list[Exception]:
        """What Redis refused of these."""
        return [answer for answer in self._redis.exchange(commands) if isinstance(answer, Exception)]

    def queued(self, worker: str) -> set[tuple[int, int]]:
        return self.queued_at([worker])[worker]

    def queued_at(self, workers: Collection[str]) -> dict[str, set[tuple[int, int]]]:
        def ask(r: redis.Redis) -> list[list[bytes]]:
            pipe = r.pipeline(transaction=False)
            for worker in workers:
                pipe.lrange(queue_name(worker), 0, -1)
            return pipe.execute()

        queues = self._redis.call(ask) if workers else []
        return {
            worker: {key for body in queue if (key := attempt_of(body)) is not None}
            for worker, queue in zip(workers, queues, strict=True)
        }

    def control(self, controls: Mapping[str, Control]) -> None:
        self._asked(
            *(
                as_command(b"SET", control_key(worker).encode(), control.encode(), b"EX", b"60")
                for worker, control in controls.items()
            )
        )

    def running(self, worker: str) -> Running | None:
        return self.running_at([worker])[worker]

    def running_at(self, workers: Collection[str]) -> dict[str, Running | None]:
        raw = self._redis.call(lambda r: r.mget([running_key(w) for w in workers])) if workers else []
        return {worker: _running(body) for worker, body in zip(workers, raw, strict=True)}

    def forget(self, worker: str) -> None:
        self._forget([worker])

    def _forget(self, workers: Sequence[str]) -> None:
        """All keys are looked through once, however many workers are gone."""
        mine = tuple(worker_key(worker, "").encode() for worker in workers)
        match = every_key_of(workers[0]) if len(workers) == 1 else worker_key("*")

        def drop(r: redis.Redis) -> None:
            keys = [key for key in r.scan_iter(match=match, count=1000) if key.startswith(mine)]
            r.unlink(*map(queue_name, workers), *keys)
            r.srem(WORKERS, *workers)

        self._redis.call(drop)

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        def read(r: redis.Redis) -> list[Entry]:
            found: list[Entry] = []
            if (now := time.monotonic()) >= self._claimed_at + min(_CLAIM_S, reclaim_s / 10):
                claimed = r.xautoclaim(OUTCOMES, GROUP, consumer, int(reclaim_s * 1000), count=count)[1]
                found = [_entry(i, fields) for i, fields in claimed if fields]
                # As long as there is some it is looked for again at once.
                self._claimed_at = -inf if found else now
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
        """Begin the stream anew where it is empty and its last id lies far in the future.

        Ids only grow: behind the last possible id Redis takes no more outcomes, even after the entry is gone.
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
        # An entry is a whole outcome, and Redis has no way to read a part of one. So each is read once at most; from
        # then on the ids tell which are there: those read and not settled, and those that no aggregator has read.
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
            if len(unread) > stream["length"] - len(standing):  # another program cut the stream
                unread = {}
                self._read_names(r, unread, given, top)
            self._named = {i: key for i, key in known.items() if i in standing} | unread
            return {key for key in self._named.values() if key is not None}

        return self._in_group(look)  # type: ignore[no-any-return]

    @staticmethod
    def _read_names(
        r: redis.Redis, into: dict[bytes, AttemptKey], after: tuple[int, int], top: bytes
    ) -> None:
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

    def count_differences(self, more: int) -> None:
        self._redis.call(lambda r: r.incrby(DIFFERENCES, more))

    def differences(self) -> int:
        return int(self._redis.call(lambda r: r.get(DIFFERENCES)) or 0)

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


def _running(raw: bytes | None) -> Running | None:
    try:
        return Running.decode(raw) if raw else None
    except BadMessage:
        return None


def _order(entry: bytes) -> tuple[int, int]:
    """An entry's place on the stream."""
    ms, _, number = entry.partition(b"-")
    return int(ms), int(number)


def _named(page: Any) -> Iterator[tuple[bytes, AttemptKey]]:
    return ((entry, _key_of_outcome(fields)) for entry, fields in page)


def _key_of_outcome(fields: Mapping[bytes, bytes]) -> AttemptKey:
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
