"""Blobs on disk: files named by their sha256, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, Problem
from scheduler.api.refusals import TooLarge, Unavailable

SHA256 = re.compile(r"[0-9a-f]{64}")
#: Weights of one file of the largest models that anyone shards.
MAX_BYTES = 32 * 1024**3
#: Collected before a thread hashes and writes them.
_CHUNK = 1024 * 1024
#: An upload that was killed leaves its file behind; after so long nobody is writing it any more.
_ABANDONED_S = 24 * 3600.0


class BlobFolder:
    """A folder of blobs, ``ab/cd/<sha256>``. Several processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / "incoming"

    def find(self, sha256: str) -> Path | None:
        """The file of this digest, or None. It is whole: files appear under their name in one step."""
        if not SHA256.fullmatch(sha256):
            return None
        path = self.path_of(sha256)
        return path if path.is_file() else None

    async def receive(self, sha256: str, chunks: AsyncIterator[bytes]) -> int:
        """Store a file and return its size. Again is harmless.

        Raises InvalidJob where the bytes have another digest, TooLarge, Unavailable where the disk is full.
        """
        _, size = await self.store(chunks, MAX_BYTES, sha256)
        return size

    async def store(self, chunks: AsyncIterator[bytes], limit: int, sha256: str = "") -> tuple[str, int]:
        """Store a file of at most ``limit`` bytes; its digest, which is ``sha256`` where that is told, and its size.

        Raises as ``receive``, and whatever ``chunks`` raises: then nothing is stored.
        """
        with await run_in_threadpool(self.new) as blob:
            held = bytearray()
            async for chunk in chunks:
                if blob.size + len(held) + len(chunk) > limit:
                    raise TooLarge("body", limit)
                held += chunk
                if len(held) >= _CHUNK:
                    await run_in_threadpool(blob.write, bytes(held))
                    held.clear()
            await run_in_threadpool(blob.write, bytes(held))
            if sha256 and blob.sha256 != sha256:
                raise InvalidJob(
                    Problem("body", f"bytes of digest {blob.sha256}", f"those of {sha256}", "send it again")
                )
            await run_in_threadpool(blob.settle)
            return blob.sha256, blob.size

    def new(self) -> NewBlob:
        """A blob to write piece by piece. Raises Unavailable."""
        with _writing():
            self._incoming.mkdir(parents=True, exist_ok=True)
            path = self._incoming / secrets.token_hex(16)
            return NewBlob(self, path, path.open("xb"))

    def path_of(self, sha256: str) -> Path:
        """Where the file of this digest stands, or will."""
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def sweep(self) -> None:
        """Remove uploads that were abandoned long ago."""
        if not self._incoming.is_dir():
            return
        for left in self._incoming.iterdir():
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink(missing_ok=True)


class NewBlob:
    """A file that is being written; it is gone at the end of the ``with`` unless it was settled."""

    def __init__(self, folder: BlobFolder, path: Path, file: BinaryIO) -> None:
        self._folder, self._path, self._file = folder, path, file
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> NewBlob:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Raises Unavailable where the disk is full."""
        with _writing():
            self._digest.update(data)
            self._file.write(data)
            self.size += len(data)

    def settle(self) -> None:
        """Put it into its place, in one step. Raises Unavailable."""
        with _writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            final = self._folder.path_of(self.sha256)
            final.parent.mkdir(parents=True, exist_ok=True)
            self._path.replace(final)
            # The name is on disk only when its folder is.
            folder = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the blob folder cannot be written ({os.strerror(error.errno or 0)})") from None
