"""An API process' side of what workers say: it listens on its own channel, to text as it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from motet.protocol.envelope import BadMessage
from motet.protocol.transport.connection import RedisConnection
from motet.protocol.transport.contract import TransportLost
from motet.protocol.transport.keys import say_channel
from motet.protocol.wire import Said, decode_said

#: Seconds between two looks at ``stopped``.
_LOOK_S = 0.5
#: Seconds until a lost connection is tried again.
_AGAIN_S = 1.0


class SayListener:
    """Hears what is said to one API process while ``run`` runs. What is said while Redis is away is lost."""

    def __init__(self, url: str, api: str) -> None:
        self._redis = RedisConnection(url)
        self._channel = say_channel(api)
        #: Set while it listens: what is said from then on is heard.
        self.listening = threading.Event()
        self.stopped = threading.Event()

    def run(self, heard: Callable[[Sequence[Said]], None]) -> None:
        """Call ``heard``, from this thread, with all that a worker says at a time, until ``stopped``."""
        while not self.stopped.is_set():
            try:
                self._listen(heard)
            except TransportLost:
                self.stopped.wait(_AGAIN_S)
            finally:
                self.listening.clear()

    def close(self) -> None:
        """Stop soon; any thread."""
        self.stopped.set()

    def _listen(self, heard: Callable[[Sequence[Said]], None]) -> None:
        channel = self._redis.client.pubsub()  # type: ignore[no-untyped-call]
        try:
            self._redis.call(lambda _: channel.subscribe(self._channel))
            while not self.stopped.is_set():
                word = self._redis.call(lambda _: channel.get_message(timeout=_LOOK_S))
                if word is None:
                    continue
                if word["type"] == "subscribe":
                    self.listening.set()
                elif word["type"] == "message":
                    try:
                        said = decode_said(word["data"])
                    except BadMessage:
                        continue
                    heard(said)
        finally:
            channel.close()
