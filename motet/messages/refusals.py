"""The message of every error. What a caller does next: motet.errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from motet.errors import Problem
from motet.messages.message import ApiMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord(ApiMessage):
    """Why a request was not done. What there is nothing to say of is left out."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"json_schema_serialization_defaults_required": False}

    #: Class of the error, such as ``invalid_job`` or ``not_found``.
    type: str
    #: In words.
    message: str
    #: Where a request is wrong.
    problems: tuple[Problem, ...] | None = None
    #: Problems beyond the first few.
    more: int | None = None
    #: Number of the part that comes next, where another came out of order.
    next_part: int | None = None
    #: Seconds after which to come back, as ``Retry-After`` says it of a whole answer.
    retry_after_s: int | None = None
    #: Index in the job of the first row of an ask that was not answered in time.
    row: int | None = None
    #: Whether the rows of such an ask were stored, and go on.
    stored: bool | None = None
    #: Index of the first row that is kept, where rows that were asked for are gone.
    first_row: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody(ApiMessage):
    """The body of every answer that is an error."""

    #: The error.
    error: ErrorRecord
