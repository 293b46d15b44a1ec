"""A job on the server, as the client holds it: watch it, stream its merged rows, export them, end it.

A ``Job`` is a handle: the job outlives it, and ``client.job(id)`` makes another one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from motet.errors import JobFailed, MotetError, NotFound, SetupError
from motet.http import MAX_WAIT_S, Http
from motet.messages.jobs import FailedCell, FailedCells, JobRecord, PlannedPass
from motet.progress import Bar, Progress
from motet.protocol.envelope import BadMessage
from motet.results import Block, Row, read_frames
from motet.states import ENDED, ENDED_EARLY
from motet.tasks import short

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from motet.evaluation import Evaluation
    from motet.evaluation.further import Costs
    from motet.media.row_media import MediaFigures
    from motet.messages.explanation import Explanation
    from motet.sources import Source

log = logging.getLogger(__name__)

Order = Literal["row", "done"]

#: A bar is redrawn about this often, and a job's record is read no oftener.
_GLANCE_S = 0.5
#: Errors asked for in one request.
_PAGE = 1000
#: A torn answer is asked for this many times before the server is taken for another program.
_READS = 3


class Job:
    """One job. Properties that can change ask the server while the job runs, and no more once it has ended."""

    def __init__(
        self,
        http: Http,
        record: JobRecord,
        *,
        progress: bool | None = None,
        media: MediaFigures | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._http = http
        #: Of the upload that this handle comes from: pictures and their bytes; None where there was none.
        self.media = media
        self._record = record
        self._bar_wanted = progress
        self._clock, self._sleep = clock, sleep

    # -- what it is

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task name -> its spec, with the exact model (``model_ref``) and labels that it uses."""
        return {name: dict(spec) for name, spec in self._record.tasks.items()}

    def specs(self, tasks: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
        """The specs of these tasks, or of all. Raises NotFound for a task that the job does not have."""
        if isinstance(tasks, str):
            raise TypeError(f"got tasks={tasks!r}; expected a list of task names, such as [{tasks!r}]")
        known = self._record.tasks
        for name in tasks or ():
            if name not in known:
                raise NotFound(f"job {self.id} has no task {name!r}; it has {', '.join(known)}")
        return {name: known[name] for name in (known if tasks is None else tasks)}

    @property
    def rows(self) -> int:
        """Rows of the job; while it loads, those that have arrived."""
        return self._record.rows

    @property
    def passes(self) -> tuple[PlannedPass, ...]:
        """The model passes that answer its tasks: which of them were fused."""
        return tuple(
            PlannedPass(**{f.name: getattr(p, f.name) for f in fields(p)}) for p in self._record.passes
        )

    @property
    def record(self) -> dict[str, Any]:
        """The job as the API last described it (docs/http.md)."""
        return self._record.to_json()

    def bar(self) -> Bar:
        """A progress bar under the job's name, silent where none is wanted."""
        return Bar(short(self.name, 20).strip("'") if self.name else "job", wanted=self._bar_wanted)

    # -- how far it is

    @property
    def state(self) -> str:
        """``open``, ``loading``, ``running``, ``succeeded``, ``failed`` or ``cancelled``."""
        return self.refresh()._record.state

    @property
    def progress(self) -> Progress:
        """Its cells counted, with the rate and the seconds left."""
        return Progress.of(self.refresh()._record)

    @property
    def partial(self) -> bool:
        """True for a succeeded job some of whose cells are errors or skipped."""
        return self.refresh()._record.partial

    @property
    def reason(self) -> str:
        """Why it failed or was cancelled; "" otherwise."""
        return self.refresh()._record.reason

    @property
    def usage(self) -> dict[str, Any]:
        """Real and computed tokens, seconds of devices, sub-tasks and lost attempts, so far."""
        return self.refresh()._record.usage.to_json()

    def refresh(self) -> Job:
        """Ask the server how the job stands, unless it has ended. Returns itself."""
        if not self._ended:
            self._record = JobRecord.of(self._http.get(self._path))
        return self

    def watch(self, timeout: float | None = None) -> Iterator[Progress]:
        """Yield how the job stands now, and again each time that has changed, until it has ended.

        Raises TimeoutError after ``timeout`` seconds, while the job goes on.
        """
        end = None if timeout is None else self._clock() + timeout
        yield Progress.of(self.refresh()._record)
        while not self._ended:
            left_s = MAX_WAIT_S if end is None else end - self._clock()
            if left_s <= 0:
                raise TimeoutError(f"job {self.id} goes on after {timeout:g} s; wait again to pick it up")
            self._next_version(min(left_s, MAX_WAIT_S))
            yield Progress.of(self._record)

    def wait(self, check: bool = True, timeout: float | None = None) -> Job:
        """Wait until the job has ended and return it. A bar shows the way on a terminal.

        Raises JobFailed where it failed or was cancelled, unless ``check`` is off; TimeoutError after
        ``timeout`` seconds, while the job goes on. Ctrl-C leaves the job running too.
        """
        with self.bar() as bar, self._left_running():
            for progress in self.watch(timeout):
                bar.track(progress)
        if check:
            self.check()
        return self

    def check(self) -> None:
        """Raises JobFailed where it is known here that the job failed or was cancelled."""
        if self._record.state in ENDED_EARLY:
            reason = self._record.reason or "no reason was given"
            raise JobFailed(self.id, f"{self._record.state}: {reason}")

    # -- what it found

    def results(
        self, tasks: Sequence[str] | None = None, order: Order = "row", *, check: bool = True
    ) -> Iterator[Row]:
        """Stream the merged rows while the job is sent and runs, and to its end; all ``tasks``, or those named.

        ``order="row"`` gives them by index, ``"done"`` as blocks of them are finished. Raises JobFailed
        behind the last row of a job that failed or was cancelled, unless ``check`` is off.
        """
        for block in self.blocks(tasks, order, check=check):
            yield from block

    def blocks(
        self,
        tasks: Sequence[str] | None = None,
        order: Order = "row",
        *,
        check: bool = True,
        bar: Bar | None = None,
    ) -> Iterator[Block]:
        """As ``results``, a block of contiguous rows at a time, in the typed arrays that they came in.

        A lost connection resumes at the block that is wanted next: none comes twice, none is left out. Raises
        MotetError where the server calls the rows complete before all of them have come.
        """
        specs = self.specs(tasks)
        asked = None if tasks is None else ",".join(tasks)
        after = rows = 0
        own_bar = self.bar() if bar is None else bar
        with own_bar, self._left_running():
            while True:
                frames, end = self.frames(asked, order, after, _GLANCE_S if own_bar.wanted else MAX_WAIT_S)
                for frame in frames:
                    block = Block.from_wire(frame, specs)
                    if bar is None:
                        own_bar.hide()
                    rows += len(block)
                    yield block
                after = int(end["next"])
                if end["complete"] or (end["state"] in ENDED and not frames):
                    break
                if own_bar.wanted:
                    progress = Progress.of(self.refresh()._record)
                    # Rows of an ended job come at once: a bar between them would only flicker.
                    if bar is not None or not self._ended:
                        own_bar.track(progress)
        if end.get("job"):
            self._record = JobRecord.of(end["job"])
        else:
            self.refresh()
        kept = self.rows - self._record.first_row
        if not kept <= rows <= self.rows and self._record.state not in ENDED_EARLY:
            raise MotetError(
                f"job {self.id}: the server sent {rows:,} of its {self.rows:,} rows and called them all; "
                "read them again, and if they stay away, look into the server's log"
            )
        if check:
            self.check()

    def frames(
        self, tasks: str | None, order: Order, after: int, wait_s: float, *, skip_gone: bool = False
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
        """One answer of results, as it was sent: the blocks that are ready, and the frame that ends it.

        Logs where the rows begin, when they are asked for from the first one and that is gone. Raises Gone where those
        behind ``after`` are, unless these are skipped.
        """
        params: dict[str, Any] = {"order": order, "after": after}
        params |= {"tasks": tasks} if tasks is not None else {}
        params |= {"skip_gone": "true"} if skip_gone else {}
        for attempt in range(_READS):
            answer = self._http.request(
                "GET",
                f"{self._path}/results",
                params=params,
                headers={"Accept": "application/msgpack"},
                wait_s=wait_s,
            )
            try:
                *frames, end = read_frames(answer.content)
                if not end.get("end"):
                    raise BadMessage("a results stream without its last frame")
            except (BadMessage, ValueError) as error:
                # A server that dies while it streams ends its answer early; a proxy may hide that.
                if attempt == _READS - 1:
                    raise MotetError(f"job {self.id}: unreadable results: {error}") from None
                self._sleep(_GLANCE_S)
            else:
                if end.get("first_row") and not after:
                    begins = end["first_row"]
                    log.warning("job %s: rows before row %s were deleted; it begins there", self.id, begins)
                return frames, end
        raise AssertionError("the last read returns or raises")

    @contextmanager
    def reading(self, tasks: Sequence[str] | None = None) -> Iterator[Iterator[Block]]:
        """The job's blocks with one bar over all of them: nothing else is printed meanwhile."""
        with Bar("reading", wanted=self._bar_wanted) as bar:
            yield self.blocks(tasks, bar=bar)

    def errors(self) -> Iterator[FailedCell]:
        """The cells that have no answer so far, by row: errors, and those skipped for another's error."""
        after: int | None = None
        while True:
            page = FailedCells.of(self._http.get(f"{self._path}/errors", limit=_PAGE, after=after))
            yield from page.errors
            after = page.next
            if after is None:
                return

    def activity(self, timeline: int | None = 500) -> Mapping[str, Any]:
        """What happens in it as of one moment: passes, devices, the newest ``timeline`` sub-tasks in time (None: all),
        throughput, errors by class; docs/http.md names every field. Times are seconds since it was created.
        ``left_out`` counts what is not told.
        """
        found: dict[str, Any] = self._http.get(f"{self._path}/activity", timeline=timeline or 0)
        self._record = JobRecord.of(found["job"])
        if timeline is None:
            found["timeline"] = list(self._subtasks())
            found["left_out"]["timeline"] = 0
        return found

    def _subtasks(self) -> Iterator[Mapping[str, Any]]:
        after: int | None = 0
        while after is not None:
            page = self._http.get(f"{self._path}/subtasks", limit=_PAGE, after=after)
            yield from page["subtasks"]
            after = page["next"]

    def explain(self) -> Explanation:
        """Why it waits: behind whom, for which model to load, which workers cannot run it; and when it will be done
        (p50 and p90). ``str`` of it is the answer in words.
        """
        from motet.messages.explanation import Explanation

        return Explanation.of(self._http.get(f"{self._path}/explain"))

    # -- how good it is

    def evaluate(
        self,
        labels: Source,
        tasks: Mapping[str, str] | Sequence[str] | None = None,
        *,
        index: str | None = None,
        as_labels: Collection[str] = (),
        as_text: Collection[str] = (),
        positive: str | None = None,
        top: float | Sequence[float] = (),
        at: int | Sequence[int] = (),
        costs: Costs | None = None,
        threshold: float = 0.5,
        group: str | None = None,
    ) -> Evaluation:
        """Wait for the job and compare its cells with labels: ``job.evaluate("test.jsonl").tasks["topic"].accuracy``.

        ``labels`` is whatever ``submit`` reads: a row for each row of the job, in order, or some rows that name
        theirs, from 0, in the field ``index``. A task's labels stand in the field of its name, or in the one that
        ``tasks`` names (``{"topic": "true_topic"}``); tasks without such a field are left out. A row whose label is
        null is left out; a cell without an answer is wrong. What a language model wrote is taken for labels, or for
        text, where ``as_labels`` or ``as_text`` names its task, else as docs/evaluate.md says. A task may be followed
        by the path to a part of its JSON answers: ``{"risk.score": "bad"}``.

        ``positive`` is the label whose score is ranked for ROC AUC and average precision, ``top`` the shares in per
        cent of the rows whose precision and recall are asked for, ``at`` the lengths of lists of ids for HR@k and
        NDCG@k, ``costs`` what a row costs, as ``{"FN": 5, "FP": 1}`` (of numbers, with ``threshold``) or as
        ``{true label: {answer: cost}}``. Rows with the same value in the field ``group`` of the labels are resampled
        together.

        Raises InvalidJob for labels that do not fit, NotFound for a task that the job does not have, SetupError
        without numpy, JobFailed as ``results`` does.
        """
        if importlib.util.find_spec("numpy") is None:
            raise SetupError("an evaluation needs numpy; pip install 'motet[evaluate]'")
        from motet.evaluation.evaluation import evaluate

        return evaluate(
            self,
            labels,
            tasks,
            index=index,
            as_labels=as_labels,
            as_text=as_text,
            positive=positive,
            top=top,
            at=at,
            costs=costs,
            threshold=threshold,
            group=group,
        )

    # -- taking it away

    def to_arrow(self, tasks: Sequence[str] | None = None) -> pyarrow.Table:
        """Wait for the job and return its rows as an Arrow table; motet.export names the columns.

        Raises SetupError without pyarrow, JobFailed as ``results`` does.
        """
        from motet import export

        specs = self.specs(tasks)
        with self.reading(tasks) as blocks:
            return export.to_arrow(blocks, specs)

    def to_pandas(self, tasks: Sequence[str] | None = None) -> pandas.DataFrame:
        """As ``to_arrow``, as a DataFrame whose index is the row. Raises SetupError without pandas."""
        from motet import export

        specs = self.specs(tasks)
        with self.reading(tasks) as blocks:
            return export.to_pandas(blocks, specs)

    def to_parquet(self, path: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> int:
        """Write the rows as Parquet while they come, in flat memory; return how many there are.

        The file appears under its name when it is whole.
        """
        from motet import export

        specs = self.specs(tasks)
        with self.reading(tasks) as blocks:
            return export.to_parquet(blocks, specs, path)

    def to_jsonl(self, path: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> int:
        """Write a JSON object per row, with the names of ``to_arrow``; return how many there are.

        The file appears under its name when it is whole.
        """
        from motet import export

        with self.reading(tasks) as blocks:
            return export.to_jsonl(blocks, path)

    def to_csv(self, path: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> int:
        """Write a table for spreadsheets: no text in it can act as a formula; return how many rows there are."""
        from motet import export

        with self.reading(tasks) as blocks:
            return export.to_csv(blocks, path)

    # -- ending it

    def cancel(self) -> Job:
        """End the job; cells that are done stay. Harmless where it has ended. Returns itself."""
        self._record = JobRecord.of(self._http.post(f"{self._path}/cancel"))
        return self

    def delete(self) -> None:
        """Remove the job and its results from the server, cancelling it first."""
        self._http.request("DELETE", self._path)

    def __repr__(self) -> str:
        return f"<Job {self.id} {Progress.of(self._record)}>"

    # -- inside

    @property
    def _path(self) -> str:
        return f"/v1/jobs/{self.id}"

    @property
    def _ended(self) -> bool:
        return self._record.state in ENDED

    def _next_version(self, wait_s: float) -> None:
        """Wait until the job differs from what is known here, but never ask again within a glance."""
        start = self._clock()
        now = self._http.get(self._path, wait_s=wait_s, version=self._record.version)
        self._record = JobRecord.of(now)
        if not self._ended:
            self._sleep(max(0.0, min(_GLANCE_S, wait_s) - (self._clock() - start)))

    @contextmanager
    def _left_running(self) -> Iterator[None]:
        """Say on Ctrl-C that the job goes on, and how to pick it up."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._ended:
                print(f"job {self.id} goes on; pick it up with: motet watch {self.id}", file=sys.stderr)
            raise
