"""Beats as they come, of all workers: a look costs what is new in them.

Most workers have beaten once since the look but one before. A worker without work says nothing new but the number of its
beat, which is seen by comparing bytes; one that works says new figures for people, of which the leader makes no `Beat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import ne

import msgpack

from motet.protocol.envelope import BadMessage
from motet.protocol.wire import Beat

_SEQ = msgpack.packb("seq")
#: First byte of a whole number in msgpack -> the bytes that it takes; 0: something else begins so.
_INT_BYTES = [1] * 0x80 + [0] * 0x60 + [1] * 0x20
for _first, _bytes in (
    (0xCC, 2),
    (0xCD, 3),
    (0xCE, 5),
    (0xCF, 9),
    (0xD0, 2),
    (0xD1, 3),
    (0xD2, 5),
    (0xD3, 9),
):
    _INT_BYTES[_first] = _bytes


@dataclass(slots=True)
class KnownBeat:
    """A beat as it came, and as it was read."""

    raw: bytes
    #: As it was read last. What is `FOR_PEOPLE` in it may be of an earlier beat.
    beat: Beat
    #: What stands before and behind the value of ``seq``.
    before: bytes
    behind: bytes
    #: With what is for people as of now; None: nobody has asked for it yet.
    _whole: Beat | None = None

    def whole(self) -> Beat:
        """The beat with all that is new in it; with what was said before, where that cannot be read."""
        if self._whole is None:
            try:
                self._whole = Beat.decode(self.raw)
            except BadMessage:
                self._whole = self.beat
        return self._whole

    def has_another_number(self, raw: bytes) -> bool:
        """Whether these bytes are the same beat but for ``seq``, a whole number."""
        at, n = len(self.before), len(raw) - len(self.before) - len(self.behind)
        return (
            n > 0 and raw.startswith(self.before) and raw.endswith(self.behind) and _INT_BYTES[raw[at]] == n
        )


def read_beat(worker: str, raw: bytes, known: KnownBeat | None) -> KnownBeat | None:
    """A worker's beat; None where it cannot be read, or is another worker's. ``known``: the one before it.

    Where nothing is new but what is `FOR_PEOPLE` the `Beat` is that of before.
    """
    if known is not None and known.has_another_number(raw):
        known.raw, known._whole = raw, None
        return known
    try:
        beat = Beat.decode(raw, known.beat if known is not None else None)
    except BadMessage:
        return None
    if beat.worker != worker:
        return None
    at = raw.find(_SEQ) + len(_SEQ)
    return KnownBeat(raw, beat, raw[:at], raw[at + _INT_BYTES[raw[at]] :])


class NewestBeats:
    """The newest beat of each worker, from one look to the next."""

    def __init__(self) -> None:
        #: All workers at the last look, and what each of them had said.
        self._names: Sequence[str] = ()
        self._raw: Sequence[bytes | None] = ()
        self._known: dict[str, KnownBeat] = {}
        #: Worker -> its newest beat as it was read: with figures for people that may be of before.
        self.beats: dict[str, Beat] = {}

    def take_in(self, names: Sequence[str], raw: Sequence[bytes | None]) -> frozenset[str]:
        """These are all workers, and what each says now. Those whose beat is another one than at the last look."""
        before = self._raw
        if names is not self._names:
            earlier = dict(zip(self._names, self._raw, strict=True))
            before = [earlier.get(name) for name in names]
            for name in earlier.keys() - set(names):
                self._forget(name)
        renewed: list[str] = []
        for name, body in compress(zip(names, raw, strict=True), map(ne, raw, before)):
            found = read_beat(name, body, self._known.get(name)) if body is not None else None
            if found is None:
                self._forget(name)
            else:
                self._known[name], self.beats[name] = found, found.beat
                renewed.append(name)
        self._names, self._raw = names, raw
        return frozenset(renewed)

    def whole(self) -> dict[str, Beat]:
        """All beats, each with its own number and figures, by name."""
        return {name: self._known[name].whole() for name in self._names if name in self._known}

    def silent(self) -> list[str]:
        """Workers of which there is no beat."""
        if len(self.beats) == len(self._names):
            return []
        return [name for name, body in zip(self._names, self._raw, strict=True) if body is None]

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self.beats.pop(name, None)
