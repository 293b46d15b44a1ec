"""Beats as they come: one that differs from the last one in its number alone is not read a second time.

Most beats are such, and of ten thousand workers 2,500 come in each quarter of a second.
"""

from __future__ import annotations

from typing import NamedTuple

import msgpack

from motet.protocol.envelope import BadMessage
from motet.protocol.wire import Beat

_SEQ = msgpack.packb("seq")


class KnownBeat(NamedTuple):
    """A beat as it came, and as it was read."""

    raw: bytes
    beat: Beat
    #: What stands before and behind the value of ``seq``; None: not looked for yet.
    around: tuple[bytes, bytes] | None = None


def read_beat(worker: str, raw: bytes, known: KnownBeat | None) -> KnownBeat | None:
    """A worker's beat; None where it cannot be read, or is another worker's. ``known``: the one before it.

    Where only the number is new the `Beat` is that of before, with the number of before.
    """
    if known is not None:
        before, behind = known.around or _around_seq(known.raw)
        number = raw[len(before) : len(raw) - len(behind)]
        if raw.startswith(before) and raw.endswith(behind) and _is_number(number):
            return KnownBeat(raw, known.beat, (before, behind))
    try:
        beat = Beat.decode(raw)
    except BadMessage:
        return None
    return KnownBeat(raw, beat) if beat.worker == worker else None


def _around_seq(raw: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind the value of ``seq``."""
    at = raw.find(_SEQ) + len(_SEQ)
    unpacker = msgpack.Unpacker()
    unpacker.feed(raw[at:])
    unpacker.unpack()
    return raw[:at], raw[at + unpacker.tell() :]


def _is_number(raw: bytes) -> bool:
    """Whether these bytes are one whole number and nothing else."""
    try:
        return type(msgpack.unpackb(raw)) is int
    except (ValueError, msgpack.UnpackException):
        return False
