"""What the leader does beside its step: one thing at a time, on a thread of its own, while the step waits for Postgres."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SideThread:
    """Does what it is given. Its errors are those of whoever waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "beside")
        self._under_way: Future[Any] | None = None

    def begin(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Do this from now on, once that which is under way has ended. Raises as `end` does; then nothing is begun.

        What is returned waits for it, raises what it raised, and returns what it returned.
        """
        self.end()
        future = self._thread.submit(act, *args, **kwargs)
        self._under_way = future

        def outcome() -> T:
            self.end()
            return future.result()

        return outcome

    def end(self) -> None:
        """Wait for what is under way. Raises what it raised, once."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()
