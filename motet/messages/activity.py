"""Messages about what happens in a job: passes, devices, sub-tasks in time. Times are seconds since it was created."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from motet.messages.jobs import JobRecord
from motet.messages.message import ApiMessage

DeviceState = Literal["starting", "ready", "draining", "silent", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBlocks(ApiMessage):
    """Where the blocks of a pass are."""

    #: All blocks of the job.
    total: int
    #: Blocks whose answers are merged.
    sealed: int
    #: Blocks that wait for cells of other tasks.
    waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsUnderWay(ApiMessage):
    """Where the rows of a pass are."""

    #: All rows of the pass.
    total: int
    #: Rows that may run now, or later.
    waiting: int
    #: Rows in sub-tasks under way.
    open: int
    #: Rows that are answered.
    done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtaskCounts(ApiMessage):
    """The sub-tasks of a pass, by state."""

    #: Under way.
    open: int
    #: Reported.
    done: int
    #: Lost with their worker or their lease; their rows wait again.
    lost: int
    #: Ended with their job.
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassUnderWay(ApiMessage):
    """How one pass of a job stands."""

    #: Its number in the job, from 0.
    number: int
    #: What runs, such as ``encoder all-MiniLM-L6-v2``.
    kind: str
    #: Names of the tasks that it answers.
    tasks: tuple[str, ...]
    #: Where its blocks are.
    blocks: PassBlocks
    #: Where its rows are.
    rows: RowsUnderWay
    #: Its sub-tasks, by state.
    subtasks: SubtaskCounts
    #: Tokens read so far.
    tokens: int
    #: What a pass per task would have read.
    unfused_tokens: int
    #: Seconds of devices so far.
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUnderWay(ApiMessage):
    """What one device did for a job."""

    #: Name of its worker.
    worker: str
    #: Name of the device.
    device_name: str
    #: ``silent``: not heard now. ``gone``: forgotten.
    state: DeviceState
    #: Sub-tasks that it reported.
    subtasks: int
    #: Sub-tasks that it holds.
    open: int
    #: Rows that it answered.
    rows: int
    #: Tokens that it read.
    tokens: int
    #: Seconds that it was busy with the job.
    busy_s: float
    #: Tokens per busy second.
    tokens_s: float
    #: Busy seconds over the time from its first lease in this job to its last outcome, or to now.
    share: float
    #: Busy share of the device in the last second, for all jobs; null without a beat.
    utilisation: float | None
    #: Seconds of predicted work that it holds, of all jobs; null without a beat.
    backlog_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtaskUnderWay(ApiMessage):
    """One sub-task in time."""

    #: Its id.
    subtask: int
    #: The worker that has it, or had it.
    worker: str
    #: Number of its pass.
    pass_: int
    #: ``lost``: with its worker or its lease; its rows wait again.
    state: Literal["open", "done", "lost", "failed"]
    #: It holds one row alone that may have killed its worker.
    exclusive: bool
    #: When it was cut out of its pass.
    carved_s: float
    #: Its end less its busy seconds; of an open or lost one the moment it was carved.
    start_s: float
    #: Its end; null while it is open.
    end_s: float | None
    #: Its rows.
    rows: int
    #: Tokens that it read.
    tokens: int
    #: Seconds of its device.
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtaskPage(ApiMessage):
    """A page of a job's sub-tasks, oldest first."""

    #: The sub-tasks of the page.
    subtasks: tuple[SubtaskUnderWay, ...]
    #: ``after`` of the next page; null behind the last one.
    next: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputBucket(ApiMessage):
    """What was done in one of at most 60 equal spans of a job's life."""

    #: The end of the span.
    at_s: float
    #: Tokens read per second.
    tokens_s: float
    #: Rows answered per second.
    rows_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCount(ApiMessage):
    """Cells of one task with errors of one class."""

    #: Name of the task.
    task: str
    #: Class of the error.
    error: str
    #: How many cells.
    count: int
    #: The first row among them.
    first_row: int
    #: What happened there, in words.
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskCounts(ApiMessage):
    """Asks of an open job that ended within some seconds, at all API processes."""

    #: The end of these seconds.
    at_s: float
    #: Asks answered per second.
    asks_s: float
    #: Rows of theirs per second.
    rows_s: float
    #: Asks whose callers gave up before the answer came.
    late: int
    #: Asks that were told to come back later.
    refused: int
    #: Asks that ended in another error.
    failed: int
    #: Rows that waited to be stored at their end.
    waiting: int
    #: Seconds within which half of the answers came; null without an answer.
    p50_s: float | None
    #: Seconds within which 99 of 100 answers came.
    p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AsksUnderWay(ApiMessage):
    """The last ten minutes of an open job."""

    #: The last minute, as one.
    minute: AskCounts
    #: Spans of five seconds, oldest first; the one under way is not among them.
    spans: tuple[AskCounts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut(ApiMessage):
    """What an activity does not tell, counted."""

    #: Older sub-tasks.
    timeline: int = 0
    #: Devices beyond the newest 1,000.
    devices: int = 0
    #: Classes of errors beyond the most frequent 50.
    errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobActivity(ApiMessage):
    """What happens in a job as of one moment."""

    #: The job.
    job: JobRecord
    #: The moment; of a job that has ended its end.
    now_s: float
    #: How its passes stand.
    passes: tuple[PassUnderWay, ...]
    #: What each device did for it.
    devices: tuple[DeviceUnderWay, ...]
    #: The newest sub-tasks, oldest first; those that are open before all others.
    timeline: tuple[SubtaskUnderWay, ...]
    #: What was done over time.
    throughput: tuple[ThroughputBucket, ...]
    #: Errors of sealed blocks by task and class, most first.
    errors: tuple[ErrorCount, ...]
    #: Of an open job: its asks of late; null of any other.
    asks: AsksUnderWay | None = None
    #: What is not told here.
    left_out: LeftOut = field(default_factory=LeftOut)
