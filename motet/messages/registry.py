"""Messages about models, their files and the aliases that name them. A manifest's own fields: motet.protocol.manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from motet.messages.message import ApiMessage, Limit
from motet.protocol.manifest import VERSION, Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias(ApiMessage):
    """A name that a task may ask for in a version's place, such as ``support@prod``, and what it means now."""

    #: ``name@alias``.
    alias: str
    #: ``name@version`` of what it means: what a job that names the alias uses, and records.
    ref: str
    #: What a rollback goes back to; null: nothing stood before.
    before: str | None = None
    #: When it was promoted, as RFC 3339.
    since: str = ""
    #: Name of the token that asked for it.
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion(ApiMessage):
    """What an alias is to mean from now on."""

    #: The version, as GET /v1/models lists it.
    version: Annotated[str, Limit('a version, such as "2"', pattern=VERSION)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord(Manifest):
    """A registered model: its manifest, and the aliases that mean it."""

    #: ``name@version``.
    ref: str = field()
    #: Sha256 of all that decides the answers.
    digest: str = field()
    #: Aliases that mean this version.
    aliases: tuple[Alias, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList(ApiMessage):
    """Every registered model, by name, the oldest version first."""

    #: The models.
    models: tuple[ModelRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord(ApiMessage):
    """A file that is stored, now or before."""

    #: Sha256 of its bytes, in lower-case hex.
    sha256: str
    #: Its size.
    bytes: int
