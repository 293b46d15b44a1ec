"""Small pictures as bytes, made without any package."""

from __future__ import annotations

import struct
import zlib


def png(width: int = 8, height: int = 8, seed: int = 0, comment: str = "") -> bytes:
    """A whole PNG of grey noise; another seed is another picture. ``comment`` stands in it as it is."""
    rows = b"".join(
        b"\0" + bytes((x * 31 + y * 17 + seed * 101) & 255 for x in range(width)) for y in range(height)
    )
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        chunk(b"tEXt", b"Comment\0" + comment.encode()) if comment else b"",
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its length and check."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
