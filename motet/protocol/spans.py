"""A span of a job's trace, and the ids that put the spans of several processes together. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

JOB, SUBMIT, SEND = "job", "submit", "send"
#: The parent of a span, by name; all other spans have the job for a parent.
_PARENTS = {"plan": SUBMIT, "land": SUBMIT, "execute": SEND}
#: Spans that are parents: the id of one is a digest of the job and of these attributes, in every process alike.
_ABOUT = {JOB: (), SUBMIT: (), SEND: ("subtask", "attempt")}

Attribute = str | int | float | UUID


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """Something that was done for a job. Times are Unix nanoseconds."""

    job: UUID
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Attribute]
    #: Class of the exception that ended it.
    error: str = ""

    @property
    def id(self) -> int | None:
        """64 bits; None where nothing hangs from it, and any number will do."""
        return self._id_of(self.name) if self.name in _ABOUT else None

    @property
    def parent(self) -> int | None:
        """The id of the span that this one hangs from; None for the job itself."""
        return None if self.name == JOB else self._id_of(_PARENTS.get(self.name, JOB))

    def _id_of(self, name: str) -> int:
        about = [self.job, name, *(self.attributes[each] for each in _ABOUT[name])]
        digest = hashlib.sha256(":".join(map(str, about)).encode()).digest()
        # Zero would be no id.
        return int.from_bytes(digest[:8], "big") | 1
