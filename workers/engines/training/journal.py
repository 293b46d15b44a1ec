"""What a run reads and leaves behind, over the API, under the lease of its attempt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from motet.errors import InvalidJob, MotetError, NotFound
from motet.http import Address, Body, Http
from motet.protocol.columns import OK, STATE_MASK, Column
from motet.protocol.envelope import BadMessage, unpack
from motet.protocol.wire import LEASE_HEADER
from workers.engines.training.learner import Hopeless
from workers.engines.training.run import RowSlice, TryAgain
from workers.engines.training.state import SLICE, RunState

#: Seconds of silence in which a request that carries a file is given up.
_FILE_S = 300.0


class HttpJournal:
    """The journal of one row of a training job."""

    def __init__(self, url: str, token: str, lease: str, row: int, job: str) -> None:
        """``lease``: ``<subtask>.<attempt>.<nonce>``. ``row``: of the training job. ``job``: what is learned from."""
        self._row, self._job = row, job
        headers = {LEASE_HEADER: lease, "Accept-Encoding": "identity"}
        self._http = Http(Address(url=url.rstrip("/"), token=token), headers=headers)

    def close(self) -> None:
        self._http.close()

    def block(self, number: int, *, texts: bool) -> RowSlice | None:
        found = self._read(
            self._ask("GET", f"/v1/fits/{self._row}/data/{self._job}/{number}?texts={int(texts)}")
        )
        if found.get("end"):
            return None
        return RowSlice(tuple(found["texts"]), _vectors(Column.from_wire(found["vectors"])))

    def checkpoint(self) -> bytes | None:
        known = json.loads(self._ask("GET", f"/v1/fits/{self._row}"))
        if not known.get("checkpoint"):
            return None
        return self._ask("GET", f"/v1/blobs/{known['checkpoint']}", answer_s=_FILE_S)

    def report(self, key: str, report: Mapping[str, Any], checkpoint: RunState | None) -> None:
        sha256 = None if checkpoint is None else self._put(checkpoint.slices)
        self._tell({"key": key, "report": _strict(report), "checkpoint": sha256})

    def keep(self, files: Sequence[str]) -> None:
        self._tell({"files": sorted(files)})

    def store(self, path: Path) -> str:
        return self._put(lambda: _slices(path))

    def _put(self, slices: Callable[[], Iterator[Any]]) -> str:
        """Store what comes in slices, each of which is small: sending it must not hold up who computes."""
        digest, size = hashlib.sha256(), 0
        for part in slices():
            digest.update(part)
            size += len(part)
        sha256 = digest.hexdigest()
        headers = {"Content-Length": str(size)}
        self._ask("PUT", f"/v1/blobs/{sha256}", lambda: map(bytes, slices()), headers, answer_s=_FILE_S)
        return sha256

    def _tell(self, what: Mapping[str, Any]) -> None:
        self._ask("PUT", f"/v1/fits/{self._row}", json.dumps(what).encode())

    def _read(self, raw: bytes) -> dict[str, Any]:
        try:
            found = unpack(raw)
        except BadMessage:
            raise TryAgain("an answer was torn") from None
        if not isinstance(found, dict):
            raise TryAgain("an answer of another form")
        return found

    def _ask(
        self,
        method: Literal["GET", "PUT"],
        path: str,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        answer_s: float | None = None,
    ) -> bytes:
        try:
            # Once: the run that asks tries again by itself, and goes on learning meanwhile.
            return self._http.once(method, path, content=body, headers=headers, answer_s=answer_s).content
        except (NotFound, InvalidJob) as error:
            raise Hopeless(str(error)) from None
        except MotetError as error:
            # A lease that ended, too: then nobody waits for this attempt any more, and it will hear of that.
            raise TryAgain(str(error)) from None


def _slices(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        while part := file.read(SLICE):
            yield part


def _strict(value: Any) -> Any:
    """As JSON has it: it knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {name: _strict(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _vectors(column: Column) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows = len(column)
    stored = np.frombuffer(column.arrays["vectors"], "<f4" if column.dtype == "fp32" else "<f2")
    # Nothing is stored where no row has an answer.
    vectors = (
        stored.reshape(rows, column.dim).astype(np.float32)
        if stored.size
        else np.zeros((rows, column.dim), np.float32)
    )
    status = np.frombuffer(column.status, np.uint8) & STATE_MASK
    vectors[status != OK] = np.nan
    return vectors
