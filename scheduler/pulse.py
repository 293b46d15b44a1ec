"""A sign of life for whoever started this process: a file that it touches in every round of its work.

``motet up`` kills and restarts a process whose file grows old: one that is stopped or hangs has not died.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def pulse(file: str) -> Callable[[], None]:
    """What to call in every round. Without a file it does nothing; trouble with the file stops no work."""
    if not file:
        return lambda: None
    path = Path(file)

    def beat() -> None:
        with suppress(OSError):
            path.touch()

    return beat
