"""Messages about jobs: what is submitted or planned, how a job stands, which cells have no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from motet.messages.message import ApiMessage, Limit
from motet.states import State
from motet.words import count

Priority = Literal["interactive", "normal", "bulk"]

#: Rows that a job may bring along in its first request.
MAX_INLINE_ROWS = 1024
#: A deadline farther away than a year is a slip of the hand.
MAX_DEADLINE_S = 366 * 86_400
#: A hundred years: more is a slip of the hand.
MAX_RETENTION_DAYS = 36_500
#: What an open job keeps its answered rows for, where it does not say: a week, in seconds.
DEFAULT_KEEP_S = 7 * 86_400.0
#: An answer is kept for a minute at least: with less, callers who wait might find it gone.
MIN_KEEP_S = 60
_MAX_KEEP_S = MAX_RETENTION_DAYS * 86_400
#: Rows of one ask: more are a job.
MAX_ASK_ROWS = 64
_ASK_KEY = Limit("text of 1 to 200 characters", least=1, most=200)
_COUNT = Limit("a whole number", least=0, most=2**62 - 1)
_TOTAL = Limit("a whole number", least=0, most=10**15)


# -- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission(ApiMessage):
    """What opens a job."""

    #: Task name -> its spec (motet.tasks).
    tasks: Annotated[Mapping[str, Any], Limit("an object of task name to spec")]
    #: For people; shown in lists.
    name: Annotated[str, Limit("text of at most 200 characters", most=200)] = ""
    #: Class of the job; an interactive one has few rows and goes first.
    priority: Priority = "normal"
    #: False: everything is computed anew.
    reuse: bool = True
    #: True: an open job, whose rows come by asking until it is closed; it takes no parts.
    open: bool = False
    #: What an open job remembers of the rows of a key: name -> spec of a fold (motet.folds).
    state: Annotated[Mapping[str, Any], Limit("an object of name to fold")] | None = None
    #: Whether a value that is no text refuses the job, or is an error of the tasks that read it.
    bad_rows: Literal["refuse", "error"] = "refuse"
    #: Seconds from now in which it must end, or it fails; null: no hurry.
    deadline_s: (
        Annotated[
            float,
            Limit(
                f"seconds from now, more than 0 and at most {MAX_DEADLINE_S:,}", above=0, most=MAX_DEADLINE_S
            ),
        ]
        | None
    ) = None
    #: Days for which it is kept after its end, where the cluster does not delete it sooner.
    retention_days: (
        Annotated[
            float,
            Limit(f"days, more than 0 and at most {MAX_RETENTION_DAYS:,}", above=0, most=MAX_RETENTION_DAYS),
        ]
        | None
    ) = None
    #: Of an open job: seconds for which a row is kept after it was answered; null: 7 days.
    keep_s: (
        Annotated[
            float,
            Limit(f"seconds, {MIN_KEEP_S} to {_MAX_KEEP_S:,}", least=MIN_KEEP_S, most=_MAX_KEEP_S),
        ]
        | None
    ) = None
    #: A condition on the answers of its tasks: each row for which it holds is an event (docs/webhooks.md).
    notify_when: Annotated[str, Limit("a condition on answers, such as risk > 0.4")] | None = None
    #: Field -> UTF-8 bytes of it in a row, about: decides whether prompts begin with the text.
    mean_bytes: (
        Annotated[
            Mapping[str, Annotated[float, Limit("", least=0, most=1 << 30)]],
            Limit("an object of field to bytes in a row, 0 or more", most=1000),
        ]
        | None
    ) = None
    #: All rows of a small job, each an object or a text; without them, they come in parts.
    rows: (
        Annotated[
            tuple[Any, ...], Limit(f"a list of 1 to {MAX_INLINE_ROWS:,} rows", least=1, most=MAX_INLINE_ROWS)
        ]
        | None
    ) = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest(Submission):
    """A submission whose rows are a sample, to be planned and not run."""

    #: A sample of the rows.
    rows: (
        Annotated[tuple[Any, ...], Limit(f"a list of 0 to {MAX_INLINE_ROWS:,} rows", most=MAX_INLINE_ROWS)]
        | None
    ) = None
    #: Rows of the whole.
    total_rows: Annotated[int, _TOTAL] | None = None
    #: UTF-8 bytes of the whole, of the fields that tasks read.
    total_bytes: Annotated[int, _TOTAL] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing(ApiMessage):
    """What was sent of a job's rows; both numbers are checked."""

    #: Parts that were sent; of an open job, which has none: not needed.
    parts: Annotated[int, _COUNT] | None = None
    #: Rows in all of them.
    rows: Annotated[int, _COUNT] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRequest(ApiMessage):
    """Rows for an open job, to be answered at once."""

    #: The rows, each an object or a text.
    rows: Annotated[tuple[Any, ...], Limit(f"a list of 1 to {MAX_ASK_ROWS} rows", least=1, most=MAX_ASK_ROWS)]
    #: Name of the rows together: asked again, they are found, and not done twice.
    key: Annotated[str, _ASK_KEY] | None = None
    #: A name for each row: then each is an ask of its own, that may fail alone.
    keys: Annotated[tuple[Annotated[str, _ASK_KEY], ...], Limit("a key for each row", unique=True)] | None = (
        None
    )
    #: Seconds for which the caller waits.
    within_s: Annotated[float, Limit("seconds, more than 0 and at most 3,600", above=0, most=3600)] = 30.0
    #: Rows that nobody waits for any more are given up: not begun where they are late, aborted where the caller hangs up.
    #: Their cells are then ``skipped``, and their keys are free for new rows.
    drop_late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AskAnswer(ApiMessage):
    """The merged rows of an ask, in its order."""

    #: Each as ``GET /v1/jobs/{id}/results`` shows it to people; of a row with a key of its own that was refused:
    #: ``{"error": …}``.
    rows: tuple[Mapping[str, Any], ...]


# -- a job


@dataclass(frozen=True, slots=True, kw_only=True)
class CellCounts(ApiMessage):
    """A job's cells, counted."""

    #: Rows times tasks.
    total: int
    #: Cells with an answer.
    ok: int
    #: Cells without one.
    error: int
    #: Cells that were not computed, for another's error or because the job ended before.
    skipped: int
    #: Cells of ``ok`` that were found from an earlier job.
    reused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPass(ApiMessage):
    """One model pass over the rows, and the tasks that it answers together."""

    #: What runs, such as ``encoder all-MiniLM-L6-v2``.
    kind: str = ""
    #: Names of the tasks that it answers.
    tasks: tuple[str, ...]
    #: The model that is loaded for it, as ``name@version``.
    model: str = ""
    #: ``exact``: an answer does not depend on what else is in its batch.
    numerics: Literal["fast", "exact"] = "fast"
    #: Tokens read per row at most, special ones included.
    max_tokens: int = 0
    #: Names of the tasks whose answers it reads, and so waits for.
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts(ApiMessage):
    """A job's blocks, counted."""

    #: All blocks that have arrived.
    total: int = 0
    #: Blocks in which every task is finished.
    done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobUsage(ApiMessage):
    """What a job has consumed so far."""

    #: Tokens read, after truncation; of language models those of every prompt.
    tokens: int = 0
    #: Those that devices computed: with padding, without what was computed already.
    computed_tokens: int = 0
    #: Those of prompts that were computed already for another task or row.
    tokens_cached: int = 0
    #: Tokens that language models wrote.
    tokens_out: int = 0
    #: Seconds of devices.
    busy_s: float = 0.0
    #: Sub-tasks that reported.
    subtasks: int = 0
    #: Attempts that were lost, with their worker or their lease.
    attempts_lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord(ApiMessage):
    """A job as it stands at one moment."""

    #: The job's id.
    id: str
    #: As submitted; "" where it has none.
    name: str = ""
    #: What it does now, or how it ended.
    state: State
    #: ``train`` where one of its tasks trains models.
    kind: Literal["infer", "train"] = "infer"
    #: Why it failed or was cancelled; "" otherwise.
    reason: str = ""
    #: Class of the job.
    priority: Priority = "normal"
    #: Rows that have arrived.
    rows: int
    #: Parts that have arrived: an upload that broke off goes on with the part of this number.
    parts: int = 0
    #: Task name -> its spec, with ``model_ref``, ``labels`` and ``column``, the type of its answers; ``artefact_ref`` too,
    #: where its function reads one.
    tasks: Mapping[str, Mapping[str, Any]]
    #: Its cells, counted.
    cells: CellCounts
    #: The model passes that answer its tasks.
    passes: tuple[JobPass, ...] = ()
    #: Its blocks, counted.
    blocks: BlockCounts = field(default_factory=BlockCounts)
    #: Differs whenever something has changed.
    version: int = 0
    #: True for a succeeded job some of whose cells are errors or skipped.
    partial: bool = False
    #: What it has consumed.
    usage: JobUsage = field(default_factory=JobUsage)
    #: When it was opened, as RFC 3339.
    created: str = ""
    #: When its first rows came: they are run from then on. Of an open job, when it was opened.
    started: str | None = None
    #: When its last rows had come; null: more may come, or it ended before.
    closed: str | None = None
    #: When it ended.
    finished: str | None = None
    #: It fails where it has not ended by then; null: no hurry.
    deadline: str | None = None
    #: Days after its end at which it is deleted; null: when the server deletes all others.
    retention_days: float | None = None
    #: Of an open job: seconds for which a row is kept after it was answered; null: until the job is removed.
    keep_s: float | None = None
    #: Index of the first row from which on all are kept; those before it were deleted by ``keep_s``.
    first_row: int = 0
    #: Each row for which this holds is an event; null: no row is.
    notify_when: str | None = None
    #: Rows for which it held so far.
    rows_matched: int = 0
    #: Seconds left at the pace so far; null where there is no pace yet.
    eta_s: float | None = None
    #: What an open job was given as ``state``: name -> spec of a fold, whose value each row has as a field.
    folds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobList(ApiMessage):
    """A page of jobs, newest first."""

    #: The jobs of the page.
    jobs: tuple[JobRecord, ...]
    #: ``after`` of the next page; null behind the last one.
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLanded(ApiMessage):
    """A part of the rows, stored now or before."""

    #: Number of the part.
    part: int
    #: Rows in it.
    rows: int
    #: Rows of the job so far.
    total_rows: int
    #: Rows of the part with anything bad.
    bad_rows: int
    #: Number of the part that comes next.
    next_part: int
    #: Cells of the job that are final by now: parts are run while others are sent.
    cells_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedCell(ApiMessage):
    """One cell without an answer."""

    #: Index of the row, from 0.
    row: int
    #: Name of the task.
    task: str
    #: Class of the error, such as ``too_long`` or ``bad_row``.
    error: str
    #: What happened, in words.
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedCells(ApiMessage):
    """A page of cells without an answer, by row; those of one row stay together."""

    #: The cells of the page.
    errors: tuple[FailedCell, ...]
    #: ``after`` of the next page; null behind the last one.
    next: int | None = None
    #: Index of the first row from which on all are kept: what an open job deleted before it is not told.
    first_row: int = 0


# -- a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass(JobPass):
    """A model pass that a submission would make, with estimates of its size."""

    #: What stands in front of its prompts, and so is shared: ``text`` or ``instruction``; "" where there are none.
    first: Literal["text", "instruction", ""] = ""
    #: The share of the rows, 0 to 1, that it will run on: where its condition reads fields alone, of the sampled rows;
    #: else of the newest job that ended with the same condition; 1 where that is not known.
    share: float = 1.0
    #: Tokens of all rows in this pass, after truncation.
    tokens: int = 0
    #: The same with padding, as a device computes them.
    computed_tokens: int = 0
    #: What a pass per task would read.
    unfused_tokens: int = 0
    #: Tokens that a language model writes at most.
    tokens_out: int = 0
    #: Pixels of the pictures that it sees, in the size in which its model reads them; 256 of them count for a token.
    pixels: int = 0
    #: Predicted seconds on the devices that are there now; null where there are none.
    seconds: float | None = None
    #: Predicted number of sub-tasks.
    subtasks: int | None = None

    @property
    def saved(self) -> float:
        """The share of tokens, 0 to 1, that a pass per task would read and this one does not."""
        return max(0.0, 1 - self.tokens / self.unfused_tokens) if self.unfused_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ApiMessage):
    """What a submission would run: a dry run's answer. Totals are estimated from a sample of the rows."""

    #: Rows of the whole.
    rows: int
    #: Always true: nothing here was counted in full.
    estimate: bool = True
    #: Task name -> the exact model that it would use, as ``name@version``.
    models: Mapping[str, str] = field(default_factory=dict)
    #: The passes, in the order in which they run.
    passes: tuple[PlannedPass, ...]
    #: Tokens of all passes.
    tokens: int = 0
    #: The same with padding, as devices compute them.
    computed_tokens: int = 0
    #: What the same tasks would read with a pass each.
    unfused_tokens: int = 0
    #: Tokens that language models write at most.
    tokens_out: int = 0
    #: Pixels of pictures, as of its passes.
    pixels: int = 0
    #: Predicted seconds of all passes, one after the other; null where no device is there.
    seconds: float | None = None
    #: Rows longer than a pass reads: cut and marked, or errors, as each task says.
    truncated_rows: int = 0
    #: Devices that are ready.
    devices: int = 0

    @property
    def tasks(self) -> int:
        """How many tasks the passes answer."""
        return sum(len(p.tasks) for p in self.passes)

    @property
    def record(self) -> Mapping[str, Any]:
        """The plan as the API gives it."""
        return self.to_json()

    def __str__(self) -> str:
        lines = [
            f"{count(self.tasks, 'task')} → {count(len(self.passes), 'pass', 'passes')}, {self.rows:,} rows"
        ]
        for p in self.passes:
            waits = f", behind {', '.join(p.needs)}" if p.needs else ""
            waits += f", on ~{p.share:.0%} of the rows" if p.share < 1 else ""
            lines.append(f"  {p.kind}: {', '.join(p.tasks)}{waits} (~{p.tokens:,} tokens)")
        lines.append(f"  ~{self.tokens:,} tokens in all; with a pass per task ~{self.unfused_tokens:,}")
        if self.tokens_out:
            lines.append(f"  at most {self.tokens_out:,} tokens written")
        if self.truncated_rows:
            lines.append(f"  ~{self.truncated_rows:,} rows are longer than a model reads")
        return "\n".join(lines)
