"""uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn.server


class _Hasty:
    """asyncio as uvicorn sees it. It looks ten times a second whether to stop, and rests for as long before it does:
    hundreds of tests would wait for that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


@contextmanager
def in_a_thread(server: uvicorn.Server, farewell: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Run a server until the end of the block; its URL. ``farewell`` is called before it is asked to stop."""
    thread = threading.Thread(target=server.run, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", _Hasty())
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.005)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            farewell()
            server.should_exit = True
            thread.join(20)
