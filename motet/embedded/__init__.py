"""A whole cluster on one machine without Docker: real Postgres and Valkey from wheels, and motet's own processes."""

from __future__ import annotations

import os
from pathlib import Path


def default_data_dir() -> Path:
    """Where `motet up` keeps its data, and where `Client()` looks for ``client.json``: ``$MOTET_HOME``, or in the home."""
    home = os.environ.get("MOTET_HOME")
    return Path(home).expanduser() if home else Path.home() / ".local" / "share" / "motet"
