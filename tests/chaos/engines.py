"""What the workers of the chaos house run: plain functions, and words in a text that make one of them misbehave.

This file is copied beside the workers; it imports nothing of motet, and the oracle shares nothing with it.
"""

import ctypes
import hashlib
import os
import resource
import signal
import time
import zlib


def digest(text: str) -> str:
    """Under a millisecond a row."""
    if "#raise-digest" in text:
        raise ValueError("asked for")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


digest.per_row = True  # type: ignore[attr-defined]


def measure(texts: list[str]) -> list[dict[str, int]]:
    """About 2 ms a row. One bad row fails the whole micro-batch, and the worker has to find it."""
    if any("#raise-measure" in text for text in texts):
        raise RuntimeError("asked for")
    time.sleep(0.002 * len(texts))
    return [{"letters": len(text), "words": len(text.split())} for text in texts]


def weigh(texts: list[str]) -> list[int]:
    """About 10 ms a row; here sit the rows that end their process."""
    answers = []
    for text in texts:
        if "#kill" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "#exit" in text:
            os._exit(3)
        if "#segfault" in text:
            ctypes.string_at(0)
        if "#hang" in text:
            time.sleep(3600)
        if "#hog" in text:
            _hog()
        time.sleep(0.01)
        answers.append(zlib.crc32(text.encode()))
    return answers


def _hog() -> None:
    """Ask for more memory at once than this process may have, so that nothing beside it goes short."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_DATA, ((used + 8_000_000) * 1024, resource.RLIM_INFINITY))
    try:
        bytes(64 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
