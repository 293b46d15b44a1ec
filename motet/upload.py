"""The parts of a job on their way: sent in order, one in flight, in smaller ones where a proxy takes no large bodies.

Parts are cut by motet.rows, always in the same way. What a proxy before the API takes is known once it has refused a
body. From then on parts go in pieces of whole blocks, so that stored columns are still found for reuse; a block goes in
pieces only where it is too large itself. Parts are numbered as they are sent, so an upload that broke off goes on behind
the parts and rows that the server has, however they were cut. The server runs what it has while the rest is sent.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain

from motet.errors import InvalidJob, MotetError, Problem
from motet.http import BodyRefused, Http, json_of
from motet.job import Job
from motet.media.row_media import RowMedia
from motet.messages.jobs import Closing, JobRecord, PartLanded, Submission
from motet.progress import Bar
from motet.protocol.values import byte_lengths
from motet.protocol.wire import marks_between
from motet.rows import BLOCK_BYTES, BLOCK_ROWS, Part
from motet.states import State

log = logging.getLogger(__name__)

#: Seconds between two looks at whether a part was refused, while another part is waited for.
_GLANCE_S = 0.25
#: Seconds for the first part beyond which a source is slow. Longer: first results of slow sources come later. Shorter:
#: small jobs take three requests on a busy machine, and not one.
_SLOW_S = 1.0


def submit_parts(
    http: Http,
    opening: Submission,
    parts: Iterator[Part],
    media: RowMedia,
    *,
    prompted: bool,
    key: str,
    resumable: bool,
    progress: bool | None,
    opened: Callable[[Job], object] | None,
) -> Job:
    """Open a job and send all of its parts; what ``Client.submit`` does once it knows what to read.

    ``prompted``: a task of it has a prompt. ``resumable``: its caller knows the key. The others are as there.
    """
    process = os.getpid()
    # Two parts are cut before anything is sent: a small job is one request, and a source that cannot be
    # read, or is bad from its start, never reaches the server. A slow source is not waited for: its first rows can
    # be run while it is read.
    began = time.monotonic()
    first = next(parts, None)
    slow = time.monotonic() - began > _SLOW_S
    if first is None:
        raise InvalidJob(Problem("rows", "no rows", "at least one row", "check the source"))
    if prompted:
        # So that what stands in front of a prompt, text or instruction, can be chosen before the rows are there.
        opening = replace(opening, mean_bytes=first.mean_bytes())
    second = None if slow else next(parts, None)
    bar = Bar("sending", wanted=progress)
    whole = second is None and not slow and not first.bad and not first.bad_fields and first.is_json
    tell = partial(_tell, bar)
    with bar:
        try:
            inline = replace(opening, rows=tuple(first.rows())) if whole else opening
            record = open_job(http, inline, key, tell)
        except BodyRefused:
            if not whole:
                raise
            # The rows do not fit beside the tasks: they are sent as those of a large job.
            record = open_job(http, opening, key, tell)
    job = Job(http, record, progress=progress)
    if record.state == State.LOADING:
        try:
            if opened is not None:
                opened(job)
            media.begin()
            total = chain([first] if second is None else [first, second], parts)
            record = send_parts(http, record, total, bar, tell, media)
        except BaseException as error:
            # Only a caller who gave the key can come back to go on. The job of a child that was forked by the
            # source, and leaves through here, is its parent's.
            if os.getpid() == process and (not resumable or isinstance(error, InvalidJob)):
                # Best effort: an abandoned upload also ends by itself.
                with suppress(MotetError):
                    job.delete()
            raise
    elif opened is not None:
        opened(job)
    return Job(http, record, progress=progress, media=media.figures)


def open_job(http: Http, opening: Submission, key: str, tell: Callable[[MotetError], object]) -> JobRecord:
    """Open a job, or find the one of this key. ``tell`` hears what is waited for."""
    return JobRecord.of(http.post("/v1/jobs", opening.to_json(sparse=True), key=key, refused=tell))


def send_parts(
    http: Http,
    job: JobRecord,
    parts: Iterator[Part],
    bar: Bar,
    tell: Callable[[MotetError], object],
    media: RowMedia,
) -> JobRecord:
    """Send the parts, each while the next is cut and packed; close the job; return its record.

    ``job`` is its record: of one that holds rows, these are cut again, not sent again. ``tell`` hears, in the caller's
    thread, what is waited for, and once that smaller parts are sent. ``media``: of a part's rows those are stored first.
    """
    there = job.rows
    rows = 0
    stop = threading.Event()
    in_flight: Future[None] | None = None
    news: list[MotetError] = []
    sender = _Sender(http, job.id, job.parts, stop, news.append)
    thread = ThreadPoolExecutor(1, thread_name_prefix="motet-upload")

    def landed() -> None:
        """Wait for the part in flight, and say here, where the bar is drawn, what it waits for."""
        while in_flight is not None and not wait((in_flight,), _GLANCE_S).done:
            while news:
                tell(news.pop(0))
        if in_flight is not None:
            in_flight.result()
        while news:
            tell(news.pop(0))

    try:
        with bar:
            for part in parts:
                rows = part.first_row + len(part)
                if rows > there:
                    rest = rows_of(part, max(0, there - part.first_row), len(part))
                    packed = sender.pack(rest)
                    media.flush(tell)
                    landed()
                    in_flight = thread.submit(sender.send, rest, *packed)
                bar.show(_so_far(rows, sender.cells_done, str(media)))
            landed()
            sent = Closing(parts=sender.number, rows=rows)
            return JobRecord.of(http.post(f"/v1/jobs/{job.id}/close", sent.to_json()))
    except Exception:
        # So that a part that is under way does not land behind the back of the next submission with this key.
        stop.set()
        thread.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        stop.set()
        thread.shutdown(wait=False, cancel_futures=True)


class _Sender:
    """Sends parts, one after the other, and learns how large a body may be."""

    def __init__(
        self, http: Http, job: str, number: int, stop: threading.Event, tell: Callable[[MotetError], object]
    ) -> None:
        self._http, self._job, self._stop, self._tell = http, job, stop, tell
        #: The number of the next part, and so how many there are.
        self.number = number
        #: Cells that were final when the last part had landed.
        self.cells_done = 0
        #: Larger bodies are not tried any more; None before one was refused.
        self._most_bytes: int | None = None
        self._squeeze = not http.stays_here

    def pack(self, part: Part) -> tuple[bytes, bool]:
        """The body of a part, in the form that is sent now, and whether it is compressed."""
        # Asked once: the part before may be refused, and so the form change, while this one is packed.
        squeeze = self._squeeze
        return part.encode(squeeze=squeeze), squeeze

    def send(self, part: Part, body: bytes, squeezed: bool) -> None:
        """Send a part whole, or else in pieces. Raises BodyRefused where a row alone is too large, and as a request."""
        while self._most_bytes is None or len(body) <= self._most_bytes or len(part) == 1:
            try:
                self._put(body, squeezed)
            except BodyRefused as refusal:
                if squeezed and len(part) == 1:
                    raise
                if self._most_bytes is None:
                    self._tell(refusal)
                # Half of it: so few bodies are refused before one fits.
                self._most_bytes = min(len(body) // 2, self._most_bytes or len(body))
                if not squeezed:
                    self._squeeze = True
                    body, squeezed = self.pack(part)
            else:
                return
        middle = _middle(part)
        for piece in (rows_of(part, 0, middle), rows_of(part, middle, len(part))):
            if not self._stop.is_set():
                self.send(piece, *self.pack(piece))

    def _put(self, body: bytes, squeezed: bool) -> None:
        """Send a part, again where an answer was lost: the same bytes under the same number are harmless."""
        answer = self._http.request(
            "PUT",
            f"/v1/jobs/{self._job}/parts/{self.number}",
            content=body,
            headers={
                "Content-Type": "application/msgpack",
                "Content-Encoding": "zstd" if squeezed else "identity",
            },
            stop=self._stop,
            refused=self._tell,
        )
        landed = PartLanded.of(json_of(answer))
        self.number, self.cells_done = landed.next_part, landed.cells_done


def _so_far(rows: int, cells_done: int, media: str) -> str:
    """Rows read, their media, and what the server has done meanwhile with those that it has."""
    done = f"{cells_done:,} cells done" if cells_done else ""
    return " · ".join(filter(None, (f"{rows:,} rows", media, done)))


def rows_of(part: Part, lo: int, hi: int) -> Part:
    """Rows [lo, hi) of a part, as a part."""
    if (lo, hi) == (0, len(part)):
        return part
    columns = {name: values[lo:hi] for name, values in part.columns.items()}
    return Part(
        number=part.number,
        first_row=part.first_row + lo,
        columns=columns,
        bad=marks_between(part.bad, lo, hi),
        bad_fields={
            name: here for name, bad in part.bad_fields.items() if (here := marks_between(bad, lo, hi))
        },
        text_bytes=sum(sum(byte_lengths(values)) for values in columns.values()),
    )


def _middle(part: Part) -> int:
    """Where a part of several rows is cut in two: between its blocks, or within its only one."""
    ends = _block_ends(part)
    return ends[len(ends) // 2 - 1] if len(ends) > 1 else len(part) // 2


def _block_ends(part: Part) -> list[int]:
    """The offset behind each block of a part, as the server cuts them (scheduler.blocks)."""
    sizes = list(map(sum, zip(*map(byte_lengths, part.columns.values()), strict=True)))
    ends: list[int] = []
    first = held = 0
    for offset, size in enumerate(sizes):
        if offset > first and (offset - first == BLOCK_ROWS or held + size > BLOCK_BYTES):
            ends.append(offset)
            first, held = offset, 0
        held += size
    return [*ends, len(part)]


def _tell(bar: Bar, refusal: MotetError) -> None:
    """Say what is waited for: on the bar, which has room for the reason alone, else in the log.

    That smaller parts are sent is said in the log even beside a bar: somebody should mend it.
    """
    if isinstance(refusal, BodyRefused):
        bar.hide()
        log.warning("rows are sent in smaller parts, which takes more requests: %s", refusal)
    elif bar.wanted:
        bar.show(f"waiting: {str(refusal).partition(';')[0]}")
    else:
        log.warning("waiting to send rows: %s", refusal)
