"""Messages about media: pictures that rows refer to, sent before the rows, once by content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from motet.messages.message import ApiMessage, Limit

#: Digests of one question at most.
MAX_DIGESTS = 4096

_Digest = Annotated[str, Limit("", pattern="[0-9a-f]{64}")]
_Digests = Annotated[
    tuple[_Digest, ...],
    Limit(f"a list of 1 to {MAX_DIGESTS:,} sha256 in lower-case hex", least=1, most=MAX_DIGESTS),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaQuery(ApiMessage):
    """Media by their digests."""

    #: Sha256 of each, in lower-case hex.
    media: _Digests


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingMedia(ApiMessage):
    """Which of the media that were asked for are to be sent: the others are stored, and stay for the rows to come."""

    #: Sha256 of each, in the order in which they were asked for.
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumRecord(ApiMessage):
    """A medium that is stored, now or before. ``{"medium": …}`` in a row refers to it."""

    #: Sha256 of its bytes.
    medium: str
    #: By its first bytes; application/octet-stream where they are of no kind that is known.
    media_type: str
    #: Size of it.
    bytes: int
    #: Pixels as its head tells them; null: not known.
    width: int | None = None
    #: As ``width``.
    height: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaStored(ApiMessage):
    """Media that are stored, now or before, in the order in which they came."""

    #: A record of each.
    media: tuple[MediumRecord, ...]
