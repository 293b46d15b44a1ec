"""Uploads that go on while their rows are run: parts, sent again where an answer was lost, and the close."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from motet.errors import Conflict, NotFound, Problem
from motet.tasks import Task
from scheduler.store.database import StoreUnavailable
from tests.integration.landing import close, land, land_more
from tests.machine.stage import Broken, Crash, Stage

#: What befalls the process of the API that lands a part or closes.
UPLOAD_FAULTS = ("crash before", "crash after", "away before", "away after", "", "", "", "")


@dataclass
class Upload:
    """A job whose upload goes on, as its client knows it."""

    job: UUID
    block_rows: int
    parts: list[Sequence[str | Problem]] = field(default_factory=list)
    #: Its client asked for that.
    closing: bool = False

    @property
    def rows(self) -> int:
        return sum(map(len, self.parts))


class Uploads:
    """All uploads of a play."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.jobs: dict[UUID, Upload] = {}

    def begin(
        self, job: UUID, rows: Sequence[str | Problem], tasks: Mapping[str, Task], block_rows: int
    ) -> None:
        """Open a job, and land its first part."""
        land(self._stage.taps["machine"], rows, tasks, block_rows=block_rows, job_id=job, close=False)
        self.jobs[job] = Upload(job, block_rows, [rows])

    def more(self, api: str, job: UUID, rows: Sequence[str | Problem], fault: str = "") -> bool:
        """Land a further part, until it is known to have landed. False where the job takes none."""
        there = self.jobs[job]
        at = {"number": len(there.parts), "first_row": there.rows, "block_rows": there.block_rows}

        def send() -> bool:
            landed = land_more(self._stage.taps[api], job, rows, **at)
            if landed.total_rows != there.rows + len(rows):
                raise Broken(f"14: part {landed.part} ends at row {landed.total_rows} of job {job}")
            return True

        if self._until_told(api, send, fault):
            there.parts.append(rows)
            return True
        return False

    def again(self, api: str, job: UUID, i: int) -> None:
        """Send a part that has landed: it changes nothing."""
        there = self.jobs[job]
        number = i % len(there.parts)
        first_row = sum(map(len, there.parts[:number]))
        at = {"number": number, "first_row": first_row, "block_rows": there.block_rows}

        def send() -> bool:
            landed = land_more(self._stage.taps[api], job, there.parts[number], **at)
            if landed.total_rows != first_row + len(there.parts[number]):
                raise Broken(f"14: part {number} ends at row {landed.total_rows} of job {job}")
            return True

        self._until_told(api, send, "")

    def close(self, api: str, job: UUID, fault: str = "") -> None:
        """Close it, until it is known to be closed; harmless where it is, or has ended."""
        there = self.jobs[job]
        there.closing = True

        def send() -> bool:
            close(self._stage.taps[api], job, parts=len(there.parts), rows=there.rows)
            return True

        self._until_told(api, send, fault)

    def _until_told(self, api: str, send: Callable[[], bool], fault: str) -> bool:
        """Send it, and again where the answer was lost. False: it is refused, for the job has ended."""
        tap = self._stage.taps[api]
        tap.arm(0, fault)
        try:
            return send()
        except (Crash, StoreUnavailable):
            tap.arm()
            try:
                return send()
            except (Conflict, NotFound):
                return False
        except (Conflict, NotFound):
            return False
        finally:
            tap.arm()
