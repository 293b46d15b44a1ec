"""The systemd units: what they start exists, what they set is read, and systemd itself has no complaint."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from motet.cli import command
from motet.protocol.settings import Settings
from workers.launch.launcher import FAREWELL_S

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
VENV = "/opt/motet/.venv/bin/"
#: Of motet.local.flower, whose module wants Flower to be installed.
FLOWER = {"flower_address", "flower_port", "flower_user", "flower_password", "flower_cookie_secret"}


def lines(unit: Path) -> Iterator[tuple[str, str]]:
    """The settings of a unit; a key may come several times."""
    for line in unit.read_text("utf-8").splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            yield name, value


def values(unit: Path, name: str) -> list[str]:
    return [value for key, value in lines(unit) if key == name]


def ids(unit: Path) -> str:
    return unit.name


def test_every_process_has_a_unit() -> None:
    assert [u.stem for u in UNITS] == [
        f"motet-{name}" for name in ("aggregator", "api", "dispatcher", "flower", "migrate", "worker")
    ]
    assert (FOLDER / "motet.target").exists()


@pytest.mark.parametrize("unit", UNITS, ids=ids)
def test_what_a_unit_starts_exists(unit: Path) -> None:
    [line] = values(unit, "ExecStart")
    program, *arguments = shlex.split(line)
    assert program.startswith(VENV)
    if program == f"{VENV}motet":
        assert arguments[0] in command.commands
        assert arguments[1:] == ["$WORKER_OPTIONS"]
        return
    assert program == f"{VENV}python"
    assert arguments[:2] == ["-P", "-m"], "not from the current folder"
    module, *rest = arguments[2:]
    assert find_spec(module)
    if module == "scheduler":
        from scheduler.__main__ import PROCESSES

        assert rest[0] in PROCESSES
        assert len(rest) == 1


def test_every_setting_that_is_named_is_one_that_is_read() -> None:
    known = {f.name for f in fields(Settings)} | FLOWER
    for path in [*UNITS, FOLDER / "motet.env.example"]:
        for name in re.findall(r"\bMOTET_([A-Z_]+)", path.read_text("utf-8")):
            assert name.removesuffix("_FILE").lower() in known, f"{path.name}: MOTET_{name}"


def test_the_example_of_an_environment_is_taken_as_it_stands() -> None:
    env = dict(lines(FOLDER / "motet.env.example"))
    assert Settings.from_env(env) == Settings(), "the example shows the defaults"


@pytest.mark.parametrize("unit", UNITS, ids=ids)
def test_each_secret_comes_from_a_credential_and_from_nowhere_else(unit: Path) -> None:
    loaded = dict(value.split(":") for value in values(unit, "LoadCredential"))
    read = re.findall(r"(MOTET_[A-Z_]+)=%d/(\w+)", unit.read_text("utf-8"))
    assert {credential for _, credential in read} == set(loaded)
    assert all(name.endswith("_FILE") for name, _ in read)
    assert all(path == f"/etc/motet/secrets/{name}" for name, path in loaded.items())
    example = (FOLDER / "motet.env.example").read_text("utf-8")
    assert all(name in example for name in loaded), "the example says what each secret holds"
    if unit.stem == "motet-worker":
        assert "database_url" not in loaded, "a worker never sees Postgres"


@pytest.mark.parametrize("unit", UNITS, ids=ids)
def test_a_unit_gains_nothing_and_writes_only_to_its_own_folder(unit: Path) -> None:
    for name, value in {
        "User": "motet",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "UMask": "0077",
    }.items():
        assert values(unit, name) == [value], name
    assert not values(unit, "ReadWritePaths")
    # torch compiles code at run time, and GPUs are devices.
    assert not values(unit, "MemoryDenyWriteExecute")
    assert bool(values(unit, "PrivateDevices")) == (unit.stem != "motet-worker")


@pytest.mark.parametrize("unit", UNITS, ids=ids)
def test_a_unit_comes_back_and_ends_in_time(unit: Path) -> None:
    assert values(unit, "StartLimitIntervalSec") == ["0"]
    assert values(unit, "RestartPreventExitStatus") == ["2"]
    if unit.stem != "motet-migrate":
        assert values(unit, "Restart") == ["always"]
    assert values(unit, "PartOf") == values(unit, "WantedBy") == ["motet.target"]
    if unit.stem == "motet-worker":
        assert values(unit, "KillMode") == ["mixed"]
        assert float(values(unit, "TimeoutStopSec")[0]) >= Settings().grace_s + FAREWELL_S + 2


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here (Debian: apt install systemd)")
    programs = str(Path(sys.executable).parent) + "/"
    assert Path(programs, "motet").exists()
    for path in [*UNITS, FOLDER / "motet.target"]:
        (tmp_path / path.name).write_text(path.read_text("utf-8").replace(VENV, programs))
    ran = subprocess.run(
        [analyze, "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
