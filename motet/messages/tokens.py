"""Messages about tokens: the rights to use the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from motet.messages.message import ApiMessage, Limit

Scope = Literal["user", "read", "admin", "worker"]
_MAX_DAYS = 36_500


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest(ApiMessage):
    """A token that is to be made."""

    #: For people; shown in lists.
    name: Annotated[str, Limit("text of 1 to 200 characters", least=1, most=200)]
    #: What it may do.
    scope: Scope
    #: Whose jobs it sees; one that does not exist is made.
    tenant: (
        Annotated[
            str,
            Limit("letters, digits, _ . -, up to 64, or nothing", pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"),
        ]
        | None
    ) = None
    #: Days after which it lets nobody in any more; null: for ever.
    expires_days: (
        Annotated[float, Limit(f"a number of days up to {_MAX_DAYS:,}, or nothing", above=0, most=_MAX_DAYS)]
        | None
    ) = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord(ApiMessage):
    """A token, without its secret."""

    #: What it is found by.
    id: str
    #: For people.
    name: str = ""
    #: What it may do.
    scope: str = ""
    #: Whose jobs it sees.
    tenant: str = ""
    #: When it was made, as RFC 3339.
    created: str | None = None
    #: When it ends; null: never.
    expires: str | None = None
    #: When it was revoked; null: it was not.
    revoked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(TokenRecord):
    """A right to use the API. Its secret is known only in the answer that made it."""

    #: ``<id>.<secret>`` where it was just made, else null.
    token: str | None = None

    def __repr__(self) -> str:
        return f"Token(id={self.id!r}, name={self.name!r}, scope={self.scope!r}, tenant={self.tenant!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenList(ApiMessage):
    """Every token, revoked ones too."""

    #: The tokens.
    tokens: tuple[TokenRecord, ...]
