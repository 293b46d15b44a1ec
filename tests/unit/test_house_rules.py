"""The rules of the house, kept by reading the code: who may import whom, and where torch and SQL may stand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import TOGETHER

ROOT = Path(__file__).parents[2]
PACKAGES = ("motet", "scheduler", "workers")
#: Rooms of placing.
ROOMS = ("records", "entries", "predictions", "asking", "ledger", "choice", "rebalancing")
#: The pure core: no clock, no I/O, nothing but the standard library, numpy and other pure modules.
PURE = (
    *(
        f"scheduler/{n}.py"
        for n in (
            "policy/plan",
            "policy/needs",
            "policy/prompt_order",
            "policy/prompt_cost",
            "policy/beginnings",
            "answers",
            "readable",
            "policy/carve",
            "policy/cost",
            "policy/fairness",
            "policy/capability",
            "policy/place",
            *(f"policy/placing/{room}" for room in ROOMS),
            "policy/pressure",
            "policy/lifecycle",
            "policy/liveness",
            "policy/folds",
            "policy/gather",
            "ask_times",
            "merge",
            "blocks",
            "explaining/case",
            "explaining/explain",
            "explaining/sentences",
            "simulation/fair_share",
            "simulation/kinds",
            "simulation/policy",
            "simulation/trial",
        )
    ),
    "motet/protocol/residency.py",
    *(f"workers/run/{n}.py" for n in ("batching", "lane", "turns")),
)
IMPURE = {
    "time",
    "os",
    "socket",
    "threading",
    "subprocess",
    "random",
    "sqlalchemy",
    "redis",
    "celery",
    "httpx",
    "torch",
}


def files(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a module, read once for all rules."""
    return tuple(ast.walk(ast.parse(path.read_text("utf-8"))))


def imports(path: Path) -> set[str]:
    """Every module named by an import statement anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("motet", {"scheduler", "workers", "torch", "transformers", "sqlalchemy"}),
        ("scheduler", {"workers", "torch", "transformers"}),
        ("workers", {"scheduler", "sqlalchemy", "psycopg"}),
    ],
)
def test_packages_point_inward(package: str, forbidden: set[str]) -> None:
    broken = {str(f.relative_to(ROOT)): tops(f) & forbidden for f in files(package)}
    assert not {name: found for name, found in broken.items() if found}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Module -> those it imports, inside functions and for the type checker too.

    ``from package import name`` is an edge to the module of that name where there is one, else to the package.
    """
    modules = {module_of(path): path for path in files(*PACKAGES)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = graph[module] = set()
        for node in nodes(path):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in modules else node.module for name in names}
        found &= modules.keys() - {module}
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_file_is_longer_than_700_lines() -> None:
    """Longer ones held two subjects each time that one was looked at."""
    lines = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files(*PACKAGES)}
    assert {name: n for name, n in lines.items() if n > 700} == {}


def test_torch_is_imported_by_engines_and_the_device_alone() -> None:
    users = {str(f.relative_to(ROOT)) for f in files("workers") if tops(f) & {"torch", "transformers"}}
    assert all(u.startswith("workers/engines/") or u == "workers/run/device.py" for u in users), users


@pytest.mark.parametrize("name", PURE)
def test_the_pure_core_has_no_clock_and_no_io(name: str) -> None:
    assert not tops(ROOT / name) & IMPURE


def test_sql_stands_in_the_store_alone() -> None:
    statement = re.compile(r"\b(SELECT .+ FROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM)\b")
    users = {
        str(f.relative_to(ROOT))
        for f in files(*PACKAGES)
        for node in nodes(f)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and statement.search(node.value)
    }
    assert {u for u in users if not u.startswith("scheduler/store/")} == set()


def test_redis_keys_are_known_to_the_transport_alone() -> None:
    key = re.compile(r"motet:(w|outcomes|workers|canary|dead)\b|motet\.gpu\.")
    allowed = {"motet/protocol/transport/keys.py", "motet/local/valkey.py"}
    users = {
        str(f.relative_to(ROOT))
        for f in files(*PACKAGES)
        for node in nodes(f)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and key.search(node.value)
    }
    assert users <= allowed, users - allowed


def test_one_module_speaks_http_to_the_api_and_two_to_strangers_servers() -> None:
    users = {
        str(f.relative_to(ROOT))
        for f in files(*PACKAGES)
        for node in nodes(f)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "httpx"
        # A type in an annotation calls nobody.
        if node.attr != "Response"
    }
    assert users == {
        "motet/http.py",
        "workers/engines/served/chat_server.py",
        "workers/engines/served/vllm.py",
    }


def test_a_public_name_of_a_type_is_given_once() -> None:
    """Classes and type aliases; verbs may stand at both sides of a border, such as a route's and the store's."""
    homes: dict[str, set[str]] = {}
    for path in files(*PACKAGES):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) and node.name[0] != "_" else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [
                    t.id
                    for t in targets
                    if isinstance(t, ast.Name) and t.id[:1].isupper() and not t.id.isupper()
                ]
            for name in names:
                homes.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert {name: sorted(found) for name, found in homes.items() if len(found) > 1} == {}


def test_pickle_is_nowhere_but_in_the_reader_of_tables_which_knows_the_names_that_it_loads() -> None:
    users = [f for f in files(*PACKAGES) if tops(f) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}]
    assert users == [ROOT / "motet/apps/data/frames.py"]
    used = {
        node.attr
        for node in nodes(users[0])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    }
    assert used == {"Unpickler", "UnpicklingError"}, (
        "a subclass with find_class of its own, and never load or loads"
    )


def test_tests_that_one_process_runs_together_are_there() -> None:
    for folder, names in TOGETHER.items():
        assert set(names) <= {file.stem for file in (ROOT / folder).glob("test_*.py")}


def test_files_that_texts_name_are_there() -> None:
    named = re.compile(
        rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)}|tests|docs|bench|examples)/[a-z0-9_/.-]+\.(?:py|md)\b"
    )
    texts = [ROOT / "README.md", *files(*PACKAGES, "tests"), *(ROOT / "docs").rglob("*.md")]
    broken = {
        (str(text.relative_to(ROOT)), name)
        for text in texts
        for name in named.findall(text.read_text("utf-8"))
        if not (ROOT / name).exists()
    }
    assert broken == set()
