"""Model files: fetched by content from the API, verified, kept in a bounded cache that a host's workers share.

<cache>/blobs/<sha256>         a file, named by what it holds; least recently used ones go first
<cache>/partial/<sha256>       a download under way, and the lock of whoever is at it
<cache>/folders/<digest>-<n>/  a model's files under their own names, while it is being loaded
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from motet.errors import MotetError, NotFound
from motet.http import Address, Http
from motet.protocol.logs import event
from motet.protocol.manifest import FILE_SUFFIXES, Manifest
from workers.engine import CannotLoad

log = logging.getLogger(__name__)

CHUNK = 1 << 20
TRIES = 5
#: Folders older than this were left behind by a process that died.
STALE_FOLDER_S = 3600.0


class CannotFetch(Exception):
    """A file could not be brought here now; another attempt may succeed. The message names it by digest."""


class FileRefused(CannotFetch):
    """The API will not give this file, however often it is asked."""


class BlobSource(Protocol):
    """Where files come from."""

    def chunks(self, sha256: str) -> Iterator[bytes]:
        """The file's bytes. Raises CannotFetch, also between chunks; FileRefused where asking again is no use."""
        ...


class HttpBlobs:
    """The API's ``GET /v1/blobs/<sha256>``."""

    def __init__(self, url: str, token: str) -> None:
        self._http = Http(Address(url=url.rstrip("/"), token=token))

    def chunks(self, sha256: str) -> Iterator[bytes]:
        try:
            yield from self._http.pieces(f"/v1/blobs/{sha256}", CHUNK)
        except NotFound as error:
            raise FileRefused(f"blob {sha256[:12]}…: {error}") from None
        except MotetError as error:
            # A wrong token, too, is for an operator to mend: the model may still be loaded later.
            raise CannotFetch(f"blob {sha256[:12]}…: {error}") from None


class BlobCache:
    """Files by content. Safe for several processes: names say what a file holds, and appear when it is whole."""

    def __init__(self, root: Path, source: BlobSource, *, limit_mb: int) -> None:
        self._blobs, self._partial, self._folders = root / "blobs", root / "partial", root / "folders"
        for folder in (self._blobs, self._partial, self._folders):
            folder.mkdir(parents=True, exist_ok=True)
        self._source = source
        self._limit = limit_mb << 20
        self._clear_stale_folders()

    def fetch(self, model: Manifest) -> None:
        """Make every file of a model present. Raises CannotFetch; CannotLoad for a file that may not be part of one."""
        for name in model.files:
            check_name(name)
        for sha256 in model.files.values():
            self.ensure(sha256)
        self.evict(keep=set(model.files.values()))

    @contextmanager
    def folder(self, model: Manifest) -> Iterator[Mapping[str, Path]]:
        """The model's files by relative path, under their own names, as long as the context lasts. Raises CannotFetch."""
        if not model.files:
            yield {}
            return
        with self._own_folder(model) as root:
            files = {name: root / check_name(name) for name in model.files}
            for name, path in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._place(model.files[name], path)
            yield files

    @contextmanager
    def _own_folder(self, model: Manifest) -> Iterator[Path]:
        """An empty folder that no other process has, removed at the end. The same model mostly gets the same name.

        vLLM keeps what it compiles under the path of the model: under a name that is never used again, every load would
        compile anew.
        """
        for number in itertools.count():
            root = self._folders / f"{model.digest[:32]}-{number}"
            with contextlib.suppress(FileExistsError):
                root.mkdir(mode=0o700)
                break
        try:
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def ensure(self, sha256: str) -> Path:
        """The file with this content, downloaded where it is missing. Raises CannotFetch."""
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise CannotFetch("a blob is named by 64 hexadecimal digits")
        path = self._blobs / sha256
        if not self._touch(path):
            with _locked(self._partial / sha256) as partial:
                if not self._touch(path):  # another process may have fetched it meanwhile
                    self._download(sha256, partial, path)
        return path

    def evict(self, keep: Collection[str] = ()) -> None:
        """Delete the least recently used files until the cache is within its bound. Readers keep what they opened."""
        files = []
        for entry in os.scandir(self._blobs):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                files.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                return
            if path.name not in keep:
                path.unlink(missing_ok=True)
                total -= size
                event(log, "blob evicted", blob=path.name[:12], mb=size >> 20)

    def _place(self, sha256: str, path: Path) -> None:
        """Give a cached file its name in a folder: a hard link, or a copy where links are not possible."""
        for _ in range(TRIES):
            blob = self.ensure(sha256)
            try:
                try:
                    os.link(blob, path)
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(blob, path)
                return
            except FileNotFoundError:
                continue  # evicted by a neighbour in between
        raise CannotFetch(f"blob {sha256[:12]}…: the cache is too small for this model")

    def _download(self, sha256: str, partial: IO[bytes], path: Path) -> None:
        began = time.monotonic()
        for left in reversed(range(TRIES)):
            try:
                size = self._stream(sha256, partial)
                break
            except FileRefused:
                raise
            except CannotFetch:
                if left == 0:
                    raise
                time.sleep(0.2 * 2 ** (TRIES - left))
        try:
            partial.flush()
            os.fsync(partial.fileno())
            os.rename(partial.name, path)
        except OSError as error:
            raise CannotFetch(f"blob {sha256[:12]}…: cannot be written: {error.strerror}") from None
        event(
            log, "blob fetched", blob=sha256[:12], mb=size >> 20, seconds=round(time.monotonic() - began, 2)
        )

    def _stream(self, sha256: str, partial: IO[bytes]) -> int:
        """Write the file while its digest is computed; return its size."""
        partial.seek(0)
        partial.truncate()
        digest = hashlib.sha256()
        try:
            for chunk in self._source.chunks(sha256):
                digest.update(chunk)
                partial.write(chunk)
        except OSError as error:
            raise CannotFetch(f"blob {sha256[:12]}…: cannot be written: {error.strerror}") from None
        if digest.hexdigest() != sha256:
            raise CannotFetch(f"blob {sha256[:12]}…: the bytes have another digest")
        return partial.tell()

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _clear_stale_folders(self) -> None:
        for folder in self._folders.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > STALE_FOLDER_S:
                    shutil.rmtree(folder, ignore_errors=True)


def check_name(name: str) -> str:
    """Return a relative path that may be part of a model folder. Raises CannotLoad for any other."""
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or path.suffix not in FILE_SUFFIXES
    ):
        raise CannotLoad(
            f"file {path.name!r} is refused; a model folder holds only {', '.join(sorted(FILE_SUFFIXES))} inside itself"
        )
    return str(path)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing, alone on this host. Its name may be moved away inside."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had the lock before may have moved this very file away: then it is not ours to write.
            if _is_still(file, path):
                yield file
                return


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
