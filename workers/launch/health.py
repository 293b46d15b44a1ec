"""Whether the workers of this host do their work: ``python -m workers health``, for a container's health check.

The cluster is asked, with the worker's own token: a worker is well while the scheduler hears it beat.
"""

from __future__ import annotations

import socket
from contextlib import closing

from motet.errors import MotetError
from motet.http import Address, Http

#: A health check is asked again soon: better no answer than a late one.
_PATIENCE_S = 5.0


def check_beats() -> int:
    """Returns 0 where each worker of this host beats, else 1; prints why."""
    host = socket.gethostname()
    try:
        with closing(Http(Address.find(), timeout_s=_PATIENCE_S)) as http:
            seen = http.get("/v1/workers")["workers"]
    except MotetError as error:
        print(error)
        return 1
    states = {one["worker"]: one["state"] for one in seen if one["host"] == host}
    if not states:
        print(f"no worker of {host} beats")
        return 1
    print(", ".join(f"{worker}: {state}" for worker, state in states.items()))
    return int(any(state == "silent" for state in states.values()))
