"""What the launcher decides: which workers, with which mask and threads, and when to start one again."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motet.errors import SetupError
from motet.local.children import MARK
from motet.protocol.settings import Settings
from motet.protocol.transport import TransportLost
from workers.launch.forkserver import server_environment
from workers.launch.herald import Herald
from workers.launch.launcher import (
    BACK_OFF_S,
    Launcher,
    Slot,
    environment,
    plan_slots,
    restart_delay_s,
    visible_gpus,
    worker_name,
)
from workers.launch.pulse import LOADING_SILENCE_S, SILENCE_S, Pulse, Pulses


def slots(
    cpus: int = 0, gpus: str = "", visible: str = "", cores: int = 16, host: str = "node-1"
) -> list[Slot]:
    return plan_slots(
        host=host, cpus=cpus, gpus=gpus, visible=visible.split(",") if visible else [], cores=cores
    )


def test_every_gpu_gets_a_worker_and_its_share_of_the_cores() -> None:
    found = slots(gpus="all", visible="0,1,2,3")
    assert [(s.worker, s.mask, s.threads) for s in found] == [
        ("node-1-gpu0", "0", 4),
        ("node-1-gpu1", "1", 4),
        ("node-1-gpu2", "2", 4),
        ("node-1-gpu3", "3", 4),
    ]


def test_a_group_of_gpus_is_one_worker_that_sees_them_all() -> None:
    assert [(s.worker, s.mask) for s in slots(gpus="0,2+3", visible="0,1,2,3")] == [
        ("node-1-gpu0", "0"),
        ("node-1-gpu2-3", "2,3"),
    ]


def test_numbers_count_within_the_inherited_mask() -> None:
    assert [s.mask for s in slots(gpus="0,1", visible="GPU-aa,6,7")] == ["GPU-aa", "6"]


def test_cpu_slots_see_no_gpu_and_never_get_less_than_a_thread() -> None:
    found = slots(cpus=3, cores=2, visible="0")
    assert [(s.worker, s.mask, s.threads, s.slots) for s in found] == [
        (f"node-1-cpu{i}", "", 1, 3) for i in range(3)
    ]
    assert plan_slots(host="h", cpus=1, gpus="", visible=[], cores=8, threads=2)[0].threads == 2


@pytest.mark.parametrize("gpus", ["4", "0,0", "0+0", "a", "0,", "1-2", "-1"])
def test_gpus_that_are_not_there_are_refused(gpus: str) -> None:
    with pytest.raises(SetupError, match=r"--gpus: got .*expected all, or numbers below 4"):
        slots(gpus=gpus, visible="0,1,2,3")


def test_no_device_at_all_says_what_to_give() -> None:
    with pytest.raises(SetupError, match="give --cpus N"):
        slots(gpus="all")


def test_the_inherited_mask_is_what_may_be_used() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4, GPU-ab,7"}) == ["4", "GPU-ab", "7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,2"}) == ["1"]


def test_threads_and_mask_are_set_before_anything_is_imported() -> None:
    env = environment(Slot("w", "cuda", "2,3", 4, 1), {"PATH": "/bin", "OMP_NUM_THREADS": "64"})
    assert env["PATH"] == "/bin"
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("2,3", "PCI_BUS_ID")
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "4"
    assert (env["OMP_WAIT_POLICY"], env["TOKENIZERS_PARALLELISM"], env["HF_HUB_OFFLINE"]) == (
        "PASSIVE",
        "false",
        "1",
    )


def test_names_fit_into_keys_patterns_and_labels() -> None:
    assert worker_name("Büro_PC.local") == "b-ro-pc-local"
    assert worker_name("x" * 99) == "x" * 60
    with pytest.raises(SetupError, match="worker name"):
        worker_name("…")


def test_a_worker_is_started_again_at_once_unless_it_keeps_dying_right_away() -> None:
    assert restart_delay_s(3600, quick_deaths=5) == 0
    delays = [restart_delay_s(0.1, quick_deaths=n) for n in range(8)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[-1] == BACK_OFF_S[-1] == 5


@pytest.fixture
def launchers(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Makes launchers of one slot on a clock that stands still; their processes end with the test."""
    made = []

    def launcher(program: str, now: list[float], **more: Any) -> Launcher:
        settings = Settings(redis_url="redis://x", cache_dir=str(tmp_path))
        one = Launcher(
            slots(cpus=1),
            settings,
            {},
            clock=lambda: now[0],
            command=lambda slot: [sys.executable, "-c", program],
            **more,
        )
        made.append(one)
        return one

    yield launcher
    for one in made:
        for charge in one._charges:
            charge.process.end()


def ended(launcher: Launcher) -> int:
    """Wait for the end of its process, and leave it to be reaped; return its number."""
    pid = launcher._charges[0].process.pid
    assert pid
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_a_dead_worker_is_replaced_by_the_next_step(launchers: Callable[..., Launcher]) -> None:
    now = [0.0]
    launcher = launchers("pass", now)
    pids = []
    for _ in range(3):
        launcher.step()
        pids.append(ended(launcher))
        now[0] += 60
    assert len(set(pids)) == 3
    now[0] -= 59.99  # this one died right away, and the one after it too
    launcher.step()
    ended(launcher)
    wait_s = launcher.step()
    assert 0 < wait_s <= BACK_OFF_S[1]
    assert not launcher._charges[0].process.alive


def test_a_death_is_told_with_the_name_of_the_next_process(launchers: Callable[..., Launcher]) -> None:
    now, told = [0.0], list[tuple[str, str]]()
    launcher = launchers(
        "import sys; print(sys.argv)", now, tell=lambda worker, boot: told.append((worker, boot))
    )
    charge = launcher._charges[0]
    launcher.step()
    first = charge.boot
    ended(launcher)
    now[0] += 60
    launcher.step()
    assert charge.boot != first
    assert launcher._herald.finish(5)
    assert told == [("node-1-cpu0", charge.boot)]


SAYS_ONCE = "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[-1][8:])); s.send(b'alive 10'); time.sleep(99)"


def until_heard(launcher: Launcher, now: list[float]) -> None:
    charge = launcher._charges[0]
    line = charge.process.line
    assert line
    assert select.select([line], [], [], 30)[0]
    launcher.step()


def test_a_worker_that_stands_still_is_killed_and_replaced(
    launchers: Callable[..., Launcher], caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    launcher = launchers(SAYS_ONCE, now)
    launcher.step()
    until_heard(launcher, now)
    for _ in range(10):
        now[0] += 1
        launcher.step()
    first = launcher._charges[0].process.pid
    assert launcher._charges[0].process.alive
    now[0] += 1
    launcher.step()
    assert ended(launcher) == first
    assert "worker stands still" in caplog.messages
    launcher.step()
    assert launcher._charges[0].process.pid != first


def test_silence_while_the_launcher_itself_was_stopped_kills_nobody(
    launchers: Callable[..., Launcher], caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    launcher = launchers(SAYS_ONCE, now)
    launcher.step()
    until_heard(launcher, now)
    for _ in range(5):
        now[0] += 60
        launcher.step()
    assert launcher._charges[0].process.alive
    assert "worker stands still" not in caplog.messages


def test_what_a_dead_worker_had_started_dies_with_it(
    launchers: Callable[..., Launcher], tmp_path: Path
) -> None:
    program = f"import subprocess, pathlib; p = subprocess.Popen(['sleep', '99']); pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid))"
    launcher = launchers(program, [0.0])
    launcher.step()
    ended(launcher)
    left = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{left}").exists()
    launcher.step()
    until = time.monotonic() + 10
    while Path(f"/proc/{left}").exists() and "Z" not in Path(f"/proc/{left}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.01)


# -- the herald


def test_the_herald_tries_again_until_redis_is_back_and_tells_only_the_newest() -> None:
    told, away = list[tuple[str, str]](), [True]

    def tell(worker: str, boot: str) -> None:
        if away[0]:
            raise TransportLost
        told.append((worker, boot))

    herald = Herald(tell)
    herald.announce("a", "1")
    herald.announce("b", "1")
    herald.announce("a", "2")
    assert not herald.finish(0.1)
    away[0] = False
    assert herald.finish(10)
    assert sorted(told) == [("a", "2"), ("b", "1")]


# -- pulses


def test_who_loads_may_be_silent_longer_than_who_works() -> None:
    pulses = Pulses()
    pulses.hear("works", 0.0, SILENCE_S)
    pulses.hear("loads", 0.0, LOADING_SILENCE_S)
    found = {second: pulses.silent(float(second)) for second in range(65)}
    assert found[8] == []
    assert found[9] == ["works"]
    pulses.forget("works")
    assert pulses.silent(64.5) == ["loads"]


def test_a_pulse_never_waits_for_a_launcher_that_does_not_listen() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pulse = Pulse(theirs.detach())
    for _ in range(10_000):
        pulse.say(10)
    assert ours.recv(64) == b"alive 10"
    ours.close()
    pulse.say(10)


# -- the fork server


def test_a_fork_server_is_told_no_secret_and_keeps_the_mark_by_which_it_is_found() -> None:
    env = server_environment(
        {"MOTET_TOKEN": "id.secret", "MOTET_REDIS_URL": "x", MARK: "/data", "PATH": "/bin"}
    )
    assert (env["PATH"], env[MARK]) == ("/bin", "/data")
    assert not {"MOTET_TOKEN", "MOTET_REDIS_URL"} & set(env)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_with_threads_is_not_copied() -> None:
    program = """
import threading
from workers.launch.forkserver import uncopyable
print(uncopyable() or "fine")
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(uncopyable())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["fine", "it has threads"]
