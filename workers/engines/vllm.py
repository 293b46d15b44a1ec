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
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from motet.columns import CellError
from motet.embedded.children import Child
from motet.errors import SetupError
from motet.manifest import Manifest, answer_places
from motet.wire import TaskOrder
from workers import scratch
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Pass, Prepared, Step
from workers.engines.openai import OpenAIEngine, Served, connect

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
#: It compiles and warms up while it starts; large weights are read for minutes.
START_S, GRACE_S, LOOK_S = 1200.0, 20.0, 0.2
#: What vLLM takes beside weights and cache, on a GPU.
BESIDE_MB = 4096
#: Secrets of the worker, which vLLM does not need.
_OURS = "MOTET_"


@dataclass(slots=True)
class Vllm(Served):
    """A server that is ours."""

    child: Child | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None


class VllmEngine:
    """Answers generate, chat, choose and extract, on a GPU or a group of GPUs."""

    spreads = True

    def __init__(self) -> None:
        self._served = OpenAIEngine()

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format) + BESIDE_MB

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Vllm:
        if "config.json" not in files:
            raise CannotLoad(f"{model.ref} has no config.json")
        kind = device.partition(":")[0]
        port, key = _free_port(), secrets.token_urlsafe(24)
        folder = scratch.folder("vllm")
        child = Child(
            f"vllm {model.ref}",
            [
                _program(),
                *_arguments(model, files["config.json"].parent, port, in_format),
                *_on_device(kind, self.memory_mb(model, in_format)),
            ],
            env=_environment(kind, key),
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
        served = connect(f"http://127.0.0.1:{port}/v1", "motet", key=key, in_flight=answer_places(kind))
        return Vllm(served.server, served.loop, served.thread, child=child, folder=folder)

    def attach(self, handle: Vllm, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self._served.attach(handle, task, files)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        return self._served.prepare(pass_, texts)

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        return self._served.admit(pass_, row, ticket, urgent=urgent)

    def step(self, handle: Vllm, tokens: int) -> Step:
        if handle.child is not None and not handle.child.alive:
            _end(handle.child)
            raise DeviceBroken(f"vllm ended with {handle.child.exit_code}")
        return self._served.step(handle, tokens)

    def abort(self, handle: Vllm, tickets: Collection[Hashable]) -> None:
        self._served.abort(handle, tickets)

    def unload(self, handle: Vllm) -> None:
        self._served.unload(handle)
        if handle.child is not None:
            _end(handle.child)
        if handle.folder is not None:
            handle.folder.cleanup()


def _program() -> str:
    named = os.environ.get("MOTET_VLLM", "")
    beside = Path(sys.executable).with_name("vllm")
    found = named or (str(beside) if beside.exists() else shutil.which("vllm"))
    if not found or not Path(found).exists():
        raise CannotLoad(
            "vllm is not installed here; install it: pip install 'motet[vllm]', or name its program in MOTET_VLLM"
        )
    return found


def _arguments(model: Manifest, folder: Path, port: int, in_format: str) -> list[str]:
    return [
        "serve",
        str(folder),
        "--host=127.0.0.1",
        f"--port={port}",
        "--served-model-name=motet",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        f"--max-model-len={model.max_tokens}",
        f"--dtype={DTYPES[in_format]}",
        # What the model's makers recommend for drawing is not what was asked for.
        "--generation-config=vllm",
    ]


def _on_device(kind: str, memory_mb: int) -> list[str]:
    """Every GPU of the group that this worker's mask shows, and of each no more memory than was reckoned with."""
    if kind != "cuda":
        return []
    import torch

    group = torch.cuda.device_count()
    total_mb = torch.cuda.get_device_properties(0).total_memory >> 20
    share = min(0.92, max(0.1, memory_mb / group / total_mb + BESIDE_MB / total_mb))
    return [f"--tensor-parallel-size={group}", f"--gpu-memory-utilization={share:.2f}"]


def _environment(kind: str, key: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    # Another environment's packages are not its own.
    env.pop("PYTHONPATH", None)
    if kind == "cpu":
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
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


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


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
                if "out of memory" in said.lower():
                    raise OutOfMemory
                errors = [line.strip()[-200:] for line in said.splitlines() if "Error" in line]
                raise CannotLoad(
                    f"{ref}: vllm ended with {child.exit_code}: {errors[-1] if errors else 'no word'}"
                )
            time.sleep(LOOK_S)
    raise CannotLoad(f"{ref}: vllm did not answer within {START_S:.0f} s")
