"""A feed: an open job as the client holds it. Rows are asked one by one, and each is answered in its own round trip.

The threads of a process share requests by Nagle's rule (RFC 896): a row goes out at once while fewer than ``REQUESTS``
requests are under way, else with all others that wait when one of them is answered, or half of it. Each row is told as
soon as it is answered, and none waits for the slowest of its request. Every row has a key of its own,
kept over retries, so that repeating is harmless; a bad row is refused alone. docs/live.md says what a feed is for.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import TracebackType
from typing import Any, TypeAlias

from motet import forks
from motet.errors import Gone, InvalidJob, Late, MotetError, Overloaded, Problem
from motet.folds import sent_fields, stored_folds
from motet.http import MAX_WAIT_S, BodyRefused, Http, error_told
from motet.job import Job
from motet.media.row_media import MediaOptions, RowMedia
from motet.messages.jobs import MAX_ASK_ROWS, JobRecord
from motet.protocol.envelope import BadMessage
from motet.protocol.values import kind_of, text_flaw
from motet.results import CURSORS_A_BLOCK, Block, Row, frames_in
from motet.row_stream import RowStream
from motet.rows import BadRows, CheckedRow, as_part, check_row
from motet.states import ENDED
from motet.tasks import dialogues_of, short, stored_task

#: Requests under way at most. Fewer: rows wait for the answers of others; more: each request carries fewer rows.
REQUESTS = 4
#: Requests beside these whose last rows are still to come. More: slow rows hold up fewer others; each costs a connection.
STRAGGLERS = 12
#: UTF-8 bytes of the rows of one request, where it has several: many proxies take a body of 1 MiB and no more.
_REQUEST_BYTES = 768 * 1024
#: Seconds that a caller waits beyond its own time for the server's word on what became of the row.
GRACE_S = 1.0
#: The longest time that a caller may give, in seconds, and the longest key, in characters: the server's limits.
_MOST_S, _MOST_KEY = 3600.0, 200

#: Blocks of a job are counted in 31 bits.
_MOST_CURSOR = 2**31 * CURSORS_A_BLOCK

#: What a row may be: a text, a mapping of field to value, or a list of messages where a Chat reads one.
AskedRow: TypeAlias = "str | Mapping[str, Any] | Sequence[Any]"


@dataclass(eq=False, slots=True)
class _Ask:
    """One row on its way."""

    row: CheckedRow
    key: str
    #: On the feed's clock: its caller gives up.
    until: float
    answer: Future[Row]
    #: It was in a request before, and is asked again.
    sent: bool = False


@dataclass(eq=False, slots=True)
class _Request:
    """Rows that were sent together, and what became of them."""

    asks: Sequence[_Ask]
    clock: Callable[[], float]
    #: Place -> those without an answer.
    open: dict[int, _Ask] = field(init=False)
    #: To be sent again, as soon as this is so on the feed's clock.
    again: list[_Ask] = field(default_factory=list)
    again_at: float = 0.0
    #: Its last rows are waited for, and another sender took this one's place.
    straggles: bool = False

    def __post_init__(self) -> None:
        self.open = dict(enumerate(self.asks))

    def ask_again(self, ask: _Ask, after_s: float) -> None:
        self.again.append(ask)
        self.again_at = max(self.again_at, self.clock() + after_s)

    def again_s(self) -> float:
        """Seconds until then."""
        return max(0.0, self.again_at - self.clock()) if self.again else 0.0


class Feed:
    """An open job: ``ask`` rows, follow all ``rows``, ``close`` it. Usable from several threads and in forked children.

    Leaving ``with`` waits for the rows that were put, and leaves the job open: another program may open it under the
    same name, and go on.
    """

    def __init__(
        self,
        http: Http,
        record: JobRecord,
        *,
        bad_rows: BadRows = "refuse",
        media: MediaOptions = MediaOptions(),  # noqa: B008 - it is frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = Job(http, record)
        self._http, self._bad_rows, self._clock = http, bad_rows, clock
        tasks = {name: stored_task(spec) for name, spec in record.tasks.items()}
        self._fields = sent_fields(tasks, stored_folds(record.folds))
        self._dialogues = dialogues_of(tasks)
        self._media_options, self._media = media, RowMedia(http, tasks, media, apart=False)
        self._most_bytes = _REQUEST_BYTES
        self.leave_to_parent()
        forks.forget_after_fork(self)

    def leave_to_parent(self) -> None:
        """Forget rows and threads of the process that this one was forked from: their answers come there."""
        self._waiting: deque[_Ask] = deque()
        #: Senders whose request is on its way, and those of which half is answered.
        self._senders = self._stragglers = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()

    # -- asking

    def ask(self, row: AskedRow, *, within_s: float = 30.0, key: str | None = None) -> Row:
        """The row's merged answers.

        ``key`` names the row for ever: asked again with it, here or elsewhere, the row is found and not done twice.
        Raises InvalidJob for a row that the tasks cannot read, Late where the answer is not there ``within_s`` seconds
        from now, Conflict where the key stands for another row or the job takes none, NotFound where it was removed,
        Overloaded and Unreachable where that lasts as long.
        """
        within_s = _seconds(within_s)
        answer = self.put(row, within_s=within_s, key=key)
        try:
            return answer.result(within_s + GRACE_S)
        except TimeoutError:
            raise late(stored=not answer.cancel()) from None
        except BaseException:
            # Of a caller that is interrupted nothing is sent any more.
            answer.cancel()
            raise

    def put(self, row: AskedRow, *, within_s: float = 30.0, key: str | None = None) -> Future[Row]:
        """As ``ask``, without waiting: the answer, or the error, comes by the future.

        Raises InvalidJob at once for a bad row; of a row with pictures, which are sent before it, also Overloaded,
        Unauthorized and Unreachable. A future that is cancelled before its row was sent takes it back.
        """
        checked = self._checked(row)
        within_s = _seconds(within_s)
        _check_key(key)
        ask = _Ask(checked, secrets.token_hex(16) if key is None else key, self._clock() + within_s, Future())
        with self._changed:
            if self._stop.is_set():
                raise MotetError("this feed was interrupted; open it again under its name")
            self._waiting.append(ask)
        self._send_more()
        return ask.answer

    def stream(
        self,
        row: AskedRow,
        *,
        task: str | None = None,
        within_s: float = 300.0,
        key: str | None = None,
        drop_late: bool = True,
    ) -> RowStream:
        """The row's text as it is written, by a language model's task, or by all of them.

        An iterator of ``TextDelta``; behind the last one its ``row`` is what ``ask`` returns, and the deltas together (from
        the last ``reset`` on, which is rare) are its text. Leaving it early gives the row up, and frees its device within a
        second; with ``drop_late=False`` the row goes on. Raises what ``ask`` raises.
        """
        checked = self._checked(row)
        within_s = _seconds(within_s)
        _check_key(key)
        specs = self.job.specs(None)
        if task is not None and task not in specs:
            raise InvalidJob(Problem("task", short(task), f"one of {', '.join(specs)}", "name another task"))
        told = {"key": secrets.token_hex(16) if key is None else key, "drop_late": drop_late}
        part = as_part([checked], self._fields)
        return RowStream(
            self._http,
            f"/v1/jobs/{self.job.id}/ask",
            lambda left_s: part.encode(squeeze=False, beside={**told, "within_s": min(_MOST_S, left_s)}),
            specs,
            [task] if task is not None else list(specs),
            within_s=within_s,
            clock=self._clock,
        )

    def holds_media(self, row: AskedRow) -> bool:
        """Whether a row holds pictures, which take a while to be read and sent."""
        return self._media.holds(row)

    def _checked(self, row: AskedRow) -> CheckedRow:
        """The row as it is sent, its pictures sent already. Raises InvalidJob for a bad one."""
        return check_row(
            self._media.row(row), self._fields, dialogues=self._dialogues, bad_rows=self._bad_rows
        )

    # -- following

    def rows(self, after: int = 0, *, skip_gone: bool = False) -> Iterator[Row]:
        """Every merged row of the job, whoever asked it, as it is done; it ends when the job does.

        ``after`` is the ``cursor`` of the last row that was seen: none comes twice, none is left out. Raises JobFailed
        behind the last row of a job that failed or was cancelled. A job keeps answered rows for ``keep_days``: raises
        Gone where rows behind ``after`` were deleted, and with ``skip_gone`` goes on with those that are kept;
        InvalidJob for a cursor that is none of this job.
        """
        for rows in self.groups(after, skip_gone=skip_gone):
            yield from rows

    def groups(self, after: int = 0, *, skip_gone: bool = False) -> Iterator[Sequence[Row]]:
        """As ``rows``, the rows that were done together at a time."""
        block_after, seen = _read_cursor(after)
        specs = self.job.specs(None)
        while True:
            frames, end = self.job.frames(None, "done", block_after, MAX_WAIT_S, skip_gone=skip_gone)
            for frame in frames:
                block = Block.from_wire(frame, specs)
                if seen and block.done != block_after + 1:
                    # Of the first block of all, whose rows were seen in part: the server takes 0 for the beginning.
                    if not skip_gone:
                        raise Gone(
                            f"job {self.job.id}: rows behind {after} are gone", int(end.get("first_row", 0))
                        )
                    seen = 0
                if seen > len(block):
                    raise _no_cursor(after)
                rows = list(block)[seen:]
                seen = 0
                if rows:
                    yield rows
            block_after = int(end["next"])
            if end["complete"] or (end["state"] in ENDED and not frames):
                break
        self.job.refresh().check()

    # -- the job

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def state(self) -> str:
        """``open`` while it takes rows; then as any job's."""
        return self.job.state

    def close(self) -> Job:
        """Take no more rows; the job succeeds when those it has are answered. Again is harmless. Returns the job."""
        record = JobRecord.of(self._http.post(f"/v1/jobs/{self.job.id}/close", {}))
        self.job = Job(self._http, record)
        return self.job

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.interrupt()
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._senders + self._stragglers)
        except BaseException:
            self.interrupt()
            raise

    def interrupt(self) -> None:
        """Take back the rows that wait, and send none again: requests under way are the last ones."""
        with self._changed:
            self._stop.set()
            waiting, self._waiting = self._waiting, deque()
        for ask in waiting:
            _gave_up(ask)

    def __reduce__(self) -> tuple[Callable[..., Feed], tuple[Http, JobRecord, BadRows, MediaOptions]]:
        return _unpickled, (self._http, JobRecord.of(self.job.record), self._bad_rows, self._media_options)

    def __repr__(self) -> str:
        return f"<Feed {self.job.name!r} {self.job.id}>"

    # -- a sender: a thread that lives while rows wait

    def _send_more(self) -> None:
        """Start a sender where rows wait and another request may be under way."""
        with self._changed:
            if not self._waiting or self._senders >= REQUESTS:
                return
            self._senders += 1
        try:
            # A daemon: a program that ends waits for no answer.
            threading.Thread(target=self._send, name="motet-feed", daemon=True).start()
        except BaseException:
            # No thread is left, or the caller was interrupted: the next row tries again.
            with self._changed:
                self._senders -= 1
            raise

    def _send(self) -> None:
        while asks := self._next():
            request = _Request(asks, self._clock)
            try:
                self._exchange(request)
            except BaseException as error:  # noqa: BLE001 - the callers wait in other threads: each is told
                for ask in asks:
                    _fail(ask, error)
            else:
                self._stop.wait(request.again_s())
                self._wait_again(request.again)
                if self._stop.is_set():
                    self.interrupt()
            if request.straggles:
                # Another sender took this one's place.
                with self._changed:
                    self._stragglers -= 1
                    self._changed.notify_all()
                self._send_more()
                return

    def _half_answered(self, request: _Request) -> None:
        """Half of a request is answered: the rows that wait need not wait for its slowest."""
        with self._changed:
            if self._stragglers >= STRAGGLERS:
                return
            request.straggles = True
            self._stragglers += 1
            self._senders -= 1
        self._send_more()

    def _next(self) -> list[_Ask]:
        """The rows of the next request; none: they are all sent, and this sender is no more."""
        expired: list[_Ask] = []
        asks: list[_Ask] = []
        with self._changed:
            keys: set[str] = set()
            size = 0
            now = self._clock()
            while self._waiting and len(asks) < MAX_ASK_ROWS:
                ask = self._waiting[0]
                # The same key twice in one request is refused: its second row goes with the next one.
                if asks and (ask.key in keys or size + ask.row.size > self._most_bytes):
                    break
                self._waiting.popleft()
                if not ask.sent and not ask.answer.set_running_or_notify_cancel():
                    continue
                ask.sent = True
                if ask.until <= now:
                    expired.append(ask)
                    continue
                asks.append(ask)
                keys.add(ask.key)
                size += ask.row.size
            if not asks:
                self._senders -= 1
                self._changed.notify_all()
        for ask in expired:
            _fail(ask, late(stored=False))
        return asks

    def _exchange(self, request: _Request) -> None:
        """Send the rows, and hand out the answers as they come."""
        asks = request.asks
        within_s = min(_MOST_S, max(ask.until for ask in asks) - self._clock())
        squeeze = not self._http.stays_here
        told = {"keys": [ask.key for ask in asks], "within_s": within_s}
        part = as_part([ask.row for ask in asks], self._fields)
        try:
            self._http.request(
                "POST",
                f"/v1/jobs/{self.job.id}/ask",
                content=part.encode(squeeze=squeeze, beside=told),
                headers={
                    "Content-Type": "application/msgpack",
                    "Content-Encoding": "zstd" if squeeze else "identity",
                    "Accept": "application/msgpack; order=done",
                },
                answer_s=within_s + GRACE_S,
                patience_s=within_s,
                stop=self._stop,
                read=lambda answer: self._read(request, answer.iter_bytes()),
            )
        except BodyRefused:
            if len(asks) == 1:
                raise
            # Half of it: so few bodies are refused before one fits.
            self._most_bytes = sum(ask.row.size for ask in asks) // 2
            request.again += asks
            return
        if request.open:
            answered = len(asks) - len(request.open)
            raise MotetError(f"job {self.job.id}: {answered:,} answers to {len(asks):,} rows")

    def _read(self, request: _Request, pieces: Iterable[bytes]) -> None:
        specs = self.job.specs(None)
        try:
            for number, frame in enumerate(frames_in(self._watched(request, pieces))):
                # A server that says nothing of the place answers in the order of the rows. What comes again after a lost
                # connection was handed out before.
                ask = request.open.pop(frame.get("ask", number), None)
                if ask is not None:
                    self._hand_out(request, ask, frame, specs)
        except (BadMessage, ValueError) as error:
            raise MotetError(f"job {self.job.id}: unreadable answers: {error}") from None

    def _watched(self, request: _Request, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            # By now all of it is handed out.
            if not request.straggles and request.open and 2 * len(request.open) <= len(request.asks):
                self._half_answered(request)

    def _hand_out(
        self, request: _Request, ask: _Ask, frame: Mapping[str, Any], specs: Mapping[str, Any]
    ) -> None:
        if "error" not in frame:
            ask.answer.set_result(Row(Block.from_wire(frame, specs), 0))
            return
        error = error_told(frame["error"])
        if isinstance(error, Overloaded) and self._clock() + error.retry_after_s < ask.until:
            request.ask_again(ask, error.retry_after_s)
        else:
            _fail(ask, error)

    def _wait_again(self, asks: Sequence[_Ask]) -> None:
        """They wait before all others, under their keys."""
        with self._changed:
            self._waiting.extendleft(reversed(asks))


def _seconds(within_s: object) -> float:
    """The time that a caller gives. Raises InvalidJob for one that is none."""
    # A number of numpy is one, and cannot be sent as it is.
    seconds = float(within_s) if not isinstance(within_s, bool) and isinstance(within_s, Real) else math.nan
    if not 0 < seconds <= _MOST_S:
        what = f"seconds, more than 0 and at most {_MOST_S:,.0f}"
        raise InvalidJob(Problem("within_s", short(within_s), what, "give it more time"))
    return seconds


def _check_key(key: object) -> None:
    if key is None:
        return
    if not isinstance(key, str):
        raise InvalidJob(Problem("key", kind_of(key), "text", "write it as text, such as str(key)"))
    if not 1 <= len(key) <= _MOST_KEY or text_flaw(key):
        got = text_flaw(key) or f"{len(key):,} characters"
        what = f"text of 1 to {_MOST_KEY} characters"
        raise InvalidJob(Problem("key", got, what, "take a digest of it"))


def _read_cursor(after: object) -> tuple[int, int]:
    """Finished blocks of which all rows were seen, and rows of the next one. Raises InvalidJob."""
    # An int of numpy, out of a table of rows, is one.
    cursor = int(after) if not isinstance(after, bool) and isinstance(after, Integral) else -1
    if not 0 <= cursor < _MOST_CURSOR:
        raise _no_cursor(after)
    return divmod(cursor, CURSORS_A_BLOCK)


def _no_cursor(after: object) -> InvalidJob:
    told = "the cursor of a row of this job, or 0"
    return InvalidJob(Problem("after", short(after), told, "leave it out to begin at the first row"))


def late(*, stored: bool) -> Late:
    if stored:
        return Late(
            "not answered in time: the row may go on; ask again with the same key for its answer", stored=True
        )
    return Late("not sent in time: nothing was stored, and nothing runs; ask again", stored=False)


def _fail(ask: _Ask, error: BaseException) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(error)


def _gave_up(ask: _Ask) -> None:
    """Its feed was interrupted before it could be sent, or sent again."""
    if not ask.answer.cancel():
        _fail(
            ask, MotetError("the feed was interrupted before this row was answered; ask again with its key")
        )


def _unpickled(http: Http, record: JobRecord, bad_rows: BadRows, media: MediaOptions) -> Feed:
    """A feed of the same job, in the process that unpickles one."""
    return Feed(http, record, bad_rows=bad_rows, media=media)
