"""The message of every error. What a caller does next: motet.errors."""

from __future__ import annotations

from dataclasses import dataclass

from motet.errors import Problem
from motet.messages.message import ApiMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord(ApiMessage):
    """Why a request was not done."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody(ApiMessage):
    """The body of every answer that is an error."""

    #: The error.
    error: ErrorRecord
