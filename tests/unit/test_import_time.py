"""`import motet` is instant, and `motet --help` is as well: what is heavy loads with its first use."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time

import pytest

from motet.protocol.imports import importing_for_good

HEAVY = (
    "asyncio",
    "torch",
    "transformers",
    "celery",
    "kombu",
    "sqlalchemy",
    "redis",
    "psycopg",
    "fastapi",
    "httpx",
    "rich",
    "numpy",
    "pandas",
    "pyarrow",
    "jinja2",
)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.parametrize("module", ["motet", "motet.cli"])
def test_nothing_heavy_is_imported(module: str) -> None:
    loaded = python(f"import {module}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))").split()
    assert not set(HEAVY) & set(loaded)


def test_the_package_offers_what_it_says_and_nothing_else() -> None:
    import motet

    offered = {name for name in vars(motet) if not name.startswith("_") and name[0].isupper()}
    # What brings asyncio along comes when it is asked for.
    later = {"AsyncClient"}
    assert set(motet.__all__) == offered | later
    assert all(getattr(motet, name).__doc__ for name in motet.__all__)


def test_every_kind_of_task_is_offered() -> None:
    import motet
    from motet.tasks import KINDS

    assert {kind.__name__ for kind in KINDS.values()} <= set(motet.__all__)


@pytest.mark.parametrize(
    ("what", "command", "limit_s"),
    [
        ("import motet", ["-c", "import motet"], 0.3),
        ("motet --help", ["-c", "from motet.cli import main; main(['--help'])"], 0.4),
    ],
)
@pytest.mark.alone
def test_it_starts_at_once(what: str, command: list[str], limit_s: float) -> None:
    """Beyond what Python itself needs to start; the best of some, since other programs run here too."""

    def best(arguments: list[str]) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, timeout=60, check=True)
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert best(command) - best(["-c", "pass"]) < limit_s, what


def test_the_search_for_garbage_goes_on_after_an_import_whatever_comes_of_it() -> None:
    before, meanwhile = gc.get_freeze_count(), True
    try:
        with contextlib.suppress(ImportError), importing_for_good():
            meanwhile = gc.isenabled()
            raise ImportError("no such module")
        assert not meanwhile
        assert gc.isenabled()
        assert gc.get_freeze_count() > before, "what is there is never searched again"
    finally:
        gc.unfreeze()
