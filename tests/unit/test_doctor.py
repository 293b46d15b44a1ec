"""What the doctor makes of facts, and that it sees this machine as it is."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from motet.doctor import STATES, Finding, checks, cluster, look
from motet.doctor.checks import GB, Driver, Folder, Package, Torch
from motet.doctor.cluster import PostgresFacts, RedisFacts, WorkerFacts
from motet.errors import SetupError
from motet.protocol.settings import Settings

H200 = "NVIDIA H200"


def states(found: list[Finding]) -> dict[str, str]:
    return {f.name: f.state for f in found}


def one(found: list[Finding], name: str) -> Finding:
    [it] = [f for f in found if f.name == name]
    return it


def test_a_finding_survives_the_wire_and_strangers_are_refused() -> None:
    finding = checks.python((3, 10, 9))
    assert Finding.checked(finding.to_json()) == finding
    for bad in ({}, finding.to_json() | {"state": "dubious"}, finding.to_json() | {"what": 3}):
        with pytest.raises(ValueError, match="expected a finding"):
            Finding.checked(bad)


def test_old_python_fails() -> None:
    assert checks.python((3, 10, 9)).state == "fail"
    assert checks.python((3, 11, 0)).state == "ok"
    assert checks.python((4, 0, 0)).state == "ok"


# -- packages


def package(name: str, wanted: str = "", found: str | None = "1", fits: bool = True) -> Package:
    return Package(name=name, wanted=wanted, found=found, fits=fits)


def test_an_extra_counts_as_wanted_where_its_mark_is_installed() -> None:
    redis = package("redis", ">=8.1,<9", "9.0", fits=False)
    alone = checks.packages("worker", [package("torch", found=None, fits=False), redis])
    assert alone.state == "skipped"
    wrong = checks.packages("worker", [package("torch"), redis, package("numpy", found=None, fits=False)])
    assert wrong.state == "fail"
    assert wrong.what == "redis 9.0, expected >=8.1,<9; numpy is missing"
    assert wrong.remedy == "pip install --upgrade 'motet[worker]'"
    assert checks.packages("", [package("click")]).state == "ok"


def test_the_packages_here_fit_what_motet_was_installed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f.name for f in look.packages()} == {"motet", *checks.MARKS}
    assert {f.state for f in look.packages()} <= {"ok", "skipped"}
    real = look.installed
    monkeypatch.setattr(look, "installed", lambda name: "9.0.1" if name == "redis" else real(name))
    wrong = one(look.packages(), "scheduler")
    assert wrong.state == "fail"
    assert "redis 9.0.1, expected <9,>=8.1" in wrong.what
    monkeypatch.setattr(look, "installed", lambda name: "5.2.0" if name == "transformers" else real(name))
    assert "transformers 5.2.0" in one(look.packages(), "worker").what


# -- folders


def folder(**changed: object) -> Folder:
    facts = {
        "use": "data",
        "path": "/data",
        "exists": True,
        "writable": True,
        "owner": 1000,
        "me": 1000,
        "free_bytes": 100 * GB,
        "filesystem": "ext4",
    }
    return Folder(**{**facts, **changed})  # type: ignore[arg-type]


def test_a_good_folder_is_fine() -> None:
    assert set(states(checks.folder(folder())).values()) == {"ok"}
    assert "not made yet" in one(checks.folder(folder(exists=False, owner=0)), "data folder").what


@pytest.mark.parametrize(
    ("changed", "name", "state", "words"),
    [
        ({"writable": False, "owner": 0}, "data folder", "fail", "belongs to user 0"),
        ({"writable": False}, "data folder", "fail", "read-only"),
        ({"owner": 0}, "data folder", "warn", "belongs to user 0"),
        ({"free_bytes": 4 * GB}, "data room", "warn", "4.0 GB free"),
        ({"free_bytes": GB // 4}, "data room", "fail", "stops taking jobs"),
        ({"filesystem": "nfs4"}, "data filesystem", "warn", "nfs4"),
        ({"filesystem": "tmpfs"}, "data filesystem", "warn", "reboot"),
    ],
)
def test_a_bad_folder_is_named(changed: dict[str, object], name: str, state: str, words: str) -> None:
    found = one(checks.folder(folder(**changed)), name)
    assert (found.state, bool(found.remedy)) == (state, True)
    assert words in found.what


def test_a_cache_in_memory_is_nobodys_loss() -> None:
    assert "cache filesystem" not in states(checks.folder(folder(use="cache", filesystem="tmpfs")))


def test_folders_are_seen_as_they_are(tmp_path: Path) -> None:
    there = look.folder("data", tmp_path)
    assert (there.exists, there.writable, there.owner) == (True, True, os.geteuid())
    assert there.free_bytes > 0
    assert there.filesystem
    none = look.folder("data", tmp_path / "a" / "b")
    assert (none.exists, none.writable) == (False, True)
    (tmp_path / "file").touch()
    assert not look.folder("data", tmp_path / "file" / "b").writable
    assert look.folder("data", Path("/proc/none")).filesystem == "proc"


def test_sockets_need_a_short_folder_that_can_be_written_to() -> None:
    long = "/" + "x" * 90
    assert checks.socket_folder({long: True, "/tmp": True}).what.endswith("/tmp")
    bad = checks.socket_folder({long: True, "/tmp": False})
    assert bad.state == "fail"
    assert "TMPDIR" in bad.remedy


def test_few_open_files_are_named() -> None:
    assert checks.open_files(128, False).state == "fail"
    assert checks.open_files(1024, False).state == "ok"
    assert checks.open_files(1024, True).state == "warn"
    assert checks.open_files(65536, True).state == "ok"


# -- ports


def test_a_port_of_another_program_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        api = one(look.ports(Settings(api_port=taken)), "API")
        assert (api.state, api.what) == ("fail", f"another program has port {taken}")
        assert "--port 0" in api.remedy
    assert one(look.ports(Settings(api_port=taken)), "API").state == "ok"


def test_a_port_that_is_ours_is_fine() -> None:
    assert checks.port("API", 8700, taken=True, ours=True, option="--port").state == "ok"


# -- GPUs


def driver(n: int = 2, mig: tuple[bool, ...] = ()) -> Driver:
    return Driver(
        device_files=n,
        version="580.1",
        error="",
        names=(H200,) * n,
        uuids=tuple(f"GPU-{i}abc" for i in range(n)),
        mig=mig or (False,) * n,
    )


def torch(devices: int = 2, cuda: str = "12.8", available: bool = True, error: str = "") -> Torch:
    return Torch(version="2.13.0", cuda=cuda, available=available, devices=devices, error=error)


NO_GPU = Driver(device_files=0, version="", error="NVML Shared Library Not Found")


def test_gpus_that_torch_sees_are_fine() -> None:
    found = checks.gpus(driver(), None, torch())
    assert states(found) == {"driver": "ok", "torch": "ok"}
    assert one(found, "driver").what == f"NVIDIA 580.1: 2 × {H200}"


def test_a_machine_without_gpus_is_fine_too() -> None:
    assert states(checks.gpus(NO_GPU, None, torch(0, "", False))) == {"driver": "skipped", "torch": "ok"}
    assert states(checks.gpus(NO_GPU, "", None)) == {"driver": "skipped"}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (torch(0, cuda=""), "CPU build"),
        (torch(0, available=False), "sees no GPU of 2"),
        (torch(0, error="exit code -11"), "does not start: exit code -11"),
    ],
)
def test_a_torch_that_sees_no_gpu_fails(seen: Torch, words: str) -> None:
    found = one(checks.gpus(driver(), None, seen), "torch")
    assert found.state == "fail"
    assert words in found.what


def test_a_driver_that_does_not_answer_fails() -> None:
    broken = Driver(device_files=8, version="", error="Driver/library version mismatch")
    found = one(checks.gpus(broken, None, None), "driver")
    assert found.state == "fail"
    assert "mismatch" in found.what


@pytest.mark.parametrize(
    ("mask", "shown", "state"),
    [
        ("0,1", ["0", "1"], "ok"),
        ("1", ["1"], "ok"),
        ("GPU-1", ["GPU-1"], "ok"),
        ("", [], "warn"),
        ("-1", [], "warn"),
        ("0,7", ["0"], "warn"),
        ("0,-1,1", ["0"], "warn"),
        ("GPU-9", [], "warn"),
    ],
)
def test_a_mask_is_read_as_cuda_reads_it(mask: str, shown: list[str], state: str) -> None:
    assert checks.visible(mask, driver()) == shown
    assert one(checks.gpus(driver(), mask, torch(len(shown))), "mask").state == state


def test_torch_is_held_against_the_mask_not_against_all_gpus() -> None:
    assert one(checks.gpus(driver(), "1", torch(1)), "torch").state == "ok"
    assert one(checks.gpus(driver(), None, torch(1)), "torch").state == "warn"


def test_mixed_mig_is_named() -> None:
    found = one(checks.gpus(driver(mig=(True, False)), None, torch()), "MIG")
    assert found.state == "warn"
    assert "GPU 0 split by MIG, the others are whole" in found.what


def test_torch_is_asked_in_a_process_whose_crash_is_a_finding() -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    seen = look.torch(os.environ, (sys.executable, "-c", crash))
    assert seen is not None
    assert seen.error == "exit code -11"
    seen = look.torch(os.environ, (sys.executable, "-c", "raise ImportError('libcudart.so.12')"))
    assert seen is not None
    assert "libcudart.so.12" in seen.error
    seen = look.torch(os.environ, (sys.executable, "-c", "print('hello')"))
    assert seen is not None
    assert seen.error
    good = 'print(\'{"version": "1", "cuda": "", "available": false, "devices": 0}\')'
    assert look.torch(os.environ, (sys.executable, "-c", good)) == torch_of_cpu()


def torch_of_cpu() -> Torch:
    return Torch(version="1", cuda="", available=False, devices=0)


def test_a_slow_cpu_is_named() -> None:
    assert checks.cpu(frozenset({"sse4_2"}), 4).state == "warn"
    assert checks.cpu(frozenset({"avx2", "amx_bf16"}), 4).what == "4 cores with amx_bf16, avx2"
    assert checks.cpu(frozenset(), 4).state == "ok"


# -- clocks, addresses, versions


def test_clocks_may_differ_and_are_named() -> None:
    assert checks.clock(1.0, "the server").state == "ok"
    wrong = checks.clock(-300.0, "the server")
    assert (wrong.state, "no lease depends on it" in wrong.what) == ("warn", True)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://8.8.8.8:8700", True),
        ("https://8.8.8.8", False),
        ("http://10.1.2.3:8700", False),
        ("http://127.0.0.1:8700", False),
        ("http://api:8700", False),
    ],
)
def test_a_token_in_clear_on_the_internet_is_named(url: str, warned: bool) -> None:
    assert (cluster.in_clear(url) is not None) == warned


def test_another_version_warns_and_another_protocol_fails() -> None:
    assert cluster.versions("1", "1", 1, 1).state == "ok"
    assert cluster.versions("1", "2", 1, 1).state == "warn"
    assert cluster.versions("1", "2", 1, 2).state == "fail"


# -- Redis, Postgres, workers


def test_old_redis_fails_and_a_far_one_warns() -> None:
    good = {"maxmemory_policy": "noeviction", "maxmemory": GB, "used_memory": 0, "aof_enabled": 1}
    found = cluster.redis(RedisFacts(version="6.0.16", info=good, rtt_s=0.2), "scheduler")
    assert states(found) == {
        "reach": "warn",
        "version": "fail",
        "rights": "ok",
        "policy": "ok",
        "memory": "ok",
        "persistence": "ok",
    }
    assert states(cluster.redis(RedisFacts(version="10.1", info=good), "worker"))["version"] == "ok"


def postgres(**changed: object) -> dict[str, str]:
    facts = {
        "release": 17,
        "version": "17.2",
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": 100,
        "free_connections": 80,
        "size_bytes": GB,
        "revision": "0002",
        "head": "0002",
        "clock_s": 0.0,
    }
    return states(cluster.postgres(PostgresFacts(**{**facts, **changed})))  # type: ignore[arg-type]


def test_postgres_is_judged() -> None:
    assert set(postgres().values()) == {"ok"}
    assert postgres(release=14)["version"] == "fail"
    assert postgres(revision=None)["migrations"] == "fail"
    assert postgres(fsync="off")["durability"] == "fail"
    assert postgres(synchronous_commit="remote_write")["durability"] == "ok"
    assert postgres(free_connections=10)["connections"] == "warn"
    assert postgres(free_connections=1)["connections"] == "fail"
    assert postgres(clock_s=-60)["clock"] == "warn"


def test_workers_are_judged() -> None:
    def worker(state: str, protocol: int = 1) -> WorkerFacts:
        return WorkerFacts(worker=f"{state}-{protocol}", state=state, protocol=protocol)

    assert states(cluster.workers([], 1)) == {"ready": "warn"}
    assert states(cluster.workers([worker("ready"), worker("starting")], 1)) == {"ready": "ok"}
    assert states(cluster.workers([worker("draining")], 1)) == {"ready": "fail"}
    assert states(cluster.workers([worker("ready"), worker("silent")], 1)) == {
        "ready": "ok",
        "silent": "warn",
    }
    assert states(cluster.workers([worker("ready", 2)], 1)) == {"ready": "fail", "protocol": "fail"}


def test_no_leader_no_aggregator_and_a_long_stream_are_named() -> None:
    assert cluster.aggregator(None).state == cluster.aggregator(60).state == "fail"
    assert cluster.aggregator(0.5).state == "ok"
    assert cluster.leader(False, "", 0).state == "fail"
    assert cluster.backlog(5000).state == "warn"


# -- the whole


def test_webhooks_that_fail_for_long_and_events_that_nobody_delivers_are_named() -> None:
    assert cluster.webhooks(0, {}, 0, 0.0) == []
    (fine,) = cluster.webhooks(3, {}, 0, 0.0)
    assert (fine.state, fine.what) == ("ok", "3 webhooks, none of which fails for long")
    failing = {f"wh_{n}": 3600.0 * n for n in range(1, 8)}
    mute, behind = cluster.webhooks(9, failing, 1200, 90.0)
    assert (mute.state, mute.what) == (
        "warn",
        "wh_7, wh_6, wh_5, wh_4, wh_3 and 2 more took nothing for up to 7.0 h",
    )
    assert "motet webhooks list" in mute.remedy
    assert (behind.state, behind.what) == (
        "fail",
        "1,200 events are due for up to 90 s, and are not delivered",
    )
    assert "scheduler api" in behind.remedy


def test_settings_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "torch", lambda env: None)
        found = look.everything({"MOTET_API_PORT": "eighty", "MOTET_HOME": str(tmp_path)})
    bad = one(found, "settings")
    assert bad.state == "fail"
    assert "MOTET_API_PORT" in bad.what
    assert all(f.state in STATES for f in found)


def test_a_url_that_is_none_is_a_finding(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        look.redis("http://nowhere", "worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "machine", lambda *_: [])
        env = {"MOTET_REDIS_URL": "mysql://user:secret@host", "MOTET_HOME": str(tmp_path)}
        found = [f for f in look.everything(env) if f.area == "redis"]
    assert [(f.name, f.state) for f in found] == [("reach", "fail")]
    assert "secret" not in found[0].what
