"""Every key in Redis, and who writes it. No other module knows one (tests/unit/test_house_rules.py).

motet:workers                      set of worker names that ever beat
motet:w:<worker>:beat              newest Beat, expires
motet:w:<worker>:control           newest Control, expires
motet:w:<worker>:running           Running: rows of the micro-batch under way (evidence for poison)
motet:w:<worker>:in:<sub>:<att>    payload of one attempt, expires
motet:outcomes                     stream of outcomes, read by the group "aggregators"
motet:dead                         the last few entries that could not be read
motet:differences                  how many differences audits of the leader have found
motet:canary                       random value; another one means that Redis was emptied
motet.gpu.<worker>                 Celery's queue of the worker: ids and counts only

And one channel, of which nothing is kept: what is published while nobody listens is gone.

motet:say:<api>                    Said: text as it is written; workers publish, that process of the API listens
"""

from __future__ import annotations

OUTCOMES, DEAD, WORKERS, CANARY = "motet:outcomes", "motet:dead", "motet:workers", "motet:canary"
DIFFERENCES = "motet:differences"
#: The consumer group of the aggregators on the stream of outcomes.
GROUP = "aggregators"


def say_channel(api: str) -> str:
    """Channel of one API process."""
    return f"motet:say:{api}"


def queue_name(worker: str) -> str:
    """Celery queue of one worker."""
    return f"motet.gpu.{worker}"


def beat_key(worker: str) -> str:
    return worker_key(worker, "beat")


def control_key(worker: str) -> str:
    return worker_key(worker, "control")


def running_key(worker: str) -> str:
    return worker_key(worker, "running")


def payload_key(worker: str, subtask: int, attempt: int) -> str:
    return worker_key(worker, "in", subtask, attempt)


def every_key_of(worker: str) -> str:
    """A glob pattern of all keys of one worker, but for its queue."""
    return worker_key("".join(f"[{c}]" if c in "*?[]\\" else c for c in worker), "*")


def worker_key(worker: str, *rest: object) -> str:
    return ":".join(("motet:w", worker, *map(str, rest)))
