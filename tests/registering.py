"""`python -m workers register` in this process, which has imported torch: a process of its own takes five seconds for that."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

from tests.fuzz.small_cluster import surrounded
from workers.__main__ import main


def register(url: str, token: str, *arguments: str, **env: str) -> CompletedProcess[str]:
    """Run it to its end against an API, with these variables beside: its exit code, and what it printed."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        surrounded(MOTET_URL=url, MOTET_TOKEN=token, **env),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        code = main(["register", *arguments])
    return CompletedProcess(["register", *arguments], code, out.getvalue(), errors.getvalue())
