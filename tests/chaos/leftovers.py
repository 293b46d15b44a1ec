"""What nobody may leave behind: keys in Redis, rows of Postgres, processes, files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import psycopg
import redis

from motet.local.children import marked
from motet.protocol.transport import GROUP, OUTCOMES
from tests.chaos.house import House

#: So long after the last job has ended the last word may still be under way.
SETTLE_S = 20.0
#: Of an ended job nothing of these stays.
ENDED = {
    "leases": "SELECT count(*) FROM lease",
    "open sub-tasks": "SELECT count(*) FROM subtask WHERE state = 'open'",
    "pieces": "SELECT count(*) FROM piece",
    "unsealed cells of succeeded jobs": """SELECT count(*) FROM cells
        WHERE job_id IN (SELECT id FROM job WHERE state = 'succeeded')""",
    "jobs under way": "SELECT count(*) FROM job WHERE state IN ('loading', 'running')",
    "columns that no job shows": """SELECT count(*) FROM sealed_column c
        WHERE NOT EXISTS (SELECT 1 FROM block_column b WHERE b.column_id = c.id)""",
    "columns whose references are miscounted": """SELECT count(*) FROM sealed_column c
        WHERE refs <> (SELECT count(*) FROM block_column b WHERE b.column_id = c.id)""",
}


#: All keys that motet has in Redis (motet/protocol/transport), but for queues, which are there only while they hold messages.
KEYS = re.compile(
    rb"motet:(outcomes|dead|workers|canary|w:WORKER:(beat|control|running|in:\d+:\d+))|motet\.gpu\.WORKER"
    rb"|_kombu\.binding(_permanent)?\.(motet\.gpu\.WORKER|celeryev)".replace(b"WORKER", rb"[a-z0-9-]{1,80}")
)


def in_services(house: House, jobs: tuple[int, int]) -> dict[str, int]:
    """What is left in Redis and Postgres, by name, once it stays the same; only what is not 0.

    ``jobs``: how many may be stored, at least and at most."""
    until = time.monotonic() + SETTLE_S
    while (left := _left(house, jobs)) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def _left(house: House, jobs: tuple[int, int]) -> dict[str, int]:
    try:
        return {**_in_redis(house), **_in_postgres(house, jobs)}
    except (redis.RedisError, psycopg.Error, OSError) as error:
        return {f"silent service ({type(error).__name__})": 1}


def _in_redis(house: House) -> dict[str, int]:
    with house.redis() as client:
        keys = [bytes(key) for key in client.scan_iter(count=1000)]
        found = {
            "payloads that never expire": len([k for k in keys if b":in:" in k and client.ttl(k) == -1]),
            "messages": sum(client.llen(key) for key in keys if key.startswith(b"motet.gpu.")),
            "outcomes": client.xlen(OUTCOMES),
            "unacknowledged": _unacknowledged(client),
        }
        found |= {f"key that nobody knows: {key!r}": 1 for key in keys if not KEYS.fullmatch(key)}
    return {name: count for name, count in found.items() if count}


def payloads(house: House) -> int:
    """Payloads of attempts that were lost, which lie in Redis until they expire."""
    try:
        with house.redis() as client:
            return len(list(client.scan_iter(match="motet:w:*:in:*", count=1000)))
    except (redis.RedisError, OSError):
        return 0


def _unacknowledged(client: redis.Redis) -> int:
    try:
        return int(cast("Mapping[str, Any]", client.xpending(OUTCOMES, GROUP))["pending"])
    except redis.ResponseError:
        return 0  # nobody has read since Redis was emptied


def _in_postgres(house: House, jobs: tuple[int, int]) -> dict[str, int]:
    found = {name: int(house.sql(statement)[0][0]) for name, statement in ENDED.items()}
    stored, (least, most) = int(house.sql("SELECT count(*) FROM job")[0][0]), jobs
    found["jobs that nobody submitted"] = max(0, stored - most)
    found["jobs too few"] = max(0, least - stored)
    return {name: count for name, count in found.items() if count}


def after_stop(house: House) -> Callable[[], dict[str, int]]:
    """Call before the house is stopped; what it returns tells then what is left of processes and files."""
    servers = set(house.pids.values())
    sockets = [link.readlink() for link in house.data.glob("*/run")]

    def look() -> dict[str, int]:
        alive = {pid for pid in servers if Path(f"/proc/{pid}").exists()} | marked(str(house.data))
        files = [
            path
            for path in house.data.rglob("*")
            if path.is_file() and not _known(path.relative_to(house.data))
        ]
        found = {
            "processes": len(alive),
            "unknown files": len(files),
            "folders of sockets": sum(path.exists() for path in sockets),
        }
        return {name: count for name, count in found.items() if count}

    return look


def _known(path: Path) -> bool:
    """Files that a cluster keeps on purpose."""
    folders = ("logs", "engines", "postgres", "valkey", "pulse")
    return path.parts[0] in folders or (len(path.parts) == 1) or path.parts[:2] == ("cache", "names")
