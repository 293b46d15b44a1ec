"""What the benchmarks share: their options, sides taken in turn, the hardware they ran on, and one last line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.table import Table

from motet import Client
from motet.demo.texts import TASKS, choose
from motet.local.cluster import Cluster
from motet.tasks import Task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
#: The demo's four tasks in fp32 on any machine, so that all sides compute the same.
EXACT: Mapping[str, Task] = {name: replace(task, numerics="exact") for name, task in TASKS.items()}
#: Names a folder of a stopped cluster whose models are registered, which costs ten CPU seconds. The test of all
#: benchmarks sets it: `furnish` copies that folder.
PREPARED = "BENCH_PREPARED"

T = TypeVar("T")


class Size(Enum):
    """How much of a benchmark runs."""

    #: What bench/results keeps.
    FULL = "full"
    #: Within a minute: figures to look at, not to keep.
    QUICK = "quick"
    #: Within seconds, through all that a full run goes through. Its figures mean nothing.
    SMOKE = "smoke"

    def of(self, *, full: T, quick: T, smoke: T) -> T:
        """The one of the three that belongs to this size."""
        return {Size.FULL: full, Size.QUICK: quick, Size.SMOKE: smoke}[self]


class Options(argparse.ArgumentParser):
    """A parser whose help is the benchmark's own text, with the options that every benchmark has."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        smaller = self.add_mutually_exclusive_group()
        for size, words in (
            (Size.QUICK, "a smaller run, within 60 s on two cores"),
            (
                Size.SMOKE,
                "the smallest run, within seconds, which shows that all of it works; its figures mean nothing",
            ),
        ):
            smaller.add_argument(f"--{size.value}", dest="size", action="store_const", const=size, help=words)
        self.add_argument(
            "--save",
            type=Path,
            metavar="FILE",
            help="keep figures, details and hardware in this file, in place of bench/results, which keeps whole runs alone",
        )
        self.set_defaults(size=Size.FULL)

    def parse_args(self, *given: Any, **more: Any) -> Any:
        """As ever; ends with a message where a smaller run is to be kept in bench/results."""
        found = super().parse_args(*given, **more)
        if found.size is not Size.FULL and found.save and found.save.resolve().is_relative_to(RESULTS):
            self.error(
                f"--save: got {found.save} with --{found.size.value}; expected a file outside bench/results, "
                "where only the figures of full runs are kept"
            )
        return found


def options(doc: str | None) -> Options:
    """The parser of a benchmark: ``size`` and ``save`` are among what it finds."""
    return Options(doc)


def in_turn(
    sides: Mapping[str, Callable[[], float]],
    rounds: int,
    told: Callable[[str, float], object] = lambda side, amount: say(f"  {side:<24}{amount:10.3f}"),
) -> dict[str, list[float]]:
    """Run every side once a round and keep what it returns (seconds, or a rate), each second round in reverse.

    A machine that slows down or is disturbed then does so to all sides alike; compare by `ratio`.
    """
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            amount = sides[name]()
            told(name, amount)
            found[name].append(amount)
    return found


def ratio(found: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median of the ratios within each round: noise that lasts longer than a round cancels out."""
    return statistics.median(a / b for a, b in zip(found[over], found[under], strict=True))


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def say(words: str) -> None:
    """A line of the story, on stdout at once."""
    print(words, flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, as wide as it must be; all columns but the first are figures."""
    say(f"\n{title}")
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(str, row))
    # A narrower console cuts cells off.
    console = Console(width=10_000)
    console.width = max(shutil.get_terminal_size().columns, console.measure(drawn).maximum)
    console.print(drawn)


def finish(
    name: str,
    keys: Mapping[str, Any],
    arguments: argparse.Namespace,
    *,
    whole: bool = True,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Keep the figures as `keep` does, name the machine, and print the keys as the last line."""
    keep(name, keys, arguments, whole=whole, details=details)
    say(f"on {machine(hardware())}")
    print(json.dumps(dict(keys)), flush=True)


def keep(
    name: str,
    keys: Mapping[str, Any],
    arguments: argparse.Namespace,
    *,
    whole: bool = True,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write figures, details and hardware where ``--save`` says, or, of a full and whole run, into bench/results.

    A run may do so after each of its parts: one that is cut off leaves behind what it measured.
    """
    file = arguments.save or (results_file(name) if arguments.size is Size.FULL and whole else None)
    if file is not None:
        _write(file, {"bench": name, **keys, "details": details or {}, "hardware": hardware()})


def renew(name: str, part: str, keys: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Put a part that was run again, whole and by itself, into what the newest full run left, and say so there.

    Where there was none, the file holds this part alone.
    """
    file = results_file(name)
    none = {"bench": name, "details": {}, "hardware": hardware()}
    kept = (json.loads(file.read_text("utf-8")) if file.exists() else none) | keys
    kept["details"][part] = {**details, "run_again": hardware()}
    _write(file, kept)


def results_file(name: str) -> Path:
    """Where the newest full run of a benchmark is kept."""
    return RESULTS / f"{name}.json"


def _write(file: Path, kept: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def hardware() -> dict[str, Any]:
    """What these figures were measured on, and with which versions."""
    cpu = next(iter(_proc("/proc/cpuinfo", "model name")), platform.processor())
    flags = next(iter(_proc("/proc/cpuinfo", "flags")), "").split()
    memory = next(iter(_proc("/proc/meminfo", "MemTotal")), "0 kB")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "gpus": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in ("motet", "torch", "transformers", "celery", "sqlalchemy")},
        "commit": _commit(),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def machine(found: Mapping[str, Any]) -> str:
    """What `hardware` told, in words: cores, processor, what it computes fast, GPUs."""
    features = found["features"]
    fast = "AMX" if "amx_bf16" in features else "no AMX" if "avx512f" in features else "no AVX-512"
    maker = found["cpu"].replace("(R)", "").removesuffix(" Processor")
    gpus = f", {len(found['gpus'])} × {found['gpus'][0].split(',')[0]}" if found["gpus"] else ""
    return f"{found['cores']} cores of {maker} ({fast}){gpus}"


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, of these processes and all their children, living or ended."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(pid)
            for one in (family, *family.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += sum(one.cpu_times()[:4])
    return total


def idle_share(pids: Iterable[int], seconds: float = 4.0) -> float:
    """CPU that these processes take while nobody asks anything of them, as a share of one core."""
    pids = list(pids)
    before = cpu_s(pids)
    time.sleep(seconds)
    return (cpu_s(pids) - before) / seconds


def peak_rss_mb(pid: int) -> float:
    """Largest resident set that a process has had so far."""
    return next((int(kb.split()[0]) / 1024 for kb in _proc(f"/proc/{pid}/status", "VmHWM")), 0.0)


@contextmanager
def cluster(cpus: int = 2, *, gpu: bool = False, models: Sequence[str] = ()) -> Iterator[Cluster]:
    """A whole cluster in a folder of its own, with all its workers there: CPU slots, and the first GPU if asked for.

    ``models``: as of `Cluster`, beside those that motet ships.
    """
    with (
        cluster_folder() as data,
        Cluster(data, cpus=cpus, gpus="0" if gpu else "", port=0, models=models) as running,
    ):
        with Client(running.url, running.tokens["user"]) as client:
            while sum(w.state == "ready" for w in client.workers()) < cpus + gpu:
                time.sleep(0.2)
        yield running


def texts(rows: int) -> list[str]:
    """Texts of the demo, tweets among news articles: lengths with a long tail. From the start again where they run out."""
    chosen = [one.text for one in choose(rows)]
    return (chosen * (rows // len(chosen) + 1))[:rows]


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, removed at the end, also after Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="motet-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster's data, removed at the end; not an empty one where a prepared cluster is at hand."""
    with scratch() as folder:
        furnish(folder)
        yield folder


def furnish(folder: Path) -> None:
    """Copy the prepared cluster into a folder, if there is one: the next cluster there has its models at once."""
    if prepared := os.environ.get(PREPARED):
        folder.mkdir(exist_ok=True)
        # Postgres' files belong to its own user where we are root.
        subprocess.run(["cp", "--archive", f"{prepared}/.", str(folder)], check=True)


def _proc(path: str, key: str) -> Iterator[str]:
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    yield from (line.partition(":")[2].strip() for line in lines if line.startswith(key))


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit("this is what the benchmarks share; see: make bench")
