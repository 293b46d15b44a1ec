"""Beats as they come, of all workers: a look costs what is new in them.

Most beats are new in their number and in figures for people alone, which are written last. That is seen by comparing the
bytes before these, and of such a beat no `Beat` is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import ne

import msgpack

from motet.protocol.envelope import BadMessage
from motet.protocol.wire import FOR_PEOPLE, Beat

#: In front of the key of the first field that is for people, and of the values of all of them, they are a map.
_FIRST, _HEAD = msgpack.packb(FOR_PEOPLE[0]), bytes((0x80 | len(FOR_PEOPLE),))
_FIELDS = dict.fromkeys(FOR_PEOPLE).keys()


@dataclass(slots=True)
class KnownBeat:
    """A beat as it came, and as it was read."""

    raw: bytes
    #: As it was read last. What is `FOR_PEOPLE` in it may be of an earlier beat.
    beat: Beat
    #: Its bytes before those of what is for people.
    before: bytes
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

    def becomes(self, raw: bytes) -> bool:
        """Be this beat from now on, if it is new in nothing but what is for people."""
        if not raw.startswith(self.before):
            return False
        try:
            told = msgpack.unpackb(_HEAD + raw[len(self.before) :])
        except (ValueError, msgpack.UnpackException):
            return False
        if told.keys() != _FIELDS or type(told["seq"]) is not int:
            return False
        self.raw, self._whole = raw, None
        return True


def read_beat(worker: str, raw: bytes, known: KnownBeat | None) -> KnownBeat | None:
    """A worker's beat; None where it cannot be read, or is another worker's. ``known``: the one before it.

    Where nothing is new but what is `FOR_PEOPLE` the `Beat` is that of before.
    """
    if known is not None and known.becomes(raw):
        return known
    try:
        beat = Beat.decode(raw, known.beat if known is not None else None)
    except BadMessage:
        return None
    return KnownBeat(raw, beat, raw[: raw.find(_FIRST)]) if beat.worker == worker else None


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
