"""Beats as they come: one that differs from the last one in its number alone is not read a second time.

Most beats are such, and of ten thousand workers 2,500 come in each quarter of a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import msgpack

from motet.protocol.envelope import BadMessage
from motet.protocol.wire import Beat

_SEQ = msgpack.packb("seq")


class KnownBeat(NamedTuple):
    """A beat as it came, and as it was read."""

    raw: bytes
    #: As it was read last: with the ``seq`` of then.
    beat: Beat
    seq: int
    #: What stands before and behind the value of ``seq``; None: not looked for yet.
    around: tuple[bytes, bytes] | None = None

    def whole(self) -> Beat:
        """The beat with its own number."""
        return self.beat if self.beat.seq == self.seq else replace(self.beat, seq=self.seq)


def read_beat(worker: str, raw: bytes, known: KnownBeat | None) -> KnownBeat | None:
    """A worker's beat; None where it cannot be read, or is another worker's. ``known``: the one before it.

    Where only the number is new the `Beat` is that of before, with the number of before.
    """
    if known is not None:
        before, behind = known.around or _around_seq(known.raw)
        if raw.startswith(before) and raw.endswith(behind):
            seq = _number(raw[len(before) : len(raw) - len(behind)])
            if seq is not None:
                return KnownBeat(raw, known.beat, seq, (before, behind))
    try:
        beat = Beat.decode(raw)
    except BadMessage:
        return None
    return KnownBeat(raw, beat, beat.seq) if beat.worker == worker else None


def _around_seq(raw: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind the value of ``seq``."""
    at = raw.find(_SEQ) + len(_SEQ)
    unpacker = msgpack.Unpacker()
    unpacker.feed(raw[at:])
    unpacker.unpack()
    return raw[:at], raw[at + unpacker.tell() :]


def _number(raw: bytes) -> int | None:
    """The whole number that these bytes are; None where they are anything else."""
    try:
        found = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException):
        return None
    return found if type(found) is int else None
