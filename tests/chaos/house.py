"""The house that is attacked: the whole of `motet up`, with two dispatchers, two aggregators and CPU workers.

Also the eyes and hands of the attacker: process ids, a Redis user who may do all, and SQL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import psycopg
import redis

from motet.http import Address, Http
from motet.local.children import Child, marked
from motet.local.cluster import Cluster, Service, registered
from motet.local.valkey import RIGHTS, Valkey
from motet.protocol.envelope import BadMessage
from motet.protocol.manifest import Manifest
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import WORKERS, RedisTransport
from motet.protocol.wire import Beat
from tests.chaos.oracle import TASKS
from tests.torchless import hide_torch

#: Runs twice here: any number may.
TWINS = ("dispatch", "aggregate")
ROLE = "chaos"


class House(Cluster):
    """A cluster whose workers know the functions of ``engines.py``."""

    #: Python that each of its processes runs first.
    first = ""

    def __init__(self, data: Path, *, workers: int = 2, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(data, cpus=workers, port=0)
        self.workers = workers
        self._settings = dict(settings or {})
        self._engines = self.data / "engines"
        self._newest: dict[str, Beat] = {}
        self._frozen: set[int] = set()
        self._frozen_lock = threading.Lock()

    # -- what is in it

    def start(self) -> None:
        _write_engines(self._engines, self.first)
        # The built-in model is not needed, and costs half a minute.
        registered(self.data).touch()
        RIGHTS[ROLE] = "~* &* +@all"
        try:
            super().start()
        finally:
            del RIGHTS[ROLE]
        with contextlib.closing(self._http()) as http:
            for task in TASKS:
                model = Manifest(
                    name=task, version="1", engine=task, answers="json", source={"function": f"chaos-{task}"}
                )
                http.post("/v1/models", model.to_json())

    def tenants(self, count: int) -> list[str]:
        """A token for each of so many tenants."""
        with contextlib.closing(self._http()) as http:
            answers = [
                http.post("/v1/tokens", {"name": f"t{i}", "scope": "user", "tenant": f"tenant-{i}"})
                for i in range(count)
            ]
        return [str(answer["token"]) for answer in answers]

    def _http(self) -> Http:
        return Http(Address.find(self.url, self.tokens["admin"]), timeout_s=60.0)

    def _env(self, **settings: str) -> dict[str, str]:
        # motet itself is where this process has found it, which may be a path of its own.
        paths = filter(None, (str(self._engines), os.environ.get("PYTHONPATH")))
        own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **self._settings}
        return {**super()._env(**settings), **own}

    def _watch(self, service: Service, grace_s: float) -> None:
        super()._watch(service, grace_s)
        if service.name in TWINS and isinstance(service, Child):
            twin = self._child(f"{service.name}-2", service._command, service._env or {})
            super()._watch(twin, grace_s)

    # -- eyes

    def sql(self, statement: str, *values: Any, timeout_s: float = 5.0) -> list[tuple[Any, ...]]:
        """Ask Postgres, over a connection of its own. Raises psycopg.Error where it is away."""
        with psycopg.connect(
            self.database_url, autocommit=True, connect_timeout=max(2, int(timeout_s))
        ) as line:
            cursor = line.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    @property
    def valkey(self) -> Valkey:
        return cast("Valkey", next(one.service for one in self._watched if one.service.name == "valkey"))

    @contextlib.contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        """A line to Redis that may do everything. What is sent may raise redis.RedisError or OSError."""
        password = json.loads((self.data / "valkey/passwords.json").read_text("utf-8"))[ROLE]
        head, _, rest = redis_py_url(self.valkey.urls.scheduler).partition("@")
        url = f"{head.split('//')[0]}//{ROLE}:{password}@{rest}"
        with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            yield client

    def transport(self) -> RedisTransport:
        return RedisTransport(self.valkey.urls.scheduler)

    def beats(self) -> dict[str, Beat]:
        """The newest beats of the workers; those known last where Redis is away."""
        with contextlib.suppress(redis.RedisError, OSError), self.redis() as client:
            names = sorted(bytes(name).decode() for name in cast("set[bytes]", client.smembers(WORKERS)))
            for name in names:
                with contextlib.suppress(BadMessage):
                    if raw := cast("bytes | None", client.get(f"motet:w:{name}:beat")):
                        self._newest[name] = Beat.decode(raw)
        return dict(self._newest)

    def living(self) -> dict[str, Beat]:
        """The newest beats of those workers whose process runs."""
        alive = marked(str(self.data))
        return {name: beat for name, beat in self.beats().items() if beat.pid in alive}

    def worker_pids(self) -> dict[str, int]:
        """Worker processes that run now, by name."""
        return {name: beat.pid for name, beat in self.living().items()}

    def named(self, prefix: str) -> dict[str, int]:
        """Processes of one kind, with their twins."""
        return {name: pid for name, pid in self.pids.items() if name.split("-")[0] == prefix}

    def leader(self) -> str | None:
        """The dispatcher that leads, by what it wrote in its log; None where that cannot be said."""
        with contextlib.suppress(psycopg.Error, OSError):
            epoch = self.sql("SELECT epoch FROM leader")[0][0]
            for name in self.named("dispatch"):
                if f'"epoch": {epoch}' in self._log(name).read_text("utf-8", "replace")[-200_000:]:
                    return name
        return None

    # -- hands

    def kill(self, *pids: int, sign: signal.Signals = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)

    def freeze(self, seconds: float, *pids: int) -> None:
        """Stop processes, and let them go on after so many seconds, by a timer."""
        with self._frozen_lock:
            self._frozen.update(pids)
        self.kill(*pids, sign=signal.SIGSTOP)
        timer = threading.Timer(seconds, self.thaw, pids)
        timer.daemon = True
        timer.start()

    @property
    def anything_frozen(self) -> bool:
        return bool(self._frozen)

    def thaw(self, *pids: int) -> None:
        """Let these processes go on; all of them where none is named."""
        with self._frozen_lock:
            chosen = [pid for pid in (pids or tuple(self._frozen)) if pid in self._frozen]
            self._frozen.difference_update(chosen)
            # Within the lock, and only ours: by now another process may have the number of one that is gone.
            self.kill(*(set(chosen) & marked_or_servers(self)), sign=signal.SIGCONT)

    def stop(self) -> None:
        with contextlib.suppress(StopIteration):
            self.thaw()
        super().stop()


def marked_or_servers(house: House) -> set[int]:
    """All processes of the house: those of the scheduler and the workers, and both servers."""
    return marked(str(house.data)) | set(house.pids.values())


def _write_engines(folder: Path, first: str) -> None:
    package = folder / "chaos_engines-1.0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("engines.py"), folder / "chaos_engines.py")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: chaos-engines\nVersion: 1.0\n")
    lines = "".join(f"{task} = chaos_engines:{task}\n" for task in TASKS)
    (package / "entry_points.txt").write_text(f"[motet.engines]\n{lines}")
    hide_torch(folder, then=first)
