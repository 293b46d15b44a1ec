"""Kinds of devices that a simulated cluster may be made of: how fast they are relative to each other, and their memory.

Pure. Until rates are learned all of it is a guess, good to a factor of two: data sheets know nothing of our models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from motet.errors import SetupError
from motet.protocol.settings import Settings
from scheduler.simulation.cluster import SimulatedDevice

#: Share of a data sheet's bf16 TFLOP/s that a forward pass reaches.
REACHED = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """Devices of one kind."""

    name: str
    #: TFLOP/s that a model gets there. A device of speed 1 does 10^12 operations a second.
    speed: float
    memory_gb: float

    def device(self, number: int) -> SimulatedDevice:
        """One of them, of whose memory models may hold what the settings' default says."""
        share = Settings().memory_share
        return SimulatedDevice(
            name=f"{self.name}-{number}",
            kind=self.name,
            speed=self.speed,
            true_speed=self.speed,
            memory_mb=int(share * self.memory_gb * 1e9 / (1 << 20)),
        )


def _sheet(name: str, tflops: float, memory_gb: float) -> DeviceModel:
    return DeviceModel(name=name, speed=REACHED * tflops, memory_gb=memory_gb)


#: Dense bf16 tensor TFLOP/s (of the T4, which has no bf16, fp16) and memory, from the makers' data sheets: NVIDIA H200
#: and H100 SXM, A100 80GB SXM, L40S, L4, T4; sheets that tell the figure with sparsity are halved. ``cpu`` is one slot
#: of a core or two, as `scheduler.policy.cost` guesses it.
KINDS = {
    kind.name: kind
    for kind in (
        _sheet("H200", 989, 141),
        _sheet("H100", 989, 80),
        _sheet("A100", 312, 80),
        _sheet("L40S", 362, 48),
        _sheet("L4", 121, 24),
        _sheet("T4", 65, 16),
        DeviceModel(name="cpu", speed=0.1, memory_gb=8),
    )
}
_PART = re.compile(r"(?:(\d{1,6})x)?([A-Za-z][A-Za-z0-9_.-]{0,39})(?:=([0-9.]{1,12}):([0-9.]{1,12}))?")


def devices_of(text: str) -> tuple[SimulatedDevice, ...]:
    """The devices of ``8xH200,16xL4,4xB300=900:288``. Raises SetupError."""
    counts: dict[str, int] = {}
    kinds: dict[str, DeviceModel] = {}
    for part in text.replace(" ", "").split(","):
        count, kind = _part(part)
        if kinds.setdefault(kind.name, kind) != kind:
            raise SetupError(f"--gpus: {kind.name} is given twice and differs; expected one SPEED:MEMORY_GB")
        counts[kind.name] = counts.get(kind.name, 0) + count
    return tuple(kinds[name].device(i) for name, count in counts.items() for i in range(count))


def kind_named(device_name: str) -> DeviceModel | None:
    """The kind of a device as its maker or its operating system names it; None where we know none such."""
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    found = next((kind for name, kind in KINDS.items() if name in words), None)
    is_cpu = any(word in device_name.lower() for word in ("cpu", "xeon", "epyc", "core", "ryzen"))
    return found or (KINDS["cpu"] if is_cpu else None)


def _part(part: str) -> tuple[int, DeviceModel]:
    found = _PART.fullmatch(part)
    if found is None or found[1] == "0":
        raise SetupError(
            f"--gpus: got {part[:60]!r}; expected a number and a kind, such as 8xH200, or 4xNAME=SPEED:MEMORY_GB"
        )
    count, name = int(found[1] or 1), found[2]
    if found[3] is None:
        if name not in KINDS:
            raise SetupError(
                f"--gpus: got the kind {name!r}; expected {', '.join(KINDS)}, or {name}=SPEED:MEMORY_GB with SPEED in"
                f" TFLOP/s that models reach (a data sheet's bf16 x {REACHED:g})"
            )
        return count, KINDS[name]
    try:
        speed, memory_gb = float(found[3]), float(found[4])
    except ValueError:
        speed = memory_gb = 0.0
    if speed <= 0 or memory_gb <= 0:
        raise SetupError(f"--gpus: got {part[:60]!r}; expected SPEED:MEMORY_GB as two numbers above 0")
    return count, DeviceModel(name=name, speed=speed, memory_gb=memory_gb)
