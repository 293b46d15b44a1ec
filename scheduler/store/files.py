"""Files of users: what they are called, whose they are, and which blob holds their bytes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import NotFound

FileOrder = Literal["desc", "asc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of a tenant."""

    id: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    created: datetime
    #: When it is deleted; None: never.
    expires: datetime | None


_FIELDS = "id, purpose, filename, bytes, sha256, created, expires"
_LIVES = "tenant_id = :tenant AND (expires IS NULL OR expires > clock_timestamp())"
_ADD = text(f"""
    INSERT INTO file (id, tenant_id, purpose, filename, bytes, sha256, expires)
    VALUES (:id, :tenant, :purpose, :filename, :bytes, :sha256,
            clock_timestamp() + make_interval(secs => CAST(:expires_s AS double precision)))
    RETURNING {_FIELDS}""")
_FIND = text(f"SELECT {_FIELDS} FROM file WHERE id = :file AND {_LIVES}")
_DELETE = text("DELETE FROM file WHERE id = :file AND tenant_id = :tenant RETURNING sha256")
# Not clock_timestamp(), which finds no index.
_EXPIRE = text("DELETE FROM file WHERE expires <= now()")
_BEYOND = {"desc": "<", "asc": ">"}
_LISTS = {
    (order, after): text(
        f"SELECT {_FIELDS} FROM file WHERE {_LIVES} AND (CAST(:purpose AS text) IS NULL OR purpose = :purpose)"
        + (
            f" AND (created, id) {_BEYOND[order]} (SELECT created, id FROM file WHERE id = :after AND tenant_id = :tenant)"
            if after
            else ""
        )
        + f" ORDER BY created {order}, id {order} LIMIT :limit"
    )
    for order in ("desc", "asc")
    for after in (False, True)
}


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def add_file(
    connection: Connection,
    *,
    file: str,
    tenant: UUID,
    purpose: str,
    filename: str,
    size: int,
    sha256: str,
    expires_s: float | None,
) -> StoredFile:
    """Name a blob that is in place. ``expires_s``: seconds from now after which it is deleted; None: never."""
    row = connection.execute(
        _ADD,
        {
            "id": file,
            "tenant": tenant,
            "purpose": purpose,
            "filename": filename,
            "bytes": size,
            "sha256": sha256,
            "expires_s": expires_s,
        },
    ).one()
    return StoredFile(**row._mapping)


def find_file(connection: Connection, tenant: UUID, file: str) -> StoredFile:
    """Raises NotFound, for one that has expired too."""
    row = connection.execute(_FIND, {"file": file, "tenant": tenant}).first()
    if row is None:
        raise NotFound("no such file")
    return StoredFile(**row._mapping)


def list_files(
    connection: Connection,
    tenant: UUID,
    *,
    purpose: str | None,
    after: str | None,
    limit: int,
    order: FileOrder,
) -> Sequence[StoredFile]:
    """Files behind ``after``, of a purpose or all."""
    at = {"tenant": tenant, "purpose": purpose, "limit": limit, **({"after": after} if after else {})}
    return [StoredFile(**row._mapping) for row in connection.execute(_LISTS[order, after is not None], at)]


def delete_file(connection: Connection, tenant: UUID, file: str) -> str:
    """Forget a file; its blob's digest, which something else may name. Raises NotFound."""
    row = connection.execute(_DELETE, {"file": file, "tenant": tenant}).first()
    if row is None:
        raise NotFound("no such file")
    return str(row.sha256)


def expire_files(connection: Connection) -> int:
    """Forget files whose time is over; how many. Their blobs are swept later."""
    return connection.execute(_EXPIRE).rowcount
