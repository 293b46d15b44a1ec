"""All settings of motet's processes: read once, at the edge, from the environment, failing loudly.

Every setting is an environment variable ``MOTET_<NAME>``; secrets may come from a file named by
``MOTET_<NAME>_FILE`` instead, so that they stand neither in ``ps`` nor in a compose file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from motet.errors import SetupError
from motet.messages.jobs import MAX_RETENTION_DAYS


def cache_folder(named: str = "") -> Path:
    """Where copies of what can be fetched again are kept: ``named``, or else ``$MOTET_CACHE_DIR`` or ~/.cache/motet."""
    # Not Path.home(): that raises where a container's user has no home.
    return Path(os.path.expanduser(named or os.environ.get("MOTET_CACHE_DIR") or "~/.cache/motet"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One frozen bag of settings. Every process takes what it needs and nothing else reads the environment."""

    #: SQLAlchemy URL of Postgres. The scheduler side only: workers never see it.
    database_url: str = ""
    #: Redis URL of this process' own role (the ACL user differs between scheduler and workers).
    redis_url: str = ""
    #: Where the API is reached, by clients and by workers that fetch blobs.
    url: str = "http://127.0.0.1:8700"
    #: The token that this client or worker shows.
    token: str = ""
    #: Where the API listens. Loopback unless an operator decides otherwise.
    api_host: str = "127.0.0.1"
    api_port: int = 8700
    #: Content-addressed files behind the API.
    blob_dir: str = ""
    #: Copies of what can be fetched again: a worker's blobs, of which the least recently used go first, converted
    #: models, data sets. Empty: ~/.cache/motet; see cache_folder.
    cache_dir: str = ""
    #: Of a worker's blobs.
    cache_mb: int = 20_000

    # -- limits at the door: small enough to protect the API, large enough for real documents
    max_rows: int = 100_000_000
    max_tasks: int = 64
    max_row_bytes: int = 256 * 1024
    max_part_bytes: int = 32 * 1024 * 1024
    #: Pictures of one tenant's jobs, in MB; 0: no limit. They lie in Postgres beside the rows: larger fills its disk.
    max_media_mb: int = 20_000
    max_active_jobs: int = 1000
    #: Requests a second of one token at one API process, ten times as many at once; 0: no limit.
    max_requests_s: float = 200.0
    #: Unfinished rows of all tenants; beyond it new jobs are refused, interactive ones apart.
    max_waiting_rows: int = 1_000_000_000
    #: Room that must stay free on the disk of Postgres, where the API sees it; 0: it does not look.
    min_free_mb: int = 500

    # -- webhooks
    #: Hosts of the own network that webhooks may name, also without TLS, each as host or host:port, with commas between.
    #: Whoever may submit jobs can then have motet send requests there.
    webhook_hosts: str = ""
    #: A PEM file of certificates that webhooks' servers may show beside the system's.
    webhook_ca: str = ""

    # -- storage
    #: Rows of a block: more amortise storage and padding, fewer stream earlier and reuse finer.
    block_rows: int = 1024
    #: UTF-8 bytes of a block, whichever comes first.
    block_bytes: int = 1024 * 1024
    #: Days after its end at which a job and its results are deleted; 0 keeps them until they are removed by hand.
    retention_days: float = 0.0

    # -- protocol timers; lease >= 2 x dead, leader lease >= 5 x tick (reference: reliability 7)
    tick_s: float = 0.5
    beat_s: float = 1.0
    #: A worker whose beat has not changed for so long is dead.
    dead_s: float = 4.0
    lease_s: float = 8.0
    leader_lease_s: float = 5.0
    #: Another aggregator's unfinished entries are taken over after so long; longer than any merge.
    reclaim_s: float = 6.0
    payload_ttl_s: int = 900

    # -- carving
    #: Seconds of predicted work in a sub-task: longer costs less overhead, shorter balances better.
    subtask_s: float = 2.0
    #: A worker gets its next sub-task when it has less predicted work than this left. Longer is safer against slow
    #: messages, shorter decides later.
    ahead_s: float = 0.5
    #: Bulk sub-tasks at one worker at most, the running one included.
    depth: int = 3

    # -- worker
    #: Seconds that a worker may go on after SIGTERM before its leases are given back.
    grace_s: float = 20.0
    #: Share of a device's memory that models may hold.
    memory_share: float = 0.92
    #: Share of a device that interactive work may take from bulk that waits, 0.1 to 0.9. Larger: callers wait less where
    #: asks are the purpose; smaller: bulk goes on faster beside them. Workers go by theirs, `explain` tells the API's.
    lane_share: float = 0.3
    log_level: str = "INFO"

    # -- watching
    #: A file that a process of the scheduler touches in every round of its work, so that a supervisor sees it hang.
    #: `motet up` sets it. Empty: none.
    pulse: str = ""
    #: OTLP/HTTP receiver of traces, such as http://127.0.0.1:4318/v1/traces. Empty: no traces, and no cost.
    traces: str = ""

    def __post_init__(self) -> None:
        # Also refuses NaN. A sign or an exponent gone wrong would delete everything.
        if not 0 <= self.retention_days <= MAX_RETENTION_DAYS:
            raise SetupError(
                f"MOTET_RETENTION_DAYS: got {self.retention_days}; expected days from 0 (keep for ever)"
                f" to {MAX_RETENTION_DAYS:,}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise SetupError(f"MOTET_{field.name.upper()}: got {value}; expected a finite number")
        if not 0.1 <= self.lane_share <= 0.9:
            raise SetupError(f"MOTET_LANE_SHARE: got {self.lane_share}; expected a share from 0.1 to 0.9")
        for name, least in (
            ("max_waiting_rows", 1),
            ("min_free_mb", 0),
            ("max_requests_s", 0),
            ("max_media_mb", 0),
        ):
            if not getattr(self, name) >= least:  # also refuses NaN
                raise SetupError(
                    f"MOTET_{name.upper()}: got {getattr(self, name)}; expected a number from {least}"
                )

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment. Raises SetupError that names the variable and what was expected."""
        env = os.environ if env is None else env
        hints = get_type_hints(cls)
        found: dict[str, Any] = {}
        for field in fields(cls):
            name = f"MOTET_{field.name.upper()}"
            text = env.get(name)
            if text is None and f"{name}_FILE" in env:
                try:
                    text = Path(env[f"{name}_FILE"]).read_text("utf-8").strip()
                except OSError as error:
                    raise SetupError(
                        f"{name}_FILE: cannot read {env[f'{name}_FILE']!r}: {error.strerror}"
                    ) from None
            if text is None:
                continue
            kind = hints[field.name]
            try:
                found[field.name] = kind(text)
            except ValueError:
                raise SetupError(f"{name}: got {text!r}; expected {kind.__name__}") from None
        return cls(**found)

    def need(self, *names: str) -> Settings:
        """Return self if each of these settings is set. Raises SetupError that names the first missing one."""
        for name in names:
            if not getattr(self, name):
                raise SetupError(
                    f"MOTET_{name.upper()} is not set; set it, or run `motet up`, which sets all of them"
                )
        return self
