"""Logs alike everywhere: one JSON object a line, with ids and counts, never a user's text."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: Secrets that could slip into a message: bearer tokens and passwords inside URLs.
_SECRET = re.compile(r"(?i)(bearer\s+)\S+|(://[^:/@\s]*:)[^@\s]+@")


class JsonFormatter(logging.Formatter):
    """Time, level, logger, event, and whatever ``extra`` holds."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
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


def configure(process: str, level: str = "INFO") -> None:
    """Send every log record of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
