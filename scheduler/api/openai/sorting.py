"""Places in the order of their texts, however many bytes these are: sorted in runs, which lie on disk and are merged."""

from __future__ import annotations

import heapq
import struct
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

#: Bytes of texts that are held in memory at a time. More: a large file takes more of it; less: it has more runs, each of
#: which is an open file.
RUN_BYTES = 16 * 1024 * 1024
#: What a text takes in memory beside its bytes, about.
_BESIDE = 160
#: A record of a run: bytes of its text, and its place.
_HEAD = struct.Struct("<IQ")


class Sorting:
    """Takes texts with their places, and tells the places in the order of the texts; equal ones in the order of places."""

    def __init__(self, folder: Path, run_bytes: int = RUN_BYTES) -> None:
        """``folder``: where runs lie while this is open, without a name; nothing where all texts fit into one."""
        self._folder, self._run_bytes = folder, run_bytes
        self._texts: list[tuple[bytes, int]] = []
        #: What is in memory now, about.
        self.held_bytes = 0
        self._runs: list[IO[bytes]] = []
        self._open = ExitStack()

    def __enter__(self) -> Sorting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, text: bytes, place: int) -> None:
        """Take a text."""
        self._texts.append((text, place))
        self.held_bytes += len(text) + _BESIDE
        if self.held_bytes >= self._run_bytes:
            self._to_disk()

    def places(self) -> array[int]:
        """All places, in order."""
        self._texts.sort()
        runs = [*map(_read, self._runs), iter(self._texts)]
        return array("Q", (place for _, place in heapq.merge(*runs)))

    def _to_disk(self) -> None:
        self._texts.sort()
        run = self._open.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        for text, place in self._texts:
            run.write(_HEAD.pack(len(text), place))
            run.write(text)
        self._runs.append(run)
        self._texts, self.held_bytes = [], 0


def _read(run: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    run.seek(0)
    while head := run.read(_HEAD.size):
        length, place = _HEAD.unpack(head)
        yield run.read(length), place
