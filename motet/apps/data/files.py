"""Files of data that no package holds: given in ``$MOTET_DATA``, or kept in the cache, each pinned by its digest.

What a package holds is ``motet.datasets.fetch``'s.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from motet.datasets import cache_dir
from motet.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file, pinned by its digest."""

    filename: str
    sha256: str
    #: How to get it, in words that end a sentence: ``take it from …``.
    remedy: str


def located(file: DataFile, folder: Path | None = None) -> Path:
    """The path of the file in ``folder``, else in ``$MOTET_DATA``, else in the cache (``motet.datasets.cache_dir``).

    Raises SetupError that says in one sentence how to get it, or that it is another file than the pinned one.
    """
    named = os.environ.get("MOTET_DATA")
    places = [folder] if folder else [Path(named)] if named else []
    for place in (*places, cache_dir()):
        path = place / file.filename
        if path.is_file():
            with path.open("rb") as opened:
                got = hashlib.file_digest(opened, "sha256").hexdigest()
            if got != file.sha256:
                raise SetupError(
                    f"{path} is not the pinned file: expected sha256 {file.sha256}, got {got}; {file.remedy}"
                )
            return path
    where = named or f"a folder that MOTET_DATA names, or {cache_dir()}"
    raise SetupError(f"{file.filename} is not here: {file.remedy}, and put it into {where}")
