"""What the launcher decides: which workers, with which mask and threads, and when to start one again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from motet.errors import SetupError
from motet.settings import Settings
from workers.launcher import (
    BACK_OFF_S,
    Launcher,
    Slot,
    environment,
    plan_slots,
    restart_delay_s,
    visible_gpus,
    worker_name,
)


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


def test_a_dead_worker_is_replaced_by_the_next_step(tmp_path: Path) -> None:
    now = [0.0]
    settings = Settings(redis_url="redis://x", cache_dir=str(tmp_path))
    launcher = Launcher(
        slots(cpus=1),
        settings,
        {},
        clock=lambda: now[0],
        command=lambda slot: [sys.executable, "-c", "pass"],
    )
    charge = launcher._charges[0]
    pids = []
    for _ in range(3):
        launcher.step()
        pids.append(charge.child.pid)
        charge.child.wait(30)
        now[0] += 60
    assert len(set(pids)) == 3
    now[0] -= 59.99  # this one died right away, and the one after it too
    launcher.step()
    charge.child.wait(30)
    wait_s = launcher.step()
    assert 0 < wait_s <= BACK_OFF_S[1]
    assert not charge.child.alive
