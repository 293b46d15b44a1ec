"""vLLM on this worker's own device: its server as a process of its own, asked like any other server.

vLLM starts processes and wants the torch it was built for, so nothing of it is imported here: ``vllm`` is found beside
this Python (pip install 'motet[vllm]'), or where MOTET_VLLM names it, in an environment of its own. Its port is on
loopback, its key is random, and it ends when this process does, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import httpx

from motet.errors import SetupError
from motet.local.children import Child
from motet.local.places import free_port
from motet.protocol.manifest import KV_TOKENS, WIDTHS, Manifest, decode_slots
from motet.protocol.settings import Settings
from workers import scratch
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Step
from workers.engines.served.openai import OpenAIEngine, connect
from workers.engines.served.question import Served

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: It compiles and warms up while it starts; large weights are read for minutes.
START_S, GRACE_S, LOOK_S = 1200.0, 20.0, 0.2
#: What vLLM takes beside weights and cache, on each GPU: activations, compiled graphs.
BESIDE_MB = 4096
#: Free memory of a GPU that the start of vLLM's processes takes before vLLM looks how much is free.
CONTEXT_MB = 1024
#: Of the memory that the least leaves free, the share that a longer context may take: the rest is for other models.
LONGER_SHARE = 0.5
#: How vLLM says that there is no memory for it now.
_NO_MEMORY = (
    "out of memory",
    "less than desired gpu memory utilization",
    "no available memory for the cache blocks",
    "larger than the available kv cache memory",
)
#: Beginnings of the names of the worker's secrets, which vLLM does not need, and of the numbers of threads of its own
#: libraries. vLLM counts the cores that it computes on by itself; MKL's number wins over its own, and on a CPU its threads
#: then take turns on one core: each step took a twentieth more.
_NOT_ITS = ("MOTET_", "MKL_", "OMP_NUM_THREADS")


@dataclass(slots=True, kw_only=True)
class Vllm(Served):
    """A server that is ours."""

    child: Child
    folder: tempfile.TemporaryDirectory[str]


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of a worker's group, each as large and as free as the least of them."""

    count: int
    total_mb: int
    free_mb: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What vLLM may take of each GPU, and the longest prompt with its answer that this is enough for."""

    memory_mb: int
    context: int


def visible_gpus() -> Gpus | None:
    """The GPUs that this worker's mask shows; None where it shows none."""
    import torch

    if not (count := torch.cuda.device_count()):
        return None
    return Gpus(
        count,
        min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) >> 20,
        min(torch.cuda.mem_get_info(i)[0] for i in range(count)) >> 20,
    )


def least_mb(model: Manifest, in_format: str, gpus: int) -> int:
    """Memory of each of so many GPUs without which vLLM cannot run the model: with a cache of KV_TOKENS."""
    return ceil(model.memory_mb(in_format) / gpus) + BESIDE_MB


def grant(model: Manifest, in_format: str, gpus: int, room_mb: int) -> Grant:
    """What vLLM gets where each of so many GPUs has ``room_mb`` for it, which is enough for the least.

    vLLM starts only where one prompt of the longest context fits into its cache: so a context beyond KV_TOKENS is as
    long as there is memory for.
    """
    least = least_mb(model, in_format, gpus)
    token_mb = _token_mb(model, in_format) / gpus
    wanted_mb = max(0, model.max_tokens - KV_TOKENS) * token_mb
    more_mb = min(wanted_mb, LONGER_SHARE * (room_mb - least))
    longer = int(more_mb / token_mb) if token_mb else 0
    return Grant(least + ceil(more_mb), min(model.max_tokens, KV_TOKENS + longer))


class VllmEngine(OpenAIEngine):
    """The same on a GPU or a group of GPUs of this worker, by a server of its own."""

    spreads = True

    longest_load_s = START_S + 2 * GRACE_S

    def __init__(
        self, gpus: Callable[[], Gpus | None] = visible_gpus, memory_share: float | None = None
    ) -> None:
        """``memory_share``: of a GPU's memory, what models may hold; None as the worker's settings say."""
        self._gpus = gpus
        self._share = Settings.from_env().memory_share if memory_share is None else memory_share

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        """What it takes of all GPUs that it sees, once their memory is free."""
        if (gpus := self._gpus()) is None:
            return model.memory_mb(in_format) + BESIDE_MB
        least, room_mb = least_mb(model, in_format, gpus.count), int(self._share * gpus.total_mb)
        if least > room_mb:
            return least * gpus.count
        return grant(model, in_format, gpus.count, room_mb).memory_mb * gpus.count

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Vllm:
        if "config.json" not in files:
            raise CannotLoad(f"{model.ref} has no config.json")
        program = _program()
        kind = device.partition(":")[0]
        gpus = self._gpus() if kind == "cuda" else None
        if gpus is None:
            arguments, more = _on_cpu(model, in_format)
        else:
            arguments, more = self._on_gpus(model, in_format, gpus), {}
        port, key = free_port(), secrets.token_urlsafe(24)
        folder = scratch.folder("vllm")
        child = Child(
            f"vllm {model.ref}",
            [program, *_arguments(files["config.json"].parent, port, in_format), *arguments],
            env={**_environment(key), **more},
            log=Path(folder.name) / "vllm.log",
        )
        try:
            child.start()
            _await(child, f"http://127.0.0.1:{port}/health", model.ref)
        except BaseException as error:
            _end(child)
            folder.cleanup()
            if isinstance(error, SetupError):
                raise CannotLoad(str(error)) from None
            raise
        served = connect(
            f"http://127.0.0.1:{port}/v1", "motet", key=key, in_flight=decode_slots(kind, "vllm")
        )
        secret = secrets.token_urlsafe(32)
        return Vllm(served.server, served.loop, served.thread, secret=secret, child=child, folder=folder)

    def step(self, handle: Served, tokens: int) -> Step:
        assert isinstance(handle, Vllm)
        if not handle.child.alive:
            _end(handle.child)
            raise DeviceBroken(f"vllm ended with {handle.child.exit_code}")
        return super().step(handle, tokens)

    def unload(self, handle: Served) -> None:
        assert isinstance(handle, Vllm)
        super().unload(handle)
        _end(handle.child)
        handle.folder.cleanup()

    def _on_gpus(self, model: Manifest, in_format: str, gpus: Gpus) -> list[str]:
        """Options for every GPU of the group. Raises CannotLoad, OutOfMemory."""
        least, most = least_mb(model, in_format, gpus.count), int(self._share * gpus.total_mb)
        if least > most:
            raise CannotLoad(f"{model.ref} needs {least} MB of each GPU, models may hold {most} MB there")
        room_mb = min(most, gpus.free_mb - CONTEXT_MB)
        if least > room_mb:
            raise OutOfMemory
        granted = grant(model, in_format, gpus.count, room_mb)
        return [
            f"--max-model-len={granted.context}",
            f"--tensor-parallel-size={gpus.count}",
            f"--gpu-memory-utilization={granted.memory_mb / gpus.total_mb:.6f}",
        ]


def _program() -> str:
    named = os.environ.get("MOTET_VLLM", "")
    beside = Path(sys.executable).with_name("vllm")
    found = named or (str(beside) if beside.exists() else shutil.which("vllm"))
    if not found or not Path(found).exists():
        raise CannotLoad(
            "vllm is not installed here; install it: pip install 'motet[vllm]', or name its program in MOTET_VLLM"
        )
    return found


def _arguments(folder: Path, port: int, in_format: str) -> list[str]:
    return [
        "serve",
        str(folder),
        "--host=127.0.0.1",
        f"--port={port}",
        "--served-model-name=motet",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        f"--dtype={DTYPES[in_format]}",
        # What the model's makers recommend for drawing is not what was asked for.
        "--generation-config=vllm",
        # Many rows of bulk work may wait inside: what somebody waits for goes before them.
        "--scheduling-policy=priority",
        # A line for each request would fill the disk in time.
        "--disable-uvicorn-access-log",
    ]


def _on_cpu(model: Manifest, in_format: str) -> tuple[list[str], dict[str, str]]:
    """Options, and variables, for a CPU slot: its cache is sized in whole GiB."""
    named, token_mb = os.environ.get("VLLM_CPU_KVCACHE_SPACE", ""), _token_mb(model, in_format)
    space_gib = int(named) if named.isdecimal() else max(1, ceil(KV_TOKENS * token_mb / 1024))
    context = min(model.max_tokens, int(space_gib * 1024 / token_mb) if token_mb else KV_TOKENS)
    return [f"--max-model-len={context}"], {"VLLM_CPU_KVCACHE_SPACE": str(space_gib)}


def _token_mb(model: Manifest, in_format: str) -> float:
    """Memory of one token's keys and values."""
    return model.kv_width * WIDTHS[in_format] / (1 << 20)


def _environment(key: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS)}
    # Another environment's packages are not its own.
    env.pop("PYTHONPATH", None)
    return {
        **env,
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _end(child: Child) -> None:
    """End the server, and what it has started: that would keep the device's memory."""
    child.stop(GRACE_S)
    if child.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _await(child: Child, url: str, ref: str) -> None:
    """Wait until it answers. Raises CannotLoad, OutOfMemory."""
    end = time.monotonic() + START_S
    with httpx.Client(trust_env=False, timeout=2.0) as http:
        while time.monotonic() < end:
            try:
                if http.get(url).is_success:
                    return
            except httpx.HTTPError:
                pass
            if not child.alive:
                said = child.tail(200)
                if any(words in said.lower() for words in _NO_MEMORY):
                    raise OutOfMemory
                errors = [line.strip()[-200:] for line in said.splitlines() if "Error" in line]
                raise CannotLoad(
                    f"{ref}: vllm ended with {child.exit_code}: {errors[-1] if errors else 'no word'}"
                )
            time.sleep(LOOK_S)
    raise CannotLoad(f"{ref}: vllm did not answer within {START_S:.0f} s")
