"""Routes of media: pictures come by content before their rows, and go to workers that hold a lease on these.

What a tenant has is told to that tenant alone: an answer depends on nothing that others sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated
from uuid import UUID

import msgpack
from fastapi import Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from motet.errors import InvalidJob, NotFound, Problem
from motet.media.medium import MAX_MEDIUM_BYTES, SHA256, THUMB_BYTES, THUMB_SIDE, Medium, measured
from motet.messages.media import MAX_DIGESTS, MediaQuery, MediaStored, MediumRecord, MissingMedia
from motet.protocol.envelope import unwrap, wrap
from motet.protocol.wire import LEASE_HEADER
from scheduler.api.auth import Caller
from scheduler.api.blobs import lease_of
from scheduler.api.bodies import whole_body
from scheduler.api.refusals import Forbidden, TooLarge
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, body, gives_bytes, takes, takes_bytes
from scheduler.api.rows import BadRow, Incoming, unpacked
from scheduler.blocks import media_in, medium_key, upload_digest
from scheduler.store import media as store
from scheduler.store.registry import secret_of

log = logging.getLogger(__name__)
routes = Routes(tags=["media"])

#: Bytes of one answer to a worker, where it holds several media. More: an API process holds more of them at a time;
#: fewer: more requests for each sub-task.
ANSWER_BYTES = 8 * 1024 * 1024
#: Bytes of media in one request.
REQUEST_BYTES = MAX_MEDIUM_BYTES + 64 * 1024
_PACKED = "application/msgpack"
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

MediumPath = Annotated[
    str, Path(description="Sha256 of the bytes, in lower-case hex.", examples=["9f86d081…"])
]

UploadKey = Annotated[
    str | None,
    Header(
        description="That of the job whose rows will follow: its pictures are kept for it, and go with it at once.",
        max_length=200,
        examples=["4f1c9a3e"],
    ),
]


@routes.post(
    "/v1/media/missing",
    summary="Which of these pictures are to be sent",
    openapi_extra=takes(MediaQuery, {"media": [_DIGEST]}),
)
def missing_media(
    use: Use,
    caller: Caller,
    asked: Annotated[MediaQuery, body(MediaQuery, newer=True)],
    idempotency_key: UploadKey = None,
) -> MissingMedia:
    with use.database.transaction() as connection:
        secret = secret_of(connection, caller.tenant)
        keys = {sha256: medium_key(secret, sha256) for sha256 in asked.media}
        by = None if idempotency_key is None else upload_digest(secret, idempotency_key)
        known = store.claim_media(connection, caller.tenant, keys.values(), by)
    return MissingMedia(missing=tuple(sha256 for sha256, key in keys.items() if key not in known))


@routes.put(
    "/v1/media/{sha256}",
    summary="Send one picture",
    status_code=201,
    openapi_extra=takes_bytes("The bytes of the picture's file.", octet_stream="binary"),
)
async def put_medium(
    request: Request, use: Use, caller: Caller, sha256: MediumPath, idempotency_key: UploadKey = None
) -> MediumRecord:
    if not SHA256.fullmatch(sha256):
        raise NotFound("a picture is named by its sha256, 64 lower-case hex digits")
    await run_in_threadpool(use.door.admit, interactive=False, uploading=True)
    try:
        async with whole_body(request, use, MAX_MEDIUM_BYTES) as raw:
            if hashlib.sha256(raw).hexdigest() != sha256:
                raise InvalidJob(
                    Problem("body", "bytes of another digest", "those of the address", "send it again")
                )
            [stored] = await run_in_threadpool(_stored, use, caller.tenant, [raw], [None], idempotency_key)
            return stored
    except TooLarge:
        raise TooLarge("body", MAX_MEDIUM_BYTES, "make the picture smaller") from None


@routes.post(
    "/v1/media",
    summary="Send several pictures at once",
    status_code=201,
    openapi_extra=takes_bytes(
        'Msgpack of `{"media": [bytes, …], "thumbs": [a small JPEG or nil, …]}`, 32 MB in all.',
        msgpack="binary",
    ),
)
async def post_media(
    request: Request, use: Use, caller: Caller, idempotency_key: UploadKey = None
) -> MediaStored:
    await run_in_threadpool(use.door.admit, interactive=False, uploading=True)
    async with whole_body(request, use, REQUEST_BYTES) as raw:
        stored = await run_in_threadpool(_unpacked, use, caller.tenant, raw, idempotency_key)
        return MediaStored(media=tuple(stored))


def _unpacked(use: Resources, tenant: UUID, raw: bytes, key: str | None) -> list[MediumRecord]:
    told = unpacked(raw)
    media = told.get("media") if isinstance(told, dict) else None
    good = isinstance(media, list) and all(isinstance(one, bytes) for one in media)
    if media is None or not good or not 0 < len(media) <= MAX_DIGESTS:
        raise InvalidJob(
            Problem(
                "media",
                "another form",
                f"a list of the bytes of 1 to {MAX_DIGESTS:,} pictures",
                'send msgpack of {"media": [bytes, …]}',
            )
        )
    thumbs = told.get("thumbs")
    if thumbs is None:
        thumbs = [None] * len(media)
    elif not isinstance(thumbs, list) or len(thumbs) != len(media) or not all(map(_is_thumb, thumbs)):
        raise InvalidJob(
            Problem(
                "thumbs",
                "another form",
                f"for each picture a JPEG of at most {THUMB_SIDE} pixels a side and {THUMB_BYTES:,} bytes, or nil",
                "leave it out, or make them smaller",
            )
        )
    return _stored(use, tenant, media, thumbs, key)


def _is_thumb(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, bytes) or len(value) > THUMB_BYTES:
        return False
    kind, size = measured(value)
    return kind == "image/jpeg" and size is not None and max(size) <= THUMB_SIDE


def _stored(
    use: Resources, tenant: UUID, media: Sequence[bytes], thumbs: Sequence[bytes | None], key: str | None
) -> list[MediumRecord]:
    """Store these. Raises InvalidJob for one that is empty, TooLarge, Overloaded beyond the tenant's quota."""
    for data in media:
        if not data:
            raise InvalidJob(Problem("media", "no bytes", "the bytes of a picture", "check the file"))
        if len(data) > MAX_MEDIUM_BYTES:
            raise TooLarge("media", MAX_MEDIUM_BYTES, "make the picture smaller")
    found = [Medium.of(data) for data in media]
    envelopes = [wrap(data) for data in media]
    with use.database.transaction() as connection:
        secret = secret_of(connection, tenant)
        store.add_media(
            connection,
            tenant,
            [
                store.NewMedium(
                    key=medium_key(secret, one.sha256),
                    media_type=one.media_type,
                    bytes=one.bytes,
                    width=one.width,
                    height=one.height,
                    payload=envelope,
                    thumb=thumb,
                )
                for one, envelope, thumb in zip(found, envelopes, thumbs, strict=True)
            ],
            use.settings.max_media_mb * 1_000_000,
            None if key is None else upload_digest(secret, key),
        )
    log.debug("media stored", extra={"media": len(found), "bytes": sum(one.bytes for one in found)})
    return [MediumRecord.of(one.to_json()) for one in found]


@routes.post(
    "/v1/media/fetch",
    summary="Pictures of a sub-task (workers, under their lease)",
    openapi_extra=takes(MediaQuery, {"media": [_DIGEST]}),
    responses={
        200: gives_bytes(
            'Msgpack of `{"media": {sha256: bytes}, "missing": [sha256]}`: the first of those that were asked for, '
            "8 MiB or one at least; the worker asks again for the rest.",
            _PACKED,
        ),
    },
    response_class=Response,
)
def fetch_media(
    request: Request,
    use: Use,
    caller: Caller,
    asked: Annotated[MediaQuery, body(MediaQuery, newer=True)],
) -> Response:
    shown = lease_of(request.headers.get(LEASE_HEADER, ""))
    with use.database.transaction() as connection:
        lease = None if shown is None else store.media_lease(connection, *shown)
        if lease is None:
            raise Forbidden(
                f"a worker reads pictures under a live lease only; name it in the header {LEASE_HEADER}"
            )
        keys = {medium_key(lease.secret, sha256): sha256 for sha256 in asked.media}
        found, absent = store.leased_media(connection, lease, list(keys), ANSWER_BYTES)
    told = {
        "media": {keys[key]: unwrap(envelope) for key, envelope in found.items()},
        "missing": [sha256 for key, sha256 in keys.items() if key in absent],
    }
    return Response(msgpack.packb(told), media_type=_PACKED)


def with_media(use: Resources, tenant: UUID, secret: bytes, incoming: Incoming, *, refuse: bool) -> Incoming:
    """The rows with each medium as it is stored, whatever its sender said of it; too many bytes in a row are marked bad.

    What is not stored is refused (InvalidJob), or with ``refuse=False`` marked as a bad value of its row.
    """
    digests = {one.sha256 for values in incoming.columns.values() for one in media_in(values)}
    if not digests:
        return incoming
    keys = {sha256: medium_key(secret, sha256) for sha256 in digests}
    with use.database.reading() as connection:
        known = store.known_media(connection, tenant, keys.values())
    facts = {sha256: known[key] for sha256, key in keys.items() if key in known}
    if refuse and len(facts) < len(digests):
        _refuse_absent(incoming, facts)
    columns = {name: list(values) for name, values in incoming.columns.items()}
    bad_fields = {name: dict(bad) for name, bad in incoming.bad_fields.items()}
    sizes: dict[int, int] = {}
    for name, values in columns.items():
        for i, value in enumerate(values):
            if type(value) is not Medium:
                continue
            fact = facts.get(value.sha256)
            why = _NOT_STORED
            if fact is not None:
                values[i] = Medium(value.sha256, fact.media_type, fact.bytes, fact.width, fact.height)
                sizes[i] = sizes.get(i, 0) + fact.bytes
                if sizes[i] <= MAX_MEDIUM_BYTES:
                    continue
                why = _TOO_MUCH
            values[i] = ""
            bad_fields.setdefault(name, {})[i] = replace(why, field=name)
    return replace(incoming, columns=columns, bad_fields=bad_fields)


_NOT_STORED = BadRow(
    "", "a picture that is not stored", "one that was sent before its row", "send its bytes, then ask again"
)
_TOO_MUCH = BadRow(
    "",
    f"pictures of more than {MAX_MEDIUM_BYTES:,} bytes in the row",
    f"at most {MAX_MEDIUM_BYTES:,} bytes of pictures a row",
    "make them smaller",
    error="too_large",
)


def _refuse_absent(incoming: Incoming, facts: Mapping[str, object]) -> None:
    for name, values in incoming.columns.items():
        rows = [i for i, v in enumerate(values) if type(v) is Medium and v.sha256 not in facts]
        if rows:
            raise store.not_stored(f"rows.{name}", len(rows), (incoming.first_row or 0) + rows[0])
