"""OpenAI's doors beside vLLM on the same cores: one batch file in both, text as it is written, and 64 callers.

The model is SmolLM2-135M in the format in which workers run it here (bf16 where the processor has it, else fp32). A batch
asks four prompts about each text, 16 tokens each; every round has texts of its own, since motet answers lines that it knows
from what is stored. Its clock runs from the upload to the last byte of the output file; that of `vllm run-batch`, whose
model is loaded, from reading the file to the last answer in its own. All have answered a few lines before. Sides take
turns. Without vLLM (`make vllm-test` installs it; or MOTET_VLLM names its program) the figures beside it are null.

A full run takes about 25 minutes on two cores, a third of which vLLM starts. Its file is written after each part, and the names
in its `details` are those of the parts that it holds. A round of a batch has 144 lines: what motet does before the first
and after the last is then half a hundredth of it. Two rounds tell the ratio in file order to a fiftieth; that of shuffled
lines is above 3, and one round tells whether it is 1.5.

batch_vs_run_batch         rows a second of motet with its torch engine / of `vllm run-batch`, lines of a text side by side
batch_vllm_vs_run_batch    the same of motet with vLLM behind it, beside the same run of `vllm run-batch`; prefix caching on in both
batch_vllm_shuffled        the same with shuffled lines, and a KV cache in both that holds a tenth of all texts (kv_tokens)
stream_first_token_ms      milliseconds from a chat with stream=True to its first text / beyond those of the bare engine,
                           which takes in the same row; one caller, median
chat_rps_64                chats a second of 64 callers who each ask again at once, 16 tokens each, with vLLM behind motet /
                           of vLLM's own server
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from callers import Order, to_json
from family import own_children
from harness import Size, cluster, finish, in_turn, keep, options, ratio, renew, say, scratch, table
from llm import BUDGET, NEW_TOKENS, PROMPTS, tiny
from openai import OpenAI

from motet import datasets
from motet.http import Address, Http
from motet.local.cluster import Cluster
from motet.protocol.wire import TaskOrder
from motet.tasks import Chat
from workers.engine import Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.engines.served.vllm import DTYPES, VllmEngine
from workers.registrar import smollm
from workers.registrar.describe import Described, describe_folder, stored_format
from workers.registrar.register import Registry

HERE = Path(__file__).resolve().parent
DOORS = "/openai/v1"
#: Prompts about one text.
K = 4
CALLERS = 64
#: Tokens of a block of vLLM's KV cache on a CPU, and of the longest prompt with its answer that it is told of where that
#: cache is small: it must hold more than one such.
BLOCK, SHORT_CONTEXT = 128, 1024
#: Names of the model: in motet's torch engine, and with vLLM behind it.
TORCH, VLLM = smollm.NAME, f"{smollm.NAME}-vllm"
#: The side of vLLM's own batch program.
RUN_BATCH = "vllm run-batch"
LIMIT_S = 3600.0
#: How often a batch is looked at, in seconds: an answer costs some 5 ms of the cores that compute. Longer at the end: the
#: end of a short batch is seen late.
LOOK_S, LOOK_AT_END_S, NEAR_END = 1.0, 0.1, 0.9
PARTS = ("batch", "shuffled", "stream", "chat")


@dataclass(frozen=True)
class Bench:
    """The model, and where vLLM is."""

    folder: Path
    size: Size
    #: Its program; None: not installed, or a smoke run, for which it starts too slowly.
    vllm: Path | None
    scratch: Path

    def described(self) -> Described:
        return describe_folder(self.folder, name=TORCH, version="1", licence=smollm.LICENCE, source={})


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--only",
        help=f"names of parts, with commas: {', '.join(PARTS)}; they replace those of the last full run",
    )
    arguments = parser.parse_args()
    wanted = tuple((arguments.only or ",".join(PARTS)).split(","))
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    size: Size = arguments.size
    vllm = _vllm() if size is not Size.SMOKE else None
    full = size is Size.FULL and not arguments.save
    if full and vllm is None:
        parser.error(
            "got a run that would be kept without vLLM; install it (make vllm-test), or name --save FILE"
        )

    def kept(keys: dict[str, Any], details: dict[str, Any]) -> None:
        """Keep what was measured so far; a part that is run again replaces that of the last full run."""
        if arguments.only and full:
            part = [*details][-1]
            renew("doors", part, keys, details[part])
        else:
            keep("doors", keys, arguments, whole=not arguments.only, details=details)

    with own_children(), scratch() as folder:
        model = tiny(folder / "tiny") if size is Size.SMOKE else smollm.folder()
        keys, details = measured(Bench(model, size, vllm, folder), wanted, kept)
    finish("doors", keys, arguments, whole=not arguments.only, details=details)


def _vllm() -> Path | None:
    found = Path(os.environ.get("MOTET_VLLM") or HERE / ".venv-vllm" / "bin" / "vllm")
    if found.exists():
        return found
    say(f"vLLM is not installed: {found} is not there; make vllm-test installs it")
    return None


Figures = tuple[dict[str, Any], dict[str, Any]]


def measured(
    bench: Bench, wanted: Collection[str], kept: Callable[[dict[str, Any], dict[str, Any]], None]
) -> Figures:
    """The figures of these parts, and their details. ``kept`` is given all of them after each part."""
    keys: dict[str, Any] = {}
    details: dict[str, Any] = {}

    def take(name: str, part: Callable[[], Figures]) -> None:
        if name in wanted:
            say(f"\n{name}")
            began = time.monotonic()
            found, more = part()
            say(f"  {name} took {time.monotonic() - began:.0f} s")
            keys.update(found)
            details[name] = more
            kept(keys, details)

    if set(wanted) - {"shuffled"}:
        with running(bench) as motet:
            take("stream", lambda: streams(bench, motet))
            take("batch", lambda: batches(bench, motet))
            take("chat", lambda: chats(bench, motet))
    take("shuffled", lambda: shuffled(bench))
    return keys, details


@contextmanager
def running(bench: Bench, vllm: Path | None = None) -> Iterator[Cluster]:
    """A cluster of one worker that knows the model, in its own engine and behind vLLM. ``vllm``: another program."""
    program = vllm or bench.vllm
    if program is not None:
        os.environ["MOTET_VLLM"] = str(program)
    with cluster(cpus=1) as motet:
        register(motet, bench, TORCH, "causal")
        if program is not None:
            register(motet, bench, VLLM, "vllm")
        yield motet


def format_in(motet: Cluster, bench: Bench) -> str:
    """The numeric format in which its worker runs the model: the one in which it is stored, or fp32.

    The worker has measured whether that is fast here. A measurement of ours might say something else.
    """
    log = (motet.data / "logs" / "workers.log").read_text("utf-8").splitlines()
    told = next(json.loads(line) for line in log if line.startswith("{") and '"event": "device"' in line)
    stored = stored_format(bench.described().files)
    return stored if stored in told["formats"] else "fp32"


def register(motet: Cluster, bench: Bench, name: str, engine: str) -> None:
    """Make the model known under this name. It is not tried: its format is the one in which it is stored."""
    described = bench.described()
    manifest = replace(described.manifest, name=name, engine=engine)
    with closing(Http(Address(url=motet.url, token=motet.tokens["admin"]), timeout_s=60.0)) as http:
        Registry(http, bench.scratch, try_on="none").register([replace(described, manifest=manifest)])


def client_of(motet: Cluster) -> OpenAI:
    return OpenAI(base_url=motet.url + DOORS, api_key=motet.tokens["user"], max_retries=0, timeout=LIMIT_S)


# -- batches


@dataclass(frozen=True)
class Texts:
    """Articles for rounds, each with texts of its own."""

    articles: Sequence[str]
    each: int
    characters: int

    def lines(self, number: int, model: str) -> list[bytes]:
        """The lines of a round: those about one text side by side."""
        chosen = self.articles[number * self.each : (number + 1) * self.each]
        assert len(chosen) == self.each, "there are no more articles"
        return [
            json.dumps(
                {
                    "custom_id": f"{number}-{n}-{k}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": model,
                        "messages": [{"role": "user", "content": f"{text}\n\n{prompt}"}],
                        "temperature": 0,
                        "max_tokens": NEW_TOKENS,
                    },
                }
            ).encode()
            for n, text in enumerate(chosen)
            for k, prompt in enumerate(PROMPTS[:K])
        ]


def texts_for(bench: Bench, each: int, characters: int) -> Texts:
    """Texts of so many characters, of one article or several."""
    found: list[str] = []
    text = ""
    for article in datasets.bbc_news():
        text += article.text + "\n"
        if len(text) >= characters:
            found.append(text[:characters])
            text = ""
    random.Random(7).shuffle(found)
    return Texts(found, each, characters)


def through_motet(motet: Cluster, lines: Sequence[bytes]) -> float:
    """Rows a second of a batch through the doors, to its last answer in hand."""
    with client_of(motet) as client:
        began = time.perf_counter()
        file = client.files.create(file=("lines.jsonl", b"\n".join(lines)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status in ("validating", "in_progress", "finalizing"):
            done = batch.request_counts.completed if batch.request_counts else 0
            time.sleep(LOOK_S if done < NEAR_END * len(lines) else LOOK_AT_END_S)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch
        assert batch.output_file_id is not None, "no line was answered"
        answers = client.files.content(batch.output_file_id).text.splitlines()
        took = time.perf_counter() - began
    assert len(answers) == len(lines), f"{len(answers)} of {len(lines)} lines were answered"
    return len(lines) / took


@contextmanager
def run_batch(bench: Bench, in_format: str, *more: str) -> Iterator[Callable[[Sequence[bytes]], float]]:
    """`vllm run-batch` with its model loaded: rows a second of a batch, to its last answer in its file."""
    assert bench.vllm is not None
    folder = bench.scratch / uuid4().hex
    folder.mkdir()
    asked, written, log = folder / "in.jsonl", folder / "out.jsonl", folder / "log"
    command = [
        str(bench.vllm.with_name("python")),
        str(HERE / "rival" / "run_batch.py"),
        *("-i", str(asked), "-o", str(written)),
        *("--model", str(bench.folder), "--served-model-name", VLLM),
        # Its context is then the model's own, as motet gives it.
        *("--dtype", DTYPES[in_format]),
        *("--enable-prefix-caching", "--generation-config", "vllm"),
        *more,
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHON", "MOTET_"))
    }
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        said, ears = process.stdin, process.stdout

        def heard() -> str:
            line = ears.readline()
            assert line, log.read_text("utf-8", "replace")[-3000:]
            return line.strip()

        def rows_per_s(lines: Sequence[bytes]) -> float:
            asked.write_bytes(b"\n".join(lines) + b"\n")
            said.write(json.dumps([str(asked), str(written)]) + "\n")
            said.flush()
            took = float(heard())
            answers = [json.loads(line) for line in written.read_text("utf-8").splitlines()]
            good = [one for one in answers if one["response"]["status_code"] == 200]
            assert len(good) == len(lines), f"{len(good)} of {len(lines)} lines were answered"
            return len(lines) / took

        try:
            assert heard() == "ready"
            yield rows_per_s
        finally:
            # It ends when it has no more to do.
            said.close()


def warming(texts: Texts, model: str) -> list[bytes]:
    """A few lines, of a text that no round has."""
    return Texts(texts.articles[::-1], 1, texts.characters).lines(0, model)


def beside_run_batch(
    bench: Bench,
    motet: Cluster,
    models: Mapping[str, str],
    texts: Texts,
    rounds: int,
    *more: str,
    shuffle: bool = False,
) -> dict[str, list[float]]:
    """Rows a second of motet by each of its models, and of `vllm run-batch`, the same texts in a round.

    ``models``: side -> the name of its model. ``more``: options of `vllm run-batch`. Without vLLM motet is alone.
    """
    for model in models.values():
        # It loads the model.
        through_motet(motet, warming(texts, model))
    played = dict.fromkeys((*models, RUN_BATCH), 0)

    def lines(side: str, name: str) -> list[bytes]:
        found = texts.lines(played[side], name)
        if shuffle:
            random.Random(played[side]).shuffle(found)
        played[side] += 1
        return found

    def side_of(side: str, model: str) -> Callable[[], float]:
        return lambda: through_motet(motet, lines(side, model))

    sides = {side: side_of(side, model) for side, model in models.items()}
    with ExitStack() as stack:
        if bench.vllm is not None:
            rival = stack.enter_context(run_batch(bench, format_in(motet, bench), *more))
            rival(warming(texts, VLLM))
            sides[RUN_BATCH] = lambda: rival(lines(RUN_BATCH, VLLM))
        return in_turn(sides, rounds)


def over_run_batch(found: Mapping[str, Sequence[float]], side: str) -> float | None:
    return round(ratio(found, side, RUN_BATCH), 3) if {side, RUN_BATCH} <= found.keys() else None


def batches(bench: Bench, motet: Cluster) -> Figures:
    """motet's torch engine, and vLLM behind motet."""
    size = bench.size
    texts = texts_for(bench, size.of(full=36, quick=16, smoke=3), size.of(full=2200, quick=2200, smoke=100))
    models = {"motet": TORCH, **({"motet with vLLM": VLLM} if bench.vllm is not None else {})}
    found = beside_run_batch(bench, motet, models, texts, size.of(full=2, quick=1, smoke=1))
    keys = {
        "batch_vs_run_batch": over_run_batch(found, "motet"),
        "batch_vllm_vs_run_batch": over_run_batch(found, "motet with vLLM"),
    }
    return keys, _told(bench, motet, texts, found)


def shuffled(bench: Bench) -> Figures:
    """The same with a KV cache for a tenth of all texts, which are in no order."""
    if bench.vllm is None:
        return {"batch_vllm_shuffled": None, "kv_tokens": None}, {}
    size = bench.size
    texts = texts_for(bench, size.of(full=24, quick=16, smoke=0), 2200)
    tokens = sum(_tokens(bench, texts.articles[: texts.each]))
    blocks = max(SHORT_CONTEXT // BLOCK + 1, tokens // 10 // BLOCK)
    say(f"{texts.each} texts of {tokens:,} tokens; a KV cache of {blocks * BLOCK:,} tokens")
    more = ("--num-gpu-blocks-override", str(blocks), "--max-model-len", str(SHORT_CONTEXT))
    program = bench.scratch / "vllm-with-a-small-cache"
    program.write_text(f'#!/bin/sh\nexec "{bench.vllm}" "$@" {" ".join(more)}\n')
    program.chmod(0o755)
    with running(bench, program) as motet:
        models = {"motet with vLLM": VLLM}
        found = beside_run_batch(bench, motet, models, texts, 1, *more, shuffle=True)
        details = {**_told(bench, motet, texts, found), "text_tokens": tokens}
    keys = {
        "batch_vllm_shuffled": over_run_batch(found, "motet with vLLM"),
        "kv_tokens": blocks * BLOCK,
    }
    return keys, details


def _tokens(bench: Bench, texts: Sequence[str]) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.folder / "tokenizer.json"))
    return [len(one.ids) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _told(bench: Bench, motet: Cluster, texts: Texts, found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    told = {"rows_per_s": found, "rows": K * texts.each, "characters": texts.characters}
    return {**told, "format": format_in(motet, bench)}


# -- requests that wait


def streams(bench: Bench, motet: Cluster) -> Figures:
    """The first text of a chat that is told as it is written: through the doors, and by the engine in this process."""
    asks = bench.size.of(full=12, quick=8, smoke=1)
    texts = [one.text for one in random.Random(5).sample(datasets.vader(), asks + 1)]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    bare = Bare(bench, format_in(motet, bench))
    firsts: dict[str, list[float]] = {"bare engine": [], "motet": []}
    with client_of(motet) as client:

        def read(text: str) -> float:
            began, first_s = time.perf_counter(), 0.0
            with client.chat.completions.create(
                model=TORCH, messages=_chat(text), max_tokens=48, temperature=0, stream=True
            ) as chunks:
                for chunk in chunks:
                    if not first_s and chunk.choices and chunk.choices[0].delta.content:
                        first_s = time.perf_counter() - began
            return first_s

        # It opens a door, and loads the model where nobody asked before.
        read(texts[-1])
        bare.first_s(texts[-1])
        for text in texts[:asks]:
            firsts["bare engine"].append(bare.first_s(text))
            firsts["motet"].append(read(text))
    bare.close()
    torch.set_num_threads(1)
    medians = {side: 1000 * statistics.median(seconds) for side, seconds in firsts.items()}
    table("first text, ms", ("", "median"), [(side, f"{ms:.1f}") for side, ms in medians.items()])
    return {"stream_first_token_ms": round(medians["motet"] - medians["bare engine"], 1)}, {"first_s": firsts}


def _chat(text: str) -> list[Any]:
    return [{"role": "user", "content": f"{text}\n\nWrite a long reply."}]


class Bare:
    """motet's engine in this process, with nothing around it."""

    def __init__(self, bench: Bench, in_format: str) -> None:
        described = bench.described()
        self._engine = CausalEngine()
        self._handle = self._engine.load(
            described.manifest, described.files, device="cpu", in_format=in_format
        )
        spec = Chat(TORCH, max_tokens=48).to_json()
        order = TaskOrder(name="reply", spec=spec, manifest=described.manifest)
        self._pass = Pass(self._handle, (order,), 0, deltas=True)

    def first_s(self, text: str) -> float:
        """Seconds until the first text of an answer."""
        engine, handle = self._engine, self._handle
        handle.prefix_cache.clear()
        began = time.perf_counter()
        [row] = engine.prepare(self._pass, [json.dumps(_chat(text))])
        assert isinstance(row, Prepared)
        engine.admit(self._pass, row, 0, urgent=True)
        while handle.rows and not engine.step(handle, BUDGET).deltas:
            pass
        first_s = time.perf_counter() - began
        while handle.rows:
            engine.step(handle, BUDGET)
        return first_s

    def close(self) -> None:
        self._engine.unload(self._handle)


def chats(bench: Bench, motet: Cluster) -> Figures:
    """64 callers of motet with vLLM behind it, and of a vLLM server with the same options."""
    if bench.vllm is None:
        # So that the doors are asked all the same.
        say(
            f"  {asked_by(motet.url + DOORS, motet.tokens['user'], TORCH, bench.size, 0.5):.1f} chats a second of motet alone"
        )
        return {"chat_rps_64": None}, {}
    described = bench.described()
    engine = VllmEngine()
    handle = engine.load(described.manifest, described.files, device="cpu", in_format=format_in(motet, bench))
    try:
        seconds = bench.size.of(full=20.0, quick=8.0, smoke=0.5)
        asked: dict[str, Callable[[float], float]] = {
            "motet": partial(asked_by, motet.url + DOORS, motet.tokens["user"], VLLM, bench.size),
            "vLLM": partial(asked_by, handle.server.url, handle.server.key, "motet", bench.size),
        }
        # A door is opened, and each server reads its first prompts.
        for warmed in asked.values():
            warmed(2.0)
        sides = {side: partial(ask, seconds) for side, ask in asked.items()}
        found = in_turn(sides, bench.size.of(full=2, quick=1, smoke=1))
    finally:
        engine.unload(handle)
    return {"chat_rps_64": round(ratio(found, "motet", "vLLM"), 3)}, {"chats_per_s": found}


def asked_by(url: str, key: str, model: str, size: Size, seconds: float) -> float:
    """Chats a second of callers who each ask again at once for so long, until the last of them is answered.

    All answers count: callers of vLLM's own server are answered in waves of 64, of which a round would have one more or less.
    """
    dice = random.Random()
    words = " ".join(one.text for one in datasets.bbc_news()[:200]).split()
    starts = (dice.randrange(len(words) - 16) for _ in range(4096))
    at = urlsplit(url)
    order = Order(
        port=at.port or 80, path=f"{at.path}/chat/completions", token=key, seconds=seconds, name=uuid4().hex[:8],
        callers=size.of(full=CALLERS, quick=CALLERS, smoke=2), keyed=False,
        texts=[" ".join(words[start : start + 12]) for start in starts], chat={"model": model, "max_tokens": NEW_TOKENS, "temperature": 0},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "callers.py")],
        input=to_json(order),
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    seen = told["seen"]
    refused = [body for _, status, body, _, _ in seen if status != 200]
    assert not refused, f"{len(refused)} of {len(seen)} chats were refused: {refused[0][:500]}"
    return float(len(seen) / told["took_s"])


if __name__ == "__main__":
    main()
