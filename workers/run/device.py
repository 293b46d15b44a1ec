"""The device that a worker owns: what it is, what it is fast at, and how busy it is. torch is imported inside."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from motet.errors import SetupError

#: A format counts as fast where it beats fp32 by this factor: less is not worth another rounding.
FAST = 1.3
#: Compute capability from which GPUs have bf16; those before it have fp16 alone.
AMPERE = 8
#: Tokens × width × inner width of MiniLM's larger matrix product.
SHAPE = (1024, 384, 1536)
#: Rounds of the comparison, each format once a round; the best time counts.
ROUNDS = 3
#: A format that takes so many times as long as fp32 on such a part of the rows is tried no further.
SLIVER, BEHIND = 32, 4.0
MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, a group of GPUs, or a CPU slot, as this process sees it under its mask."""

    kind: Literal["cpu", "cuda"]
    #: The name people know.
    name: str
    #: What torch calls it; the first of a group.
    torch_name: str
    #: Its memory; of a group that of its smallest GPU, times their number; a CPU slot's share of the host's.
    memory_mb: int
    #: Formats it is fast at, beside fp32.
    formats: tuple[str, ...] = ()
    #: NVML handles, one per GPU; empty where there is no telemetry.
    nvml: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    #: GPUs of the group; 1 of a single device.
    gpus: int = 1

    def memory_used_mb(self) -> int:
        """Memory in use now: of a GPU by anybody, of a CPU slot by this process."""
        if self.nvml:
            import pynvml

            try:
                return sum(int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in self.nvml) // MB
            except pynvml.NVMLError:
                pass  # telemetry is a comfort: torch knows too
        if self.kind == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(self.torch_name)
            return int(total - free) // MB
        import psutil

        return int(psutil.Process().memory_info().rss) // MB

    def utilisation(self) -> float | None:
        """Busy share as the driver measures it, 0 to 1; None where only the executor knows."""
        if not self.nvml:
            return None
        import pynvml

        try:
            rates = [float(pynvml.nvmlDeviceGetUtilizationRates(h).gpu) for h in self.nvml]
        except pynvml.NVMLError:
            return None
        return sum(rates) / len(rates) / 100


def probe(kind: Literal["cpu", "cuda"], slots: int = 1) -> Device:
    """Look at the device that this process was given; of a CPU, one of ``slots`` shares. Raises SetupError."""
    return _probe_cuda() if kind == "cuda" else _probe_cpu(slots)


def use_threads(count: int) -> None:
    """Let one matrix product use so many cores: more than are free is the largest trap there is (models.md 4e)."""
    if find_spec("torch") is None:
        return
    import torch

    torch.set_num_threads(max(1, count))


def _probe_cpu(slots: int) -> Device:
    return Device(
        kind="cpu",
        name=_cpu_name(),
        torch_name="cpu",
        memory_mb=_host_memory() // MB // max(1, slots),
        # A worker that only runs functions needs no torch.
        formats=fast_formats("cpu") if find_spec("torch") else (),
    )


def _probe_cuda() -> Device:
    import torch

    if not torch.cuda.is_available():
        raise SetupError(
            "torch sees no GPU here; install a CUDA build of torch and the driver, or use --cpus instead of --gpus"
        )
    compute_exactly()
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Device(
        kind="cuda",
        name=every[0].name if len(every) == 1 else f"{len(every)} x {every[0].name}",
        torch_name="cuda:0",
        memory_mb=min(int(p.total_memory) for p in every) // MB * len(every),
        formats=fast_formats("cuda:0"),
        nvml=_nvml_handles([str(getattr(p, "uuid", "")) for p in every]),
        gpus=len(every),
    )


def other_devices(torch_name: str) -> tuple[str, ...]:
    """What torch calls the other GPUs of this worker's group; none beside a CPU slot."""
    if not torch_name.startswith("cuda"):
        return ()
    import torch

    return tuple(name for i in range(torch.cuda.device_count()) if (name := f"cuda:{i}") != torch_name)


def fast_formats(torch_name: str, rounds: int = ROUNDS) -> tuple[str, ...]:
    """The formats in which a typical matrix product is at least FAST times as fast as in fp32: about 50 ms of work.

    That is fp16 on GPUs without bf16. A CPU without instructions for bf16 takes a hundred times as long for it, and every
    start of a worker would wait for that: a format that is behind on a sliver of the work is not tried on all of it.
    """
    import torch

    rows, width, inner = SHAPE
    half = half_format(torch_name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    operands = {
        name: (
            torch.ones(rows, width, dtype=dtype, device=torch_name),
            torch.ones(width, inner, dtype=dtype, device=torch_name),
        )
        for name, dtype in {"fp32": torch.float32, half: dtype}.items()
    }
    settle = torch.cuda.synchronize if torch_name.startswith("cuda") else _nothing
    sliver = {
        name: min(_seconds(partial(torch.mm, left[: rows // SLIVER], right), settle) for _ in range(3))
        for name, (left, right) in operands.items()
    }
    if sliver[half] > BEHIND * sliver["fp32"]:
        return ()
    best = dict.fromkeys(operands, float("inf"))
    for pair in operands.values():
        _seconds(partial(torch.mm, *pair), settle)  # warm up
    # Formats take turns, so that a neighbour's burst of work hits all of them alike.
    for _ in range(rounds):
        for name, pair in operands.items():
            best[name] = min(best[name], _seconds(partial(torch.mm, *pair), settle))
    return (half,) if best["fp32"] >= FAST * best[half] else ()


def half_format(torch_name: str) -> str:
    """The format of two bytes that a device may be fast at."""
    if not torch_name.startswith("cuda"):
        return "bf16"
    import torch

    return half_of(*torch.cuda.get_device_capability(torch_name))


def half_of(generation: int, _: int) -> Literal["bf16", "fp16"]:
    """The same by the compute capability of a GPU."""
    return "bf16" if generation >= AMPERE else "fp16"


def _seconds(work: Callable[[], object], settle: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def _nothing() -> None:
    return None


def _nvml_handles(uuids: Sequence[str]) -> tuple[Any, ...]:
    """Telemetry of the GPUs with these ids; () where NVML or an id is missing, or inside a MIG slice."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(
            pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            for uuid in uuids
        )
    except Exception:  # noqa: BLE001 - telemetry is a comfort; the library has its own error types or is absent
        return ()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_memory_mb() -> int:
    """Memory that nobody holds, of this host or of the container we are in."""
    import psutil

    rooms = [int(psutil.virtual_memory().available), *(limit - used for limit, used in _containers())]
    return max(0, min(rooms)) // MB


def compute_exactly() -> None:
    """Let fp32 be fp32 on a GPU, for which TF32 would stand in: "exact" promises it."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _host_memory() -> int:
    """Bytes that this host, or the container we are in, has for us."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _containers())])


def _containers() -> Iterator[tuple[int, int]]:
    """Bytes that the container we are in may use, and does use, where either version of cgroups limits it."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            yield int(Path(limit).read_text()), int(Path(used).read_text())


def cores() -> int:
    """CPU cores that this process may really use: its affinity, bounded by the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_quota() or allowed)))


def _quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return quota_us / int((folder / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None
