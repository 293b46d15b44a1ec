"""What bench/rivals.py asks of a system, and how that reports: JSON in on stdin, a line of JSON out on stdout.

In: ``texts`` (path of a JSON Lines file of strings), ``out`` (a folder), ``processes``, ``store`` (keep the results
in Postgres), ``postgres`` and ``redis`` (URLs, where the system asked for such a server). Out: ``ready`` and ``done``,
by the machine's monotonic clock, and ``results``, the path of the merged answers.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WARM_UP_ROWS = 32
LOAD_S = 180.0


@dataclass(slots=True, kw_only=True)
class Work:
    """The texts to answer, and the clock."""

    texts: list[str]
    out: Path
    processes: int
    store: bool = False
    postgres: str = ""
    redis: str = ""
    #: When all processes had their models and a few rows had been through.
    _ready: float = 0.0

    @property
    def warm_up(self) -> list[str]:
        """A few rows that go the whole way before the clock starts."""
        return self.texts[:WARM_UP_ROWS]

    def await_loaded(self, parent: subprocess.Popen[bytes] | None = None) -> None:
        """Wait until all processes have loaded their model. Raises RuntimeError where they, or their parent, do not."""
        end = time.monotonic() + LOAD_S
        while (there := len(self.loaded())) < self.processes:
            if time.monotonic() > end or (parent and parent.poll() is not None):
                raise RuntimeError(
                    f"{there} of {self.processes} models are loaded; waited at most {LOAD_S:.0f} s"
                )
            time.sleep(0.02)

    def loaded(self) -> list[float]:
        """When each process had its model."""
        return [float(path.read_text() or "inf") for path in self.out.glob("loaded-*")]

    def ready(self, at: float | None = None) -> None:
        """The work begins: now, or, where a system loads its models while it works, at that time."""
        self._ready = time.monotonic() if at is None else at

    def done(self, results: Mapping[str, NDArray]) -> None:
        """All answers of all rows are here, in row order."""
        done = time.monotonic()
        path = self.out / "results.npz"
        np.savez(path, **results)
        print(json.dumps({"ready": self._ready, "done": done, "results": str(path)}), flush=True)


def do(system: Callable[[Work], None]) -> None:
    """Read what is asked and let the system do it. SIGTERM ends it as Ctrl-C does, so that it cleans up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = json.load(sys.stdin)
    with open(asked.pop("texts"), encoding="utf-8") as lines:
        texts = [json.loads(line) for line in lines]
    try:
        system(Work(texts=texts, out=Path(asked.pop("out")), **asked))
    except KeyboardInterrupt:
        sys.exit("interrupted")
