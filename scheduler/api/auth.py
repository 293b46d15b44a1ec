"""Who asks, and what they may ask for: one literal table of every route. What is not in it is refused.

A token is ``<id>.<secret>``; the secret has 256 random bits, so its plain digest is what is stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, get_args
from uuid import UUID

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from motet.errors import Overloaded, Unauthorized
from motet.messages.tokens import Scope
from scheduler.api.refusals import Forbidden
from scheduler.api.resources import Resources, Use
from scheduler.store.database import StoreUnavailable
from scheduler.store.registry import StoredToken, find_token

SCOPES: tuple[Scope, ...] = get_args(Scope)

_OPEN = frozenset({"anyone"})
_ANY = frozenset(SCOPES)
#: Scopes that may submit rows.
SUBMITS = frozenset({"user", "admin"})
_SUBMIT = SUBMITS
_LOOK = _SUBMIT | {"read"}
_ADMIN = frozenset({"admin"})
_READ = frozenset({"read", "admin"})
_WORKER = frozenset({"worker"})
_BLOBS = frozenset({"worker", "admin"})

#: The route that goes on while Postgres is away, for those who could read it shortly before.
FIGURES = "/metrics"
_REMEMBERED_S = 3600.0

#: The route of open jobs, served hundreds of times a second.
ASK = "/v1/jobs/{job}/ask"
#: What an ask takes of a token's requests. Larger: MOTET_MAX_REQUESTS_S refuses callers that an open job has room for;
#: smaller: a program that runs wild keeps a process of the API busy. An open job has its own bound (policy/gather.py).
ASK_COSTS = 0.1
#: Seconds for which a token is not looked up again. Longer: a token that another API process revoked is good for longer.
#: Shorter: more requests ask Postgres first.
_FRESH_S = 2.0

#: (method, path) -> scopes that may use the route. ``admin`` is an operator's, yet sees its own tenant's jobs only.
ALLOWED: Mapping[tuple[str, str], frozenset[str]] = {
    ("GET", "/healthz"): _OPEN,
    ("GET", "/readyz"): _OPEN,
    ("GET", FIGURES): _READ,
    ("POST", "/v1/jobs"): _SUBMIT,
    ("GET", "/jobs"): _LOOK,
    ("GET", "/jobs/{job}"): _LOOK,
    ("GET", "/jobs/{job}/queue"): _LOOK,
    ("GET", "/v1/jobs"): _LOOK,
    ("PUT", "/v1/jobs/{job}/parts/{number}"): _SUBMIT,
    ("POST", "/v1/jobs/{job}/close"): _SUBMIT,
    ("POST", ASK): _SUBMIT,
    ("POST", "/v1/jobs/{job}/cancel"): _SUBMIT,
    ("POST", "/v1/plan"): _SUBMIT,
    ("GET", "/v1/jobs/{job}"): _LOOK,
    ("GET", "/v1/jobs/{job}/activity"): _LOOK,
    ("GET", "/v1/jobs/{job}/subtasks"): _LOOK,
    ("GET", "/v1/jobs/{job}/explain"): _LOOK,
    ("GET", "/v1/jobs/{job}/fits"): _LOOK,
    ("GET", "/v1/jobs/{job}/results"): _LOOK,
    ("GET", "/v1/jobs/{job}/errors"): _LOOK,
    ("DELETE", "/v1/jobs/{job}"): _SUBMIT,
    ("GET", "/v1/models"): _ANY,
    ("GET", "/v1/models/{ref}"): _ANY,
    ("POST", "/v1/models"): _ADMIN,
    ("DELETE", "/v1/models/{ref}"): _ADMIN,
    ("PUT", "/v1/models/{name}/aliases/{alias}"): _ADMIN,
    ("DELETE", "/v1/models/{name}/aliases/{alias}"): _ADMIN,
    ("POST", "/v1/models/{name}/aliases/{alias}/rollback"): _ADMIN,
    ("GET", "/v1/cluster"): _ANY,
    ("GET", "/v1/workers"): _ANY,
    ("POST", "/v1/workers/{worker}/drain"): _ADMIN,
    ("POST", "/v1/workers/{worker}/resume"): _ADMIN,
    ("GET", "/v1/doctor"): _ANY,
    ("GET", "/v1/tokens"): _ADMIN,
    ("POST", "/v1/tokens"): _ADMIN,
    ("DELETE", "/v1/tokens/{token}"): _ADMIN,
    ("GET", "/v1/webhooks"): _LOOK,
    ("POST", "/v1/webhooks"): _SUBMIT,
    ("DELETE", "/v1/webhooks/{webhook}"): _SUBMIT,
    ("POST", "/v1/webhooks/{webhook}/test"): _SUBMIT,
    ("POST", "/v1/webhooks/{webhook}/replay"): _SUBMIT,
    ("GET", "/v1/fits/{row}"): _WORKER,
    ("PUT", "/v1/fits/{row}"): _WORKER,
    ("GET", "/v1/fits/{row}/data/{job}/{number}"): _WORKER,
    ("HEAD", "/v1/blobs/{sha256}"): _BLOBS,
    ("GET", "/v1/blobs/{sha256}"): _BLOBS,
    ("PUT", "/v1/blobs/{sha256}"): _BLOBS,
    ("POST", "/v1/media/missing"): _SUBMIT,
    ("PUT", "/v1/media/{sha256}"): _SUBMIT,
    ("POST", "/v1/media"): _SUBMIT,
    ("POST", "/v1/media/fetch"): _WORKER,
}

#: What people open in a browser, which sends no Bearer header by itself: these take HTTP Basic as well. No other
#: route does, for a browser repeats Basic unasked, also in a request that another site made up.
PAGES = frozenset({("GET", "/jobs"), ("GET", "/jobs/{job}"), ("GET", "/jobs/{job}/queue")})

_FORM = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,128})")
#: Compared with where no token has the id, so that a miss takes as long as a wrong secret.
_NOBODY = bytes(32)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made: the only moment at which its secret is known."""

    id: str
    secret: str

    @property
    def shown(self) -> str:
        """What its owner sends."""
        return f"{self.id}.{self.secret}"

    @property
    def digest(self) -> bytes:
        return secret_digest(self.secret)


def new_token() -> NewToken:
    """Draw a token: 48 bits to find it by, 256 bits to prove it."""
    return NewToken(secrets.token_hex(6), secrets.token_urlsafe(32))


def secret_digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def split_token(shown: str) -> NewToken | None:
    """The two halves of ``<id>.<secret>``, or None where it has no such form."""
    match = _FORM.fullmatch(shown)
    return NewToken(match[1], match[2]) if match else None


def basic_token(header: str) -> NewToken | None:
    """The token in an HTTP Basic header: its id as the user name, its secret as the password."""
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(coded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return split_token(f"{user}.{password}") if colon else None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks."""

    token: str
    tenant: UUID
    scope: str


_BEARER = HTTPBearer(auto_error=False, description="`<id>.<secret>`, from `motet token create`.")
_REFUSED = (
    "the token is missing, wrong, expired or revoked; "
    "set MOTET_TOKEN to another; make one with `motet token create`"
)


async def authenticate(
    request: Request,
    use: Use,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
) -> Identity | None:
    """Who asks; None on the few open routes.

    Raises Unauthorized, Forbidden where the scope is not enough, Overloaded where the token asks too often.

    Why a token is not good is never told: it would help to guess.
    """
    path = getattr(request.scope.get("route"), "path", "")
    scopes = ALLOWED.get((request.method, path), frozenset())
    if scopes is _OPEN:
        return None
    return await _proved(request, use, credentials, path, scopes, 1.0)


async def _proved(
    request: Request,
    use: Resources,
    credentials: HTTPAuthorizationCredentials | None,
    path: str,
    scopes: frozenset[str],
    cost: float,
) -> Identity:
    """Who asks, on a route that these scopes may use: Postgres is asked in a thread, once for all requests that come with
    one token meanwhile, and seldom, for a hand-over costs more than all the rest of it."""
    shown = _shown(request, credentials)
    known = use.known_tokens.get(shown.id)
    if known is not None and _fresh(known, time.monotonic()):
        return _allowed(request, use, path, scopes, cost, shown, known[0])
    look = partial(_find, use, path, shown.id)
    # The figures go on where another look ends without Postgres.
    stored = await (run_in_threadpool(look) if path == FIGURES else use.token_looks.at(shown.id, look))
    return _allowed(request, use, path, scopes, cost, shown, stored)


def _shown(request: Request, credentials: HTTPAuthorizationCredentials | None) -> NewToken:
    """The token that a request shows. Raises Unauthorized where it shows none."""
    shown = split_token(credentials.credentials) if credentials else None
    if credentials is None and is_page(request):
        shown = basic_token(request.headers.get("Authorization", ""))
    if shown is None:
        raise Unauthorized(_REFUSED)
    return shown


def _allowed(
    request: Request,
    use: Resources,
    path: str,
    scopes: frozenset[str],
    cost: float,
    shown: NewToken,
    stored: StoredToken | None,
) -> Identity:
    """Who asks, on a route that these scopes may use. ``cost``: what it takes of a token's requests."""
    proved = hmac.compare_digest(shown.digest, stored.secret_sha256 if stored else _NOBODY)
    if stored is None or not proved or stored.revoked or stored.expired:
        raise Unauthorized(_REFUSED)
    request.state.tenant = stored.tenant
    wait_s = use.allowance.take(stored.id, ASK_COSTS if path == ASK else cost)
    if wait_s:
        raise Overloaded("this token asks too often; come back in a moment", wait_s)
    if stored.scope not in scopes:
        raise Forbidden(f"a token of scope {stored.scope} may not do this; {' or '.join(sorted(scopes))} may")
    return Identity(stored.id, stored.tenant, stored.scope)


def _find(use: Resources, path: str, token_id: str) -> StoredToken | None:
    """The stored token, as of two seconds ago at most. Raises StoreUnavailable, but for a known reader of the figures:
    no token can be revoked while Postgres is away, and that it is away is what the figures have to say."""
    known, now = use.known_tokens.get(token_id), time.monotonic()
    if known is not None and _fresh(known, now):
        return known[0]
    try:
        with use.database.transaction() as connection:
            stored = find_token(connection, token_id)
    except StoreUnavailable:
        if path != FIGURES or known is None or now - known[1] > _REMEMBERED_S:
            raise
        return known[0]
    if stored is not None:
        use.known_tokens.put(token_id, (stored, now))
    return stored


def _fresh(known: tuple[StoredToken, float], now: float) -> bool:
    return now - known[1] < _FRESH_S


async def authenticated(
    request: Request, use: Resources, scopes: frozenset[str] | None = None, cost: float = 1.0
) -> Identity:
    """`authenticate` of a route that FastAPI does not call, and that is open to nobody.

    ``scopes``: of a route that stands in a table of its own (scheduler/api/openai/app.py).
    """
    path = getattr(request.scope.get("route"), "path", "")
    if scopes is None:
        scopes = ALLOWED.get((request.method, path), frozenset())
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    credentials = (
        HTTPAuthorizationCredentials(scheme=scheme, credentials=rest.strip())
        if scheme.lower() == "bearer"
        else None
    )
    return await _proved(request, use, credentials, path, scopes, cost)


def is_page(request: Request) -> bool:
    """Whether what is asked for is a page for people."""
    return (request.method, getattr(request.scope.get("route"), "path", "")) in PAGES


# Not a thread's work either: FastAPI would hand over to one.
async def _identity(identity: Annotated[Identity | None, Depends(authenticate)]) -> Identity:
    if identity is None:
        raise Unauthorized(_REFUSED)
    return identity


#: Whoever asks, as an argument of a route.
Caller = Annotated[Identity, Depends(_identity)]
