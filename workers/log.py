"""Structured logs of a worker: one JSON object a line, with ids, never a user's text.

Messages of other libraries may echo what they were given, so only their template is kept, without arguments,
and an exception is named by its class alone.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from motet.errors import SetupError


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **ids: object) -> None:
    """Log that something happened: ``event(log, "loaded", model=…, seconds=…)``."""
    logger.log(level, name, extra={"ids": ids})


def configure(level: str, worker: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to ``stream`` (stderr) as JSON lines. Raises SetupError for an unknown level."""
    if level.upper() not in logging.getLevelNamesMapping():
        raise SetupError(f"MOTET_LOG_LEVEL: got {level!r}; expected DEBUG, INFO, WARNING or ERROR")
    out = logging.StreamHandler(stream or sys.stderr)
    out.setFormatter(_JsonLines(worker))
    root = logging.getLogger()
    root.handlers[:] = [out]
    root.setLevel(logging.WARNING)
    logging.getLogger("workers").setLevel(level.upper())
    logging.captureWarnings(True)


class _JsonLines(logging.Formatter):
    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": str(record.msg)[:200] if isinstance(record.msg, str) else type(record.msg).__name__,
            "worker": self._worker,
            **getattr(record, "ids", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line, default=str)
