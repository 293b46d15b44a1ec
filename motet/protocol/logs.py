"""Logs alike everywhere: one JSON object a line, with ids and counts, never a user's text."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import time
from typing import Any

from motet.errors import SetupError

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: Secrets that could slip into a message: bearer tokens and passwords inside URLs.
_SECRET = re.compile(r"(?i)(bearer\s+)\S+|(://[^:/@\s]*:)[^@\s]+@")


#: Packages whose records are told in full. Of others only the template is kept: their arguments may hold a text.
_OURS = ("motet", "scheduler", "workers", "py")


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **ids: object) -> None:
    """Log that something happened: ``event(log, "loaded", model=…, seconds=…)``."""
    logger.log(level, name, extra=ids)


def configure(process: str, level: str = "INFO") -> None:
    """Send every log record of this process to stderr as JSON lines. Raises SetupError for an unknown level."""
    if level.upper() not in logging.getLevelNamesMapping():
        raise SetupError(f"MOTET_LOG_LEVEL: got {level!r}; expected DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in _OURS:
        logging.getLogger(ours).setLevel(level.upper())
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """Time, level, logger, event, and whatever ``extra`` holds."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        if record.name.split(".")[0] not in _OURS:
            record = copy.copy(record)
            record.args = ()
            record.msg = record.msg[:200] if isinstance(record.msg, str) else type(record.msg).__name__
        line: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage(),
        }
        line.update((k, v) for k, v in vars(record).items() if k not in _STANDARD)
        if record.exc_info and record.exc_info[0] is not None:
            # The class and where, never the message: those of torch and of tokenizers repeat their inputs.
            line["error"] = record.exc_info[0].__name__
            line["where"] = _where(record.exc_info[2])
        return _SECRET.sub(r"\1\2<redacted>", json.dumps(line, default=str))


def _where(traceback: Any) -> list[str]:
    frames: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return frames[-6:]
