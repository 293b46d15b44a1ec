"""Real worker processes on a real GPU: what their mask shows them, what they say of it, and that a lost one is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from motet.local.valkey import ValkeyUrls
from motet.protocol.columns import values
from tests.processes.test_worker_process import Blobs, Stage, blobs, eventually, running, set_up  # noqa: F401
from workers.run.app import EXIT_DEVICE
from workers.run.device import probe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

ENGINES = '''
import os

def seen(texts):
    """What this process sees of GPUs."""
    import torch
    cards = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return [{"mask": os.environ["CUDA_VISIBLE_DEVICES"], "cards": cards} for _ in texts]


class Poison:
    """Asks for a row of a table that is not there, which ends a GPU's context, where a text says so."""

    def memory_mb(self, model, in_format):
        return 1

    def load(self, model, files, *, device, in_format):
        import torch
        return torch.zeros(2, 2, device=device)

    def attach(self, handle, task, files): ...

    def prepare(self, pass_, texts):
        from workers.engine import Prepared
        return [Prepared(i, 1, False, text) for i, text in enumerate(texts)]

    def run(self, pass_, batch):
        import torch
        from workers.engines.function import json_column
        from workers.engines.trunk import torch_errors
        with torch_errors():
            rows = [99 if "poison" in row.inputs else 1 for row in batch]
            torch.nn.functional.embedding(torch.tensor(rows, device="cuda"), pass_.handle).cpu()
        return {task.name: json_column([row.inputs for row in batch]) for task in pass_.tasks}

    def unload(self, handle): ...
'''


@pytest.fixture
def stage(
    tmp_path: Path,
    redis_urls: ValkeyUrls,
    blobs: Blobs,  # noqa: F811
) -> Iterator[Stage]:
    for ready in set_up(tmp_path, redis_urls, blobs):
        (tmp_path / "gpu_engines.py").write_text(ENGINES)
        points = tmp_path / "test_engines-1.0.dist-info" / "entry_points.txt"
        points.write_text(points.read_text() + "seen = gpu_engines:seen\npoison = gpu_engines:Poison\n")
        yield ready


def first_card() -> str:
    return str(torch.cuda.get_device_properties(0).uuid)


@pytest.mark.parametrize("inherited", ["", "uuid"])
def test_a_worker_of_the_first_gpu_sees_that_one_alone(stage: Stage, inherited: str) -> None:
    mask = {"CUDA_VISIBLE_DEVICES": f"GPU-{first_card().removeprefix('GPU-')}"} if inherited else {}
    stage.run("workers", "--gpus", "0", "--name", "h", **mask)
    beat = stage.beat("h-gpu0")
    assert (beat.device_kind, beat.gpus, beat.spreads) == ("cuda", 1, ())
    assert beat.device_name == torch.cuda.get_device_name(0)
    order = stage.order("seen", "what?")
    stage.scheduler.publish_all({"h-gpu0": [order]})
    [found] = values(stage.outcome(order).columns["answer"])
    assert found["cards"] == [first_card()]
    if inherited:
        assert found["mask"] == mask["CUDA_VISIBLE_DEVICES"]


def test_a_gpu_that_is_not_there_is_refused_in_words(stage: Stage) -> None:
    count = torch.cuda.device_count()
    assert stage.run("workers", "--gpus", str(count + 7), "--name", "h").wait(90) == 2
    assert f"{count + 7}" in stage.log


def test_a_worker_tells_what_the_driver_measures(stage: Stage) -> None:
    import pynvml

    stage.run("workers", "--gpus", "0", "--name", "h")
    beat = stage.beat("h-gpu0")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{first_card().removeprefix('GPU-')}")
    used_mb = pynvml.nvmlDeviceGetMemoryInfo(handle).used >> 20
    assert beat.memory_mb == torch.cuda.get_device_properties(0).total_memory >> 20
    # Of the same GPU, at nearly the same time.
    assert abs(beat.memory_used_mb - used_mb) < 1024
    assert 0 <= beat.utilisation <= 1
    device = probe("cuda")
    assert len(device.nvml) == torch.cuda.device_count()
    assert 0 <= (device.utilisation() or 0.0) <= 1


def test_a_worker_whose_gpu_is_lost_is_replaced_and_works_again(stage: Stage) -> None:
    stage.run("workers", "--gpus", "0", "--name", "h")
    before = stage.beat("h-gpu0")
    fine = stage.order("poison", "fine")
    stage.scheduler.publish_all({"h-gpu0": [fine]})
    assert stage.outcome(fine).verdict == "done"
    stage.scheduler.publish_all({"h-gpu0": [stage.order("poison", "poison")]})
    after = stage.beat("h-gpu0", unlike=before.boot)
    assert not running(before.pid)
    assert str(EXIT_DEVICE) in stage.log
    evidence = stage.scheduler.running("h-gpu0")
    assert evidence is not None
    assert evidence.boot == before.boot
    again = stage.order("poison", "fine")
    stage.scheduler.publish_all({"h-gpu0": [again]})
    assert stage.outcome(again).verdict == "done"
    assert after.pid != before.pid
