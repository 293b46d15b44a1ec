"""What each user of Redis may not do, on a real Valkey with the very rights that `motet up` and compose give out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from motet.local.valkey import RIGHTS, ValkeyUrls, acl
from motet.protocol.redis_url import redis_py_url

#: Nobody may do these: they run code, show or change the server, or see what others do.
NOBODY = (
    *(
        "FLUSHALL",
        "FLUSHDB",
        "SWAPDB 0 1",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "CONFIG REWRITE",
        "SHUTDOWN",
    ),
    *(
        "EVAL return(1) 0",
        "EVALSHA x 0",
        "SCRIPT LOAD return(1)",
        "FUNCTION LIST",
        "FCALL x 0",
        "MODULE LIST",
    ),
    *("ACL LIST", "ACL SETUSER worker on", "ACL GETUSER scheduler", "MONITOR", "SLOWLOG GET"),
    *(
        "CLIENT LIST",
        "CLIENT KILL TYPE normal",
        "CLIENT PAUSE 1",
        "REPLICAOF 127.0.0.1 1",
        "SYNC",
        "PSYNC ? -1",
    ),
    *("SAVE", "BGSAVE", "BGREWRITEAOF", "FAILOVER", "KEYS *", "MIGRATE h 1 k 0 1", "LATENCY RESET"),
    *("RESTORE k 0 x", "SORT motet:dead BY nosort"),
)
#: What only the scheduler may: to hand out work, to read outcomes, to say who leads and what was buried.
SCHEDULER_ONLY = (
    *("LPUSH motet.gpu.w {}", "RPUSH motet.gpu.w {}", "LRANGE motet.gpu.w 0 -1", "DEL motet.gpu.w"),
    *(
        "XRANGE motet:outcomes - +",
        "XREAD STREAMS motet:outcomes 0",
        "XDEL motet:outcomes 1-1",
        "DEL motet:outcomes",
    ),
    *("XGROUP CREATE motet:outcomes g 0", "XREADGROUP GROUP aggregators me STREAMS motet:outcomes >"),
    *(
        "XACK motet:outcomes aggregators 1-1",
        "XTRIM motet:outcomes MAXLEN 0",
        "XAUTOCLAIM motet:outcomes g me 0 0",
    ),
    *(
        "GET motet:canary",
        "SET motet:canary x",
        "LRANGE motet:dead 0 -1",
        "LPUSH motet:dead x",
        "DEL motet:workers",
    ),
    *(
        "SCAN 0",
        "RANDOMKEY",
        "DBSIZE",
        "RENAME motet:workers x",
        "COPY motet:w:w:beat x",
        "SET anything 1",
        "INFO",
    ),
    *("GET anything", "SET _kombu.binding.x 1", "SUBSCRIBE motet", "PSUBSCRIBE *", "PUBLISH motet x"),
    *("PUBSUB CHANNELS", "TYPE motet:w:w:beat", "OBJECT ENCODING motet:w:w:beat", "DUMP motet:w:w:beat"),
)
#: Beyond that Flower only reads: beats, queue lengths and events.
FLOWER_EITHER = (
    *("SET motet:w:w:beat x", "GET motet:w:w:control", "GET motet:w:w:in:1:1", "GET motet:w:w:running"),
    *("MGET motet:w:w:beat", "DEL motet:w:w:beat", "SADD motet:workers x", "SREM motet:workers x"),
    *(
        "XADD motet:outcomes * m x",
        "XLEN motet:outcomes",
        "BRPOP motet.gpu.w 1",
        "PUBLISH /0.celeryev/task.sent x",
    ),
    *("PUBLISH motet:say:a x", "SUBSCRIBE motet:say:a"),
)
#: And a worker listens to nobody's events, nor to what others say.
WORKER_EITHER = (
    "SUBSCRIBE motet:say:a",
    "PSUBSCRIBE motet:say:*",
    "PUBLISH motet:said:a x",
    "PSUBSCRIBE /0.celeryev/*",
    "SUBSCRIBE /0.celeryev/x",
    "PUBLISH /0.celery.pidbox x",
    "BRPOP celeryev.x 1",
)

TABLE = (
    *((role, command) for role in RIGHTS for command in NOBODY),
    *((role, command) for role in ("worker", "flower") for command in SCHEDULER_ONLY),
    *(("flower", command) for command in FLOWER_EITHER),
    *(("worker", command) for command in WORKER_EITHER),
)


@pytest.fixture(scope="module")
def lines(redis_urls: ValkeyUrls) -> Iterator[dict[str, redis.Redis]]:
    """A connection for each role."""
    found = {
        role: redis.Redis.from_url(redis_py_url(getattr(redis_urls, role)), socket_timeout=5)
        for role in RIGHTS
    }
    yield found
    for line in found.values():
        line.close()


def test_debugging_is_off_for_everybody(lines: dict[str, redis.Redis]) -> None:
    """Its own setting comes before any rights."""
    for line in lines.values():
        with pytest.raises(redis.ResponseError, match="DEBUG command not allowed"):
            line.execute_command("DEBUG", "JMAP")


@pytest.mark.parametrize("role", RIGHTS)
def test_a_role_is_refused_whatever_is_not_its_work(lines: dict[str, redis.Redis], role: str) -> None:
    done = []
    for command in [command for one, command in TABLE if one == role]:
        try:
            lines[role].execute_command(*command.split())
            done.append(command)
        except redis.exceptions.NoPermissionError:
            pass
        except redis.RedisError as error:
            done.append(f"{command}: {type(error).__name__}: {error}")
    assert not done


def test_the_table_is_about_commands_that_exist(lines: dict[str, redis.Redis]) -> None:
    """A slip of the pen would be refused as well, and would prove nothing."""
    # COMMAND is among the scheduler's rights.
    names = {command.split()[0].lower() for _, command in TABLE}
    known = lines["scheduler"].execute_command("COMMAND", "INFO", *sorted(names))
    entries = known.values() if isinstance(known, dict) else known
    assert len([entry for entry in entries if entry]) == len(names)


def test_nobody_comes_in_without_a_password_or_with_another_roles(redis_urls: ValkeyUrls) -> None:
    worker = redis_py_url(redis_urls.worker)
    _, at, where = worker.partition("@")
    password = worker.partition("://")[2].partition("@")[0].partition(":")[2]
    for who in ("", "worker:wrong@", f"scheduler:{password}@", "default:@", f":{password}@"):
        with (
            redis.Redis.from_url(f"unix://{who}{where}") as line,
            pytest.raises(redis.RedisError, match=r"(?i)auth|pass"),
        ):
            line.execute_command("PING")
    assert at


def test_every_role_can_do_its_own_work(lines: dict[str, redis.Redis]) -> None:
    """The table refuses, and does not simply refuse everything."""
    for role, command in (
        ("worker", "SET motet:w:w:beat x"),
        ("worker", "GET motet:w:w:control"),
        ("worker", "SADD motet:workers w"),
        ("worker", "XADD motet:outcomes * m x"),
        ("worker", "LLEN motet.gpu.w"),
        ("worker", "PUBLISH motet:say:a x"),
        ("flower", "SMEMBERS motet:workers"),
        ("flower", "GET motet:w:w:beat"),
        ("flower", "LLEN motet.gpu.w"),
        ("scheduler", "LPUSH motet.gpu.w x"),
        ("scheduler", "SCAN 0"),
        ("scheduler", "INFO server"),
        ("scheduler", "DEL motet.gpu.w motet:w:w:beat motet:workers motet:outcomes"),
    ):
        lines[role].execute_command(*command.split())


def test_the_file_of_users_holds_digests_only() -> None:
    passwords = {role: f"password-of-{role}" for role in RIGHTS}
    told = "\n".join(acl(passwords))
    assert not any(password in told for password in passwords.values())
    assert "user default off" in told
    assert "nopass" not in told


# -- code that nobody installed


#: Modules that turn bytes into code, and the two built-in functions that do (``model.eval()`` is neither).
_READS_CODE = re.compile(
    r"^\s*(?:import|from) (?:pickle|marshal|shelve|dill|joblib)\b|(?<![.\w])(?:eval|exec)\(|torch\.load\((?![^)]*weights_only=True)|yaml\.load\(",
    re.MULTILINE,
)


def test_no_pickle_is_read_anywhere() -> None:
    """What Celery does with a pickle that is sent to it stands in tests/fuzz/test_bus.py."""
    root = Path(__file__).parents[2]
    # Of pinned wheels, by an unpickler that knows a table's names: test_house_rules holds it to that.
    tables = root / "motet/apps/data/frames.py"
    for package in ("motet", "scheduler", "workers"):
        for file in (root / package).rglob("*.py"):
            words = file.read_text("utf-8")
            found = [] if file == tables else _READS_CODE.findall(words)
            assert not found, f"{file}: {found}"
