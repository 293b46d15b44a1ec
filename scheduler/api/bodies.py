"""Bodies of requests: read as they come, counted on the wire and again as they are decoded."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from fastapi import Request

from motet.errors import InvalidJob, Overloaded, Problem
from motet.messages.message import ApiMessage, expectations, misfits
from motet.protocol.values import Doubled
from motet.tasks import short
from scheduler.api.refusals import TooLarge
from scheduler.api.resources import MAX_BODIES_BYTES, Resources
from scheduler.api.strict_json import BrokenJson, flaw, loads

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

M = TypeVar("M", bound=ApiMessage)

#: Bodies that hold no rows.
SMALL_BYTES = 1024 * 1024
#: A sender that is silent for so long has gone.
_SILENCE_S = 30.0
_PIECE = 256 * 1024
#: Memory that a zstd frame may ask its reader for: 8 MiB, what level 19 of a large file uses.
_WINDOW_LOG_MAX = 23
#: Frames or members of one body: each costs more than its bytes, and nobody needs more than one.
_MAX_FRAMES = 64


async def chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises InvalidJob where its sender falls silent."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidJob(
                Problem("body", f"nothing for {_SILENCE_S:.0f} s", "the rest of it", "send it again")
            ) from None
        if chunk:
            yield chunk


@asynccontextmanager
async def whole_body(request: Request, use: Resources, limit: int) -> AsyncIterator[bytes]:
    """The whole body, decoded; its bytes count against the process' budget until the caller is done.

    Raises TooLarge beyond ``limit`` bytes, on the wire or decoded; InvalidJob where it cannot be decoded;
    Overloaded where too many bodies are under way.
    """
    decoder = _decoder(request)
    body, wire, held = bytearray(), 0, 0
    try:
        async for chunk in chunks(request):
            wire += len(chunk)
            if wire > limit:
                raise TooLarge("body", limit)
            for piece in decoder.feed(chunk):
                if len(body) + len(piece) > limit:
                    raise TooLarge("body", limit)
                if use.bodies_bytes + len(piece) > MAX_BODIES_BYTES:
                    raise Overloaded("too many uploads at once; come back in a moment", 1.0)
                body += piece
                held += len(piece)
                use.bodies_bytes += len(piece)
        decoder.finish()
        yield bytes(body)
    finally:
        use.bodies_bytes -= held


def json_body(raw: bytes) -> Any:
    """The body as JSON, odd values as marks. Raises InvalidJob where it is no JSON."""
    try:
        return loads(raw)
    except BrokenJson as broken:
        raise InvalidJob(Problem("body", str(broken), "JSON", "mend the body")) from None


def clean_object(body: Any, where: str = "body") -> dict[str, Any]:
    """The body as an object without any mark, NUL or lone surrogate. Raises InvalidJob that says where."""
    if not isinstance(body, dict):
        raise InvalidJob(Problem(where, _kind(body), "a JSON object", "see docs/http.md"))
    if isinstance(body, Doubled):
        raise InvalidJob(
            Problem(where, "a key that stands there twice", "each key once", "remove one of them")
        )
    found = flaw(body)
    if found:
        path, words = found
        raise InvalidJob(
            Problem(path or where, words, "JSON that other programs can read", "mend this value")
        )
    return body


def taken(message: type[M], body: Mapping[str, Any], *, newer: bool = False) -> M:
    """A clean object as a message. ``newer``: fields that are not known are passed over.

    Raises InvalidJob with every field that is not known, is missing or does not fit.
    """
    if problems := misfits_of(message, body, newer=newer):
        raise InvalidJob(problems)
    return message.of(body)


def misfits_of(message: type[ApiMessage], body: Mapping[str, Any], *, newer: bool = False) -> list[Problem]:
    """Every field of an object that is not known to the message, is missing or does not fit."""
    known = expectations(message)
    strange = [] if newer else [key for key in body if key not in known]
    return [
        *(Problem(short(k), "an unknown option", f"one of {', '.join(known)}", "remove it") for k in strange),
        *(
            Problem(key, short(body.get(key, "nothing")), known[key], "mend it; see docs/http.md")
            for key in misfits(message, body)
        ),
    ]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


class _Decoder(Protocol):
    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decoded pieces of at most 256 KiB, so that a bomb is seen before it has gone off."""
        ...

    def finish(self) -> None:
        """Raise InvalidJob where the body ended too early."""
        ...


def _decoder(request: Request) -> _Decoder:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    match coding:
        case "identity" | "":
            return _Identity()
        case "zstd":
            return _Zstd()
        case "gzip" | "x-gzip":
            return _Gzip()
        case _:
            raise InvalidJob(
                Problem("Content-Encoding", "an unknown coding", "zstd, gzip or none", "send it as it is")
            )


class _Identity:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        pass


class _Zstd:
    def __init__(self) -> None:
        self._frame = _new_frame()
        self._frames = 1
        self._fed = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._fed = self._fed or bool(data)
        try:
            while data:
                if self._frame.eof:
                    self._frame, self._frames = _new_frame(), _one_more(self._frames, "zstd")
                yield self._frame.decompress(data, _PIECE)
                while not self._frame.eof and not self._frame.needs_input:
                    yield self._frame.decompress(b"", _PIECE)
                data = self._frame.unused_data if self._frame.eof else b""
        except zstd.ZstdError:
            raise _undecodable("zstd") from None

    def finish(self) -> None:
        if self._fed and not self._frame.eof:
            raise _undecodable("zstd")


def _new_frame() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})


class _Gzip:
    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)
        self._members = 1
        self._fed = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._fed = self._fed or bool(data)
        try:
            while data:
                if self._member.eof:
                    self._member, self._members = zlib.decompressobj(31), _one_more(self._members, "gzip")
                yield self._member.decompress(data, _PIECE)
                data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        except zlib.error:
            raise _undecodable("gzip") from None

    def finish(self) -> None:
        if self._fed and not self._member.eof:
            raise _undecodable("gzip")


def _one_more(frames: int, coding: str) -> int:
    if frames == _MAX_FRAMES:
        raise _undecodable(coding)
    return frames + 1


def _undecodable(coding: str) -> InvalidJob:
    return InvalidJob(
        Problem("body", f"bytes that are not {coding}", f"a whole {coding} stream", "send it again")
    )
