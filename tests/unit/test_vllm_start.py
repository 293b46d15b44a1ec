"""How vLLM is started: its command line on GPUs of many sizes, and what is made of its last words."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from motet.protocol.manifest import KV_TOKENS, WIDTHS, Manifest
from motet.protocol.residency import NeverFits, evictions
from motet.protocol.settings import Settings
from workers.engine import CannotLoad, OutOfMemory
from workers.engines.served.vllm import BESIDE_MB, Gpus, VllmEngine

#: Stands in for the program: it notes how it was called, and answers as long as it may live, or ends with these words.
PROGRAM = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

Path({noted!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
if {words!r}:
    print({words!r}, file=sys.stderr)
    sys.exit(1)

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): ...

port = next(a.partition("=")[2] for a in sys.argv if a.startswith("--port="))
HTTPServer(("127.0.0.1", int(port)), Healthy).serve_forever()
"""
#: Llama 3.1 8B, Qwen3 4B with its longest context, and a small one.
LLAMA = Manifest(
    name="llama",
    version="1",
    engine="vllm",
    answers="text",
    max_tokens=131_072,
    parameters=8_030_000_000,
    kv_width=2 * 32 * 8 * 128,
)
QWEN = Manifest(
    name="qwen",
    version="1",
    engine="vllm",
    answers="text",
    max_tokens=131_072,
    parameters=4_020_000_000,
    kv_width=2 * 36 * 8 * 128,
)
SMALL = Manifest(
    name="small",
    version="1",
    engine="vllm",
    answers="text",
    max_tokens=2048,
    parameters=135_000_000,
    kv_width=2 * 30 * 3 * 64,
)
H200, L4 = 143_771, 23_034
MEMORY_SHARE = Settings().memory_share


@dataclass
class Called:
    """How the program was called."""

    options: dict[str, str]
    env: dict[str, str]

    @property
    def context(self) -> int:
        return int(self.options["--max-model-len"])

    @property
    def share(self) -> float:
        return float(self.options["--gpu-memory-utilization"])


Start = Callable[..., Called]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the stand-in for a model on such GPUs, and end it again."""

    def call(model: Manifest, gpus: Gpus | None, words: str = "", in_format: str = "bf16") -> Called:
        program, noted = tmp_path / "vllm", tmp_path / "noted.json"
        program.write_text(PROGRAM.format(python=sys.executable, noted=str(noted), words=words))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("MOTET_VLLM", str(program))
        config = tmp_path / "config.json"
        config.write_text("{}")
        engine = VllmEngine(gpus=lambda: gpus)
        device = "cpu" if gpus is None else "cuda:0"
        handle = engine.load(model, {"config.json": config}, device=device, in_format=in_format)
        engine.unload(handle)
        # Its prefix cache is kept apart by tenant, with a secret of this start.
        assert len(handle.secret) > 40
        arguments, env = json.loads(noted.read_text())
        options = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
        return Called(options, env)

    return call


def kv_mb(model: Manifest, tokens: int, in_format: str = "bf16") -> float:
    return model.kv_width * WIDTHS[in_format] * tokens / (1 << 20)


def weights_mb(model: Manifest) -> float:
    return model.weights_bytes("bf16") / (1 << 20)


def test_a_long_context_is_kept_whole_where_it_fits(start: Start) -> None:
    called = start(LLAMA, Gpus(1, H200, H200))
    assert called.context == LLAMA.max_tokens
    assert called.share * H200 >= weights_mb(LLAMA) + kv_mb(LLAMA, LLAMA.max_tokens) + BESIDE_MB


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        (LLAMA, Gpus(1, H200, H200)),
        (QWEN, Gpus(1, L4, L4)),
        (QWEN, Gpus(1, L4, L4 - 2000)),
        (LLAMA, Gpus(4, L4, L4)),
        (SMALL, Gpus(1, H200, H200)),
        (SMALL, Gpus(2, L4, L4)),
    ],
)
def test_the_context_fits_into_the_memory_that_vllm_is_given_and_that_was_reckoned_with(
    start: Start, model: Manifest, gpus: Gpus
) -> None:
    called = start(model, gpus)
    assert int(called.options["--tensor-parallel-size"]) == gpus.count
    given_mb = called.share * gpus.total_mb * gpus.count
    assert given_mb - weights_mb(model) - BESIDE_MB * gpus.count >= kv_mb(model, called.context)
    assert called.context >= min(model.max_tokens, KV_TOKENS)
    assert called.share * gpus.total_mb <= gpus.free_mb
    reckoned_mb = VllmEngine(gpus=lambda: gpus).memory_mb(model, "bf16")
    assert given_mb <= reckoned_mb + gpus.count
    if gpus.free_mb == gpus.total_mb:
        assert given_mb >= reckoned_mb - gpus.count
    assert evictions([], reckoned_mb, int(MEMORY_SHARE * gpus.total_mb * gpus.count), ()) == []


def test_what_vllm_takes_beside_weights_and_cache_is_counted_once(start: Start) -> None:
    called = start(SMALL, Gpus(1, H200, H200))
    assert called.share * H200 == pytest.approx(SMALL.memory_mb("bf16") + BESIDE_MB, abs=20)


def test_a_long_context_leaves_room_for_other_models() -> None:
    needed = VllmEngine(gpus=lambda: Gpus(1, L4, L4)).memory_mb(QWEN, "bf16")
    assert needed + 1000 <= MEMORY_SHARE * L4


def test_a_model_that_fits_a_worker_s_share_of_the_memory_is_never_reckoned_above_it() -> None:
    long = replace(LLAMA, max_tokens=10_000_000)
    engine = VllmEngine(gpus=lambda: Gpus(1, H200, H200), memory_share=0.3)
    assert evictions([], engine.memory_mb(long, "bf16"), int(0.3 * H200), ()) == []


def test_a_model_that_no_gpu_has_room_for_never_fits() -> None:
    gpus = Gpus(1, L4, L4)
    needed = VllmEngine(gpus=lambda: gpus).memory_mb(LLAMA, "fp32")
    with pytest.raises(NeverFits):
        evictions([], needed, int(MEMORY_SHARE * L4), ())


def test_memory_that_others_hold_now_is_no_reason_to_refuse_the_model_for_ever(start: Start) -> None:
    with pytest.raises(OutOfMemory):
        start(LLAMA, Gpus(1, H200, 9_000))


@pytest.mark.parametrize(
    "words",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: Free memory on device cuda:0 (2.6/121.63 GiB) on startup is less than desired GPU memory "
        "utilization (0.08, 9.73 GiB).",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        "ValueError: To serve at least one request with the model's max seq len (700160), (6.11 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (5.17 GiB).",
    ],
)
def test_vllm_that_ends_for_want_of_memory_may_be_started_again(start: Start, words: str) -> None:
    with pytest.raises(OutOfMemory):
        start(SMALL, Gpus(1, H200, H200), words)


def test_vllm_that_cannot_run_the_model_says_why(start: Start) -> None:
    with pytest.raises(CannotLoad, match=r"vllm ended with 1: ValueError: no such architecture"):
        start(SMALL, Gpus(1, H200, H200), "INFO starting\nValueError: no such architecture")


@pytest.mark.parametrize("own", ["", "3"])
def test_on_a_cpu_the_context_fits_into_its_cache(
    start: Start, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", own) if own else monkeypatch.delenv(
        "VLLM_CPU_KVCACHE_SPACE", raising=False
    )
    called = start(QWEN, None)
    space_mb = int(called.env["VLLM_CPU_KVCACHE_SPACE"]) * 1024
    assert not own or space_mb == 3 * 1024
    assert kv_mb(QWEN, called.context) <= space_mb
    assert called.context >= KV_TOKENS
    assert "--gpu-memory-utilization" not in called.options


def test_vllm_counts_its_threads_by_itself_and_knows_no_secret(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MOTET_TOKEN"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    env = start(SMALL, None).env
    assert not {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "MOTET_TOKEN"} & env.keys()
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_it_may_take_longer_to_start_than_other_engines() -> None:
    from workers.engines.served.vllm import START_S
    from workers.run.executor import LOAD_S

    assert VllmEngine.longest_load_s > START_S > LOAD_S
