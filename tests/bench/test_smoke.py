"""Every command of bench/ runs, at its smallest size, and prints what its readers read. Its figures are not looked at."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.conftest import copy_of

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
#: Files that commands import or start. Every other file is a command: a new one is run here.
PARTS = frozenset(
    f"{name}.py"
    for name in (
        *(
            "bare",
            "callers",
            "client",
            "connected",
            "engine",
            "family",
            "harness",
            "lower_bound",
            "pages",
            "paced",
            "rival_policies",
        ),
        *("crowd", "leading", "stage", "stand_in", "uploading"),
    )
)
COMMANDS = sorted(file.name for file in BENCH.glob("*.py") if file.name not in PARTS)
#: Commands at once: much of a cluster's start is waiting.
AT_ONCE = 2
LIMIT_S = 240.0


class Ran(NamedTuple):
    """One command, run to its end."""

    code: int
    out: str
    errors: str
    seconds: float


@pytest.fixture(scope="module")
def prepared(with_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped cluster that has the models of all benchmarks: each command starts from a copy of it."""
    folder = copy_of(with_models, tmp_path_factory.mktemp("prepared"))
    code = "import sys; from pathlib import Path; from paced import Paced\nwith Paced(Path(sys.argv[1]), cpus=0) as running: running.register_second()"
    paths = os.pathsep.join((str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")))
    subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    return folder


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, prepared: Path) -> Iterator[Mapping[str, Future[Ran]]]:
    """The commands that this session's tests ask for, running some at once."""
    mine = [item for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    names = dict.fromkeys(item.callspec.params["name"] for item in mine)  # type: ignore[attr-defined]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield {name: pool.submit(run, name, prepared) for name in names}
    finally:
        pool.shutdown(cancel_futures=True)


def run(name: str, prepared: Path) -> Ran:
    began = time.monotonic()
    env = os.environ | {
        "BENCH_PREPARED": str(prepared),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, str(BENCH / name), "--smoke"],
        capture_output=True, text=True, timeout=LIMIT_S, env=env, cwd=ROOT, check=False,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


@pytest.mark.timeout(600)  # where another command's end is waited for, too
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_at_its_smallest_size_and_prints_figures_that_can_be_read(
    name: str, runs: Mapping[str, Future[Ran]]
) -> None:
    kept = results()
    ran = runs[name].result()
    print(f"{name}: {ran.seconds:.1f} s")
    assert ran.code == 0, f"exit code {ran.code}\n{ran.out[-3000:]}\n{ran.errors[-6000:]}"
    figures = json.loads(ran.out.splitlines()[-1], parse_constant=no_number)
    assert isinstance(figures, dict)
    assert figures
    cut_off = [line for line in ran.out.splitlines() if re.search(r"\w…", line)]
    assert not cut_off, "a table was narrower than its cells"
    assert results() == kept, "a smoke run's figures mean nothing: bench/results keeps none of them"


def test_every_command_is_listed_by_make_bench_and_run_by_make_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    figures = importlib.import_module("figures")
    [listed] = re.findall(
        r"^BENCHES := \$\(patsubst %,bench/%.py,(.*)\)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    commands = {name.removesuffix(".py") for name in COMMANDS}
    assert set(listed.split()) == commands
    # The first two do not measure motet as it is, the last one wants a GPU.
    assert {*figures.BENCHES} == commands - {"ab", "figures", "gpu"}


def results() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (BENCH / "results").iterdir()}


def no_number(text: str) -> NoReturn:
    pytest.fail(f"{text} is no figure, and no JSON")
