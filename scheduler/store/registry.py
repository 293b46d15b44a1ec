"""Tenants, tokens, blobs and models: who may ask, and what may be loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import Conflict
from motet.protocol.manifest import Manifest
from motet.states import LIVE
from scheduler.store.aliases import alias_of, find_alias, lock_names
from scheduler.store.database import together
from scheduler.store.schema import spelt

# -- tenants and tokens ----------------------------------------------------------------------------

_FIND_TOKEN = text("""
    SELECT id, tenant_id, scope, secret_sha256, revoked IS NOT NULL AS revoked,
           coalesce(expires <= clock_timestamp(), false) AS expired
      FROM token WHERE id = :id""")
_TENANT = text("SELECT id FROM tenant WHERE name = :name")
#: The key of every digest of what a tenant sends.
SECRET = text("SELECT digest_key FROM tenant WHERE id = :tenant")
_MAKE_TENANT = text("INSERT INTO tenant (name) VALUES (:name) ON CONFLICT (name) DO NOTHING")
_ADD_TOKEN = text("""
    INSERT INTO token (id, tenant_id, name, scope, secret_sha256, expires)
    VALUES (:id, :tenant, :name, :scope, :secret_sha256,
            clock_timestamp() + make_interval(secs => CAST(:expires_s AS double precision)))
    ON CONFLICT (id) DO NOTHING""")
_TOKENS = text("""
    SELECT k.id, k.name, k.scope, t.name AS tenant, k.created, k.expires, k.revoked
      FROM token k JOIN tenant t ON t.id = k.tenant_id ORDER BY k.created, k.id""")
_REVOKE = text("UPDATE token SET revoked = coalesce(revoked, clock_timestamp()) WHERE id = :id RETURNING id")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """A token as it is checked: its secret only as a digest."""

    id: str
    tenant: UUID
    scope: str
    secret_sha256: bytes
    revoked: bool
    expired: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntry:
    """A token as it is listed: nothing that would let anyone in."""

    id: str
    name: str
    scope: str
    tenant: str
    created: datetime
    expires: datetime | None
    revoked: datetime | None


def find_token(connection: Connection, token_id: str) -> StoredToken | None:
    """The token of this id, valid or not."""
    row = connection.execute(_FIND_TOKEN, {"id": token_id}).first()
    if row is None:
        return None
    return StoredToken(
        id=row.id,
        tenant=row.tenant_id,
        scope=row.scope,
        secret_sha256=bytes(row.secret_sha256),
        revoked=row.revoked,
        expired=row.expired,
    )


def tenant_named(connection: Connection, name: str) -> UUID:
    """The tenant of this name, made if there is none."""
    connection.execute(_MAKE_TENANT, {"name": name})
    tenant: UUID = connection.execute(_TENANT, {"name": name}).scalar_one()
    return tenant


def secret_of(connection: Connection, tenant: UUID) -> bytes:
    """The key of every digest of what a tenant sends."""
    return bytes(connection.execute(SECRET, {"tenant": tenant}).scalar_one())


def add_token(
    connection: Connection,
    *,
    token_id: str,
    tenant: UUID,
    name: str,
    scope: str,
    secret_sha256: bytes,
    expires_s: float | None = None,
) -> None:
    """Store a token. One of this id that is there already stays as it is, revoked or not."""
    connection.execute(
        _ADD_TOKEN,
        {
            "id": token_id,
            "tenant": tenant,
            "name": name,
            "scope": scope,
            "secret_sha256": secret_sha256,
            "expires_s": expires_s,
        },
    )


def tokens(connection: Connection) -> list[TokenEntry]:
    """Every token, revoked ones included, oldest first."""
    return [TokenEntry(**row._mapping) for row in connection.execute(_TOKENS)]


def revoke_token(connection: Connection, token_id: str) -> bool:
    """Revoke a token for good; again is harmless. False where there is none."""
    return connection.execute(_REVOKE, {"id": token_id}).first() is not None


# -- blobs -----------------------------------------------------------------------------------------

# Ordered, since two manifests may name the same files.
_BLOB_SIZES = text("""
    WITH asked AS (SELECT sha256 FROM blob WHERE sha256 = ANY(:shas) ORDER BY sha256 FOR UPDATE)
    UPDATE blob SET created = clock_timestamp() FROM asked WHERE blob.sha256 = asked.sha256
 RETURNING blob.sha256, blob.bytes""")
_LIVE_LEASE = text("""
    SELECT 1 FROM lease WHERE subtask_id = :subtask AND attempt = :attempt AND nonce = :nonce
       AND until > clock_timestamp()""")


def blob_sizes(connection: Connection, shas: Collection[str]) -> dict[str, int]:
    """Digest -> bytes of those blobs that are stored.

    They are young again: no sweep takes one between this look and the model that will name it.
    """
    return {row.sha256: row.bytes for row in connection.execute(_BLOB_SIZES, {"shas": list(shas)})}


def has_live_lease(connection: Connection, subtask: int, attempt: int, nonce: str) -> bool:
    """Whether an attempt that knows its nonce still holds its lease."""
    at = {"subtask": subtask, "attempt": attempt, "nonce": nonce}
    return connection.execute(_LIVE_LEASE, at).first() is not None


# -- models ----------------------------------------------------------------------------------------

#: A model that finished jobs used cannot go, for their answers name it: its row stays, marked and unseen.
_SEEN = "NOT manifest ? 'removed'"
# ``name@version`` is that model, ``name@alias`` the one it means now; a bare name is the newest of it.
_FIND = f"""
    SELECT DISTINCT ON (asked.ref) asked.ref, m.id, m.manifest
      FROM (SELECT ref, split_part(ref, '@', 1) AS name, strpos(ref, '@') = 0 AS bare,
                   substr(ref, strpos(ref, '@') + 1) AS which
              FROM unnest(CAST(:refs AS text[])) ref) asked
      LEFT JOIN alias a ON a.name = asked.name AND a.alias = asked.which AND NOT asked.bare
      JOIN model m ON m.name = asked.name AND (asked.bare OR m.version = asked.which OR m.id = a.model_id)
     WHERE {_SEEN} ORDER BY asked.ref, m.id DESC"""
_FIND_MODELS = text(_FIND)
_FIND_WITH_TRUNKS = text(f"""
    WITH found AS ({_FIND}),
    trunk AS (SELECT DISTINCT manifest->>'trunk_model' AS ref FROM found WHERE manifest->>'trunk_model' <> '')
    SELECT ref, id, manifest, false AS below FROM found UNION ALL
    SELECT t.ref, m.id, m.manifest, true
      FROM trunk t JOIN model m ON m.name = split_part(t.ref, '@', 1) AND m.version = split_part(t.ref, '@', 2)
     WHERE {_SEEN}""")
_ALL_MODELS = text(f"SELECT id, manifest FROM model WHERE {_SEEN} ORDER BY name, id")
_REFS = text(f"""
    (SELECT name || '@' || version FROM model WHERE {_SEEN} ORDER BY name, id LIMIT 10000)
    UNION ALL (SELECT name || '@' || alias FROM alias ORDER BY name, alias LIMIT 10000)""")
_ADD_MODEL = text("""
    INSERT INTO model (name, version, digest, trunk, manifest)
    VALUES (:name, :version, :digest, :trunk, CAST(:manifest AS jsonb)) ON CONFLICT (name, version) DO NOTHING
    RETURNING id""")
_THE_MODEL = text("SELECT id, manifest FROM model WHERE name = :name AND version = :version FOR UPDATE")
_SHOW_MODEL = text("UPDATE model SET manifest = manifest - 'removed' WHERE id = :id")
_HIDE_MODEL = text("UPDATE model SET manifest = manifest || '{\"removed\": true}' WHERE id = :id")
_DELETE_MODEL = text("DELETE FROM model WHERE id = :id")
_USED_BY = text(f"""
    SELECT j.id, j.state IN {spelt(LIVE)} AS unfinished FROM job j
     WHERE j.id IN (SELECT job_id FROM task WHERE model_id = :id UNION SELECT job_id FROM pass WHERE model_id = :id)
     ORDER BY unfinished DESC LIMIT 1""")
_SITS_ON = text(
    f"SELECT name || '@' || version FROM model WHERE {_SEEN} AND manifest ->> 'trunk_model' = :ref LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class Registered:
    """A model of the registry, with the id that jobs refer to."""

    id: int
    manifest: Manifest


def find_models(connection: Connection, refs: Iterable[str]) -> dict[str, Registered]:
    """``name``, ``name@version`` or ``name@alias`` -> its model, for those that are registered.

    A bare name is its newest version, an alias the version that it means now.
    """
    rows = connection.execute(_FIND_MODELS, {"refs": sorted(set(refs))})
    return {row.ref: Registered(row.id, Manifest.from_json(row.manifest)) for row in rows}


def find_with_trunks(
    connection: Connection, refs: Iterable[str]
) -> tuple[dict[str, Registered], dict[str, Registered]]:
    """``find_models``, and by ``name@version`` the trunks that these sit on, as far as they are registered."""
    (rows,) = together(connection, (_FIND_WITH_TRUNKS, {"refs": sorted(set(refs))}))
    found, trunks = dict[str, Registered](), dict[str, Registered]()
    for row in rows:
        (trunks if row.below else found)[row.ref] = Registered(row.id, Manifest.from_json(row.manifest))
    return found, trunks


def models(connection: Connection) -> list[Registered]:
    """Every registered model, by name, oldest version first."""
    return [Registered(row.id, Manifest.from_json(row.manifest)) for row in connection.execute(_ALL_MODELS)]


def model_refs(connection: Connection) -> list[str]:
    """``name@version`` of every registered model, then ``name@alias`` of every alias."""
    return [str(ref) for ref in connection.execute(_REFS).scalars()]


def add_model(connection: Connection, manifest: Manifest) -> bool:
    """Register a model; the same manifest again is harmless. False where it was there.

    A version never changes its meaning, for finished jobs name it, even after it was removed. Raises Conflict
    where this name and version mean something else, or are an alias.
    """
    lock_names(connection, manifest.name)
    taken = find_alias(connection, manifest.name, manifest.version)
    if taken is not None:
        raise Conflict(
            f"{taken.shown} is an alias, of {taken.ref}; register it under another version, or remove the alias"
        )
    spec = manifest.to_json()
    values = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "trunk": manifest.trunk,
        "manifest": json.dumps(spec),
    }
    if connection.execute(_ADD_MODEL, values).first() is not None:
        return True
    known = connection.execute(_THE_MODEL, {"name": manifest.name, "version": manifest.version}).one()
    # As read: a field that came later is its default in a manifest from before it.
    if Manifest.from_json(known.manifest) != Manifest.from_json(json.loads(values["manifest"])):
        raise Conflict(f"{manifest.ref} is registered with other content; register it under another version")
    connection.execute(_SHOW_MODEL, {"id": known.id})
    return False


def remove_model(connection: Connection, ref: str) -> bool:
    """Take ``name@version`` out of the registry. False where it is not there.

    Its row is deleted where no job names it, else only hidden: finished jobs keep their record of what
    answered. Raises Conflict while an unfinished job uses it, a registered head sits on it, or an alias means it.
    """
    name, _, version = ref.partition("@")
    lock_names(connection, name)
    found = connection.execute(_THE_MODEL, {"name": name, "version": version}).first()
    if found is None or "removed" in found.manifest:
        return False
    head = connection.execute(_SITS_ON, {"ref": ref}).scalar()
    if head is not None:
        raise Conflict(f"{head} sits on {ref}; remove that first")
    alias = alias_of(connection, found.id)
    if alias is not None:
        raise Conflict(f"{name}@{alias} means {ref}; promote another version, or remove the alias, first")
    user = connection.execute(_USED_BY, {"id": found.id}).first()
    if user is not None and user.unfinished:
        raise Conflict(f"job {user.id} uses {ref}; wait for it, or cancel it")
    connection.execute(_DELETE_MODEL if user is None else _HIDE_MODEL, {"id": found.id})
    return True


# -- the cluster -----------------------------------------------------------------------------------

_LEADER = text("SELECT until > clock_timestamp() FROM leader WHERE id = 1")


def has_leader(connection: Connection) -> bool:
    """Whether some dispatcher leads now."""
    return bool(connection.execute(_LEADER).scalar())
