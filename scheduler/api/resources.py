"""What every route of the API stands on: settings, Postgres, Redis, blobs, and the bell for those who wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Annotated, Generic, TypeVar, cast
from uuid import UUID

from cachetools import LRUCache
from fastapi import Depends, Request

from motet.errors import NotFound
from motet.protocol.manifest import decode_slots
from motet.protocol.settings import Settings
from motet.protocol.transport import RedisTransport, TransportLost
from motet.protocol.wire import Beat
from scheduler.api.allowance import Allowance
from scheduler.api.bell import Bell
from scheduler.api.blob_folder import BlobFolder
from scheduler.api.door import Door
from scheduler.api.live import Feeds, ReadyWorkers
from scheduler.api.looks import Looks
from scheduler.api.openai.counted_lines import CountedLines
from scheduler.api.streaming import Ears
from scheduler.api.token_counts import TokenCounter
from scheduler.api.workers_seen import WorkersSeen
from scheduler.store.database import Database
from scheduler.store.landing import LoadingJob
from scheduler.store.manifests import Manifests
from scheduler.store.registry import StoredToken

K = TypeVar("K")
V = TypeVar("V")

#: Connections to Postgres of one API process, and as many again under load.
POOL = 8
#: Bytes of bodies in one process at a time: beyond it new ones are asked to come back.
MAX_BODIES_BYTES = 512 * 1024 * 1024


class Recent(Generic[K, V]):
    """The last few things of a kind, for what never changes once it is known. Safe between threads."""

    def __init__(self, size: int) -> None:
        self._kept: LRUCache[K, V] = LRUCache(size)
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            return self._kept.get(key)

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._kept[key] = value

    def drop(self, key: K) -> None:
        with self._lock:
            self._kept.pop(key, None)


@dataclass
class Resources:
    """One per process."""

    settings: Settings
    database: Database
    #: None where no Redis is configured.
    transport: RedisTransport | None
    blobs: BlobFolder
    bell: Bell
    counter: TokenCounter
    workers: WorkersSeen
    door: Door
    allowance: Allowance
    #: Jobs whose parts are coming in, by tenant and id.
    loading: Recent[tuple[UUID, UUID], LoadingJob] = field(default_factory=lambda: Recent(1024))
    #: Tokens that were shown lately, and when they were read.
    known_tokens: Recent[str, tuple[StoredToken, float]] = field(default_factory=lambda: Recent(1024))
    #: Tokens that are looked up now, by id.
    token_looks: Looks[str, StoredToken | None] = field(default_factory=Looks)
    manifests: Manifests = field(default_factory=Manifests)
    #: Open jobs that are asked here.
    feeds: Feeds = field(init=False)
    #: (tenant, endpoint, model) -> the open job behind one of OpenAI's doors, and when its use was noted.
    known_doors: Recent[tuple[UUID, str, int], tuple[UUID, float]] = field(
        default_factory=lambda: Recent(4096)
    )
    #: Batch -> its lines that were counted here while it ran.
    counted_lines: Recent[str, CountedLines] = field(default_factory=lambda: Recent(256))
    #: Set where a batch waits for somebody to work on it.
    batch_waits: asyncio.Event = field(default_factory=asyncio.Event)
    #: Jobs of batches that this process let run: their ends are heard.
    batch_jobs: Recent[UUID, bool] = field(default_factory=lambda: Recent(1024))
    #: Bytes of bodies that are being read or worked on now.
    bodies_bytes: int = 0

    def __post_init__(self) -> None:
        ears = Ears(self.settings.redis_url)
        self.feeds = Feeds(self.database, self.bell, self._ready_workers, ears)
        self.bell.told = self._batch_changed

    def _batch_changed(self, job: UUID) -> None:
        if self.batch_jobs.get(job):
            self.batch_waits.set()

    def live_workers(self) -> dict[str, Beat]:
        """Newest beat of every worker that is not known to be silent. Raises TransportLost."""
        if self.transport is None:
            return {}
        beats = self.transport.beats()
        silent = self.workers.silent(beats, time.monotonic())
        return {name: beat for name, beat in beats.items() if name not in silent}

    def _ready_workers(self) -> ReadyWorkers:
        """Workers that take work, as far as Redis tells."""
        try:
            ready = [beat for beat in self.live_workers().values() if beat.state == "ready"]
        except TransportLost:
            return ReadyWorkers()
        return ReadyWorkers(len(ready), sum(decode_slots(beat.device_kind) for beat in ready))

    @classmethod
    def of(cls, settings: Settings) -> Resources:
        """Connects to nothing yet: a server that starts before its database answers 503 until it is there."""
        database = Database(settings.need("database_url").database_url, pool=POOL)
        transport = RedisTransport(settings.redis_url) if settings.redis_url else None
        blobs = BlobFolder(Path(settings.need("blob_dir").blob_dir))
        return cls(
            settings=settings,
            database=database,
            transport=transport,
            blobs=blobs,
            bell=Bell(database.libpq_url),
            counter=TokenCounter(blobs),
            workers=WorkersSeen(dead_s=settings.dead_s),
            door=Door(database, transport, settings),
            allowance=Allowance(settings.max_requests_s),
        )

    def close(self) -> None:
        """Let go of every connection."""
        self.feeds.close()
        self.database.close()
        if self.transport is not None:
            self.transport.close()


async def resources(request: Request) -> Resources:
    """The process' resources, as a dependency; a coroutine, since FastAPI hands plain functions over to a thread."""
    return cast(Resources, request.app.state.resources)


Use = Annotated[Resources, Depends(resources)]


def job_id(text: str) -> UUID:
    """A job's id from a path. What is no id names no job. Raises NotFound."""
    try:
        return UUID(text)
    except ValueError:
        raise NotFound("no job of this id") from None
