"""Blobs on disk: files named by their sha256, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
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
        path = self._path(sha256)
        return path if path.is_file() else None

    async def receive(self, sha256: str, chunks: AsyncIterator[bytes]) -> int:
        """Store a file and return its size. Again is harmless.

        Raises InvalidJob where the bytes have another digest, TooLarge, Unavailable where the disk is full.
        """
        path, file = await run_in_threadpool(self._begin)
        try:
            with file:
                size, found = await self._write(file, chunks)
                if found != sha256:
                    raise InvalidJob(
                        Problem("body", f"bytes of digest {found}", f"those of {sha256}", "send it again")
                    )
                await run_in_threadpool(self._settle, file, path, sha256)
        except OSError as error:
            raise Unavailable(
                f"the blob folder cannot be written ({os.strerror(error.errno or 0)})"
            ) from None
        finally:
            path.unlink(missing_ok=True)
        return size

    def sweep(self) -> None:
        """Remove uploads that were abandoned long ago."""
        if not self._incoming.is_dir():
            return
        for left in self._incoming.iterdir():
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def _begin(self) -> tuple[Path, BinaryIO]:
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            path = self._incoming / secrets.token_hex(16)
            return path, path.open("xb")
        except OSError as error:
            raise Unavailable(
                f"the blob folder cannot be written ({os.strerror(error.errno or 0)})"
            ) from None

    async def _write(self, file: BinaryIO, chunks: AsyncIterator[bytes]) -> tuple[int, str]:
        digest, size, held = hashlib.sha256(), 0, bytearray()

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        async for chunk in chunks:
            size += len(chunk)
            if size > MAX_BYTES:
                raise TooLarge("body", MAX_BYTES)
            held += chunk
            if len(held) >= _CHUNK:
                await run_in_threadpool(put, bytes(held))
                held.clear()
        await run_in_threadpool(put, bytes(held))
        return size, digest.hexdigest()

    def _settle(self, file: BinaryIO, path: Path, sha256: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        final = self._path(sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        path.replace(final)
        # The name is on disk only when its folder is.
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
