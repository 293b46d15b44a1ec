"""Structured logs of a worker: motet's JSON lines, with a guard against libraries that repeat what they were given."""

from __future__ import annotations

import copy
import logging
import sys

from motet.errors import SetupError
from motet.logs import JsonFormatter

OURS = ("workers", "motet", "py.warnings")


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **ids: object) -> None:
    """Log that something happened: ``event(log, "loaded", model=…, seconds=…)``."""
    logger.log(level, name, extra=ids)


def configure(level: str, worker: str) -> None:
    """Send all logs of this process to stderr as JSON lines. Raises SetupError for an unknown level."""
    if level.upper() not in logging.getLevelNamesMapping():
        raise SetupError(f"MOTET_LOG_LEVEL: got {level!r}; expected DEBUG, INFO, WARNING or ERROR")
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(_Guarded(worker))
    root = logging.getLogger()
    root.handlers[:] = [out]
    root.setLevel(logging.WARNING)
    for ours in OURS[:2]:
        logging.getLogger(ours).setLevel(level.upper())
    logging.captureWarnings(True)


class _Guarded(JsonFormatter):
    """Of others' records only the template is kept: Celery's arguments may hold a message, torch's an input."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name.split(".")[0] not in OURS and not record.name.startswith("py.warnings"):
            record = copy.copy(record)
            record.args = ()
            record.msg = record.msg[:200] if isinstance(record.msg, str) else type(record.msg).__name__
        return super().format(record)
