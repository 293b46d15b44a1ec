"""Aliases: names such as ``support@prod`` that mean one version of a model now, and what they meant before.

An alias is read where a version could stand, so the two share one space of names: ``registry`` and this module take
the same lock before either gives out a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, text

from motet.errors import Conflict, InvalidJob, NotFound, Problem
from motet.tasks import short


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasRow:
    """An alias as it stands."""

    name: str
    alias: str
    #: The version that it means.
    version: str
    #: The version that a rollback goes back to; None: nothing stood before.
    before: str | None
    since: datetime
    #: Name of the token that asked for it.
    by: str

    @property
    def ref(self) -> str:
        """``name@version`` of what it means."""
        return f"{self.name}@{self.version}"

    @property
    def shown(self) -> str:
        """``name@alias``, the way a task asks for it."""
        return f"{self.name}@{self.alias}"


# Names of versions and aliases are given out in one transaction after the other, for each model.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
_ALIASES = text("""
    SELECT a.name, a.alias, m.version, b.version AS before, s.at AS since, coalesce(k.name, s.by) AS by
      FROM alias a JOIN model m ON m.id = a.model_id JOIN alias_step s ON s.id = a.step
      LEFT JOIN alias_step b ON b.id = s.before LEFT JOIN token k ON k.id = s.by
     WHERE CAST(:name AS text) IS NULL OR a.name = :name ORDER BY a.name, a.alias""")
_MEANS = text("SELECT alias FROM alias WHERE model_id = :id ORDER BY alias LIMIT 1")
_VERSIONS = text("""
    SELECT id, version, manifest ? 'removed' AS removed FROM model WHERE name = :name ORDER BY id""")
_STANDS = text("""
    SELECT a.model_id, m.version, a.step, s.before, b.model_id AS before_id, b.version AS before_version,
           b.before AS before_that
      FROM alias a JOIN model m ON m.id = a.model_id JOIN alias_step s ON s.id = a.step
      LEFT JOIN alias_step b ON b.id = s.before WHERE a.name = :name AND a.alias = :alias""")
_STEP = text("""
    INSERT INTO alias_step (name, alias, what, version, model_id, before, by)
    VALUES (:name, :alias, :what, :version, :id, :before, :by) RETURNING id""")
_SET = text("""
    INSERT INTO alias (name, alias, model_id, step) VALUES (:name, :alias, :id, :step)
    ON CONFLICT (name, alias) DO UPDATE SET model_id = excluded.model_id, step = excluded.step""")
_REMOVE = text("DELETE FROM alias WHERE name = :name AND alias = :alias")


def lock_names(connection: Connection, name: str) -> None:
    """Until this transaction ends nobody else names a version or an alias of this model, or takes one away."""
    connection.execute(_LOCK, {"name": name})


def aliases(connection: Connection, name: str | None = None) -> list[AliasRow]:
    """Every alias of a model, or of all of them, by name."""
    return [AliasRow(**row._mapping) for row in connection.execute(_ALIASES, {"name": name})]


def find_alias(connection: Connection, name: str, alias: str) -> AliasRow | None:
    """The alias of this name, if there is one."""
    return next((one for one in aliases(connection, name) if one.alias == alias), None)


def alias_of(connection: Connection, model_id: int) -> str | None:
    """Some alias that means this model now, or None."""
    found: str | None = connection.execute(_MEANS, {"id": model_id}).scalar()
    return found


def promote(connection: Connection, name: str, alias: str, version: str, by: str) -> AliasRow:
    """Let an alias mean this version from now on; again is harmless, and no step.

    Raises NotFound where there is no such model, InvalidJob where the version is not registered, Conflict where a
    version bears the alias' name: also a removed one, for jobs name it still.
    """
    lock_names(connection, name)
    versions = {row.version: row for row in connection.execute(_VERSIONS, {"name": name})}
    if not versions:
        raise NotFound(f"no model {name}; GET /v1/models lists them")
    if alias in versions:
        raise Conflict(f"{name}@{alias} is a version, and no alias can have its name; choose another alias")
    if version not in versions or versions[version].removed:
        seen = [row.version for row in versions.values() if not row.removed]
        raise InvalidJob(_no_version(name, version, version in versions, seen))
    stands = connection.execute(_STANDS, {"name": name, "alias": alias}).first()
    meant = versions[version].id
    if stands is None or stands.model_id != meant:
        before = stands.step if stands else None
        _step(connection, name, alias, "promoted", version=version, model_id=meant, before=before, by=by)
    return _found(connection, name, alias)


def roll_back(connection: Connection, name: str, alias: str, by: str) -> AliasRow:
    """Let an alias mean again what it meant before its last promotion that still stands. Twice goes back twice.

    Raises NotFound where there is no such alias, Conflict where nothing stood before, or what did was removed.
    """
    lock_names(connection, name)
    stands = connection.execute(_STANDS, {"name": name, "alias": alias}).first()
    if stands is None:
        raise NotFound(f"no alias {name}@{alias}; GET /v1/models lists them")
    if stands.before is None:
        raise Conflict(
            f"{name}@{alias} means {name}@{stands.version}, and nothing stood before; promote another version"
        )
    before = stands.before_version
    versions = connection.execute(_VERSIONS, {"name": name})
    if stands.before_id not in {row.id for row in versions if not row.removed}:
        raise Conflict(
            f"{name}@{before}, which stood before at {name}@{alias}, was removed from the registry; "
            "promote another version"
        )
    _step(
        connection,
        name,
        alias,
        "rolled back",
        version=before,
        model_id=stands.before_id,
        before=stands.before_that,
        by=by,
    )
    return _found(connection, name, alias)


def remove_alias(connection: Connection, name: str, alias: str, by: str) -> bool:
    """Take an alias away; its steps stay on record, and a later one of its name begins anew. False where there is none."""
    lock_names(connection, name)
    stands = connection.execute(_STANDS, {"name": name, "alias": alias}).first()
    if stands is None:
        return False
    at = {"name": name, "alias": alias}
    connection.execute(_REMOVE, at)
    gone = {"what": "removed", "version": stands.version, "id": stands.model_id, "before": stands.step}
    connection.execute(_STEP, {**at, **gone, "by": by})
    return True


def _step(
    connection: Connection,
    name: str,
    alias: str,
    what: Literal["promoted", "rolled back"],
    *,
    version: str,
    model_id: int,
    before: int | None,
    by: str,
) -> None:
    at = {"name": name, "alias": alias, "id": model_id}
    made = {**at, "what": what, "version": version, "before": before, "by": by}
    step = connection.execute(_STEP, made).scalar_one()
    connection.execute(_SET, {**at, "step": step})


def _found(connection: Connection, name: str, alias: str) -> AliasRow:
    found = find_alias(connection, name, alias)
    assert found is not None, "it was set in this transaction"
    return found


def _no_version(name: str, version: str, removed: bool, seen: Sequence[str]) -> Problem:
    got = f"{short(version)}, which was removed" if removed else short(version)
    choose = f"choose one of {', '.join(seen[-5:])}" if seen else "register one"
    return Problem("version", got, f"a registered version of {name}", f"{choose}; see `motet models`")
