"""The envelope: one wrapping for all that is stored or travels with text in it, and the packing inside it.

An envelope is a byte of its format, a byte that says how many bytes of a key's id follow (0: none, until sealing is
built), and the body: msgpack under zstd. Bytes from before the envelope are a bare zstd frame, known by its first byte,
and stay readable. HTTP bodies are packed, never wrapped: whoever reads them may read the text.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from typing import Any

import msgpack

from motet.media.medium import Medium

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: First byte of an envelope. It grows when the body is packed in another way; it is never ``_BARE``.
FORMAT = 1
#: First byte of a zstd frame: what was stored before there were envelopes.
_BARE = 0x28
_HEAD = bytes((FORMAT, 0))
#: Bodies that unfold to more are refused: a guard against bombs, above any real sub-task, for 8,192 vectors of
#: 4,096 numbers are 128 MiB. A reader needs twice as much while it reads one.
MAX_DECODED_BYTES = 256 << 20
#: Entries that one list or map may claim: more than the rows of any sub-task.
_MOST_ENTRIES = 1 << 20
#: Level 1 is faster than the network and leaves a third of the size. Without the checksum, a bit that turned on the way
#: would be read as another text, or as another answer.
_PACKED: Mapping[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.checksum_flag: 1,
}
#: Extension codes of msgpack for the values that it has no type for; the bytes are their text.
_DECIMAL, _DATE, _DATETIME, _TIME, _MEDIUM = 1, 2, 3, 4, 5


class _Compressors(threading.local):
    """One for each thread: what a new one sets up costs as much as compressing a message does."""

    def __init__(self) -> None:
        self.zstd = zstd.ZstdCompressor(options=_PACKED)


_compressors = _Compressors()


class BadMessage(Exception):
    """A message that is not what its sender should have sent: torn, forged or of another version."""


def wrap(value: object) -> bytes:
    """A value in an envelope."""
    return _HEAD + pack(value)


def wrap_packed(plain: bytes) -> bytes:
    """``wrap`` of a value whose ``packed_plain`` is known."""
    return _HEAD + _compressed(plain)


def unwrap(raw: bytes) -> Any:
    """The opposite of ``wrap``, for bytes from before the envelope too. Raises BadMessage, never anything else."""
    return unpack(_body(raw))


def unfolded_bytes(raw: bytes) -> int:
    """What ``unwrap`` would unfold these bytes to, by their own word; their length where they say nothing."""
    try:
        size = zstd.get_frame_info(_body(raw)).decompressed_size
    except (zstd.ZstdError, BadMessage):
        return len(raw)
    return len(raw) if size is None or size > MAX_DECODED_BYTES else max(size, len(raw))


def _body(raw: bytes) -> memoryview:
    if raw[:1] == bytes((_BARE,)):
        return memoryview(raw)
    if len(raw) < len(_HEAD) or raw[0] != FORMAT:
        raise BadMessage(f"{len(raw)} bytes that are no envelope of a known format")
    if raw[1]:
        raise BadMessage("an envelope sealed with a key; this process has none")
    return memoryview(raw)[len(_HEAD) :]


def pack(value: object) -> bytes:
    """Msgpack under zstd, with a checksum of the whole."""
    return _compressed(packed_plain(value))


def _compressed(plain: bytes) -> bytes:
    """One whole frame, whose head says how long the text is."""
    return _compressors.zstd.compress(plain, zstd.ZstdCompressor.FLUSH_FRAME)


def packed_plain(value: object) -> bytes:
    """Msgpack alone, typed values included. The same value gives the same bytes, and another type others."""
    return msgpack.packb(value, use_bin_type=True, default=_extended)  # type: ignore[no-any-return]


def unpack(raw: bytes | memoryview) -> Any:
    """The opposite of ``pack``. Raises BadMessage, never anything else."""
    try:
        size = zstd.get_frame_info(raw).decompressed_size
        if size is None or size > MAX_DECODED_BYTES:
            raise BadMessage(f"payload claims {size} bytes")
        whole = zstd.ZstdDecompressor()
        plain = whole.decompress(raw, size)
        if not whole.eof:
            # All of it may be there but its checksum.
            raise BadMessage("payload is cut off")
        return msgpack.unpackb(
            plain,
            strict_map_key=False,
            max_array_len=_MOST_ENTRIES,
            max_map_len=_MOST_ENTRIES,
            ext_hook=extension,
        )
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001 - any stranger's bytes: every decoder error means the same thing
        raise BadMessage(f"cannot decode {len(raw)} bytes: {type(error).__name__}") from None


def _extended(value: object) -> msgpack.ExtType:
    match value:
        case Decimal():
            return msgpack.ExtType(_DECIMAL, str(value).encode())
        case datetime():
            return msgpack.ExtType(_DATETIME, value.isoformat().encode())
        case date():
            return msgpack.ExtType(_DATE, value.isoformat().encode())
        case time():
            return msgpack.ExtType(_TIME, value.isoformat().encode())
        case Medium():
            return msgpack.ExtType(_MEDIUM, value.to_wire().encode())
    raise TypeError(f"no message holds a {type(value).__name__}")


def extension(code: int, raw: bytes) -> Decimal | date | time | Medium:
    """The value of an extension. Raises ValueError that says in words what it is instead."""
    try:
        text = raw.decode("ascii")
        match code:
            case 1:
                return Decimal(text)
            case 2:
                return date.fromisoformat(text)
            case 3:
                return datetime.fromisoformat(text)
            case 4:
                return time.fromisoformat(text)
            case 5:
                return Medium.from_wire(text)
    except (ValueError, InvalidOperation):
        pass
    raise ValueError(
        "a msgpack extension that is no decimal, date, time or medium"
        if code in (1, 2, 3, 4, 5)
        else "a msgpack extension"
    )
