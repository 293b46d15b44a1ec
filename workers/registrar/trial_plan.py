"""Where a model is tried while it is registered: on which device of this host, in which formats; or why not.

A trial holds the whole model, so memory is reckoned before anything is loaded. ``plan_trial`` decides, ``look_around``
says what there is; neither loads torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from motet.errors import SetupError

#: A GPU with less than this in use runs nothing: a driver alone takes some hundred.
IDLE_MB = 1024
#: What people choose: a device, or to try nothing.
AUTO, NOWHERE = "auto", "none"
#: Numeric formats of two bytes in which a model may run, beside fp32.
HALVES = ("bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialDevice:
    """The CPU of this host, or one GPU."""

    #: ``cpu``, or ``cuda:1`` as GPUs count under our own mask.
    name: str
    #: CUDA_VISIBLE_DEVICES that shows this device alone; "" shows no GPU.
    mask: str
    #: What neither workers nor others hold now.
    free_mb: int
    #: Nothing else runs on it.
    idle: bool = True
    #: The format of two bytes that it has.
    half: str = "bf16"

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    @property
    def torch_name(self) -> str:
        """What torch calls it under its mask."""
        return "cuda:0" if self.is_gpu else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """What will be tried."""

    #: None: nothing is tried.
    device: TrialDevice | None
    formats: tuple[str, ...]
    #: Each other format, and why it is not tried.
    left_out: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it is kept with the model's scores."""
        on = {"on": self.device.name} if self.device else {}
        return {**on, "formats": list(self.formats), "not_tried": dict(self.left_out)}


def halves(wanted: str, devices: Sequence[TrialDevice]) -> tuple[str, ...]:
    """The formats of two bytes to try: bf16, and fp16 where a GPU here has no bf16, or where the CPU is named.

    The CPU imitates both. Without such a GPU, and without being asked for, the time of another trial would be lost.
    """
    fp16 = wanted == "cpu" or any(device.half == "fp16" for device in devices)
    return HALVES if fp16 else HALVES[:1]


def plan_trial(
    wanted: str,
    devices: Sequence[TrialDevice],
    formats: Sequence[str],
    need_mb: Callable[[TrialDevice, str], int],
    *,
    wants_gpu: bool = False,
) -> TrialPlan:
    """The device of ``wanted``, and the formats in which the model fits there. Raises SetupError.

    ``auto`` prefers the CPU, where no worker's memory is at stake, then an idle GPU, and takes the first device that
    holds all formats, or else most of them. ``wants_gpu``: what runs the model runs it on a GPU where there is one.
    """
    if wanted == NOWHERE:
        return TrialPlan(device=None, formats=(), left_out=dict.fromkeys(formats, "as it was asked for"))
    if wanted == AUTO:
        idle = sorted((d for d in devices if d.is_gpu and d.idle), key=lambda d: -d.free_mb)
        cpu = [d for d in devices if not (d.is_gpu or (wants_gpu and any(one.is_gpu for one in devices)))]
        found = [*cpu, *idle]
    else:
        found = [d for d in devices if d.name == wanted]
        if not found:
            known = ", ".join(d.name for d in devices)
            raise SetupError(f"--try: got {wanted}; expected one of auto, none, {known}, which are here")
    if not found:
        why = "every GPU of this host is in use; --try cuda:N takes one all the same"
        return TrialPlan(device=None, formats=(), left_out=dict.fromkeys(formats, why))
    fitting = {d.name: tuple(f for f in formats if need_mb(d, f) <= d.free_mb) for d in found}
    # The first of those that are equally good.
    device = max(found, key=lambda d: len(fitting[d.name]))
    left_out = {f: _too_large(f, found, need_mb) for f in formats if f not in fitting[device.name]}
    if not fitting[device.name]:
        if wanted != AUTO:
            smallest = min(formats, key=lambda f: need_mb(device, f))
            raise SetupError(
                f"--try {wanted}: {left_out[smallest]} in {smallest}; name another device, or register it untried: "
                "--try none"
            )
        return TrialPlan(device=None, formats=(), left_out=left_out)
    return TrialPlan(device=device, formats=fitting[device.name], left_out=left_out)


def _too_large(
    in_format: str, devices: Sequence[TrialDevice], need_mb: Callable[[TrialDevice, str], int]
) -> str:
    largest = max(devices, key=lambda d: d.free_mb)
    return (
        f"needs {_size(need_mb(largest, in_format))}, {largest.name} here has {_size(largest.free_mb)} free"
    )


def _size(mb: int) -> str:
    return f"{mb / 1024:,.0f} GB" if mb >= 10_240 else f"{mb:,} MB"


def look_around() -> list[TrialDevice]:
    """The CPU and the GPUs that this process may use, with their free memory."""
    from workers.launch.launcher import visible_gpus
    from workers.run.device import free_memory_mb

    found = [TrialDevice(name="cpu", mask="", free_mb=free_memory_mb())]
    for number, mask in enumerate(visible_gpus(os.environ)):
        with contextlib.suppress(Exception):  # without NVML nothing is known of a GPU, and none is taken
            found.append(_gpu(f"cuda:{number}", mask))
    return found


def _gpu(name: str, mask: str) -> TrialDevice:
    """The GPU that a mask names."""
    import pynvml

    from workers.run.device import half_of

    pynvml.nvmlInit()
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(mask))
        if mask.isdecimal()
        else pynvml.nvmlDeviceGetHandleByUUID(mask)
    )
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return TrialDevice(
        name=name,
        mask=mask,
        free_mb=int(memory.free) >> 20,
        idle=int(memory.used) >> 20 < IDLE_MB,
        half=half_of(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


@contextmanager
def shown(device: TrialDevice) -> Iterator[None]:
    """Let this process, and those that it starts, see this device alone. CUDA reads that when it is first asked."""
    names = {"CUDA_VISIBLE_DEVICES": device.mask, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    was = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in was.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def prepare_environment() -> None:
    """As the launcher does for workers, before anything imports torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
