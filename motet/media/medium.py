"""A medium: a picture as the value of a field, told by its digest and what is known of it. Stdlib only; never the bytes.

The bytes lie beside the rows, stored once by content for each tenant (docs/media.md). A row, a block, a payload and a
column of values hold a ``Medium``; a worker turns it into bytes before its engine sees it. On the wire it is an extension
of msgpack (motet.protocol.envelope), in JSON the object ``{"medium": "<sha256>"}``.
"""

from __future__ import annotations

import builtins
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHA256 = re.compile(r"[0-9a-f]{64}")
#: What is told of bytes of no kind that is known: no name that a stranger chose goes further.
UNKNOWN_TYPE = "application/octet-stream"
#: Media types that are told by their first bytes.
MEDIA_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/bmp",
    "image/tiff",
    "image/avif",
    UNKNOWN_TYPE,
)
#: Bytes of one medium, and of all media of a row. Larger: one row fills a worker's memory.
MAX_MEDIUM_BYTES = 32_000_000
#: Bytes, and pixels of the longer side, of a medium in small.
THUMB_BYTES, THUMB_SIDE = 8_192, 96
#: Markers of a JPEG that hold its size: frames of all codings, the tables DHT, JPG and DAC among them aside.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Segments of a JPEG looked through for its size.
_MOST_SEGMENTS = 1000


@dataclass(frozen=True, slots=True)
class Medium:
    """The value of a field that holds a picture."""

    #: Of its bytes, in lower-case hex.
    sha256: str
    #: One of MEDIA_TYPES.
    media_type: str
    #: Size of it.
    bytes: int
    #: Pixels as its head tells them, before it is turned upright; None where that is not known.
    width: int | None = None
    height: int | None = None

    @classmethod
    def of(cls, data: builtins.bytes) -> Medium:
        """What these bytes are, as far as their head tells. Reads no pixel, and never fails."""
        kind, size = measured(data)
        width, height = size or (None, None)
        return cls(hashlib.sha256(data).hexdigest(), kind, len(data), width, height)

    @property
    def pixels(self) -> int | None:
        """Width times height."""
        return None if self.width is None or self.height is None else self.width * self.height

    @property
    def text(self) -> str:
        """What stands in a template, a log for people or a cell of a table: a reference, never a pixel or a path."""
        size = "" if self.width is None else f", {self.width}x{self.height}"
        return f"medium:{self.sha256[:16]} ({self.media_type}{size})"

    def to_wire(self) -> str:
        """The text inside its extension of msgpack."""
        return f"{self.sha256} {self.media_type} {self.bytes} {self.width or 0} {self.height or 0}"

    @classmethod
    def from_wire(cls, text: str) -> Medium:
        """The opposite of ``to_wire``. Raises ValueError."""
        sha256, kind, size, width, height = text.split(" ")
        if not SHA256.fullmatch(sha256) or kind not in MEDIA_TYPES:
            raise ValueError("a medium of another form")
        size_, width_, height_ = (_count(number) for number in (size, width, height))
        return cls(sha256, kind, size_, width_ or None, height_ or None)

    def to_json(self) -> dict[str, Any]:
        """For people and for JSON lines: what ``reference`` reads, and what is known beside it."""
        told = {"medium": self.sha256, "media_type": self.media_type, "bytes": self.bytes}
        return {**told, **({} if self.width is None else {"width": self.width, "height": self.height})}


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 10:
        raise ValueError("a number of another form")
    return int(text)


def reference(value: Any) -> Medium | None:
    """The medium that an object of JSON names, as ``{"medium": "<sha256>"}``; None where it names none.

    What else stands there is believed by no one: the server knows what it stored.
    """
    if not isinstance(value, Mapping) or not isinstance(found := value.get("medium"), str):
        return None
    if not SHA256.fullmatch(found):
        return None
    kind = value.get("media_type")
    size, width, height = (_told(value.get(name)) for name in ("bytes", "width", "height"))
    return Medium(
        found, kind if kind in MEDIA_TYPES else UNKNOWN_TYPE, size or 0, width or None, height or None
    )


def _told(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 else None


def measured(data: bytes) -> tuple[str, tuple[int, int] | None]:
    """Media type, and width and height where the head says them, of a stranger's bytes. Never fails."""
    try:
        return _measured(data)
    except (struct.error, IndexError):
        return _kind(data), None


def _measured(data: bytes) -> tuple[str, tuple[int, int] | None]:
    kind = _kind(data)
    match kind:
        case "image/jpeg":
            return kind, _size_of_jpeg(data)
        case "image/png":
            return kind, struct.unpack_from(">II", data, 16)
        case "image/gif":
            return kind, struct.unpack_from("<HH", data, 6)
        case "image/bmp":
            return kind, _size_of_bmp(data)
        case "image/webp":
            return kind, _size_of_webp(data)
    return kind, None


def _kind(data: bytes) -> str:
    head = data[:32]
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"BM"):
        return "image/bmp"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "image/tiff"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return UNKNOWN_TYPE


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _size_of_bmp(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # the head of OS/2
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)  # a negative height: from top to bottom


def _size_of_webp(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            packed = struct.unpack_from("<I", data, 21)[0]
            return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        case b"VP8X":
            width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
            return width, height
    return None
