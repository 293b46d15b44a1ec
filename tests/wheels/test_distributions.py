"""Two wheels from one checkout: a client beside strangers' packages, and the cluster's processes. Built without a network."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.integration.api_house import House, a_house

ROOT = Path(__file__).parents[2]
#: What the wheels are made of (Dockerfile, .dockerignore).
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "motet",
    "scheduler",
    "workers",
    "migrations",
    "deploy/cluster",
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution -> its wheel, built from a copy: a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            )
        else:
            shutil.copy(source, target)
    out = tmp_path_factory.mktemp("wheels")
    pip(
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(out),
        ".",
        "./deploy/cluster",
        cwd=copy,
    )
    return {wheel.name.partition("-")[0]: wheel for wheel in out.glob("*.whl")}


@pytest.fixture(scope="module")
def client_bin(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the client, what it asks for, and strangers called scheduler and workers."""
    place = tmp_path_factory.mktemp("client")
    venv.create(place)
    pip(
        "--python",
        str(place / "bin/python"),
        "install",
        "--no-index",
        "--no-deps",
        str(wheels["motet"]),
        cwd=place,
    )
    [packages] = place.glob("lib/python*/site-packages")
    for distribution in asked_for("motet"):
        for file in distribution.files or ():
            if ".." not in file.parts and (source := Path(str(file.locate()))).is_file():
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    for name in ("scheduler", "workers", "migrations"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(f"raise RuntimeError('the {name} of somebody else')\n")
    return place / "bin"


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path) as found:
        yield found


def clean_env() -> dict[str, str]:
    """Without what would show the checkout, or a server, to another Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MOTET_", "PYTHON"))}


def pip(*words: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *words]
    done = subprocess.run(command, cwd=cwd, env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def asked_for(name: str) -> Iterator[metadata.Distribution]:
    """What a distribution needs without its extras, and what that needs, as installed here."""
    seen, ahead = {name}, [name]
    while ahead:
        for line in metadata.requires(ahead.pop()) or ():
            wanted = Requirement(line)
            there = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if there and wanted.name not in seen:
                seen.add(wanted.name)
                ahead.append(wanted.name)
                yield metadata.distribution(wanted.name)


def run(program: Path, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(cwd), "MOTET_HOME": str(cwd / "home")}
    return subprocess.run(
        [program, *words], cwd=cwd, env={**clean_env(), **home, **env}, capture_output=True, text=True
    )


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_clients_wheel_brings_one_package_and_the_clusters_the_other_three(
    wheels: dict[str, Path],
) -> None:
    tops = {
        name: {file.partition("/")[0] for file in names_in(wheel)} - {f"{name}-0.1.0.dist-info"}
        for name, wheel in wheels.items()
    }
    assert tops == {"motet": {"motet"}, "motet_cluster": {"scheduler", "workers", "migrations"}}
    for packages in (("motet",), ("scheduler", "workers", "migrations")):
        wheel = wheels["motet" if packages == ("motet",) else "motet_cluster"]
        found = (f for name in packages for f in (ROOT / name).rglob("*") if f.is_file())
        expected = {str(f.relative_to(ROOT)) for f in found if f.suffix != ".pyc"}
        assert expected <= set(names_in(wheel)), "modules, templates, heads and what else lies there"


def test_engines_come_with_the_cluster_and_the_applications_functions_with_motet(
    wheels: dict[str, Path],
) -> None:
    engines = {name: _entry_points(wheels[name], name) for name in wheels}
    assert engines["motet_cluster"]
    assert all(point.startswith("workers.engines.") for point in engines["motet_cluster"].values())
    assert all(point.startswith("motet.apps.functions.") for point in engines["motet"].values())
    assert not engines["motet"].keys() & engines["motet_cluster"].keys()


def _entry_points(wheel: Path, name: str) -> dict[str, str]:
    """Those of the group ``motet.engines``, by name."""
    read = configparser.ConfigParser(delimiters=("=",))
    read.read_string(_read(wheel, f"{name}-0.1.0.dist-info/entry_points.txt").decode())
    return dict(read["motet.engines"])


def _read(wheel: Path, name: str) -> bytes:
    return zipfile.ZipFile(wheel).read(name)


def test_a_client_works_beside_a_strangers_scheduler(client_bin: Path, house: House, tmp_path: Path) -> None:
    server = {"MOTET_URL": house.url, "MOTET_TOKEN": house.tokens["user"]}
    code = "import motet, sys; print(motet.__file__, 'scheduler' in sys.modules)"
    where = run(client_bin / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert where[0].startswith(str(client_bin.parent))
    assert where[1] == "False"
    assert "Several AI tasks at once" in run(client_bin / "motet", "--help", cwd=tmp_path).stdout

    submit = (
        "from motet import Classify, Client\n"
        "print(Client().submit(['a', 'b', 'c'], {'topic': Classify('topics')}).id)"
    )
    job = run(client_bin / "python", "-c", submit, cwd=tmp_path, **server)
    assert job.returncode == 0, job.stderr
    house.answer(job.stdout.strip(), 0)
    read = run(client_bin / "motet", "results", job.stdout.strip(), "--json", cwd=tmp_path, **server)
    assert read.returncode == 0, read.stderr
    assert read.stdout.count('"topic"') == 3


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["up", "--cpus", "1"], "all"),
        (["demo"], "all"),
        (["worker", "--cpus", "1"], "worker"),
        (["models", "add", "here", "--name", "mine"], "worker"),
        (["simulate", "--gpus", "1xL4"], "scheduler"),
    ],
)
def test_what_needs_the_cluster_says_in_a_sentence_what_to_install(
    client_bin: Path, tmp_path: Path, command: list[str], extra: str
) -> None:
    ended = run(client_bin / "motet", *command, cwd=tmp_path)
    assert ended.returncode == 1, ended.stdout
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: this needs motet-cluster")
    assert line.endswith(f"pip install 'motet[{extra}]'")


def test_the_doctor_takes_a_stranger_for_no_scheduler(client_bin: Path, tmp_path: Path) -> None:
    found = run(client_bin / "motet", "doctor", "--json", cwd=tmp_path)
    assert found.stderr == ""
    assert "somebody else" not in found.stdout
