"""What docker-compose.yml promises, read without an engine; tests/compose/check.py proves it on a real one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from motet.local.flower import FlowerSettings
from motet.local.valkey import RIGHTS, acl
from motet.protocol.settings import Settings
from scheduler import __main__ as scheduler
from scheduler import health
from scheduler.bootstrap import FIRST_SCOPES, _read
from workers.launch.launcher import FAREWELL_S

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: s for name, s in SERVICES.items() if name not in ("postgres", "redis")}
#: They do one thing and end.
ONCE = {"migrate", "models", "motet"}
PREPARE = ROOT / "deploy/compose/prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = spec_from_file_location("prepare", PREPARE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_api_and_flower_are_published_and_only_on_loopback() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {
        "api": ["${API_LISTEN:-127.0.0.1:8700}:8700"],
        "flower": ["${FLOWER_LISTEN:-127.0.0.1:5555}:5555"],
    }
    assert not [name for name, s in SERVICES.items() if s.get("network_mode") or s.get("privileged")]


@pytest.mark.parametrize("name", SERVICES)
def test_no_process_is_root_or_can_become_it_or_write_where_it_should_not(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] in ("postgres", "redis", "10001:10001")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "cap_add" not in service
    # A named volume or memory; nothing of the host.
    assert not [v for v in service.get("volumes", ()) if v.split(":")[0] not in COMPOSE["volumes"]]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_bounds_and_one_that_stays_has_a_health_check_and_is_restarted(name: str) -> None:
    service = SERVICES[name]
    assert {"mem_limit", "pids_limit", "logging"} <= service.keys()
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    if name in ONCE:
        assert service["restart"] in ("no", "on-failure:3")
    else:
        assert service["restart"] == "unless-stopped"
        assert {"test", "interval", "timeout", "retries"} <= service["healthcheck"].keys()
        assert service["healthcheck"]["test"][:2] != ["CMD", "true"]


def test_whoever_needs_another_waits_until_it_is_well() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            expected = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert (name, needed, condition) == (name, needed, expected)


def test_workers_and_flower_are_on_no_network_with_postgres_and_neither_network_has_a_way_out() -> None:
    assert SERVICES["postgres"]["networks"] == ["store"]
    assert SERVICES["redis"]["networks"] == ["wire"]
    assert {n for n, s in SERVICES.items() if "store" in s["networks"]} == {
        *("postgres", "migrate", "api", "dispatcher", "aggregator")
    }
    assert all(COMPOSE["networks"][name]["internal"] for name in ("store", "wire"))
    assert all(SERVICES[name]["networks"] == ["wire"] for name in ("worker-cpu", "worker-gpu"))


def test_every_setting_exists_and_every_secret_comes_from_a_file_that_its_service_is_given() -> None:
    known = {f"MOTET_{f.name.upper()}" for kind in (Settings, FlowerSettings) for f in fields(kind)}
    for name, service in OURS.items():
        given = {(s if isinstance(s, str) else s["source"]) for s in service.get("secrets", ())}
        read = set()
        for variable, value in service["environment"].items():
            if variable.startswith("MOTET_"):
                assert variable.removesuffix("_FILE") in known, (name, variable)
            if variable.endswith("_FILE"):
                read.add(value.removeprefix("/run/secrets/"))
            else:
                assert not re.search("TOKEN|PASSWORD|SECRET|_URL$", variable) or value == "http://api:8700"
        assert read | ({"tokens"} if name == "migrate" else set()) == given, name


@pytest.mark.parametrize("name", OURS)
def test_every_command_exists(name: str) -> None:
    service = OURS[name]
    for command in (
        [*service.get("entrypoint", ()), *service["command"]],
        service.get("healthcheck", {}).get("test", ["CMD", "motet"])[1:],
    ):
        if command[0] == "motet":
            assert find_spec("motet.cli")
        elif command[1] == "-c":
            compile(command[2], "health check", "exec")
        else:
            assert command[:3] == ["python", "-P", "-m"]
            assert find_spec(command[3])
            if command[3] == "scheduler":
                assert command[4] in scheduler.PROCESSES
                assert command[4] != "health" or command[5] in health.PROCESSES


def test_a_stop_waits_longer_than_the_grace_that_a_process_takes() -> None:
    for name in ("worker-cpu", "worker-gpu"):
        grace_s = float(SERVICES[name]["environment"]["MOTET_GRACE_S"])
        assert _seconds(SERVICES[name]["stop_grace_period"]) > grace_s + FAREWELL_S


def test_a_gpu_worker_asks_for_gpus_and_is_started_only_on_request() -> None:
    worker = SERVICES["worker-gpu"]
    assert worker["profiles"] == ["gpu"]
    assert worker["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    ]


def test_redis_forgets_nothing_silently_and_is_bounded_like_the_embedded_one() -> None:
    command = SERVICES["redis"]["command"]
    said = dict(zip(command[1::2], command[2::2], strict=True))
    assert said["--maxmemory-policy"] == "noeviction"
    assert (said["--appendonly"], said["--appendfsync"]) == ("yes", "everysec")
    embedded = (ROOT / "motet/local/valkey.py").read_text("utf-8")
    for option in ("proto-max-bulk-len", "client-output-buffer-limit", "tcp-keepalive", "maxmemory-policy"):
        assert f'"{option} {said[f"--{option}"]}"' in embedded


def test_the_env_file_tells_of_every_variable_and_of_no_other(prepare: ModuleType) -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text("utf-8")))
    told = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", prepare.ENV, re.MULTILINE))
    assert told.keys() == used
    assert told == defaults


def test_the_dockerfile_can_be_built_by_any_builder_and_names_no_host() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert not re.search(r"^# *syntax=|--mount|https?://", dockerfile, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    assert {s["build"]["target"] for s in OURS.values() if "build" in s} <= stages
    arguments = set(re.findall(r"^ARG ([A-Z_]+)", dockerfile, re.MULTILINE))
    assert {a for s in OURS.values() if "build" in s for a in s["build"]["args"]} == arguments
    # Each image is built once, and found under its name by the other services.
    assert len({s["image"] for s in OURS.values()}) == sum("build" in s for s in OURS.values())


def test_secrets_are_made_once_and_never_written_again(tmp_path: Path) -> None:
    assert "made secrets/postgres_password" in _prepare(tmp_path)
    first = dict(_files(tmp_path))
    (tmp_path / ".env").write_text("CPU_WORKERS=7\n", "utf-8")
    assert "everything is there already" in _prepare(tmp_path)
    assert dict(_files(tmp_path)) == {**first, ".env": "CPU_WORKERS=7\n"}

    # One that is lost is made anew, with all that follows from it, and no other changes.
    (tmp_path / "secrets/redis_worker_url").unlink()
    assert "made secrets/redis_worker_url, secrets/redis.acl\n" in _prepare(tmp_path)
    changed = {name for name, text in _files(tmp_path) if text != first[name]}
    assert changed == {"secrets/redis_worker_url", "secrets/redis.acl", ".env"}


def test_the_folder_is_closed_and_what_a_container_is_given_can_be_read_there(tmp_path: Path) -> None:
    _prepare(tmp_path)
    folder = tmp_path / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert {s["file"] for s in COMPOSE["secrets"].values()} == {f"secrets/{p.name}" for p in folder.iterdir()}
    ignored = subprocess.run(
        ["git", "check-ignore", "secrets/user_token", ".env", "deploy/compose/wheels/x.whl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(ignored.stdout.split()) == 3


def test_the_secrets_are_what_the_processes_take(tmp_path: Path) -> None:
    _prepare(tmp_path)
    folder = tmp_path / "secrets"

    def said(name: str) -> str:
        return (folder / name).read_text("utf-8")

    tokens = _read(folder / "tokens.json")
    assert tokens is not None
    assert {scope: token.shown for scope, token in tokens.items()} == {
        scope: said(f"{scope}_token") for scope in FIRST_SCOPES
    }
    assert json.loads(said("tokens.json")).keys() == set(FIRST_SCOPES)
    passwords = {role: said(f"redis_{role}_url").split(":")[2].split("@")[0] for role in RIGHTS}
    assert said("redis.acl").splitlines()[:-1] == acl(passwords)
    assert not [p for p in passwords.values() if p in said("redis.acl")]
    assert said("database_url").split(":")[2].split("@")[0] in said("postgres_init.sql")


def _prepare(root: Path) -> str:
    """Run it as a bare host would: any Python, and no package installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PREPARE), "--root", str(root)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _files(root: Path) -> Iterator[tuple[str, str]]:
    for path in root.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(root)), path.read_text("utf-8")


def _seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])
