"""Manifests of registered models, read and parsed once by whoever keeps a `Manifests`."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from threading import Lock
from uuid import UUID

from cachetools import LRUCache
from sqlalchemy import Connection, text

from motet.protocol.manifest import Manifest

#: More than the models of any cluster so far; they take some kilobytes each.
_KEPT = 1000
#: A model never changes; after a restore of an older dump its id may name another, born at another time.
ModelId = tuple[int, datetime]
_MANIFESTS = text("SELECT id, created, manifest FROM model WHERE id = ANY(:ids)")
_BY_ID = text("SELECT manifest FROM model WHERE id = ANY(:ids)")


class Manifests:
    """Those that were asked for lately. Threads of the API may share one."""

    def __init__(self) -> None:
        self._known: dict[ModelId, Manifest] = {}
        self._of_passes: LRUCache[tuple[UUID, int], list[Manifest]] = LRUCache(_KEPT)
        self._lock = Lock()

    def of(self, connection: Connection, wanted: Collection[ModelId]) -> dict[ModelId, Manifest]:
        """The manifests of these models, but for those that were removed.

        What one thread has found it does not look up again where another may empty it.
        """
        found = {model: known for model in wanted if (known := self._known.get(model)) is not None}
        if missing := [model for model in wanted if model not in found]:
            for row in connection.execute(_MANIFESTS, {"ids": [id_ for id_, _ in missing]}):
                found[row.id, row.created] = Manifest.from_json(row.manifest)
            if len(self._known) > _KEPT:
                self._known.clear()
            self._known.update(found)
        return found

    def of_pass(
        self, connection: Connection, job: UUID, pass_number: int, ids: Collection[int]
    ) -> list[Manifest]:
        """The manifests of the models of a pass, whose ``ids`` these are: of a pass that was asked for lately they are
        not read again. A job's models never change, and no other job has its id, also after a restore."""
        with self._lock:
            known = self._of_passes.get((job, pass_number))
        if known is None:
            rows = connection.execute(_BY_ID, {"ids": list(ids)})
            known = [Manifest.from_json(row.manifest) for row in rows]
            with self._lock:
                self._of_passes[job, pass_number] = known
        return known
