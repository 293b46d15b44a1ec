"""Folders, files and ports of the embedded servers: who may use a data folder, where sockets and secrets lie."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path

from motet.errors import SetupError

#: What fits into ``sun_path`` of Linux (108 bytes with the closing NUL; macOS has four less).
SOCKET_PATH_BYTES = 103


class Lock:
    """The right to use a folder. The kernel takes it back when its process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self) -> None:
        """Take the lock; again is harmless. Raises SetupError that names the process which holds it."""
        if self._fd is not None:
            return
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 20).decode().strip()
            os.close(fd)
            raise SetupError(
                f"{self._path.parent} is in use by process {holder or '(just starting)'}; stop that process, or choose another folder"
            ) from None
        os.truncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SocketDir:
    """A short folder of mode 0700 for one server's sockets; ``<data>/run`` points to it.

    Not below ``$XDG_RUNTIME_DIR``: that vanishes when its user logs out, while `motet up` may go on in a tmux.
    """

    def __init__(self, data_dir: Path) -> None:
        self._link = data_dir / "run"

    def make(self, owner: int | None = None) -> Path:
        """Make the folder, given to the user id ``owner``, and remove what a killed predecessor left behind."""
        self.remove()
        usable = [p for p in socket_parents() if writable(p) and short_for_sockets(p)]
        usable = usable if owner is None else [p for p in usable if open_to_all(p)]
        if not usable:
            raise SetupError(
                "no folder for sockets: expected /tmp to be writable, or TMPDIR to name a short path"
            )
        path = Path(tempfile.mkdtemp(prefix="motet-", dir=usable[0]))
        if owner is not None:
            os.chown(path, owner, -1)
        self._link.symlink_to(path)
        return path

    def remove(self) -> None:
        if self._link.is_symlink():
            path = self._link.readlink()
            if path.name.startswith("motet-"):
                shutil.rmtree(path, ignore_errors=True)
            self._link.unlink()


def socket_parents() -> list[Path]:
    """The folders that are tried for sockets, in order."""
    return [Path(name) for name in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))]


def short_for_sockets(parent: str | Path) -> bool:
    """Whether the address of Postgres' socket below this folder is short enough."""
    return len(os.fsencode(Path(parent, "motet-12345678", ".s.PGSQL.5432.lock"))) <= SOCKET_PATH_BYTES


def writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def open_to_all(path: Path) -> bool:
    """Whether any user of this machine may go into ``path``. Says no when in doubt."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.absolute().parents))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step: no reader meets half of it."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    with open(
        os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    new.replace(path)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def why_taken(port: int) -> str | None:
    """Why a TCP port of the loopback interface cannot be listened on; None where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror or type(error).__name__
    return None


def installed_package(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None
