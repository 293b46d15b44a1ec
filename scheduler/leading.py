"""The dispatcher's process: step, rest, and step again."""

from __future__ import annotations

import gc
import logging
import threading
import time

from motet.protocol.transport import TransportLost
from scheduler.dispatcher import MOST_PER_STEP, Dispatcher
from scheduler.pulse import pulse
from scheduler.store.database import StoreUnavailable
from scheduler.store.leadership import NotLeading
from scheduler.store.listening import Listener
from scheduler.store.words import EVERYTHING, SILENCE

log = logging.getLogger(__name__)


def look_for_circles_rarely() -> None:
    """Of a hundred thousand leases and beats that live for seconds nothing is garbage in circles, and looking through all
    of them takes a third of a second."""
    gc.freeze()
    gc.set_threshold(5_000, 20, 200)


def run(dispatcher: Dispatcher, wake: Listener, stopping: threading.Event) -> None:
    """Step until ``stopping``. Trouble with Postgres or Redis is waited out."""
    tick_s = dispatcher.settings.tick_s
    beat = pulse(dispatcher.settings.pulse)
    words = EVERYTHING
    look_for_circles_rarely()
    while not stopping.is_set():
        beat()
        try:
            sent = dispatcher.step(time.monotonic(), words)
            words = SILENCE
            if dispatcher.epoch is None:
                # What the leader is told is not for us, and nobody keeps it: to lead begins by reading everything.
                wake.close()
                stopping.wait(tick_s)
                continue
            if sent >= MOST_PER_STEP:
                words = wake.wait(0.0)  # there may be room for more
                continue
        except NotLeading:
            dispatcher.epoch = None
            continue
        except (StoreUnavailable, TransportLost) as trouble:
            log.warning("waiting for a service", extra={"trouble": f"{type(trouble).__name__}: {trouble}"})
            stopping.wait(tick_s)
        words = wake.wait(dispatcher.rest_s(time.monotonic()))
    wake.close()
    try:
        dispatcher.stop()
    except (StoreUnavailable, TransportLost):
        log.warning("could not resign: the lease will run out by itself")
