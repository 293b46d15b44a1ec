"""How far a job is: the numbers (``Progress``), and a bar on a terminal (``Bar``) that is silent in a pipe."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING

from motet.states import ENDED, GROWING, State

if TYPE_CHECKING:
    import rich.progress

    from motet.messages.jobs import JobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A job's cells counted, as the API knew them at one moment."""

    #: open, loading, running, succeeded, failed or cancelled.
    state: str
    rows: int
    #: Cells: rows x tasks. The next three are final and add up to ``done``.
    total: int
    ok: int
    error: int
    skipped: int
    #: Cells of ``ok`` that were not computed but found from an earlier job.
    reused: int
    #: Rows per second, all tasks of a row together; None before there is anything to measure.
    rate: float | None
    #: Seconds that the rest will take, or None where that is not known.
    eta: float | None
    #: Of an open job: rows before this one are no longer kept.
    first_row: int = 0

    @property
    def done(self) -> int:
        """Cells that are final."""
        return self.ok + self.error + self.skipped

    @property
    def waiting(self) -> int:
        """Cells that are not final."""
        return self.total - self.done

    @property
    def grows(self) -> bool:
        """Whether rows keep coming, so that ``total`` grows and neither share nor time left mean anything."""
        return self.state in GROWING

    @property
    def share(self) -> float:
        """The finished share of the cells, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @classmethod
    def of(cls, job: JobRecord) -> Progress:
        """Read it from a job as the API describes it."""
        cells = job.cells
        return cls(
            state=job.state,
            rows=job.rows,
            total=cells.total,
            ok=cells.ok,
            error=cells.error,
            skipped=cells.skipped,
            reused=cells.reused,
            rate=_rate(job),
            eta=job.eta_s,
            first_row=job.first_row,
        )

    def __str__(self) -> str:
        if self.state == State.OPEN:
            # There is no whole of which a share could be told.
            words = [self.state, f"{self.rows:,} rows", f"{self.waiting:,} cells wait"]
            words += [f"kept from row {self.first_row:,} on"] if self.first_row else []
        elif self.grows:
            words = [self.state, f"{self.rows:,} rows so far", f"{self.done:,} of their {self.total:,} cells"]
        else:
            words = [self.state, f"{self.done:,} of {self.total:,} cells"]
        if self.reused:
            words.append(f"{self.reused:,} reused")
        if self.error:
            words.append(f"{self.error:,} errors")
        if self.skipped:
            words.append(f"{self.skipped:,} skipped")
        if self.rate:
            words.append(f"{self.rate:,.0f} rows/s" if self.rate >= 10 else f"{self.rate:.2g} rows/s")
        if self.eta is not None and self.state not in ENDED:
            words.append(f"{clock(self.eta)} left")
        return " · ".join(words)


def clock(seconds: float) -> str:
    """Seconds as people read them: ``0:07``, ``12:30``, ``3:05:00``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def instant(seconds: float | None) -> str:
    """The time of an answer: ``27 ms``, ``1.23 s``, ``42 s``; ``–`` where there was none."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"


def _rate(job: JobRecord) -> float | None:
    """Rows per second: of the whole run where it has ended, else what the API's estimate of the rest says.

    The clock here is never compared with the server's.
    """
    cells = job.cells
    open_cells = cells.total - cells.ok - cells.error - cells.skipped
    if job.state in ENDED:
        if not job.started or not job.finished:
            return None
        seconds = (_time(job.finished) - _time(job.started)).total_seconds()
        share = 1 - cells.skipped / cells.total if cells.total else 0.0
        return job.rows * share / seconds if seconds > 0 else None
    return job.rows * open_cells / cells.total / job.eta_s if job.eta_s and cells.total else None


def _time(iso: str) -> datetime:
    return datetime.fromisoformat(iso)


class Bar:
    """A progress bar on stderr where that is a terminal, and nothing at all elsewhere.

    ``wanted`` None decides by the terminal. It can be hidden and shown again, so that it never stands among
    the lines that a caller prints.
    """

    def __init__(self, title: str, *, wanted: bool | None = None) -> None:
        self.title = title
        self.wanted = _on_a_terminal() if wanted is None else wanted
        self._bar: rich.progress.Progress | None = None
        self._line: rich.progress.TaskID | None = None

    def show(self, words: object, *, share: float | None = None) -> None:
        """Draw or redraw: ``share`` done of 1, or None where the end is not known."""
        if not self.wanted:
            return
        total, completed = (None, 0.0) if share is None else (1.0, share)
        if self._bar is None or self._line is None:
            self._bar = _bar()
            self._line = self._bar.add_task(self.title, total=total, completed=completed, words=str(words))  # type: ignore[arg-type]
            self._bar.start()
        self._bar.update(self._line, total=total, completed=completed, words=str(words))

    def track(self, progress: Progress) -> None:
        """Draw how far a job is; before its first cell there is no share that could be told."""
        if progress.state == State.RUNNING and not progress.done:
            self.show(f"starting: workers load the model · {progress.total:,} cells")
        else:
            words = str(progress).removeprefix("running · ")
            self.show(words, share=None if progress.grows else progress.share)

    def hide(self) -> None:
        """Take it off the screen until it is shown again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._line = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _bar() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30 if console.width >= 100 else 12),
        TextColumn("{task.fields[words]}", markup=False),
        console=console,
        transient=True,
        # It is hidden before a caller prints, so nobody's stdout needs to be caught.
        redirect_stdout=False,
        redirect_stderr=False,
        refresh_per_second=8,
    )
