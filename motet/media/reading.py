"""The client's reading of media: whatever a row holds for a picture becomes a ``Medium`` and bytes to send.

A path in a row is a stranger's input: it is opened below ``media_root`` only (motet.media.folder). An address is never
opened. A picture larger than any model reads is made smaller here, once.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from motet.errors import InvalidJob, Problem, SetupError
from motet.media.decoding import BAD_IMAGE, TOO_LARGE, BadMedium, decode
from motet.media.folder import MediaFolder, RefusedPath
from motet.media.medium import (
    MAX_MEDIUM_BYTES,
    THUMB_BYTES,
    THUMB_SIDE,
    UNKNOWN_TYPE,
    Medium,
    measured,
    reference,
)
from motet.protocol.values import Doubled, kind_of
from motet.sources import OR_ERROR, Fault, Rows
from motet.tasks import short

#: Pixels of a picture's longer side that are sent at most. Larger: more bytes for models that read 224 to 448 pixels;
#: smaller: models see less than they could.
MEDIA_SIZE = 512
#: The formats that are sent as they are where they are small enough: the others are read by fewer programs.
_AS_THEY_ARE = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"})
#: Quality of a JPEG that was made smaller.
_QUALITY = 90
#: The same of one in small: some 3 kB.
_THUMB_QUALITY = 70
#: Rows whose pictures are read at the same time: as many as there are threads, and as many again that wait.
_THREADS = min(4, os.cpu_count() or 1)
_AHEAD = 4 * _THREADS

#: What a value may be where a picture is expected.
EXPECTED = "a picture: bytes, a path below media_root, a PIL image, an array, or a data URL"
#: Types whose values are no pictures by themselves.
_PLAIN = frozenset({int, float, bool, type(None)})
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|//")
_DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.ASCII)

#: Gets a medium and its bytes, for sending, and it in small where that is wanted.
Keep: TypeAlias = "Callable[[Medium, bytes, bytes | None], object]"


@dataclass(slots=True)
class MediaRead:
    """What was read of media so far."""

    #: Values that hold one.
    media: int = 0
    #: Bytes of them as they were found, and as they are sent where each is sent.
    found_bytes: int = 0
    bytes: int = 0
    #: Of them those that were made smaller.
    shrunk: int = 0


class MediaReader:
    """Reads the media of rows. ``rows`` reads ahead in threads; ``row`` reads one."""

    def __init__(
        self,
        names: Sequence[str],
        fields: Callable[[], Collection[str]],
        *,
        root: str | os.PathLike[str] | None = None,
        size: int | None = MEDIA_SIZE,
        thumbs: bool = False,
        keep: Keep | None = None,
    ) -> None:
        """``names``: fields that tasks read; ``fields``: those of them that must hold media, asked for once and only
        where it matters. ``size``: pixels of the longer side at most; None: pictures are sent as they are. ``thumbs``: each is
        sent in small as well, for pages. ``keep``:
        None where nothing will be sent: then pictures are looked at, not made smaller.

        Raises InvalidJob for a root that is no folder, and for a size that is none.
        """
        if size is not None and (
            not isinstance(size, int) or isinstance(size, bool) or not 16 <= size <= 16384
        ):
            raise InvalidJob(
                Problem(
                    "media_size",
                    short(size),
                    "16 to 16,384 pixels of the longer side, or None",
                    "leave it out for 512, or give None to send pictures as they are",
                )
            )
        self._names, self._ask_fields, self._size, self._keep = names, fields, size, keep
        self._thumbs = thumbs
        self._root = None if root is None else MediaFolder(root)
        self._fields: Collection[str] | None = None
        self._lock = threading.Lock()
        self.read = MediaRead()

    def close(self) -> None:
        if self._root is not None:
            self._root.close()

    @property
    def fields(self) -> Collection[str]:
        """The fields that must hold media."""
        if self._fields is None:
            self._fields = self._ask_fields()
        return self._fields

    def rows(self, rows: Rows) -> Rows:
        """The same rows with each medium read: a ``Medium``, or a ``Fault`` in its place. In order, some rows ahead."""
        waiting: deque[tuple[Future[Any] | Any, int | None]] = deque()
        threads: ThreadPoolExecutor | None = None
        try:
            for row, line in rows:
                found = self._found(row)
                if not found and not waiting:
                    yield row, line
                    continue
                if found and threads is None:
                    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="motet-media")
                assert threads is not None, "a row waits for one with media"
                waiting.append((threads.submit(self._read_row, row, found) if found else row, line))
                while len(waiting) > _AHEAD or (waiting and _is_done(waiting[0][0])):
                    yield _done(waiting)
            while waiting:
                yield _done(waiting)
        except InvalidJob:
            # What came before it is told as well.
            while waiting:
                yield _done(waiting)
            raise
        finally:
            rows.close()
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)

    def row(self, row: Any) -> Any:
        """One row, read here and now."""
        found = self._found(row)
        return self._read_row(row, found) if found else row

    def holds(self, row: Any) -> bool:
        """Whether a row has media that are to be read."""
        return bool(self._found(row))

    def _found(self, row: Any) -> list[str]:
        """The fields of a row that hold media."""
        if (
            type(row) is str
            or type(row) is Doubled
            or (type(row) is not dict and not isinstance(row, Mapping))
        ):
            return []
        found = []
        known = self._root is not None or self._fields is not None
        for name in self._names:
            value = row.get(name)
            # Most values of most rows. A path that is none is refused by the server.
            if not known and (type(value) in _PLAIN or (type(value) is str and value[:5] != "data:")):
                continue
            if self._is_medium(name, value, name in row):
                found.append(name)
        return found

    def _is_medium(self, name: str, value: Any, is_there: bool) -> bool:
        if isinstance(value, Fault | Medium) or not is_there:
            return False
        if isinstance(value, bytes | bytearray | memoryview):
            return measured(bytes(value[:64]))[0] != UNKNOWN_TYPE or name in self.fields
        if _is_pil(value) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)):
            return True
        if self._root is not None or isinstance(value, str | os.PathLike) or _is_pixels(value):
            return name in self.fields
        return self._fields is not None and name in self._fields

    def _read_row(self, row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        # All of it: folds of an open job read fields that no task reads.
        read = dict(row)
        kept: list[tuple[Medium, bytes, int]] = []
        total = 0
        for name in names:
            try:
                medium, data, found_bytes = self._medium(row[name])
                total += medium.bytes
                if total > MAX_MEDIUM_BYTES:
                    raise RefusedPath(
                        f"pictures of {total:,} bytes in the row",
                        f"at most {MAX_MEDIUM_BYTES:,} bytes of pictures a row",
                    )
            except BadMedium as bad:
                read[name] = Fault(name, str(bad), "", f"mend the picture, {OR_ERROR}", bad.code)
            except RefusedPath as no:
                read[name] = Fault(name, no.got, no.expected, f"mend the row, {OR_ERROR}")
            else:
                read[name] = medium
                kept.append((medium, data, found_bytes))
        for medium, data, found_bytes in kept:
            if data:
                self._note(medium, data, found_bytes)
        return read

    def _note(self, medium: Medium, data: bytes, found_bytes: int) -> None:
        with self._lock:
            self.read.media += 1
            self.read.found_bytes += found_bytes
            self.read.bytes += medium.bytes
            self.read.shrunk += medium.bytes != found_bytes
        if self._keep is not None:
            self._keep(medium, data, _in_small(data) if self._thumbs else None)

    def _medium(self, value: Any) -> tuple[Medium, bytes, int]:
        """The value's medium, its bytes as they are sent, and how many were found. Raises BadMedium, RefusedPath."""
        if named := reference(value):
            return named, b"", 0
        if isinstance(value, Mapping):  # of Hugging Face: the bytes, or where they are
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if _is_pil(value):
            data = _of_pil(value, self._size)
        elif hasattr(value, "dtype") and hasattr(value, "shape"):
            data = _of_array(value, self._size)
        elif isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
        elif isinstance(value, str) and value[:5].lower() == "data:":
            data = _of_data_url(value)
        elif isinstance(value, str | os.PathLike):
            data = self._of_path(os.fspath(value))
        else:
            raise RefusedPath(kind_of(value), EXPECTED)
        found = len(data)
        if self._keep is None:
            return self._looked_at(data), data, found
        data = _fitting(data, self._size)
        return Medium.of(data), data, found

    def _of_path(self, path: Any) -> bytes:
        if not isinstance(path, str):
            raise RefusedPath("a path of bytes", "a path of text")
        if _ADDRESS.match(path):
            raise RefusedPath("an address, which nobody opens", EXPECTED)
        if self._root is None:
            raise RefusedPath(
                "a path, and no media_root", "media_root, the folder that paths are opened below"
            )
        return self._root.read(path)

    def _looked_at(self, data: bytes) -> Medium:
        """About what would be sent, by the head alone."""
        medium = Medium.of(data)
        _must_be_a_picture(medium)
        if self._size is None or medium.width is None or medium.height is None:
            return medium
        share = min(1.0, self._size / max(medium.width, medium.height, 1))
        return replace(
            medium, width=max(1, round(medium.width * share)), height=max(1, round(medium.height * share))
        )


def _is_done(row: Any) -> bool:
    return not isinstance(row, Future) or row.done()


def _done(waiting: deque[tuple[Future[Any] | Any, int | None]]) -> tuple[Any, int | None]:
    row, line = waiting.popleft()
    return (row.result() if isinstance(row, Future) else row), line


def _is_pil(value: Any) -> bool:
    # Another thread may be importing it: who has such an image has all of it.
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)
    return kind is not None and isinstance(value, kind)


def _is_pixels(value: Any) -> bool:
    """An array that may be a picture, or a table of numbers."""
    return hasattr(value, "dtype") and getattr(value, "ndim", 0) in (2, 3)


def _must_be_a_picture(medium: Medium) -> None:
    if medium.media_type == UNKNOWN_TYPE:
        # In whatever words there are for it; and nothing that is no picture leaves this machine.
        raise BadMedium(BAD_IMAGE, "this is no picture of a kind that is read")


def _fitting(data: bytes, size: int | None) -> bytes:
    """The picture as it is sent: as it is where it is small enough, else its longer side is ``size``. Raises BadMedium."""
    if len(data) > MAX_MEDIUM_BYTES:
        raise BadMedium(
            TOO_LARGE, f"the picture's file has {len(data):,} bytes; at most {MAX_MEDIUM_BYTES:,} are read"
        )
    kind, dims = measured(data)
    if size is None:
        _must_be_a_picture(Medium.of(data))
        return data
    if dims is not None and kind in _AS_THEY_ARE and max(dims) <= size:
        return data
    side = None if dims is None else max(1, min(dims) * size // max(*dims, 1))
    image = decode(data, side)
    if max(image.size) > size:
        image.thumbnail((size, size))
        return _encoded(image, "JPEG", quality=_QUALITY)
    # Small enough in pixels, and of a format that few read: nothing of it is lost.
    return _encoded(image, "PNG", compress_level=1)


def _in_small(data: bytes) -> bytes | None:
    """The picture for a page; None where it cannot be read, which its cells will say."""
    try:
        image = decode(data, THUMB_SIDE)
    except BadMedium:
        return None
    image.thumbnail((THUMB_SIDE, THUMB_SIDE))
    found = _encoded(image, "JPEG", quality=_THUMB_QUALITY)
    return found if len(found) <= THUMB_BYTES else None


def _encoded(image: Any, how: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, how, **options)
    return out.getvalue()


def _of_pil(image: Any, size: int | None) -> bytes:
    """A picture in memory as a file that nothing of it is lost in. Raises BadMedium."""
    try:
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image) or image
        if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            if upright.mode in ("I", "F"):
                raise BadMedium(
                    BAD_IMAGE, "its pixels have 32 bits each, as measurements have; give it 8 or 16 bits"
                )
            upright = upright.convert("RGB")
        small = size is None or max(upright.size) <= size
        return _encoded(upright, "PNG", compress_level=1 if small else 0)
    except BadMedium:
        raise
    except MemoryError:
        raise BadMedium(TOO_LARGE, "the picture needs more memory than there is; make it smaller") from None
    except Exception:  # noqa: BLE001 - an image that is read only now may be broken in any way
        raise BadMedium(
            BAD_IMAGE, "the picture is damaged or cut off: it cannot be read to its end"
        ) from None


_ARRAY = "an array of uint8 of the shape (height, width), (height, width, 3) or (height, width, 4)"


def _of_array(array: Any, size: int | None) -> bytes:
    """An array of pixels as a file. Raises RefusedPath, BadMedium."""
    shape = tuple(array.shape)
    if len(shape) == 3 and shape[2] == 1:
        array, shape = array[:, :, 0], shape[:2]
    good = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
    if str(array.dtype) == "bool" and len(shape) == 2:
        array = array.astype("uint8") * 255
    if not good or str(array.dtype) != "uint8" or 0 in shape:
        told = "x".join(map(str, shape)) or "no"
        raise RefusedPath(f"an array of {array.dtype} of {told} values", _ARRAY)
    try:
        from PIL import Image
    except ImportError:
        raise SetupError("arrays become pictures with Pillow; pip install 'motet[media]'") from None
    import numpy

    return _of_pil(Image.fromarray(numpy.ascontiguousarray(array)), size)


def _of_data_url(url: str) -> bytes:
    """The bytes within a data URL. Raises RefusedPath."""
    head = _DATA_URL.match(url[:200])
    if head is None or ";base64" not in head[2].lower():
        raise RefusedPath("a data URL of another form", "data:image/…;base64,…")
    if (len(url) - head.end()) // 4 * 3 > MAX_MEDIUM_BYTES + 3:
        raise RefusedPath(
            f"a data URL of {len(url):,} characters", f"at most {MAX_MEDIUM_BYTES:,} bytes of a picture"
        )
    with suppress(binascii.Error, ValueError):
        if data := base64.b64decode(url[head.end() :], validate=True):
            return data
    raise RefusedPath("a data URL that holds no base64", "data:image/…;base64,…")
