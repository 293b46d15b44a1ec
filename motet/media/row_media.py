"""What the client does about the media of rows: which fields hold them, read them, send them, and say so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

from motet.errors import MotetError, NotFound
from motet.http import Http
from motet.media.fields import media_fields
from motet.media.reading import MEDIA_SIZE, MediaReader
from motet.media.sending import MediaSender
from motet.protocol.manifest import Manifest
from motet.sources import Rows
from motet.tasks import Task, fields_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """How the media of rows are read: ``media_root``, ``media_size`` and ``media_thumbs`` of ``Client.submit``."""

    root: str | os.PathLike[str] | None = None
    size: int | None = MEDIA_SIZE
    thumbs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFigures:
    """Pictures of an upload."""

    #: Values that hold one.
    images: int
    #: Bytes of them as they were found.
    found_bytes: int
    #: Bytes that went to the server: each picture once by content, and none that it had.
    sent_bytes: int
    #: Of them those that were made smaller.
    shrunk: int

    @property
    def bytes_sent_per_image(self) -> float:
        """0 where there are none."""
        return self.sent_bytes / self.images if self.images else 0.0


class RowMedia:
    """The media of one upload, or of an open job. It costs next to nothing where rows hold none."""

    def __init__(
        self,
        http: Http,
        specs: Mapping[str, Task],
        options: MediaOptions,
        *,
        sends: bool = True,
        apart: bool = True,
        key: str | None = None,
    ) -> None:
        """``key``: Idempotency-Key of the job, where it has one. ``sends``: False where they are only looked at. ``apart``: send in a thread of its own. Raises InvalidJob."""
        self._http, self._specs, self._size = http, specs, options.size
        self._sender = MediaSender(http, apart=apart, key=key) if sends else None
        keep = None if self._sender is None else self._sender.add
        self._reader = MediaReader(
            fields_of(specs),
            self._fields,
            root=options.root,
            size=options.size,
            thumbs=options.thumbs,
            keep=keep,
        )

    def __enter__(self) -> RowMedia:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, and send nothing more."""
        self._reader.close()
        if self._sender is not None:
            self._sender.close()

    def rows(self, rows: Rows) -> Rows:
        """The rows with their media read."""
        return self._reader.rows(rows)

    def row(self, row: Any) -> Any:
        """One row with its media read, and stored. Raises as ``flush``."""
        read = self._reader.row(row)
        if read is not row:
            self.flush(lambda refusal: None)
        return read

    def holds(self, row: Any) -> bool:
        """Whether ``row`` has anything to do."""
        return self._reader.holds(row)

    def begin(self) -> None:
        """The job is open: send while others are read."""
        if self._sender is not None:
            self._sender.begin()

    def flush(self, tell: Callable[[MotetError], object]) -> None:
        """Return when the media of all rows that were read are stored: then the rows may go.

        Raises InvalidJob, Overloaded beyond the tenant's quota, Unauthorized, Unreachable.
        """
        if self._sender is not None:
            self._sender.flush(tell)

    @property
    def figures(self) -> MediaFigures | None:
        """None where no row held any."""
        read = self._reader.read
        if not read.media:
            return None
        sent = 0 if self._sender is None else self._sender.sent.bytes
        return MediaFigures(
            images=read.media, found_bytes=read.found_bytes, sent_bytes=sent, shrunk=read.shrunk
        )

    def __str__(self) -> str:
        """For the progress line; "" where there are none."""
        figures = self.figures
        if figures is None:
            return ""
        each = f"{figures.bytes_sent_per_image / 1000:,.0f} kB each"
        shrunk = f", {figures.shrunk:,} shrunk to {self._size} px" if figures.shrunk else ""
        return f"{figures.images:,} pictures, {each}{shrunk}"

    def _fields(self) -> frozenset[str]:
        """The fields that must hold media, by what the registry says of the models."""
        known: dict[str, Manifest] = {}
        for ref in {task.model for task in self._specs.values()}:
            try:
                known[ref] = Manifest.from_json(self._http.get(f"/v1/models/{quote(ref, safe='@')}"))
            except NotFound:
                continue  # the server says so when it is asked to run it
        models = {name: known[task.model] for name, task in self._specs.items() if task.model in known}
        return media_fields(self._specs, models)
