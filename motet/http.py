"""The client's line to the API: where it is, tokens, time limits, retries with back-off, and errors as types.

A proxy may stand before the API: it refuses bodies, loses patience and answers by itself, in words that are not shown.
The contract is docs/http.md. Everything that waits or rolls dice is passed in, so tests need no patience.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from motet import forks
from motet.errors import (
    Conflict,
    Gone,
    InvalidJob,
    Late,
    MotetError,
    NotFound,
    Overloaded,
    Problem,
    SetupError,
    Unauthorized,
    Unreachable,
)

if TYPE_CHECKING:
    import httpx

#: What is sent: bytes, a file, or a function that gives the pieces, from the first one whenever it is called.
Body: TypeAlias = "bytes | Path | Callable[[], Iterable[bytes]]"

DEFAULT_URL = "http://127.0.0.1:8700"
#: Longest that the API holds a request open for something to happen.
MAX_WAIT_S = 30.0
#: A server that has never answered gets this long: long enough for one that is starting to listen.
_FIRST_CONTACT_S = 2.0
_FIRST_DELAY_S = 0.25
_LAST_DELAY_S = 8.0
#: A proxy's words for an API that it does not reach, or that was silent for too long; 520 to 524 are Cloudflare's.
_PROXY_IS_ALONE = frozenset({408, 502, 504, 520, 521, 522, 523, 524})
#: Nothing was done with such a request, or doing it again is harmless.
_COME_BACK = _PROXY_IS_ALONE | {429, 503}
#: A wait that a proxy ends after this long was cut by its time limit; one that ends sooner met an API that is away.
_CUT_AFTER_S = 1.0
#: Waits are not made shorter than this: a client that watches a job then asks twice a second.
_SHORTEST_WAIT_S = 0.5
#: What the API takes in one body, in MiB: what a proxy before it should take too.
_BODY_MB = 32
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def is_near(url: str) -> bool:
    """Whether it is on this machine: a proxy has no business between two processes of one machine."""
    try:
        return urlsplit(url).hostname in _LOOPBACK
    except ValueError:
        return False


def is_address(url: str) -> bool:
    """Whether it is http(s)://host[:port][/path]: without a user, whom people see in logs, and without a query."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    more = "@" in parts.netloc or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(host) and port != 0 and not more


def home(env: Mapping[str, str] | None = None) -> Path:
    """The data folder of `motet up`: ``$MOTET_HOME``, or else ``~/.local/share/motet``."""
    env = os.environ if env is None else env
    # Not Path.home(): that raises where a container's user has no home.
    return Path(os.path.expanduser(env.get("MOTET_HOME") or "~/.local/share/motet"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the API is, and the token to show there."""

    url: str
    token: str

    def __repr__(self) -> str:
        return f"Address(url={self.url!r}, token=…)"

    @classmethod
    def find(
        cls,
        url: str | None = None,
        token: str | None = None,
        *,
        admin: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> Address:
        """Find what is not given in ``MOTET_URL`` and ``MOTET_TOKEN``, else where `motet up` wrote it.

        What `motet up` wrote is shown to that server only, never to another address. ``admin`` takes its
        administrator's token. Raises SetupError where nothing is known, Unauthorized where there is no token.
        """
        env = os.environ if env is None else env
        token = token or env.get("MOTET_TOKEN") or _token_file(env)
        local = {} if token and (url or env.get("MOTET_URL")) else _read_local(home(env) / "client.json")
        url = (url or env.get("MOTET_URL") or local.get("url") or DEFAULT_URL).rstrip("/")
        if not is_address(url):
            raise SetupError(f"got {url!r} as the API's address; expected one like {DEFAULT_URL}")
        if not token and url == local.get("url", "").rstrip("/"):
            token = local.get("admin_token" if admin else "token")
        if not token:
            raise Unauthorized(
                f"no token for {url}; set MOTET_TOKEN, or run `motet up` on this machine, which makes one"
            )
        token = token.strip()
        if not token.isascii() or not token.isprintable() or " " in token:
            raise SetupError("the token holds characters that no token has; copy it again, as <id>.<secret>")
        return cls(url=url, token=token)


def whole(answer: httpx.Response) -> object:
    """Read an answer to its end."""
    return answer.read()


class BodyRefused(InvalidJob):
    """A body of this size is not taken, by the API or by a proxy before it: send less at once."""


class Http:
    """Requests to one API. Safe to use from several threads, and in forked children: each opens its own connections.

    It is pickled by address, token, time limit and headers. ``timeout_s`` is how long one call goes on trying, retries
    included, while the API is away or overloaded; it does not limit how long a call waits for a job. ``headers`` go
    with every request.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.headers = dict(headers or {})
        self._sleep, self._clock, self._dice = sleep, clock, dice
        self._met = False
        #: Longest wait that was not cut by a proxy, as far as that is known.
        self._longest_wait_s = MAX_WAIT_S
        #: Longest silence of the API in one try, and longest time to connect.
        self._silence_s, self._connect_s = min(30.0, timeout_s), min(5.0, timeout_s)
        #: Opened by the first request: httpx takes a tenth of a second to import.
        self._line: httpx.Client | None = None
        self._connecting = threading.Lock()
        forks.forget_after_fork(self)

    def __reduce__(self) -> tuple[Callable[..., Http], tuple[Address, float, Mapping[str, str]]]:
        return _unpickled, (self.address, self.timeout_s, self.headers)

    def _connect(self) -> httpx.Client:
        import httpx

        return httpx.Client(
            base_url=self.address.url,
            headers={**_headers(self.address.token), **self.headers},
            trust_env=not is_near(self.address.url),
        )

    def _connected(self) -> httpx.Client:
        """This process' own connections."""
        with self._connecting:
            if self._line is None:
                self._line = self._connect()
            return self._line

    def leave_to_parent(self) -> None:
        """Forget connections that belong to the process that this one was forked from, and locks held there.

        Nothing is closed in words: that would end the parent's connections. The sockets' copies go with their objects.
        """
        self._line = None
        self._connecting = threading.Lock()

    @property
    def stays_here(self) -> bool:
        """Whether the API is on this machine: bytes are free then, and packing them is not."""
        return is_near(self.address.url)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def get(self, path: str, *, wait_s: float = 0.0, **params: object) -> Any:
        """The JSON of a GET; with ``wait_s`` the API may take that long to answer."""
        query = {name: value for name, value in params.items() if value is not None}
        return json_of(self.request("GET", path, params=query, wait_s=wait_s))

    def post(
        self,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        again: bool = True,
        refused: Callable[[Overloaded], object] | None = None,
    ) -> Any:
        """The JSON of a POST. ``key`` is its Idempotency-Key; ``again=False`` where repeating would do harm."""
        headers = {"Idempotency-Key": key} if key else {}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        return json_of(
            self.request("POST", path, content=content, headers=headers, again=again, refused=refused)
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: Body | None = None,
        headers: Mapping[str, str] | None = None,
        again: bool = True,
        wait_s: float = 0.0,
        answer_s: float | None = None,
        patience_s: float | None = None,
        stop: threading.Event | None = None,
        refused: Callable[[Overloaded], object] | None = None,
        read: Callable[[httpx.Response], object] = whole,
    ) -> httpx.Response:
        """Send until there is an answer, and return it if it is a good one.

        ``read`` reads a good one as it comes, and may be called again with the next where that is lost meanwhile.

        Lost connections, 429, 503 and the statuses of a proxy that does not reach the API
        (408, 502, 504, 520 to 524) are tried again with jittered back-off, as late as Retry-After asks, for
        ``timeout_s`` in all; ``stop`` ends that early. ``refused`` is told of the first refusal that is waited out.
        ``again=False`` tries again only where the request cannot have been taken. With ``wait_s`` the API may take
        that long to answer; where a proxy cuts that short, this and all later waits are shorter. ``answer_s`` is how
        long one try may be without a sign of life, and ``patience_s`` how long is tried in all, where that is not what
        all have.
        Raises the errors of motet.errors, by docs/http.md.
        """
        import httpx

        start = self._clock()
        patient_s = self.timeout_s if patience_s is None else patience_s
        for attempt in range(1_000_000):
            refusal: MotetError
            may_wait_s = min(wait_s, self._longest_wait_s)
            asked = {**(params or {}), "wait_s": round(may_wait_s, 3)} if wait_s else params
            sent = self._clock()
            try:
                with self._answer(
                    method, path, asked, content, headers, (answer_s or self._silence_s) + may_wait_s
                ) as answer:
                    (read if answer.is_success else whole)(answer)
            except httpx.RequestError as error:
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                cut = not unsent and not isinstance(error, httpx.TimeoutException)
                refusal = Unreachable(_out_of_reach(self.address.url, error))
                if not isinstance(error, httpx.TransportError) or not (again or unsent):
                    raise refusal from None
                limit_s = patient_s if self._met or not unsent else min(_FIRST_CONTACT_S, patient_s)
                delay_s = 0.0
            else:
                self._met = True
                if answer.is_success:
                    return answer
                cut = answer.status_code in _PROXY_IS_ALONE
                refusal = error_of(answer)
                if isinstance(refusal, Late):
                    raise refusal
                if answer.status_code not in _COME_BACK or not (again or answer.status_code in (429, 503)):
                    raise refusal
                limit_s = patient_s
                delay_s = refusal.retry_after_s if isinstance(refusal, Overloaded) else 0.0
            now = self._clock()
            if cut and now - sent >= _CUT_AFTER_S and may_wait_s > _SHORTEST_WAIT_S:
                self._longest_wait_s = max(_SHORTEST_WAIT_S, min(now - sent, may_wait_s) / 2)
                # Waiting for news is no trying, so the time limit begins anew: at most as often as a wait can be halved.
                start = now
            # Full jitter on the upper half: clients that were cut off together do not come back together.
            back_off_s = min(_LAST_DELAY_S, _FIRST_DELAY_S * 2 ** min(attempt, 10)) * (0.5 + self._dice() / 2)
            delay_s = max(delay_s, back_off_s)
            waited_s = now - start
            if waited_s + delay_s > limit_s:
                raise _patience_is_over(refusal, waited_s) from None
            if isinstance(refusal, Overloaded) and refused is not None:
                refused(refusal)
                refused = None
            if stop is None:
                self._sleep(delay_s)
            elif stop.wait(delay_s):
                raise refusal from None
        raise AssertionError("a million attempts within one time limit")

    def once(
        self,
        method: str,
        path: str,
        *,
        content: Body | None = None,
        headers: Mapping[str, str] | None = None,
        answer_s: float | None = None,
    ) -> httpx.Response:
        """As ``request``, tried once only: for callers that have a way of their own to try again."""
        with self._good(method, path, content, headers, answer_s) as answer:
            answer.read()
        return answer

    def answering(
        self, path: str, content: bytes, headers: Mapping[str, str], silence_s: float
    ) -> AbstractContextManager[httpx.Response]:
        """A good answer to a POST, to be read as it comes, with at most ``silence_s`` between two signs of life. Tried once."""
        return self._good("POST", path, content, headers, silence_s)

    def pieces(self, path: str, size: int) -> Iterator[bytes]:
        """The bytes of a GET in pieces of ``size``, as they arrive. Tried once; raises between pieces as well."""
        with self._good("GET", path, None, {"Accept-Encoding": "identity"}, None) as answer:
            yield from answer.iter_bytes(size)

    @contextmanager
    def _good(
        self,
        method: str,
        path: str,
        content: Body | None,
        headers: Mapping[str, str] | None,
        answer_s: float | None,
    ) -> Iterator[httpx.Response]:
        """A good answer, of which the head is read. Raises the errors of motet.errors."""
        import httpx

        try:
            with self._answer(method, path, None, content, headers, answer_s or self._silence_s) as answer:
                if not answer.is_success:
                    answer.read()
                    raise error_of(answer)
                yield answer
        except httpx.HTTPError as error:
            raise Unreachable(_out_of_reach(self.address.url, error)) from None

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        content: Body | None,
        headers: Mapping[str, str] | None,
        silence_s: float,
    ) -> Iterator[httpx.Response]:
        """Any answer, of which the head is read. Raises httpx.RequestError."""
        import httpx

        patience = httpx.Timeout(silence_s, connect=self._connect_s)
        with (
            _opened(content) as body,
            self._connected().stream(
                method, path, params=params, content=body, headers=headers, timeout=patience
            ) as answer,
        ):
            yield answer


def look_at(url: str, *, token: str = "", timeout_s: float) -> httpx.Response:
    """One GET of any address, not only of the API's: its answer, whatever that is. Raises Unreachable."""
    import httpx

    try:
        return httpx.get(url, headers=_headers(token), timeout=timeout_s, trust_env=not is_near(url))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"{url}: {_silence(error)}") from None


def _headers(token: str) -> dict[str, str]:
    return {"User-Agent": "motet", **({"Authorization": f"Bearer {token}"} if token else {})}


def _out_of_reach(url: str, error: Exception) -> str:
    """Who did not answer and what to do."""
    if "CERTIFICATE" in str(error):
        return (
            f"the certificate of {url} is not trusted here; set SSL_CERT_FILE to your authority's certificate"
        )
    return (
        f"the server at {url} does not answer: {_silence(error)}; "
        "start it with `motet up`, or set MOTET_URL to where it is"
    )


def _silence(error: Exception) -> str:
    """Why there is no answer. Only our own words: an exception's may hold a peer's."""
    import httpx

    if isinstance(error, httpx.InvalidURL):
        return "no address"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if "CERTIFICATE" in str(error):
        return "a certificate that is not trusted here"
    return "no connection" if isinstance(error, httpx.ConnectError) else "the connection was lost"


def _unpickled(address: Address, timeout_s: float, headers: Mapping[str, str]) -> Http:
    """A line to the same API, in the process that unpickles one."""
    return Http(address, timeout_s=timeout_s, headers=headers)


@contextmanager
def _opened(content: Body | None) -> Iterator[bytes | Iterable[bytes] | None]:
    """What to send, from its beginning."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            yield file
    else:
        yield content() if callable(content) else content


def error_of(answer: httpx.Response) -> MotetError:
    """The error that an answer means. Its words are the API's own; any other body is not repeated."""
    status = answer.status_code
    said = _error_body(answer)
    message = _printable(str(said.get("message") or "")) or _in_other_words(answer)
    if status == 413 and not said:
        return BodyRefused(_too_large_for_a_proxy(answer))
    known = _known_error(status, said, message, _retry_after_s(answer.headers.get("Retry-After")))
    if known is not None:
        return known
    if status in _PROXY_IS_ALONE:
        return Unreachable(
            f"a proxy before {answer.url.host} cannot reach the server ({status} to {_asked(answer)}); "
            "look whether the API runs, and into the proxy's log"
        )
    if status < 400:
        return SetupError(
            f"{answer.url.host} answers {status}, which motet's API never does; check MOTET_URL"
        )
    if said:
        return _failed(status, message)
    return MotetError(message)


#: Class of an error -> the status of an answer that is that error.
_STATUS = {
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "gone": 410,
    "conflict": 409,
    "too_large": 413,
    "invalid_job": 422,
    "overloaded": 429,
    "unavailable": 503,
}


def error_told(said: Mapping[str, Any]) -> MotetError:
    """The error of one row of an ask, which stands in a good answer among those of others."""
    message = _printable(str(said.get("message") or "no reason was given"))
    status = _STATUS.get(str(said.get("type")), 500)
    again_s = _retry_after_s(str(said.get("retry_after_s", "")))
    return _known_error(status, said, message, again_s) or _failed(status, message)


def _known_error(
    status: int, said: Mapping[str, Any], message: str, retry_after_s: float
) -> MotetError | None:
    """The error of this status, in the API's words where there are any; None where the status alone tells nothing."""
    if said.get("type") == "late":
        row = said.get("row")
        return Late(message, stored=bool(said.get("stored")), row=row if isinstance(row, int) else None)
    if status in (401, 403):
        return Unauthorized(message)
    if status == 404:
        return NotFound(message)
    if status == 410:
        row = said.get("first_row")
        return Gone(message, row if isinstance(row, int) else 0)
    if status == 409:
        conflict = Conflict(message)
        if isinstance(said.get("next_part"), int):
            conflict.next_part = said["next_part"]
        return conflict
    if status in (429, 503):
        return Overloaded(message, retry_after_s)
    if status in (400, 405, 413, 415, 422):
        problems = [_problem(p) for p in said.get("problems") or () if isinstance(p, dict)]
        more = said.get("more")
        left_out = more if isinstance(more, int) else 0
        invalid = (BodyRefused if status == 413 else InvalidJob)(problems, more=left_out)
        if not problems:
            invalid.args = (message,)
        return invalid
    return None


def _failed(status: int, message: str) -> MotetError:
    return MotetError(f"the server failed ({status}): {message}; its log says more")


def _asked(answer: httpx.Response) -> str:
    """The request: its method and address, without what was asked for there."""
    return f"{answer.request.method} {answer.url.copy_with(query=None)}"


def _in_other_words(answer: httpx.Response) -> str:
    """What can be said of an answer that is not the API's."""
    return (
        f"{_asked(answer)} was answered with {answer.status_code}, and not in the API's words: "
        "a proxy before it, or another program; check MOTET_URL, and look into the proxy's log"
    )


def _too_large_for_a_proxy(answer: httpx.Response) -> Problem:
    size = int(answer.request.headers.get("Content-Length") or 0)
    most_mb = max(_BODY_MB, math.ceil(size / (1 << 20)))
    return Problem(
        "body",
        f"413 for {size:,} bytes, and not in the API's words",
        f"a proxy before the API that takes them ({_asked(answer)})",
        f"let it take {most_mb} MiB; in nginx: client_max_body_size {most_mb}m;",
    )


def _patience_is_over(refusal: MotetError, waited_s: float) -> MotetError:
    """The last refusal, which says of an overload how long it was waited for and what else to do."""
    if not isinstance(refusal, Overloaded):
        return refusal
    then = f"come back in {refusal.retry_after_s:.0f} s, or give the client a longer timeout"
    return Overloaded(f"{refusal} (still so after {waited_s:.0f} s: {then})", refusal.retry_after_s)


def _error_body(answer: httpx.Response) -> dict[str, Any]:
    """The API's error object, ``next_part`` included wherever it stands; {} for any other body."""
    try:
        body = answer.json()
        error = body["error"]
        return {**({"next_part": body["next_part"]} if "next_part" in body else {}), **error}
    except (ValueError, TypeError, KeyError):
        return {}


def _problem(said: Mapping[str, Any]) -> Problem:
    row = said.get("row")
    field, got, expected, remedy = (
        _printable(str(said.get(name, ""))) for name in ("field", "got", "expected", "remedy")
    )
    return Problem(field, got, expected, remedy, row if isinstance(row, int) else None)


def _printable(text: str, limit: int = 2000) -> str:
    """Text that may be shown on a terminal: no control characters, and not without end."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])


def _retry_after_s(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), 3600.0)
    except ValueError:
        # A date, which motet's API never sends: a proxy's. It may be wrong by the clocks' difference.
        return 1.0


def json_of(answer: httpx.Response) -> Any:
    """The JSON of a good answer; None of one that has no content by its status. Raises SetupError for anything else."""
    if answer.status_code == 204:
        return None
    try:
        return answer.json()
    except ValueError:
        raise SetupError(
            f"{answer.url.host} answers in another language than JSON; check MOTET_URL"
        ) from None


def _read_local(path: Path) -> dict[str, str]:
    """What `motet up` wrote, or {} where it never ran."""
    try:
        said = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot read {path}: {error}; delete it and run `motet up` again") from None
    return (
        {name: value for name, value in said.items() if isinstance(value, str)}
        if isinstance(said, dict)
        else {}
    )


def _token_file(env: Mapping[str, str]) -> str | None:
    name = env.get("MOTET_TOKEN_FILE")
    if not name:
        return None
    try:
        return Path(name).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise SetupError(f"MOTET_TOKEN_FILE: cannot read {name!r}: {error}") from None
