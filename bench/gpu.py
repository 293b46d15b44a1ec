"""What share of a GPU's peak motet's engines reach, on random models of usual shapes. One GPU; within four minutes.

Peaks are measured here, by products of large matrices and by copying a gibibyte, in the format that the engines run in;
where the GPU is in the table, the shares of its data sheet's peaks are told as well. On a CPU only --smoke runs, with
tiny models.

encoder_roofline           operations a second of an encoder of BERT's base shape, real tokens only / peak
prefill_roofline           the same of a language model of about a billion parameters that reads prompts of about 2,000 tokens
decode_roofline            bytes a second that writing 256 answers at once must read (weights and the answers' keys and
                           values, once a step) / peak of memory
vllm_ratio                 tokens a second of motet's engine over a vLLM server of our own / of the same requests sent to
                           that server at once, in turn; null where vLLM is not installed
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from harness import ROOT, Size, finish, in_turn, options, ratio, say, scratch, table

from motet.errors import SetupError
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Embed, Generate, Task
from workers.engine import CannotLoad, Ended, Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.served.vllm import VllmEngine
from workers.engines.trunk import DTYPES, settle
from workers.registrar.describe import describe_folder
from workers.run.batching import pack
from workers.run.device import half_format, probe, use_threads

#: A GPU's name contains the first; dense TFLOP/s in bf16 (of the T4 in fp16) and memory in GB/s, from NVIDIA's data
#: sheets of the SXM forms; sheets that tell figures with sparsity are halved.
SHEETS: Mapping[str, tuple[float, float]] = {
    "H200": (989, 4800),
    "H100": (989, 3350),
    "A100": (312, 2039),
    "L40S": (362, 864),
    "L4": (121, 300),
    "T4": (65, 320),
}
WORDS = [
    "The",
    "council",
    "announced",
    "on",
    "Monday",
    "that",
    "prices",
    "will",
    "rise",
    "while",
    "the",
    "goalkeeper",
    "was",
    "far",
    "better",
    "than",
    "expected",
]


@dataclass(frozen=True)
class Peak:
    """What the device can do at most, as measured here, and by its data sheet."""

    tflops: float
    gb_s: float
    sheet: tuple[float, float] | None


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="encoder,prefill,decode,vllm", help="names of parts, with commas")
    arguments = parser.parse_args()
    size, wanted = arguments.size, set(arguments.only.split(","))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and size is not Size.SMOKE:
        sys.exit(
            f"torch {torch.__version__} sees no GPU here; expected one with its driver, and a CUDA build of torch "
            "(bench/gpu.sh says how to get one), or --smoke, which runs on the CPU"
        )
    if device == "cpu":
        use_threads(1)
    else:
        probe("cuda")  # it sets what fp32 means
    in_format = half_format(device) if device != "cpu" else "fp32"
    peak = peaks(device, in_format, size)
    parts: dict[str, Callable[[str, str, Size, Peak, Path], dict[str, float | None]]] = {
        "encoder": encoder,
        "prefill": prefill,
        "decode": decode,
        "vllm": beside_vllm,
    }
    keys: dict[str, float | None] = {}
    with scratch() as folder:
        for name, part in parts.items():
            if name in wanted:
                began = time.perf_counter()
                keys |= part(device, in_format, size, peak, folder)
                say(f"  {name}: {time.perf_counter() - began:.0f} s in all")
    details = {"device": _name(device), "format": in_format, "peak": vars(peak)}
    table(
        "shares of the peak",
        ["", "share"],
        [(name, "–" if v is None else f"{v:.3f}") for name, v in keys.items()],
    )
    finish("gpu", keys, arguments, whole=wanted == parts.keys(), details=details)


# -- the peak


def peaks(device: str, in_format: str, size: Size) -> Peak:
    """By what is simple enough to be as fast as anything."""
    n = size.of(full=8192, quick=8192, smoke=256)
    a, b = (torch.randn(n, n, device=device).to(DTYPES[in_format]) for _ in range(2))
    product_s = best_s(lambda: a @ b, device, 5)
    source = torch.empty(
        size.of(full=1 << 30, quick=1 << 30, smoke=1 << 20), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    copy_s = best_s(lambda: target.copy_(source), device, 5)
    sheet = next((one for name, one in SHEETS.items() if name in _name(device)), None)
    # A copy reads and writes.
    peak = Peak(2 * n**3 / product_s / 1e12, 2 * len(source) / copy_s / 1e9, sheet)
    by_sheet = (
        f"; its data sheet says {sheet[0]:,.0f} and {sheet[1]:,.0f}" if sheet else "; no data sheet is known"
    )
    say(
        f"{_name(device)}, {in_format}: {peak.tflops:,.1f} TFLOP/s and {peak.gb_s:,.0f} GB/s measured{by_sheet}"
    )
    return peak


def best_s(work: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of the best round, to its end on the device."""
    best = float("inf")
    for _ in range(rounds + 1):
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        best = min(best, time.perf_counter() - began)
    return best


def _name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device != "cpu" else "CPU"


def shares(name: str, reached: float, measured: float, sheet: float | None) -> dict[str, float | None]:
    found = {f"{name}_roofline": reached / measured}
    by_sheet = None if sheet is None else reached / sheet
    told = "" if by_sheet is None else f", {by_sheet:.1%} of the data sheet's"
    say(f"  {name}: {reached / measured:.1%} of the measured peak{told}")
    return {**found, f"{name}_of_sheet": by_sheet}


# -- encoders


def encoder(device: str, in_format: str, size: Size, peak: Peak, folder: Path) -> dict[str, float | None]:
    from transformers import BertConfig, BertModel

    home = folder / "encoder"
    home.mkdir()
    vocabulary = tokenizer(home)
    shape: dict[str, Any] = size.of(
        full={"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
        quick={"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
        smoke={"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
    )
    heads = max(1, shape["hidden_size"] // 64)
    with torch.device(device):
        trunk = BertModel(BertConfig(vocab_size=vocabulary, num_attention_heads=heads, **shape))
    trunk.save_pretrained(home)
    model = described(home, "encoder")
    engine = EncoderEngine()
    handle = engine.load(model, files(home), device=device, in_format=in_format)
    order = TaskOrder(name="v", spec=Embed("bench").to_json(), manifest=model)
    pass_ = Pass(handle, (order,), 0)
    rows = prepared(engine, pass_, texts(size.of(full=4096, quick=1024, smoke=16), 256))
    batches = pack(rows, tokens=size.of(full=1 << 16, quick=1 << 16, smoke=512))

    def run() -> None:
        for batch in batches:
            engine.run(pass_, batch)

    seconds = best_s(run, device, size.of(full=3, quick=1, smoke=1))
    engine.unload(handle)
    lengths = np.array([row.length for row in rows])
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    products = layers * (4 * width * width + 2 * width * shape["intermediate_size"])
    # Every product with a weight is two operations a token; attention multiplies with keys and with values.
    operations = 2 * products * lengths.sum() + 4 * layers * width * (lengths.astype(np.float64) ** 2).sum()
    say(f"  encoder: {lengths.sum() / seconds:,.0f} tokens a second")
    return shares("encoder", operations / seconds / 1e12, peak.tflops, peak.sheet and peak.sheet[0])


# -- language models


@dataclass
class Language:
    """A random Llama in motet's engine."""

    device: str
    in_format: str
    folder: Path
    size: Size

    def __post_init__(self) -> None:
        self.model = described(language_folder(self.folder, self.device, self.size), "lm")
        self.engine = CausalEngine()
        self.handle = self.engine.load(
            self.model, files(self.folder / "language"), device=self.device, in_format=self.in_format
        )
        # Every answer has its full length; a GPU has all its free memory.
        self.handle.tokens.ends = frozenset()
        self.engine.stretch(self.handle, 1 << 20)
        self.config = self.handle.model.config

    def rows(self, count: int, tokens: int, most: int) -> tuple[Pass, list[Prepared]]:
        pass_ = passes(self.handle, self.model, {"a": Generate("bench", prompt="Go on.", max_tokens=most)})
        return pass_, prepared(self.engine, pass_, texts(count, tokens))

    @property
    def products(self) -> int:
        """Weights that every token is multiplied with: all but the tables of words."""
        of_words = self.handle.model.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in self.handle.model.parameters()) - 2 * of_words

    def close(self) -> None:
        self.engine.unload(self.handle)


def prefill(device: str, in_format: str, size: Size, peak: Peak, folder: Path) -> dict[str, float | None]:
    language = Language(device, in_format, folder, size)
    engine, handle = language.engine, language.handle
    longest = size.of(full=2600, quick=2600, smoke=60)
    count = size.of(full=48, quick=16, smoke=3)
    step_tokens = size.of(full=16_384, quick=16_384, smoke=256)
    best, tokens = 0.0, 0
    for _ in range(size.of(full=3, quick=2, smoke=1)):
        pass_, rows = language.rows(count, longest, 1)
        handle.prefix_cache.clear()
        waiting, ended, computed = list(rows), 0, 0
        settle(device)
        began = time.perf_counter()
        while ended < len(rows):
            while waiting and engine.admit(pass_, waiting[0], object(), urgent=False):
                waiting.pop(0)
            step = engine.step(handle, step_tokens)
            ended += len(step.ended)
            computed += step.computed_tokens
        best = max(best, computed / (time.perf_counter() - began))
        tokens = computed // len(rows)
    config = language.config
    # Attention to all tokens before: half of the square, with keys and with values.
    attention = 2 * config.num_hidden_layers * config.hidden_size * tokens
    reached = best * (2 * language.products + attention) / 1e12
    say(
        f"  prefill: {best:,.0f} tokens a second, {'the kernel for many sequences' if handle.varlen else 'masks'}"
    )
    language.close()
    return shares("prefill", reached, peak.tflops, peak.sheet and peak.sheet[0])


def decode(device: str, in_format: str, size: Size, peak: Peak, folder: Path) -> dict[str, float | None]:
    language = Language(device, in_format, folder, size)
    engine, handle = language.engine, language.handle
    most = size.of(full=128, quick=64, smoke=8)
    pass_, rows = language.rows(handle.decode_slots, size.of(full=200, quick=200, smoke=10), most)
    for row in rows:
        if not engine.admit(pass_, row, object(), urgent=True):
            break
    inside = len(handle.rows)
    # Read all prompts first: only writing is measured.
    while any(len(row.todo) for row in handle.rows.values()):
        engine.step(handle, 1 << 16)
    seconds, read, steps = 0.0, 0.0, 0
    weights = (
        language.products + handle.model.get_input_embeddings().weight.numel()
    ) * handle.model.dtype.itemsize
    while handle.rows:
        cells = sum(row.cell for row in handle.rows.values())
        full = len(handle.rows) == inside
        settle(device)
        began = time.perf_counter()
        engine.step(handle, inside)
        took = time.perf_counter() - began
        if full:
            seconds, steps = seconds + took, steps + 1
            read += weights + cells * handle.pool.token_bytes
    say(f"  decode: {inside * steps / seconds:,.0f} tokens a second in {inside} answers at once")
    language.close()
    return shares("decode", read / seconds / 1e9, peak.gb_s, peak.sheet and peak.sheet[1])


# -- beside vLLM


def beside_vllm(device: str, in_format: str, size: Size, peak: Peak, folder: Path) -> dict[str, float | None]:
    """Both sides ask one server: what motet's engine costs, its reading of rows and its bookkeeping."""
    if size is Size.SMOKE or device == "cpu":
        say("  vllm: not in a smoke test")
        return {"vllm_ratio": None}
    model = described(language_folder(folder, device, size), "lm")
    engine = VllmEngine()
    try:
        handle = engine.load(model, files(folder / "language"), device=device, in_format=in_format)
    except (CannotLoad, SetupError) as error:
        say(f"  vllm: left out, {error}")
        return {"vllm_ratio": None}
    try:
        most, count = 64, size.of(full=1024, quick=256, smoke=0)
        task = Generate("bench", prompt="Go on.", max_tokens=most, temperature=0.0)
        pass_ = passes(handle, model, {"a": task})
        server = handle.server

        def alone() -> float:
            return asyncio.run(requests(server.url, server.key, texts(count, 200), task, server.in_flight))

        def with_motet() -> float:
            waiting, written = prepared(engine, pass_, texts(count, 200)), 0
            began, ended = time.perf_counter(), 0
            while ended < count:
                while waiting and engine.admit(pass_, waiting[0], object(), urgent=False):
                    waiting.pop(0)
                step = engine.step(handle, 1 << 16)
                ended += len(step.ended)
                written += sum(one.spent["a"][2] for one in step.ended if isinstance(one, Ended))
            return written / (time.perf_counter() - began)

        alone()  # warm up
        found = in_turn({"vLLM alone": alone, "motet with vLLM": with_motet}, 3)
    finally:
        engine.unload(handle)
    return {"vllm_ratio": ratio(found, "motet with vLLM", "vLLM alone")}


async def requests(url: str, key: str, asked: Sequence[str], task: Generate, in_flight: int) -> float:
    """Tokens a second of these chats, so many of them at once."""
    gate, written = asyncio.Semaphore(in_flight), 0
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=in_flight)
    began = time.perf_counter()
    async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits, trust_env=False) as http:

        async def one(text: str) -> None:
            nonlocal written
            body = {
                "model": "motet",
                "messages": [{"role": "user", "content": f"{text}\n\n{task.prompt}"}],
                "max_tokens": task.max_tokens,
                "temperature": 0.0,
            }
            async with gate:
                answer = await http.post(f"{url}/chat/completions", json=body)
            answer.raise_for_status()
            written += answer.json()["usage"]["completion_tokens"]

        await asyncio.gather(*map(one, asked))
    return written / (time.perf_counter() - began)


# -- models and texts


def language_folder(folder: Path, device: str, size: Size) -> Path:
    """A Llama of about a billion random parameters, made once; tiny in a smoke test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    home = folder / "language"
    if home.exists():
        return home
    home.mkdir()
    tokenizer(home)
    whole = {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
    tiny = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    }
    shape: dict[str, Any] = size.of(full=whole, quick=whole, smoke=tiny)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape))
    model.to(torch.float32 if size is Size.SMOKE else torch.bfloat16).save_pretrained(home)
    return home


def tokenizer(home: Path) -> int:
    """The one that the tests make; how many tokens it has."""
    sys.path.append(str(ROOT))
    from tests.tiny_language import a_tokenizer

    return a_tokenizer(home)


def described(home: Path, name: str) -> Manifest:
    found = describe_folder(home, name=name, version="1", licence="", source={}).manifest
    # The tokenizer's own limit is that of the tests.
    limit = json.loads((home / "config.json").read_text())["max_position_embeddings"]
    return replace(found, max_tokens=limit)


def files(home: Path) -> dict[str, Path]:
    return {path.name: path for path in home.iterdir() if path.is_file()}


def passes(handle: Any, model: Manifest, tasks: Mapping[str, Task]) -> Pass:
    orders = [TaskOrder(name=name, spec=task.to_json(), manifest=model) for name, task in tasks.items()]
    return Pass(handle, tuple(orders), 0)


def prepared(engine: Any, pass_: Pass, asked: Sequence[str]) -> list[Prepared]:
    return [row for row in engine.prepare(pass_, asked) if isinstance(row, Prepared)]


def texts(count: int, most: int) -> list[str]:
    """Of half to all of so many tokens each, no two alike; a word is about four tokens of this tokenizer."""
    dice = np.random.default_rng(0)
    return [" ".join(dice.choice(WORDS, int(most * dice.uniform(0.5, 1.0)) // 4 + 1)) for _ in range(count)]


if __name__ == "__main__":
    main()
