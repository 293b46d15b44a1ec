"""One worker process: `python -m workers.run.app NAME --device cpu|cuda`, started by the launcher, one per device.

Celery's threads take messages and wait; the executor's one thread owns the device. What Celery may do here is
little: it delivers an id. Leases in Postgres own redelivery, and nothing is returned through it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from motet.errors import SetupError
from motet.protocol import traces
from motet.protocol.envelope import BadMessage
from motet.protocol.logs import configure, event
from motet.protocol.manifest import decode_slots
from motet.protocol.settings import Settings, cache_folder
from motet.protocol.transport import (
    ENTRY_POINT,
    RedisWorkerTransport,
    TransportLost,
    WorkerTransport,
    queue_name,
)
from motet.protocol.wire import Assignment, Beat
from workers.engines import InstalledEngines
from workers.launch.pulse import Pulse
from workers.run.attempts import Attempts, Key
from workers.run.beat import Heart, Watchdog
from workers.run.blobs import BlobCache, HttpBlobs
from workers.run.device import Device, probe, use_threads
from workers.run.executor import Executor
from workers.run.media import HttpMedia, Media
from workers.run.reporter import Reporter
from workers.run.sayer import Sayer
from workers.run.work import Work

if TYPE_CHECKING:
    from celery import Celery

#: By name: this module runs as __main__.
log = logging.getLogger("workers.run.app")

#: Celery threads, and as many more as a language model writes answers at once: waiting ones are free. The dispatcher
#: sends at most three bulk sub-tasks, ten where a language model answers, and twice three of the lane, or of a language
#: model's lane one for each such answer.
THREADS = 16
#: Threads that tokenise; a GPU is hungrier than a CPU slot, which has only its own core.
PREPARING = {"cpu": 1, "cuda": 4}
#: How long a payload is asked for while Redis is away. Afterwards its lease has ended anyway.
FETCH_S = 30.0
RETRY_S = 0.25
#: Longest that one read of the queue waits for a message (kombu's BRPOP: one second).
QUEUE_READ_S = 1.2
#: Seconds for which events for Flower are gathered. Longer: its pages lag; shorter: each costs a message of its own.
EVENTS_S = 0.5
#: Events that are sent before that, three a sub-task. Fewer: threads that take work send them in between.
EVENTS_KEPT = 1000

#: Added to the score by which the kernel chooses whom to end when memory is out; 1000 is the most.
OOM_SCORE = 500

#: Why a worker ended, for its launcher's log. 0 is a drained worker.
EXIT_SETUP, EXIT_DEVICE, EXIT_STUCK, EXIT_FAULT, EXIT_ORPHAN = 2, 71, 72, 73, 74


class WorkerApp:
    """Everything of a worker process but Celery."""

    def __init__(
        self,
        name: str,
        boot: str,
        settings: Settings,
        device: Device,
        transport: WorkerTransport,
        *,
        end_celery: Callable[[], None],
        parent: int = 0,
        pulse: Callable[[int], None] = lambda silence_s: None,
        exit_now: Callable[[int], None] = os._exit,
    ) -> None:
        """``boot``: random per process. ``end_celery``: makes `serve` return, once no thread of Celery's works.
        ``pulse``: tells the launcher that this process runs, and how long it may be silent from now."""
        self.name, self.boot = name, boot
        self.attempts = Attempts()
        #: Whether messages are taken from the queue.
        self.tap_open = True
        self._transport, self._end_celery, self._exit = transport, end_celery, exit_now
        self._device = device
        self._grace_s, self._beat_s = settings.grace_s, settings.beat_s
        self._reporter = Reporter(transport, self.attempts)
        self._sayer = Sayer(transport)
        #: By whether it is for interactive rows: they must not wait for a whole bulk sub-task to be tokenised.
        self._pools = {
            True: ThreadPoolExecutor(1, thread_name_prefix="prepare-interactive"),
            False: ThreadPoolExecutor(PREPARING[device.kind], thread_name_prefix="prepare"),
        }
        self._engines = engines = InstalledEngines()
        self._executor = Executor(
            worker=name,
            boot=self.boot,
            device=device,
            engines=engines,
            files=BlobCache(
                cache_folder(settings.cache_dir),
                HttpBlobs(settings.url, settings.token),
                limit_mb=settings.cache_mb,
            ),
            transport=transport,
            attempts=self.attempts,
            reporter=self._reporter,
            budget_mb=int(settings.memory_share * device.memory_mb) // device.gpus,
            lane_share=settings.lane_share,
            broken=lambda: exit_now(EXIT_DEVICE),
            spawn=lambda job, interactive: self._pools[interactive].submit(self._must_run, job),
            sayer=self._sayer,
            media=Media(HttpMedia(settings.url, settings.token)),
            pulse=pulse,
        )
        self._heart = Heart(
            worker=name,
            boot=self.boot,
            device=device,
            engines=engines.names(),
            # Of one device it makes no difference, and importing all of them takes seconds.
            spreads=engines.spreading() if device.gpus > 1 else (),
            transport=transport,
            attempts=self.attempts,
            executor=self._executor,
            consume=self._turn_tap,
        )
        self._watchdog = Watchdog(
            self._executor,
            stuck=lambda: exit_now(EXIT_STUCK),
            orphaned=lambda: exit_now(EXIT_ORPHAN),
            parent=parent,
            pulse=pulse,
        )
        self._stopped = threading.Event()
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads. From here on the scheduler knows this worker."""
        self._watchdog.step()
        self._heart.step()
        self._thread("executor", self._own_the_device)
        self._thread("reporter", self._reporter.run)
        self._thread("sayer", self._sayer.run)
        self._thread("heart", lambda: self._heart.run(self._stopped, self._beat_s))
        self._thread("watchdog", lambda: self._watchdog.run(self._stopped))
        self._thread("drain", self._drain_when_told)

    def run_attempt(self, subtask: int, attempt: int) -> None:
        """Run one attempt and return when its outcome is on the stream, or when nobody waits for one.

        Twice is harmless: an attempt that was begun before is left alone.
        """
        key = (subtask, attempt)
        began = time.time()
        if not self.attempts.begin(key):
            event(log, "attempt left alone", subtask=subtask, attempt=attempt)
            return
        order = self._assignment(key)
        if isinstance(order, str):
            self._leave_to_rescue(key, order)
            return
        event(
            log,
            "taken",
            subtask=subtask,
            attempt=attempt,
            job=order.job,
            rows=len(order.texts),
            tasks=len(order.tasks),
        )
        work = self._executor.submit(order)
        work.finished.wait()
        self._trace(work, began)

    def _trace(self, work: Work, began: float) -> None:
        u, order = work.usage, work.order
        traces.add(
            order.job,
            "execute",
            began,
            subtask=order.subtask,
            attempt=order.attempt,
            worker=self.name,
            device=self._device.name,
            pass_kind=order.pass_kind,
            rows=len(order.texts),
            tokens=u.tokens,
            micro_batches=u.micro_batches,
            busy_s=u.busy_s,
            load_s=u.load_s,
        )

    def _own_the_device(self) -> None:
        # On the one thread that also loads models: transformers breaks when two import it at once.
        self._engines.preload()
        self._executor.run()

    @property
    def device_kind(self) -> str:
        return self._device.kind

    @property
    def leaving(self) -> bool:
        return self._leaving.is_set()

    def leave(self) -> None:
        """Begin to drain: take nothing more, finish what is held within the grace period. Safe in a signal handler."""
        self._leaving.set()

    def finish(self) -> None:
        """Stop the threads after everything was reported, and say so in a last beat."""
        self._stopped.set()
        self._executor.stop()
        self._reporter.stop()
        self._sayer.stop()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._say_goodbye()

    def _drain_when_told(self) -> None:
        """Wait for `leave`; then let what is held be finished, and end what Celery runs, or the process."""
        self._leaving.wait()
        give_up = time.monotonic() + self._grace_s
        self._heart.leave()
        self._turn_tap(False)
        event(log, "draining", held=len(self.attempts.held()), grace_s=self._grace_s)
        # A read of the queue may be under way: whatever it brings is still ours.
        self._stopped.wait(min(QUEUE_READ_S, self._grace_s))
        while self.attempts.held() and time.monotonic() < give_up:
            self._stopped.wait(0.02)
        if self.attempts.held():
            event(log, "grace is over", logging.WARNING, held=len(self.attempts.held()))
            self._say_goodbye()
            self._exit(0)
        self._end_celery()

    def _turn_tap(self, open_: bool) -> None:
        self.tap_open = open_ and not self._leaving.is_set()

    def _say_goodbye(self) -> None:
        try:
            # The rows that run now did not kill us.
            self._transport.mark_running(None)
            self._heart.step()
        except TransportLost:
            pass

    def _assignment(self, key: Key) -> Assignment | str:
        """What to run, or why it cannot begin."""
        try:
            if (payload := self._payload(key)) is None:
                return "payload expired or lost"
            order = Assignment.decode(payload)
        except TransportLost:
            return "payload out of reach"
        except BadMessage:
            return "payload cannot be decoded"
        return order if order.key == key else "payload of another attempt"

    def _payload(self, key: Key) -> bytes | None:
        """The attempt's payload. Raises TransportLost where Redis stays away, or nobody wants the attempt any more."""
        give_up = time.monotonic() + FETCH_S
        while True:
            try:
                return self._transport.fetch(*key)
            except TransportLost:
                if time.monotonic() > give_up or self.attempts.dropped(key):
                    raise
            self._stopped.wait(RETRY_S)

    def _leave_to_rescue(self, key: Key, why: str) -> None:
        """An attempt that cannot begin: its nonce came with the payload, so nothing could be said that counts.

        It is neither held nor queued from now on, and the beat says so: its rows need not wait for the lease's end.
        """
        event(log, why, logging.WARNING, subtask=key[0], attempt=key[1])
        self.attempts.leave(key)

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._must_run, args=(target,), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _must_run(self, job: Callable[[], None]) -> None:
        """Run what the worker cannot live without: if it fails, a fresh process is better than half of one."""
        try:
            job()
        except Exception as error:  # noqa: BLE001 - the outermost loop of this thread
            where = error.__traceback__
            while where and where.tb_next:
                where = where.tb_next
            at = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
            event(log, "fault", logging.CRITICAL, error=type(error).__name__, at=at)
            self._exit(EXIT_FAULT)


def celery_app(redis_url: str, worker: WorkerApp) -> Celery:
    """The Celery application of one worker: its own queue, one entry point (reference: reliability 7)."""
    from celery import Celery
    from kombu.entity import Exchange, Queue

    app = Celery("motet", broker=redis_url, set_as_current=False)
    queue = queue_name(worker.name)
    app.conf.update(
        broker_transport_options={
            # Leases in Postgres own redelivery: no unacked hash, no visibility timeout, no wall clock.
            "ack_emulation": False,
            # One list per queue, so that its length and its keys are what they seem.
            "priority_steps": [0],
            # Without these a half-open connection hangs for ever.
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 5,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Work goes on while Redis is away; its outcome is put on the stream later.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_queues=[Queue(queue, Exchange(""), routing_key=queue)],  # type: ignore[no-untyped-call]
        task_default_queue=queue,
        task_create_missing_queues=False,
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        # As many as the engine with the most slots may be sent.
        worker_concurrency=THREADS + decode_slots(worker.device_kind, "vllm"),
        task_ignore_result=True,
        result_backend=None,
        accept_content=["json"],
        task_serializer="json",
        # No remote shutdown or revoke; the worker's rights in Redis do not hold the channel either.
        worker_enable_remote_control=False,
        # For Flower only. Names are pass kinds; arguments are ids and counts.
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )

    @app.task(name=ENTRY_POINT, ignore_result=True)  # type: ignore[untyped-decorator]
    def run(subtask: int, attempt: int, job: str, rows: int) -> None:
        worker.run_attempt(int(subtask), int(attempt))

    return app


def serve(app: Celery, worker: WorkerApp) -> None:
    """Take messages until SIGTERM, then until all that was taken is done."""
    from celery import bootsteps, signals

    from workers.run import celery_transport

    celery_transport.install()

    class Tap(bootsteps.StartStopStep):  # type: ignore[misc]
        """Lets the queue be left alone without cancelling its consumer, which would throw back what it reads."""

        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Also after each reconnection, which makes a new channel."""
            qos = consumer.task_consumer.channel.qos
            has_room = qos.can_consume
            qos.can_consume = lambda: worker.tap_open and has_room()

    class Tell(bootsteps.StartStopStep):  # type: ignore[misc]
        """Sends the events of tasks together, not each as it comes: that took a sixth of a worker with short sub-tasks."""

        requires = ("celery.worker.consumer.events:Events",)

        def start(self, consumer: Any) -> None:
            """Also after each reconnection, which makes another dispatcher and forgets what was to be repeated."""
            dispatcher = consumer.event_dispatcher
            dispatcher.on_send_buffered, dispatcher.buffer_limit = None, EVENTS_KEPT
            consumer.timer.call_repeatedly(EVENTS_S, dispatcher.flush)

    class End(bootsteps.StartStopStep):  # type: ignore[misc]
        """Drains when Celery ends on its own, on an error that it does not know."""

        def start(self, controller: Any) -> None:
            return None

        def stop(self, controller: Any) -> None:
            if not worker.leaving:
                event(log, "celery ended", logging.ERROR)
                worker.leave()

    def received(request: Any = None, **_: Any) -> None:
        # Before a thread has it: from here on it is no longer in the queue, so it must be in the beat.
        key = request.message.headers.get("motet") if request else None
        if isinstance(key, list) and len(key) == 2:
            worker.attempts.receive((int(key[0]), int(key[1])))

    def ready(**_: Any) -> None:
        # In place of Celery's: it would stop reading in the middle of a read.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: worker.leave())
        # In place of Celery's too, which prints local variables: rows' texts.
        faulthandler.register(signal.SIGUSR1)
        worker.start()
        event(log, "ready", boot=worker.boot)

    app.steps["consumer"].add(Tap)
    app.steps["consumer"].add(Tell)
    app.steps["worker"].add(End)
    signals.task_received.connect(received, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    # Any receiver keeps Celery from setting up logging of its own.
    signals.setup_logging.connect(lambda **_: None, weak=False)
    warnings.filterwarnings("ignore", message=".*superuser privileges.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    app.Worker(
        hostname=f"motet@{worker.name}",
        task_events=True,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    ).start()
    worker.finish()


def end_celery() -> None:
    """Ask Celery's loop to return."""
    from celery.worker import state

    state.should_stop = 0


@click.command()
@click.argument("name")
@click.option("--device", "kind", type=click.Choice(["cpu", "cuda"]), required=True)
@click.option("--slots", default=1, help="CPU slots that share this host's memory.")
@click.option("--threads", default=1, help="Threads of one matrix product.")
@click.option("--parent", default=0, help="End when this process is no longer our parent.")
@click.option("--boot", default="", help="Random name of this process; chosen here unless given.")
@click.option("--pulse", "pulse_fd", default=0, help="File descriptor on which to say that we run.")
def main(
    name: str, kind: Literal["cpu", "cuda"], slots: int, threads: int, parent: int, boot: str, pulse_fd: int
) -> int:
    """The process' whole life. Returns 0 once drained."""
    configure(name, "INFO")
    _offer_to_oom_killer()
    pulse = Pulse(pulse_fd) if pulse_fd else None
    try:
        settings = Settings.from_env().need("redis_url")
        configure(name, settings.log_level)
        traces.configure("worker", settings.traces, name)
        transport = RedisWorkerTransport(settings.redis_url, name)
        boot = boot or secrets.token_hex(8)
        _say_hello(transport, name, boot)
        use_threads(threads)
        device = probe(kind, slots)
        event(
            log, "device", kind=device.kind, device=device.name, mb=device.memory_mb, formats=device.formats
        )
        worker = WorkerApp(
            name,
            boot,
            settings,
            device,
            transport,
            end_celery=end_celery,
            parent=parent,
            **({"pulse": pulse.say} if pulse else {}),
        )
        serve(celery_app(settings.redis_url, worker), worker)
    except SetupError as error:
        event(log, str(error), logging.ERROR)
        return EXIT_SETUP
    return 0


def _say_hello(transport: WorkerTransport, name: str, boot: str) -> None:
    """Before torch is imported, which takes seconds: whatever a process of this name held is lost, rescue it now."""
    try:
        transport.beat(Beat(worker=name, boot=boot, seq=0, state="starting"))
    except TransportLost:
        event(log, "redis lost", logging.WARNING)


def _offer_to_oom_killer() -> None:
    """If the host runs out of memory, the kernel shall end a worker, whose rows go elsewhere, and not its neighbours."""
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))


if __name__ == "__main__":
    sys.exit(main.main(prog_name="python -m workers.run.app", standalone_mode=False))
