"""Messages about why a job waits, and when it will be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from motet.messages.jobs import Priority
from motet.messages.message import ApiMessage
from motet.states import State

#: Why a worker gets nothing of a pass.
Why = Literal[
    "no_engine", "too_small", "refused", "drained", "draining", "starting", "incompatible", "exclusive"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cannot(ApiMessage):
    """Workers that cannot run a pass, for one reason."""

    #: Why a worker gets nothing of the pass.
    why: Why
    #: The reason in words; of ``refused`` the worker's own.
    words: str
    #: How many workers.
    workers: int
    #: Names of some of them.
    names: tuple[str, ...]
    #: Of ``too_small``: memory that the model needs.
    need_mb: int | None = None
    #: Of ``too_small``: the most that models may hold on one of these workers.
    have_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanLoad(ApiMessage):
    """Workers of one kind that can run a pass once they have loaded its model."""

    #: The kind: the name of the device.
    device_name: str
    #: How many workers.
    workers: int
    #: Predicted seconds of loading.
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading(ApiMessage):
    """A worker that loads the model of a pass."""

    #: The worker's name.
    worker: str
    #: Predicted seconds until it has loaded it.
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRows(ApiMessage):
    """Where the rows of a pass are."""

    #: All rows of the pass that have arrived.
    total: int
    #: Rows that may run now.
    waiting: int
    #: Rows that came back and are tried again later.
    later: int
    #: Rows in sub-tasks under way.
    open: int
    #: Rows that are answered.
    done: int
    #: Rows that wait for cells of other tasks.
    blocked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassExplained(ApiMessage):
    """How one pass of a job stands, and who can run it."""

    #: Its number in the job, from 0.
    number: int
    #: What runs, such as ``encoder all-MiniLM-L6-v2``.
    kind: str
    #: Names of the tasks that it answers.
    tasks: tuple[str, ...]
    #: The model that is loaded for it.
    model: str
    #: Where its rows are.
    rows: PassRows
    #: Predicted device-seconds of what waits, on the fastest device that can run it; None where none can.
    work_s: float | None
    #: Workers that hold its model and may be given work.
    resident: int
    #: Names of some of them.
    resident_on: tuple[str, ...]
    #: Workers that load its model now.
    loads: int = 0
    #: Some of them.
    loading: tuple[Loading, ...]
    #: Workers that could load its model, by kind.
    can_load: tuple[CanLoad, ...]
    #: Workers that cannot run it, by reason.
    cannot: tuple[Cannot, ...]
    #: Tasks whose answers it reads: a block of it waits until they are there.
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival(ApiMessage):
    """Another job of the same tenant that wants the same workers."""

    #: Its id.
    job: str
    #: Its name; "" where it has none.
    name: str
    #: Predicted device-seconds of what waits of it.
    work_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside(ApiMessage):
    """What waits for the same workers in one class. Jobs of other tenants are counted, never named."""

    #: The class.
    priority: Priority
    #: The tenant's own jobs, most work first; beyond the first ones only counted.
    own: tuple[Rival, ...]
    #: How many own jobs.
    own_jobs: int
    #: Predicted device-seconds of what waits of them.
    own_s: float
    #: Other tenants with jobs in the class.
    other_tenants: int
    #: Jobs of other tenants.
    other_jobs: int
    #: Predicted device-seconds of what waits of them.
    other_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share(ApiMessage):
    """Sub-tasks under way: of this job, and in all; and on how many workers."""

    #: Sub-tasks of this job.
    subtasks: int
    #: Sub-tasks of all jobs.
    all: int
    #: Workers that hold sub-tasks of this job.
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries(ApiMessage):
    """Rows that came back and wait to be tried again."""

    #: How many rows.
    rows: int
    #: Seconds until the last of them may run.
    until_s: float
    #: Tries so far, of those tried most.
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Due(ApiMessage):
    """A job's deadline."""

    #: The moment, as RFC 3339.
    at: str
    #: Seconds until then.
    left_s: float
    #: ``likely``: in half of all cases, but not in nine of ten. None: nobody can tell.
    kept: Literal["yes", "likely", "no"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta(ApiMessage):
    """When it will be done: in half of all cases by p50, in nine of ten by p90."""

    #: Seconds from now by which it is done in half of all cases.
    p50_s: float
    #: Seconds from now by which it is done in nine of ten cases.
    p90_s: float
    #: The moment of ``p50_s``, as RFC 3339.
    p50_at: str
    #: The moment of ``p90_s``.
    p90_at: str
    #: False: nothing was measured yet of its models on these devices.
    measured: bool
    #: False: its upload goes on, and only the rows that have arrived are counted.
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(ApiMessage):
    """Why a job waits, or when it will be done. ``str`` of it is what a person wants to read."""

    #: The job's id.
    job: str
    #: Its name; "" where it has none.
    name: str
    #: How it stands.
    state: State
    #: The answer in one sentence.
    says: str
    #: What else is worth knowing, a sentence each.
    notes: tuple[str, ...]
    #: How each pass stands, and who can run it.
    passes: tuple[PassExplained, ...] = ()
    #: What waits for the same workers, by class.
    beside: tuple[Beside, ...] = ()
    #: Sub-tasks under way; null where the job has ended.
    share: Share | None = None
    #: Cells that are errors so far.
    errors: int = 0
    #: Rows that came back and are tried again; null where there are none.
    retries: Retries | None = None
    #: Share of its usual rate at which the dispatcher sends, 1 to 0; None where it is not known.
    throttle: float | None = None
    #: Whether its deadline will be kept; null where it has none.
    deadline: Due | None = None
    #: None where it has ended, or where nobody can tell.
    eta: Eta | None = None

    def __str__(self) -> str:
        return "\n".join((self.says, *self.notes))
