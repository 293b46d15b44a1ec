"""Redis, or memory in its place. Transport only: all of it may be lost at any moment and no row is.

``contract`` says what both sides ask of it, ``keys`` every key, ``message`` Celery's form; ``scheduler``, ``worker`` and
``reader`` are the three sides of Redis, ``listener`` a fourth one, of the API; ``memory`` is both sides without it.
"""

from motet.protocol.transport.contract import (
    DEAD_KEPT,
    Entry,
    Heard,
    Lag,
    SchedulerTransport,
    TransportLost,
    WorkerTransport,
)
from motet.protocol.transport.keys import CANARY, DEAD, GROUP, OUTCOMES, WORKERS, queue_name
from motet.protocol.transport.listener import SayListener
from motet.protocol.transport.memory import MemoryTransport, MemoryWorkerTransport
from motet.protocol.transport.message import ENTRY_POINT, celery_message
from motet.protocol.transport.reader import RedisReader, Seen
from motet.protocol.transport.scheduler import RedisTransport
from motet.protocol.transport.worker import RedisWorkerTransport

__all__ = [
    "CANARY",
    "DEAD",
    "DEAD_KEPT",
    "ENTRY_POINT",
    "GROUP",
    "OUTCOMES",
    "WORKERS",
    "Entry",
    "Heard",
    "Lag",
    "MemoryTransport",
    "MemoryWorkerTransport",
    "RedisReader",
    "RedisTransport",
    "RedisWorkerTransport",
    "SayListener",
    "SchedulerTransport",
    "Seen",
    "TransportLost",
    "WorkerTransport",
    "celery_message",
    "queue_name",
]
