"""Files of data that no package holds: given in ``$MOTET_DATA``, kept in the cache, or fetched from where they are published.

Each is pinned by its digest. What a package holds is ``motet.datasets.fetch``'s.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from motet.datasets import Archive, cache_dir, fetch
from motet.errors import SetupError

#: Gives what is published at an https address. Raises OSError, HTTPException.
FetchUrl = Callable[[str], bytes]
#: Seconds without a byte after which a download is given up.
_SILENT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file, pinned by its digest."""

    filename: str
    sha256: str
    #: Where it is published, in words.
    published: str
    #: Makes it of what is published.
    make: Callable[[FetchUrl], bytes]


def located(file: DataFile, *, cache: Path | None = None, download: FetchUrl | None = None) -> Path:
    """The path of the file: in ``$MOTET_DATA``, else in the cache (``motet.datasets.cache_dir``), else fetched into it.

    Raises SetupError that says in one sentence how to get it, or that what lies there is another file.
    """
    given = os.environ.get("MOTET_DATA")
    cache = cache_dir() if cache is None else cache
    for place in (*([Path(given)] if given else []), cache):
        path = place / file.filename
        if path.is_file():
            _check(file, path.read_bytes(), str(path))
            return path
    try:
        made = file.make(download or downloaded)
    except (OSError, HTTPException) as error:
        raise SetupError(
            f"cannot fetch {file.published}: {type(error).__name__}; put {file.filename} into a folder and name that in "
            f"MOTET_DATA, or try again where that address can be reached"
        ) from None
    except (KeyError, ValueError, IndexError) as error:
        raise SetupError(
            f"{file.published} has another layout than expected: {type(error).__name__}"
        ) from None
    _check(file, made, file.published)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            (Path(folder) / file.filename).write_bytes(made)
            os.replace(Path(folder) / file.filename, cache / file.filename)
    except OSError as error:
        raise SetupError(
            f"cannot keep {file.filename} in {cache}: {error}; set MOTET_CACHE_DIR to a folder that can be written"
        ) from None
    return cache / file.filename


def fetched(one: Archive | DataFile) -> Path:
    """The path of what a package holds, or of such a file; fetched unless it is here. Raises SetupError as either does."""
    return located(one) if isinstance(one, DataFile) else fetch(one)


def downloaded(url: str) -> bytes:
    """What is published at an https address."""
    with urllib.request.urlopen(url, timeout=_SILENT_S) as answer:
        found: bytes = answer.read()
    return found


def _check(file: DataFile, content: bytes, where: str) -> None:
    if (got := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise SetupError(
            f"{where} is not the pinned file: expected sha256 {file.sha256}, got {got}; take it from {file.published}, "
            "or remove it, and it is fetched"
        )
