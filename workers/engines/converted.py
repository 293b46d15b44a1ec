"""Models that are converted once, and kept as a folder that several processes may use."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from motet.errors import SetupError


def keep_converted(
    place: Path, convert: Callable[[Path], object], is_whole: Callable[[Path], bool] = Path.is_dir
) -> None:
    """Convert beside the place and move the folder there whole, so that a killed conversion leaves nothing behind.

    ``convert``: writes the folder that it is given. Raises SetupError where there is no room.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".converting-") as beside:
            folder = Path(beside) / "model"
            convert(folder)
            if not is_whole(place):
                shutil.rmtree(place, ignore_errors=True)
                # Where another process was faster, its folder is as good.
                try:
                    os.rename(folder, place)
                except OSError:
                    if not is_whole(place):
                        raise
    except OSError as error:
        raise SetupError(
            f"cannot keep the converted model in {place.parent}: {error.strerror or error}; make room there, "
            "or name another folder in MOTET_CACHE_DIR"
        ) from None
