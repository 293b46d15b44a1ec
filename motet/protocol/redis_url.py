"""One Redis setting for two libraries that write unix sockets differently: kombu's form is ours, redis-py's is made here."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from motet.errors import SetupError


def redis_py_url(url: str) -> str:
    """Turn ``redis+socket://user:password@/path.sock?virtual_host=0``, as kombu takes it, into redis-py's ``unix://``.

    ``redis://`` and ``rediss://`` mean the same to both and stay as they are. Raises SetupError for anything else.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme in ("redis", "rediss") and parts.hostname:
        return url
    if parts.scheme == "redis+socket" and not parts.hostname and len(parts.path) > 1:
        database = parse_qs(parts.query).get("virtual_host", ["0"])[0]
        return f"unix://{parts.netloc}{parts.path}?db={database}"
    # The URL itself is not shown: it holds a password.
    raise SetupError(
        f"Redis URL: got {parts.scheme or 'no scheme'}://…; "
        "expected redis://user:password@host:6379/0 or redis+socket://user:password@/path.sock?virtual_host=0"
    )
