"""Files below one folder, opened by a stranger's paths: what leads out of it, and what is no plain file, is refused.

Each part of a path is opened relative to the folder before it and never followed, so that nothing which is moved or
linked meanwhile leads elsewhere; links are read and walked the same way, as far as they stay inside.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from motet.errors import InvalidJob, SetupError
from motet.media.medium import MAX_MEDIUM_BYTES

#: Links of one path at most, as Linux has it.
_MOST_LINKS = 40
#: Parts of one path at most, those that links bring included.
_MOST_PARTS = 256
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
#: A pipe does not wait for its other end.
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC


class RefusedPath(Exception):
    """A path from which nothing is read. The words say which rule it breaks, and nothing of the path."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


_INSIDE = "a file below media_root"
_LEAVES = ("a path that leaves media_root", _INSIDE)
_NO_FILE = ("a path at which there is no file", _INSIDE)


class MediaFolder:
    """One folder, and what lies below it. Several threads may read from it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Raises InvalidJob where it is no folder that can be read."""
        if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
            raise SetupError("media_root needs an operating system that opens files relative to a folder")
        try:
            self._fd = os.open(root, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | os.O_CLOEXEC)
            self._real = Path(os.path.realpath(root)).parts
        except (OSError, ValueError, TypeError) as error:
            why = (getattr(error, "strerror", None) or "no path").lower()
            raise InvalidJob.of(
                "media_root", why, "a folder that can be read", "name the folder of the pictures"
            ) from None
        self._named = Path(os.path.abspath(root)).parts
        # Also where nobody closes it, as the one of a feed that is forgotten.
        self._ending = weakref.finalize(self, os.close, self._fd)

    def close(self) -> None:
        """Let go of it. Twice is harmless."""
        self._ending()

    def read(self, path: str, most: int = MAX_MEDIUM_BYTES) -> bytes:
        """The bytes of a plain file of at most ``most``. Raises RefusedPath."""
        try:
            with self._opened(path) as (fd, size):
                if size > most:
                    raise RefusedPath(f"a file of {size:,} bytes", f"at most {most:,} bytes")
                if not size:
                    # Also what the kernel makes up as it is read, below /proc.
                    raise RefusedPath("an empty file", "the file of a picture")
                return _whole(fd, size)
        except OSError as error:
            why = os.strerror(error.errno or 0).lower()
            raise RefusedPath(f"a path that cannot be opened ({why})", "a file that can be read") from None

    @contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, int]]:
        """The plain file at this path, and its size."""
        todo = list(reversed(self._parts(path)))
        links = walked = 0
        with ExitStack() as opened:
            # The folders on the way down, the innermost last: a step up goes back by what was opened, not by a name.
            way = [self._fd]
            while todo:
                walked += 1
                part = todo.pop()
                if walked > _MOST_PARTS:
                    raise RefusedPath("a path without end", _INSIDE)
                if part == "..":
                    if len(way) == 1:
                        raise RefusedPath(*_LEAVES)
                    way.pop()
                    continue
                try:
                    about = os.stat(part, dir_fd=way[-1], follow_symlinks=False)
                except (FileNotFoundError, NotADirectoryError):
                    raise RefusedPath(*_NO_FILE) from None
                if stat.S_ISLNK(about.st_mode):
                    links += 1
                    if links > _MOST_LINKS:
                        raise RefusedPath("a path of links without end", _INSIDE)
                    target = os.readlink(part, dir_fd=way[-1])
                    if target.startswith("/"):
                        way = way[:1]
                    try:
                        todo += reversed(self._parts(target))
                    except RefusedPath:
                        raise RefusedPath("a link that leaves media_root", _INSIDE) from None
                    continue
                if stat.S_ISDIR(about.st_mode):
                    fd = os.open(part, _DIRECTORY, dir_fd=way[-1])
                    opened.callback(os.close, fd)
                    way.append(fd)
                    continue
                if todo:
                    raise RefusedPath(*_NO_FILE)
                _must_be_plain(about)
                fd = os.open(part, _FILE, dir_fd=way[-1])
                opened.callback(os.close, fd)
                # What was looked at may have been replaced since.
                now = os.fstat(fd)
                _must_be_plain(now)
                yield fd, now.st_size
                return
        raise RefusedPath("a folder", _INSIDE)

    def _parts(self, path: str) -> list[str]:
        """The parts of a path from the folder on."""
        if "\0" in path or not path:
            raise RefusedPath("a path with a NUL character" if path else "an empty path", _INSIDE)
        if len(path) > 4096:
            raise RefusedPath("a path of more than 4,096 characters", _INSIDE)
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            raise RefusedPath("a path with a lone surrogate", _INSIDE) from None
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/"):
            for root in (self._named, self._real):
                above = root[1:]
                if tuple(parts[: len(above)]) == above:
                    return parts[len(above) :]
            raise RefusedPath(*_LEAVES)
        return parts


def _must_be_plain(about: os.stat_result) -> None:
    mode = about.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISLNK, "a link that was put there meanwhile"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    raise RefusedPath(next((words for is_kind, words in kinds if is_kind(mode)), "a device"), _INSIDE)


def _whole(fd: int, size: int) -> bytes:
    """All of a file of this size. Raises RefusedPath where it grows or shrinks meanwhile."""
    pieces: list[bytes] = []
    left = size + 1
    while left > 0 and (piece := os.read(fd, min(left, 1 << 20))):
        pieces.append(piece)
        left -= len(piece)
    if left != 1:
        raise RefusedPath("a file that changes while it is read", "a file that nobody writes to")
    return b"".join(pieces)
