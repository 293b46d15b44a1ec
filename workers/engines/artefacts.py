"""The data of an artefact, as the function that reads it gets it. Nothing in it is ever run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.engine import CannotLoad


def read_artefact(files: Mapping[str, Path]) -> Any:
    """Of one file its content; of several a dict by file name. Raises CannotLoad.

    JSON is its value, safetensors a dict of numpy arrays by name, Parquet a pyarrow table.
    """
    found = {name: _read(name, path) for name, path in files.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def _read(name: str, path: Path) -> Any:
    read = _READERS.get(path.suffix)
    if read is None:
        raise CannotLoad(f"{name}: expected a file that ends in {', '.join(_READERS)}")
    try:
        return read(path)
    except CannotLoad:
        raise
    except MemoryError:
        raise CannotLoad(f"{name}: no memory for it") from None
    except Exception as error:
        # The class alone: the message may repeat what the file holds.
        raise CannotLoad(f"{name}: cannot be read as {path.suffix[1:]} ({type(error).__name__})") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _safetensors(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        try:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        except TypeError:
            raise CannotLoad(
                f"{path.name}: a type of numbers that numpy has not, such as bf16; store them as fp32"
            ) from None


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CannotLoad(
            f"{path.name}: Parquet needs pyarrow, which is not installed here; pip install pyarrow"
        ) from None
    # Not mapped into memory: the file may be gone before the table is read.
    return parquet.ParquetFile(path, memory_map=False).read()


_READERS: Mapping[str, Callable[[Path], Any]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
