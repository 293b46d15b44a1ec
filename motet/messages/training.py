"""Messages about training runs: how far one is, for its worker and for whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from motet.messages.message import ApiMessage, Limit

_DIGEST = "[0-9a-f]{64}"
_MOST_FILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRecord(ApiMessage):
    """What one run of a training job has reported."""

    #: Index of its recipe in the job.
    row: int
    #: Its epochs in order: ``stage``, ``epoch`` ``of``, ``loss``, scores by task of ``validation`` and ``test``.
    epochs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitList(ApiMessage):
    """How far the runs of a training job are."""

    #: The runs that have reported something.
    fits: tuple[FitRecord, ...]
    #: Epochs beyond the first 1,000.
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(ApiMessage):
    """Where a run goes on."""

    #: Sha256 of the blob with which it goes on; null: from its beginning.
    checkpoint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport(ApiMessage):
    """How far a run is, or what came out of it."""

    #: What the report stands under: a stage and a number of four digits.
    key: Annotated[
        str, Limit("up to 40 lower-case letters, digits and blanks", pattern="[a-z0-9 ]{1,40}")
    ] = "files"
    #: An epoch; it replaces what stood under its key.
    report: Annotated[Mapping[str, Any], Limit("an object")] = field(default_factory=dict)
    #: Sha256 of a stored blob; it replaces the checkpoint before.
    checkpoint: Annotated[str, Limit("the sha256 of a stored blob, or null", pattern=_DIGEST)] | None = None
    #: Digests of what came out; after them no checkpoint is kept.
    files: Annotated[
        tuple[Annotated[str, Limit("", pattern=_DIGEST)], ...],
        Limit(f"up to {_MOST_FILES} digests of stored blobs", most=_MOST_FILES),
    ] = ()
