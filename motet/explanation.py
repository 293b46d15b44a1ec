"""Why a job waits, and when it will be done: as the API tells it, and as the client reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

#: Why a worker gets nothing of a pass.
Why = Literal[
    "no_engine", "too_small", "refused", "drained", "draining", "starting", "incompatible", "exclusive"
]

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cannot:
    """Workers that cannot run a pass, for one reason."""

    why: Why
    #: The reason in words; of ``refused`` the worker's own.
    words: str
    workers: int
    #: Of some of them.
    names: tuple[str, ...]
    #: Of ``too_small``: memory that the model needs, and the most that models may hold on one of these.
    need_mb: int | None = None
    have_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanLoad:
    """Workers of one kind that can run a pass once they have loaded its model."""

    device_name: str
    workers: int
    #: Predicted seconds of loading.
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A worker that loads the model of a pass."""

    worker: str
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRows:
    """Where the rows of a pass are."""

    total: int
    #: Those that may run now, and those that are tried again later.
    waiting: int
    later: int
    open: int
    done: int
    #: Those that wait for cells of other tasks.
    blocked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassExplained:
    """How one pass of a job stands, and who can run it."""

    number: int
    kind: str
    tasks: tuple[str, ...]
    #: The model that is loaded for it.
    model: str
    rows: PassRows
    #: Predicted device-seconds of what waits, on the fastest device that can run it; None where none can.
    work_s: float | None
    #: Workers that hold its model and may be given work, and names of some of them.
    resident: int
    resident_on: tuple[str, ...]
    #: Workers that load its model, and some of them.
    loads: int = 0
    loading: tuple[Loading, ...]
    can_load: tuple[CanLoad, ...]
    cannot: tuple[Cannot, ...]
    #: Tasks whose answers it reads: a block of it waits until they are there.
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another job of the same tenant that wants the same workers."""

    job: str
    name: str
    #: Predicted device-seconds of what waits of it.
    work_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What waits for the same workers in one class. Jobs of other tenants are counted, never named."""

    priority: Literal["interactive", "normal", "bulk"]
    #: Own jobs, most work first; beyond the first ones only counted.
    own: tuple[Rival, ...]
    own_jobs: int
    own_s: float
    other_tenants: int
    other_jobs: int
    other_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Sub-tasks under way: of this job, and in all; and on how many workers."""

    subtasks: int
    all: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Rows that came back and wait to be tried again."""

    rows: int
    #: Seconds until the last of them may run.
    until_s: float
    #: Tries so far, of those tried most.
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A job's deadline."""

    at: str
    left_s: float
    #: ``likely``: in half of all cases, but not in nine of ten. None: nobody can tell.
    kept: Literal["yes", "likely", "no"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """When it will be done: in half of all cases by p50, in nine of ten by p90."""

    p50_s: float
    p90_s: float
    p50_at: str
    p90_at: str
    #: False: nothing was measured yet of its models on these devices.
    measured: bool
    #: False: its upload goes on, and only the rows that have arrived are counted.
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a job waits, or when it will be done. ``str`` of it is what a person wants to read."""

    job: str
    name: str
    state: Literal["loading", "running", "succeeded", "failed", "cancelled"]
    #: The answer in one sentence, and what else is worth knowing, a sentence each.
    says: str
    notes: tuple[str, ...]
    passes: tuple[PassExplained, ...] = ()
    beside: tuple[Beside, ...] = ()
    share: Share | None = None
    #: Cells that are errors so far.
    errors: int = 0
    retries: Retries | None = None
    #: Share of its usual rate at which the dispatcher sends, 1 to 0; None where it is not known.
    throttle: float | None = None
    deadline: Due | None = None
    #: None where it has ended, or where nobody can tell.
    eta: Eta | None = None

    def __str__(self) -> str:
        return "\n".join((self.says, *self.notes))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Explanation:
        """Read it from the API's answer. What a newer server adds is passed over."""
        return _told(
            cls,
            {
                **record,
                "notes": tuple(record["notes"]),
                "passes": tuple(_pass(p) for p in record["passes"]),
                "beside": tuple(
                    _told(Beside, {**b, "own": tuple(_told(Rival, r) for r in b["own"])})
                    for b in record["beside"]
                ),
                "share": _maybe(Share, record["share"]),
                "retries": _maybe(Retries, record["retries"]),
                "deadline": _maybe(Due, record["deadline"]),
                "eta": _maybe(Eta, record["eta"]),
            },
        )


def _pass(record: Mapping[str, Any]) -> PassExplained:
    return _told(
        PassExplained,
        {
            **record,
            "tasks": tuple(record["tasks"]),
            "needs": tuple(record.get("needs", ())),
            "rows": _told(PassRows, record["rows"]),
            "resident_on": tuple(record["resident_on"]),
            "loading": tuple(_told(Loading, one) for one in record["loading"]),
            "can_load": tuple(_told(CanLoad, one) for one in record["can_load"]),
            "cannot": tuple(_told(Cannot, {**one, "names": tuple(one["names"])}) for one in record["cannot"]),
        },
    )


def _told(kind: type[Told], record: Mapping[str, Any]) -> Told:
    return kind(**{f.name: record[f.name] for f in fields(kind) if f.name in record})  # type: ignore[arg-type]


def _maybe(kind: type[Told], record: Mapping[str, Any] | None) -> Told | None:
    return None if record is None else _told(kind, record)
