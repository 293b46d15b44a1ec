"""Every error a user of motet can meet, named by what the caller does next.

MotetError
├── InvalidJob       mend the job, submit it again        (HTTP 422; .problems says where)
├── NotFound         ask for something that exists        (HTTP 404)
│   └── Gone         go on with the rows that are kept    (HTTP 410; .first_row)
├── Unauthorized     bring another token                  (HTTP 401, 403)
├── Conflict         the thing has moved on: look again   (HTTP 409)
├── Overloaded       come back after .retry_after_s       (HTTP 429, 503)
├── Late             ask again with the same key, or give it more time (HTTP 503, 504)
├── Unreachable      start the server, or mend the address
├── JobFailed        the job ended as failed or cancelled (.job_id, .reason)
└── SetupError       mend this machine's set-up: a missing package, folder, port or setting
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from motet.messages.message import ApiMessage


@dataclass(frozen=True, slots=True)
class Problem(ApiMessage):
    """One thing wrong with a submission: where it is, what was found, what was expected, what to do."""

    #: Path of the field, such as ``tasks.topic.model`` or ``rows.text``.
    field: str
    #: What was found, shortened, never a whole text of a user.
    got: str
    #: What may stand there.
    expected: str
    #: What to do.
    remedy: str
    #: Index of the row from 0, or None where the problem is not in a row.
    row: int | None = None

    def __str__(self) -> str:
        where = self.field if self.row is None else f"row {self.row}, {self.field}"
        return f"{where}: got {self.got}; expected {self.expected}; {self.remedy}"


class MotetError(Exception):
    """Base of all errors that motet raises on purpose."""


class InvalidJob(MotetError):
    """The submission is wrong; ``problems`` lists where, and ``more`` counts those beyond the first few."""

    def __init__(self, problems: Sequence[Problem] | Problem, more: int = 0) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.more = more
        super().__init__("\n".join([*map(str, self.problems), *([f"and {more:,} more"] if more else [])]))

    @classmethod
    def of(cls, field: str, got: str, expected: str, remedy: str, row: int | None = None) -> InvalidJob:
        """One problem."""
        return cls(Problem(field, got, expected, remedy, row))

    @classmethod
    def first(cls, problems: Sequence[Problem], most: int = 20) -> InvalidJob:
        """Of many problems the first ones, and how many there are beyond."""
        return cls(problems[:most], max(0, len(problems) - most))


class NotFound(MotetError):
    """No such job, model, token or blob, or it belongs to another tenant."""


class Gone(NotFound):
    """Rows that were asked for are no longer kept; ``first_row`` is the index of the first row that is."""

    def __init__(self, message: str, first_row: int) -> None:
        super().__init__(message)
        self.first_row = first_row


class Unauthorized(MotetError):
    """The token is missing, wrong, expired or revoked, or its scope does not allow this."""


class Conflict(MotetError):
    """The request does not fit the present state, such as a part sent to a closed job."""

    #: Where a part came out of order: the number of the part that the server wants.
    next_part: int | None = None


class Overloaded(MotetError):
    """The cluster takes no more now. ``retry_after_s`` says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def retry_after(self) -> float:
        """The same as ``retry_after_s``, under the name of the HTTP header."""
        return self.retry_after_s


class Late(MotetError):
    """The answer to an ask did not come within the time that its caller gave."""

    def __init__(self, message: str, *, stored: bool, row: int | None = None) -> None:
        super().__init__(message)
        #: False: nothing of it was stored, and nothing runs.
        self.stored = stored
        #: Index of its first row in the job, where that is known.
        self.row = row


class Unreachable(MotetError):
    """The API did not answer in time, also after retries."""


class JobFailed(MotetError):
    """The job ended without all its cells: it failed or was cancelled."""

    def __init__(self, job_id: str, reason: str) -> None:
        self.job_id = job_id
        self.reason = reason
        super().__init__(f"job {job_id}: {reason}")


class SetupError(MotetError):
    """This machine lacks something; the message says what and how to mend it."""
