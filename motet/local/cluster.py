"""Everything that `motet up` starts: servers, scheduler and workers, in order, kept alive, and stopped in reverse."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from motet.distributions import installed
from motet.errors import SetupError
from motet.local.children import MARK, Child, evict, marked, rotate
from motet.local.places import Lock, free_port, why_taken, write_private
from motet.local.postgres import STOP_S, Postgres
from motet.local.valkey import Valkey, ValkeyUrls
from motet.protocol.settings import Settings, cache_folder

log = logging.getLogger("motet.cluster")

#: Seconds until the API must be ready; a slow disk needs most of them for the first start of Postgres.
READY_S = 180.0
#: Longest pause in seconds before a process that died is started again.
BACKOFF_S = 4.0
#: A process that lived for this many seconds has started well: its next death begins the pauses anew.
SETTLED_S = 30.0
#: Seconds for a process of the scheduler to end by itself; after that it is killed.
GRACE_S = 10.0
#: A process of the scheduler without a sign of life for this many seconds hangs: it is killed and started again.
SILENT_S = 30.0

#: Settings that the cluster gives to its processes; those of the surrounding environment are for other clusters.
GIVEN = (
    *("DATABASE_URL", "REDIS_URL", "TOKEN", "URL", "API_HOST", "API_PORT", "BLOB_DIR", "CACHE_DIR", "HOME"),
    *("FLOWER_USER", "FLOWER_PASSWORD", "FLOWER_COOKIE_SECRET", "FLOWER_ADDRESS", "FLOWER_PORT"),
    "PULSE",
)


class Service(Protocol):
    """What the cluster starts, watches and stops."""

    @property
    def name(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def pid(self) -> int | None: ...
    def start(self) -> object: ...
    def stop(self, grace_s: float) -> None: ...


@dataclass(slots=True)
class Watched:
    """A service, and what the supervisor remembers of it."""

    service: Service
    #: Seconds from the request to stop until it is killed.
    grace_s: float
    started_at: float = field(default_factory=time.monotonic)
    #: Deaths soon after a start, in a row.
    deaths: int = 0
    #: When to start it again; None while it lives.
    restart_at: float | None = None
    #: A file that it touches while it works, if it is one that does.
    pulse: Path = Path()
    #: When that was touched as last seen, by the file's clock, and since when it has been so by ours.
    touched: float | None = None
    touched_at: float = 0.0

    def silent_s(self, now: float) -> float:
        """Seconds without a sign of life; 0 before the first one."""
        try:
            touched = self.pulse.stat().st_mtime if self.pulse.name else None
        except OSError:
            touched = None
        if touched is None or touched != self.touched:
            self.touched, self.touched_at = touched, now
        return now - self.touched_at


class Cluster:
    """A whole motet on this machine, from ``start`` to ``stop``, or inside ``with``.

    One thread starts, watches and stops the processes, from the first to the last; the kernel ends them all if
    that thread is killed with this process. Whoever opens the same data folder next goes on where this one ended.
    """

    def __init__(
        self,
        data: Path,
        *,
        cpus: int = 0,
        gpus: str = "",
        port: int = 8700,
        flower_port: int | None = None,
        models: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """``models``: lines of options of `python -m workers register`, each run once beside ``--builtin``.

        ``settings``: variables of its processes, in place of those of the environment.
        """
        self.data = data.resolve()
        self._settings = dict(settings or {})
        self._models = ("--builtin", *models)
        self._workers = [*(("--cpus", str(cpus)) if cpus else ()), *(("--gpus", gpus) if gpus else ())]
        self._port = port
        self._flower_port = flower_port
        #: Where the API is, from ``start`` on.
        self.url = ""
        #: Where Flower is, with name and password; empty without ``flower_port``.
        self.flower_url = ""
        #: The database, as psql and libpq take it; over a socket that only this user opens.
        self.database_url = ""
        #: By scope: ``admin``, ``user``, ``worker``.
        self.tokens: Mapping[str, str] = {}
        self._lock = Lock(self.data / "lock")
        self._watched: list[Watched] = []
        self._ready: Future[None] = Future()
        self._stopping = threading.Event()
        self._ended: Future[None] = Future()
        self._hurry = False
        self._thread = threading.Thread(target=self._run, name="motet-cluster", daemon=True)

    def command(self, module: str, *arguments: str) -> list[str]:
        """How a module of motet is run. Not from the current folder, which may hold another ``workers``."""
        return [sys.executable, "-P", "-m", module, *arguments]

    @property
    def pids(self) -> Mapping[str, int]:
        """The processes that run now, by name."""
        return {
            one.service.name: one.service.pid
            for one in self._watched
            if one.service.pid and one.service.alive
        }

    def start(self) -> None:
        """Start everything and return when the API is ready. Raises SetupError, and leaves nothing running then."""
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything, workers first. Ctrl-C meanwhile kills what still runs."""
        if self._thread.is_alive() and not self._stopping.is_set():
            log.info("stopping everything; Ctrl-C again kills")
        self._stopping.set()
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._hurry = True
            evict(self._left_behind, patience_s=0)
            self._thread.join()

    def run_forever(self, ready: Callable[[], object] = lambda: None) -> None:
        """Run in the foreground until SIGINT, SIGTERM or SIGHUP, then stop in order; the second one kills.

        ``ready`` is called once, when everything answers.
        """
        for sign in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sign) is signal.SIG_DFL:  # and not ignored, as under nohup
                signal.signal(sign, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt), self:
            ready()
            self._ended.result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- from here on in the cluster's own thread

    def _run(self) -> None:
        outcome = self._ready
        try:
            self._take_folder()
            try:
                self._start_all()
                self._ready.set_result(None)
                outcome = self._ended
                while not self._stopping.wait(0.2):
                    self.step(time.monotonic())
            finally:
                self._stop_all()
            self._ended.set_result(None)
        except BaseException as error:
            if outcome is self._ended:
                log.exception("the cluster stopped, because its supervisor failed")
            outcome.set_exception(error)

    def step(self, now: float) -> None:
        """Start again what has died, after a pause that grows while it keeps dying; and keep the logs short."""
        for one in self._watched:
            rotate(self._log(one.service.name))
            if one.service.alive:
                if (silent_s := one.silent_s(now)) > SILENT_S:
                    log.warning(
                        "%s gave no sign of life for %.0f s and is killed", one.service.name, silent_s
                    )
                    one.service.stop(0)
                continue
            if one.restart_at is None:
                one.deaths = one.deaths + 1 if now - one.started_at < SETTLED_S else 1
                pause_s = min(BACKOFF_S, 0.1 * 2**one.deaths)
                one.restart_at = now + pause_s
                log.warning(
                    "%s died; starts again in %.1f s; see %s",
                    one.service.name,
                    pause_s,
                    self._log(one.service.name),
                )
            elif now >= one.restart_at:
                one.restart_at, one.started_at = None, now
                self._pulse(one.service.name).unlink(missing_ok=True)
                try:
                    one.service.start()
                except (SetupError, OSError) as error:  # a full disk must not end what still runs
                    log.warning("%s", error)

    def _take_folder(self) -> None:
        if not self.data.exists():
            # A folder that does not exist belongs to no cluster; and a cluster that cannot start must not leave one behind.
            _open_port(self._port, "--port")
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.data / "pulse").mkdir(exist_ok=True)
        self._lock.take()
        evict(self._left_behind, patience_s=0)

    def _start_all(self) -> None:
        port = _open_port(self._port, "--port")
        self.url = f"http://127.0.0.1:{port}"

        valkey = Valkey(self.data / "valkey", self._log("valkey"))
        postgres = Postgres(self.data / "postgres", self._log("postgres"))
        self._watch(valkey, GRACE_S)
        self._watch(postgres, STOP_S)
        self.database_url = postgres.url.replace("+psycopg", "")
        scheduler = self._env(
            DATABASE_URL=postgres.url,
            REDIS_URL=valkey.urls.scheduler,
            URL=self.url,
            API_PORT=str(port),
            BLOB_DIR=str(self.data / "blobs"),
        )
        tokens = self.data / "tokens.json"
        self._run_once(
            "bootstrap",
            "preparing the database",
            self.command("scheduler", "bootstrap", "--tokens", str(tokens)),
            scheduler,
        )
        self.tokens = json.loads(tokens.read_text("utf-8"))

        for name in ("api", "dispatch", "aggregate"):
            self._watch(self._child(name, self.command("scheduler", name), scheduler), GRACE_S)
        worker = self._env(URL=self.url, CACHE_DIR=str(self.data / "cache"))
        if self._workers:
            env = {**worker, "MOTET_TOKEN": self.tokens["worker"], "MOTET_REDIS_URL": valkey.urls.worker}
            # Without us there is no Redis either: nothing can be drained, so it ends at once, and its workers with it.
            launcher = self._child(
                "workers", self.command("workers", *self._workers), env, orphaned=signal.SIGKILL
            )
            self._watch(launcher, Settings.from_env(env).grace_s + 5)
        if self._flower_port is not None:
            self._watch(self._flower(_open_port(self._flower_port, "--flower"), valkey.urls), GRACE_S)
        self._await_ready(port)

        for option in self._models:
            builtin = option == "--builtin"
            done = registered(self.data, option)
            if not done.exists():
                # Data sets and converted models are this user's, whatever cluster asks for them.
                cache = str(cache_folder().absolute())
                env = {**worker, "MOTET_TOKEN": self.tokens["admin"], "MOTET_CACHE_DIR": cache}
                what = "the model and its heads" if builtin else f"what {option} names"
                words = f"registering {what} (once)"
                self._run_once(
                    "register", words, self.command("workers", "register", *shlex.split(option)), env
                )
                done.touch()
        client = {"url": self.url, "token": self.tokens["user"], "admin_token": self.tokens["admin"]}
        write_private(self.data / "client.json", json.dumps(client))

    def _stop_all(self) -> None:
        (self.data / "client.json").unlink(missing_ok=True)
        with contextlib.ExitStack() as last_first:  # and all of it, whatever fails
            last_first.callback(self._lock.release)
            last_first.callback(evict, self._left_behind, patience_s=0)
            for one in self._watched:
                last_first.callback(self._stop, one)

    def _stop(self, one: Watched) -> None:
        log.info("stopping %s", one.service.name)
        one.service.stop(0 if self._hurry else one.grace_s)

    def _watch(self, service: Service, grace_s: float) -> None:
        log.info("starting %s", service.name)
        self._watched.append(Watched(service, grace_s, pulse=self._pulse(service.name)))
        self._watched[-1].pulse.unlink(missing_ok=True)
        service.start()

    def _run_once(self, name: str, words: str, command: list[str], env: Mapping[str, str]) -> None:
        log.info("%s", words)
        child = self._child(name, command, env)
        child.start()
        try:
            while child.wait(0.02) is None:
                self._pause()
        finally:
            child.stop(1)
        if child.exit_code != 0:
            raise SetupError(_how_it_ended(child))

    def _await_ready(self, port: int) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            for one in self._watched:
                if isinstance(one.service, Child) and not one.service.alive:
                    raise SetupError(_how_it_ended(one.service))
            if _answers(port, "/readyz"):
                return
            if time.monotonic() > deadline:
                raise SetupError(f"the API is not ready after {READY_S:.0f} s; see {self._log('api')}")
            self._pause(0.05)

    def _pause(self, seconds: float = 0) -> None:
        if self._stopping.wait(seconds):
            raise SetupError("stopped while it was starting")

    def _child(
        self, name: str, command: list[str], env: Mapping[str, str], orphaned: signal.Signals | None = None
    ) -> Child:
        env = {**env, "MOTET_PULSE": str(self._pulse(name))}
        return Child(name, command, env=env, log=self._log(name), orphaned=orphaned)

    def _flower(self, port: int, urls: ValkeyUrls) -> Child:
        kept = self.data / "flower.json"
        if not kept.exists():
            # Kept, so that a bookmark still opens after the next start.
            write_private(
                kept,
                json.dumps(
                    {"password": secrets.token_urlsafe(12), "cookie_secret": secrets.token_urlsafe(48)}
                ),
            )
        own = json.loads(kept.read_text("utf-8"))
        self.flower_url = f"http://motet:{own['password']}@127.0.0.1:{port}"
        env = self._env(
            REDIS_URL=urls.flower,
            FLOWER_USER="motet",
            FLOWER_PASSWORD=own["password"],
            FLOWER_COOKIE_SECRET=own["cookie_secret"],
            FLOWER_ADDRESS="127.0.0.1",
            FLOWER_PORT=str(port),
        )
        return self._child("flower", self.command("motet.local.flower"), env)

    def _env(self, **settings: str) -> dict[str, str]:
        """Our own environment without what is meant for another cluster or database, then the given settings."""
        foreign = {f"MOTET_{name}{end}" for name in GIVEN for end in ("", "_FILE")}
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in foreign and not name.startswith("PG")
        }
        given = {f"MOTET_{name}": value for name, value in settings.items()}
        return env | self._settings | given | {MARK: str(self.data), "PYTHONUNBUFFERED": "1"}

    def _log(self, name: str) -> Path:
        return self.data / "logs" / f"{name}.log"

    def _pulse(self, name: str) -> Path:
        return self.data / "pulse" / name

    def _left_behind(self) -> set[int]:
        """Processes of a cluster on this folder; ours or, while we hold its lock, those of a killed one."""
        return marked(str(self.data))


def registered(data: Path, option: str = "--builtin") -> Path:
    """The file in a cluster's folder that says that ``register`` has run with this option, by this version."""
    named = "" if option == "--builtin" else re.sub(r"[^\w.-]+", "-", option[1:])
    return data / f"registered-{installed() or 'unknown'}{named}"


def _open_port(port: int, option: str) -> int:
    if port == 0:
        return free_port()
    if why := why_taken(port):
        raise SetupError(
            f"port {port}: {why}; stop the program that has it, or let motet choose with `{option} 0`"
        )
    return port


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _how_it_ended(child: Child) -> str:
    return f"{child.name} ended with exit code {child.exit_code}; the end of {child.log}:\n{child.tail()}"
