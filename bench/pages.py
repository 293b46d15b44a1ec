"""The figures in README.md and docs/ as Markdown: pure functions of what bench/results and the shipped heads hold.

A page marks where figures go; what stands between the marks is made here, and by nobody's hand:

    <!-- figures: rivals -->
    …
    <!-- end of figures -->

A row whose figure was never measured is left out. `bench/figures.py` measures, and writes the pages.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from harness import machine

#: Benchmark -> what bench/results has of it.
Results = Mapping[str, Mapping[str, Any]]
#: What the shipped heads say of themselves (head.json), by name.
Heads = Mapping[str, Mapping[str, Any]]

MARK = re.compile(
    r"(<!-- figures: (?P<name>[a-z-]+) -->\n)(?P<figures>.*?)(<!-- end of figures -->)", re.DOTALL
)


class Row(NamedTuple):
    """One row of README's table of figures."""

    #: What is measured; may name values as ``{value}``.
    words: str
    bench: str
    #: Where the values are in the results, by dotted path; ``words`` and ``shown`` name its last part, a number as at_64.
    values: tuple[str, ...]
    shown: str


ROWS = (
    Row("a job of {rows:,} texts × 4 tasks ÷ the best loop by hand on the same cores, both storing", "tax", ("framework_tax", "details.rows"), "{framework_tax:.2f} ×"),
    Row("four tasks unfused ÷ fused", "fusion", ("fusion_gain",), "{fusion_gain:.1f} ×"),
    Row("one task alone ÷ the bare trunk and head", "fusion", ("fusion_cost_k1",), "{fusion_cost_k1:.3f} ×"),
    Row("real tokens ÷ computed tokens, tweets among articles", "fusion", ("real_token_share",), "{real_token_share:.0%}"),
    Row("four prompts about a text of 1,000 tokens, one by one ÷ together, 16 tokens written each", "llm", ("prefix_gain_k4",), "{prefix_gain_k4:.1f} ×"),
    Row("eight prompts", "llm", ("prefix_gain_k8",), "{prefix_gain_k8:.1f} ×"),
    Row("four, with labels chosen instead", "llm", ("prefix_gain_label",), "{prefix_gain_label:.1f} ×"),
    Row("one prompt alone ÷ transformers' `generate`", "llm", ("prefix_cost_k1",), "{prefix_cost_k1:.2f}"),
    Row("tokens a second, 128 prompts, answers of all lengths ÷ transformers' `generate_batch`, ÷ padded `generate`", "llm", ("vs_generate_batch", "vs_padded_generate"), "{vs_generate_batch:.1f} ×, {vs_padded_generate:.1f} ×"),
    Row("rows a second, one of four labels chosen ÷ an answer generated and read: through `generate`, in motet", "llm", ("choose_gain", "choose_gain_own"), "{choose_gain:.1f} ×, {choose_gain_own:.1f} ×"),
    Row("decode slots that are taken while rows wait", "llm", ("slot_occupancy",), "{slot_occupancy:.0%}"),
    Row("a job through a cluster of one worker ÷ the bare engine on the same rows", "llm", ("llm_tax",), "{llm_tax:.2f} ×"),
    Row("a batch file of four prompts a text, rows a second with vLLM behind the doors ÷ `vllm run-batch`", "doors", ("batch_vllm_vs_run_batch",), "{batch_vllm_vs_run_batch:.2f} ×"),
    Row("the same with shuffled lines and a KV cache for a tenth of the texts", "doors", ("batch_vllm_shuffled",), "{batch_vllm_shuffled:.1f} ×"),
    Row("the same file through motet's own engine ÷ `vllm run-batch`", "doors", ("batch_vs_run_batch",), "{batch_vs_run_batch:.2f} ×"),
    Row("the first text of a streamed chat, beyond the bare engine's", "doors", ("stream_first_token_ms",), "{stream_first_token_ms:.0f} ms"),
    Row("chats a second of 64 callers with vLLM behind the doors ÷ vLLM's own server", "doors", ("chat_rps_64",), "{chat_rps_64:.2f} ×"),
    Row("training heads for five epochs: the frozen trunk run in each ÷ once", "train", ("frozen_gain",), "{frozen_gain:.1f} ×"),
    Row("{compressed_in} of an encoder compressed to `{compressed_by}` ÷ of the whole in bf16; a head loses at most {compressed_loss:.1f} points", "compress", ("compressed_gain", "compressed_in", "compressed_by", "compressed_loss"), "{compressed_gain:.1f} ×"),
    Row("requests a second of 32 callers, each answer stored ÷ LitServe's, which keeps nothing", "live", ("of_litserve_32",), "{of_litserve_32:.2f} ×"),
    Row("of 128 callers", "live", ("of_litserve_128",), "{of_litserve_128:.2f} ×"),
    Row("four tasks on a picture unfused ÷ fused", "media", ("image_fusion_gain",), "{image_fusion_gain:.1f} ×"),
    Row("{pictures:,} pictures through a cluster ÷ the best loop by hand, decoding and storing included", "media", ("images_vs_loop", "details.pictures"), "{images_vs_loop:.2f} ×"),
    Row("one row, submit to result, beside the model", "latency", ("one_row_overhead_ms",), "{one_row_overhead_ms:.0f} ms"),
    Row("CPU of all processes but the model's, a sub-task of two seconds", "dispatch", ("cpu_ms_per_subtask", "share_of_subtask"), "{cpu_ms_per_subtask:.1f} ms ({share_of_subtask:.2%})"),
    Row("sub-tasks that one dispatcher leases and sends, 64 a step", "dispatch", ("live_path_per_s.64",), "{at_64:,} a second"),
    Row("rows over HTTP into committed blocks ÷ bare COPY", "storage", ("rows_vs_copy",), "{rows_vs_copy:.2f}"),
    Row("sealed label cells ÷ bare COPY", "storage", ("cells_vs_copy",), "{cells_vs_copy:.2f}"),
    Row("bytes of storage a label cell", "storage", ("bytes_per_label_cell",), "{bytes_per_label_cell:.2f}"),
    Row("memory of API, dispatcher, aggregator: a million rows − ten thousand", "memory", ("rss_growth_mb",), "{rss_growth_mb:+.0f} MiB"),
    Row("{rows:,} rows × 4 tasks without the model's time", "scale", ("details.total_s", "details.rows"), "{total_s:.1f} s"),
)  # fmt: skip
CASES = {
    "homogeneous": "64 equal GPUs",
    "mixed": "64 GPUs of four speeds",
    "silent_slow": "one of them silently four times slower",
    "models": "64 GPUs that hold 3 of 12 models each",
    "hard": "16 GPUs that hold 2 of 40 models each",
}
POLICIES = {
    "motet": "motet",
    "Celery": "Celery, round robin",
    "FIFO": "one shared FIFO",
    "two choices": "two choices",
    "blind EFT": "earliest finish, blind",
}
SYSTEMS = {
    "motet": "**motet**",
    "loop": "hand-written loop",
    "loop-stored": "hand-written loop",
    "celery-best": "Celery, fused and sorted by hand",
    "celery-best-stored": "Celery, fused and sorted by hand",
    "dask": "Dask, fused by hand",
    "ray-fused": "Ray Data, fused by hand",
    "st-pool": "sentence-transformers pool",
    "celery-plain": "Celery, as usually written",
    "ray-plain": "Ray Data, as usually written",
}
#: Those whose results are in Postgres in the end.
STORING = ("motet", "loop-stored", "celery-best-stored")
#: Processes of the scheduler's side, and how pages name them.
PROCESSES = {
    "client": "client",
    "api": "API",
    "postgres": "Postgres, all backends",
    "dispatch": "dispatcher",
    "aggregate": "aggregator",
    "valkey": "Valkey",
}
GROWING = ("api", "dispatch", "aggregate")


def written(page: str, results: Results, heads: Heads) -> str:
    """The page with all of its figures made anew. Raises ValueError where it asks for figures that nobody makes."""

    def made(match: re.Match[str]) -> str:
        if match["name"] not in FIGURES:
            raise ValueError(f"figures: got {match['name']!r}; expected one of {', '.join(FIGURES)}")
        needs, make = FIGURES[match["name"]]
        missing = [name for name in needs if name not in results]
        text = f"*Not measured yet: {_commands(missing)}.*" if missing else make(results, heads)
        return f"{match[1]}{text}\n{match[4]}"

    return MARK.sub(made, page)


# -- README


def bench(results: Results, _: Heads) -> str:
    rows, named = [], ""
    for row in ROWS:
        values = _values(results, row)
        if values is not None:
            command = "" if row.bench == named else f"`bench/{row.bench}.py`"
            rows.append(
                (row.words.format_map(values), command, row.shown.format_map(values).replace("%", " %"))
            )
            named = row.bench
    used = dict.fromkeys(row.bench for row in ROWS)
    return f"{table(('', 'command', 'measured'), rows)}\n\n{measured_on(results, used)}"


def _values(results: Results, row: Row) -> dict[str, Any] | None:
    found = {_name(path): _at(results.get(row.bench, {}), path) for path in row.values}
    return None if None in found.values() else found


def _name(path: str) -> str:
    last = path.rpartition(".")[2]
    return f"at_{last}" if last.isdigit() else last


def _at(kept: Any, path: str) -> Any:
    for part in path.split("."):
        kept = kept.get(part) if isinstance(kept, Mapping) else None
    return kept


def rivals(results: Results, _: Heads) -> str:
    kept = results["rivals"]
    rates: Mapping[str, float] = kept["rows_per_s"]
    rows = [
        (
            SYSTEMS[name],
            "yes" if name in STORING else "no",
            f"{rate:.0f}",
            f"{kept['rows_per_s_with_start'][name]:.0f}",
            f"{kept['work_cpu_s'][name]:.{0 if kept['work_cpu_s'][name] >= 100 else 1}f}",
        )
        for name, rate in sorted(rates.items(), key=lambda item: -item[1])
        if name in SYSTEMS
    ]
    head = ("system", "stores its results", "rows/s", "rows/s, its start included", "CPU s")
    return f"{table(head, rows)}\n\n{measured_on(results, ('rivals',))}"


def simulated(results: Results, _: Heads) -> str:
    runs = results["simulate"]["details"]["runs"]
    rows = [
        (words, *(f"{statistics.fmean(runs[f'{case} / {who}']['efficiency']):.3f}" for who in POLICIES))
        for case, words in CASES.items()
        if all(f"{case} / {who}" in runs for who in POLICIES)
    ]
    return table(("", *POLICIES.values()), rows)


def truth(results: Results, _: Heads) -> str:
    kept = results["truth"]
    steady, bare = (
        [abs(r["predicted_s"] / r["actual_s"] - 1) for r in kept["details"]["runs"] if r["steady"] is kind]
        for kind in (True, False)
    )
    return (
        "The simulator tells the truth about devices whose speed is their own: traces of real two-worker runs, replayed"
        f" before they ran, end within {_percent(max(steady))} of the clock (median {_percent(statistics.median(steady))};"
        f" {_percent(kept['schedule_error'])} where the machine's speed is known; `bench/truth.py`,"
        " [scatter](docs/truth.svg)). Those workers were paced to a steady speed. Bare CPU slots, whose speed is what the"
        f" machine's other programs leave of it, were {_percent(min(bare)).removesuffix(' %')}–{_percent(max(bare))} off"
        f" ({_percent(kept['bare_schedule_error'])} again where their speed is known)."
    )


def shipped(_: Results, heads: Heads) -> str:
    rows = [
        (
            f"`{name}`",
            f"several of {len(head['labels'])}" if head["head"] == "multi" else f"one of {len(head['labels'])}: {', '.join(head['labels'])}",
            f"{head['data']['rows_train']:,} texts: {head['data']['source'].partition(':')[0]} ({head['data']['licence']})",
            f"{_share(head['scores']['accuracy'])}{' a label' if head['head'] == 'multi' else ''}"
            f" (majority {_share(head['scores']['majority_accuracy'])}){_elsewhere(head['scores'])}",
        )
        for name, head in heads.items()
    ]  # fmt: skip
    return table(("head", "kind", "trained on", "test score"), rows)


# -- docs/live.md


def live(results: Results, _: Heads) -> str:
    kept = results["live"]
    details = kept["details"]
    rows = []
    for callers, rates in details["rates"].items():
        own, lit = (statistics.median(rates[side]) for side in ("motet", "litserve"))
        rows.append(
            (
                f"{int(callers):,}",
                f"{own:.0f}",
                f"{kept[f'p50_ms_{callers}']:.0f} / {kept[f'p99_ms_{callers}']:.0f}",
                f"{statistics.median(details['cpu_ms']['motet'][callers]):.1f}",
                f"{lit:.0f}",
                f"{statistics.median(details['cpu_ms']['litserve'][callers]):.1f}",
                f"{own / lit:.2f}",
            )
        )
    head = (
        "callers", "motet, requests/s", "p50 / p99, ms", "CPU ms", "LitServe, requests/s", "CPU ms", "motet ÷ LitServe",
    )  # fmt: skip
    return f"{table(head, rows)}\n\n{measured_on(results, ('live',))}"


# -- docs/scale.md


def one_job(results: Results, _: Heads) -> str:
    kept = results["scale"]
    run, rows = kept["details"], kept["details"]["rows"]
    facts = [
        ("end to end, first row sent to last result read", f"{run['total_s']:.1f} s: {kept['rows_per_s']:,} rows/s"),
        *([("first result", f"{kept['first_result_s']:.2f} s")] if "first_result_s" in kept else []),
        ("submitted / ran", f"{run['submit_s']:.1f} s / {run['running_s']:.1f} s"),
        ("sub-tasks", f"{kept['subtasks']:,} of {rows / kept['subtasks']:,.0f} rows"),
        ("stored, rows and 4 cells each", f"{kept['stored_bytes_per_row']} bytes per row; the text alone is {kept['text_bytes_per_row']}"),
        ("WAL", f"{kept['wal_bytes_per_row']:.0f} bytes per row"),
        ("Valkey, peak", f"{kept['redis_peak_mb']:.0f} MB"),
        ("Valkey, per row under way", f"{kept['redis_bytes']['row']} bytes"),
    ]  # fmt: skip
    us: Mapping[str, float] = kept["cpu_us_per_row"]
    cells = run["cells"] / rows
    paying = sorted((name for name in PROCESSES if us.get(name)), key=lambda name: -us[name])
    costs = [
        (
            PROCESSES[name],
            f"{us[name]:.1f}",
            f"{us[name] / cells:.2f}",
            f"{_significant(1e6 / us[name], 3):,}",
        )
        for name in paying
    ]
    total_us, cores = sum(us[name] for name in paying), kept["hardware"]["cores"]
    return "\n\n".join(
        (
            f"{rows:,} rows of {kept['text_bytes_per_row']:.0f} bytes, 4 label tasks in one pass, two stand-ins for workers"
            " on the real wire, client included.",
            table(("", ""), facts),
            table(("process", "CPU µs per row", "CPU µs per cell", "rows/s of one core"), costs),
            f"All but the workers: {total_us:.0f} µs per row, so {_significant(cores * 1e6 / total_us, 3):,} rows/s is what"
            f" {cores} cores can do with nothing else on them.",
            measured_on(results, ("scale",)),
        )
    )


def storage(results: Results, _: Heads) -> str:
    kept = results["storage"]
    details = kept["details"]
    rates = {side: statistics.median(found) for side, found in details["rates"].items()}
    costs: Mapping[str, Mapping[str, str]] = details["cpu_s_per_million"]
    ratios = {
        "mixed rows": kept["rows_vs_copy"],
        "short rows": details["short_rows_vs_copy"],
        "cells": kept["cells_vs_copy"],
    }
    names = {
        "mixed rows": f"rows of {details['row_bytes']['mixed']} bytes (the demo's mix), rows/s",
        "short rows": f"rows of {details['row_bytes']['short']} bytes, rows/s",
        "cells": "sealed label cells, cells/s",
    }
    rows = [
        (
            names[what],
            *(f"{_significant(rates[f'{side}, {what}'], 4):,}" for side in ("motet", "COPY")),
            f"{ratio:.2f}",
        )
        for what, ratio in ratios.items()
    ]
    rows += [
        ("bytes per label cell", f"{kept['bytes_per_label_cell']:.2f}", "", ""),
        (
            "WAL bytes per label cell",
            *(costs[f"{side}, cells"]["wal_bytes_each"] for side in ("motet", "COPY")),
            "",
        ),
    ]
    paid = [
        (side, *(costs[side][process] for process in ("client", "api", "postgres")))
        for what in ratios
        for side in (f"motet, {what}", f"COPY, {what}")
    ]
    rounds = len(next(iter(details["rates"].values())))
    return "\n\n".join(
        (
            f"Ratios within one run, medians of {rounds} rounds.",
            table(("", "motet", "bare COPY", "ratio"), rows),
            table(("CPU µs of a row, or of a cell", "client", "API", "Postgres"), paid),
            measured_on(results, ("storage",)),
        )
    )


def memory(results: Results, _: Heads) -> str:
    kept = results["memory"]
    small, large = sorted(kept["details"], key=int)
    peaks = [kept["details"][rows]["peaks_mb"] for rows in (small, large)]
    rows = [
        (PROCESSES[name], *(f"{peak[name]:.0f}" for peak in peaks), f"{peaks[1][name] - peaks[0][name]:.0f}")
        for name in (*GROWING, "client")
    ]
    return "\n\n".join(
        (
            table(("process", f"{int(small):,} rows", f"{int(large):,} rows", "more"), rows),
            f"API + dispatcher + aggregator: {kept['rss_growth_mb']:+.0f} MiB.",
            measured_on(results, ("memory",)),
        )
    )


def dispatcher(results: Results, _: Heads) -> str:
    rows = [
        (
            f"{int(workers):,}",
            f"{step['idle']:.0f} ms",
            f"{step['full']:.0f} ms",
            f"{step['leases']:,}",
            f"{step['longest'] / 1e3:.2f} s",
            f"{step['sent_per_s']:,}",
        )
        for workers, step in results["scale_workers"]["details"].items()
    ]
    head = ("workers", "idle step", "full step", "leases", "longest step", "sub-tasks sent per second")
    kept = results["scale_workers"]
    return "\n\n".join(
        (
            table(head, rows),
            f"Log-log slopes of the step over workers: idle {kept['step_slope_idle']}, full {kept['step_slope_full']}."
            f" The leader's process: {kept['dispatcher_mb']:,} MiB with {kept['workers']:,} workers.",
            measured_on(results, ("scale_workers",)),
        )
    )


def decisions(results: Results, _: Heads) -> str:
    live, grown = results["dispatch"], results["growth"]
    each = live["live_path_ms"]
    sent = [
        (f"{count} a step", *(f"{ms[stage]:.2f}" for stage in ("frontier", "lease", "payload", "publish")), f"{sum(ms.values()):.2f}")
        for count, ms in each.items()
    ]  # fmt: skip
    us = grown["details"]["decision_us"]
    counts = list(us["workers"])
    decided = [
        (f"with so many {what}", *(f"{us[what][n]:.0f}" for n in counts)) for what in ("workers", "jobs")
    ]
    return "\n\n".join(
        (
            "The live path alone (`python bench/dispatch.py`), and a decision of the policy (`python bench/growth.py`):",
            table(("ms a sub-task", "read the frontier", "lease", "payload", "publish", "all"), sent),
            f"All processes but the model's together: {live['cpu_ms_per_subtask']:.1f} ms of CPU a sub-task,"
            f" {100 * live['share_of_subtask']:.2f} % of its two seconds.",
            table(("CPU µs of a decision", *(f"{int(n):,}" for n in counts)), decided),
            f"Placing, carving and learning take {grown['us_per_subtask']:.0f} µs a sub-task while"
            f" {grown['details']['simulated']['rows']:,} rows run on {grown['details']['simulated']['gpus']:,} GPUs; memory"
            f" does not grow with rows (slope {grown['slope_memory_rows']}).",
            measured_on(results, ("dispatch", "growth")),
        )
    )


def full_first(results: Results, _: Heads) -> str:
    kept = results["scale"]
    leads = results["scale_workers"]
    us = kept["cpu_us_per_row"]
    return (
        f"1. **Sub-tasks per second of the leader**, which is one process: {leads['subtasks_s']:,} a second placed, leased,"
        f" packed and published beside {leads['workers']:,} workers, so {2 * leads['subtasks_s']:,} workers with sub-tasks of"
        f" two seconds. Its beat step takes {leads['full_step_ms']:.0f} ms there, four times a second.\n"
        f"2. **The API**, at {_significant(1e6 / us['api'], 3):,} rows/s of one core ({kept['text_bytes_per_row']:.0f}-byte"
        " rows), of which there may be several; one job's parts come in order, so one job uses one.\n"
        f"3. **Postgres**, at {_significant(1e6 / us['postgres'], 3):,} rows/s of each core it has, for rows, 4 cells each,"
        " and reading them back."
    )


#: What a page may ask for: the benchmarks that must have run, and what makes the text.
FIGURES: Mapping[str, tuple[tuple[str, ...], Callable[[Results, Heads], str]]] = {
    "bench": ((), bench),
    "rivals": (("rivals",), rivals),
    "simulated": (("simulate",), simulated),
    "truth": (("truth",), truth),
    "heads": ((), shipped),
    "one-job": (("scale",), one_job),
    "storage": (("storage",), storage),
    "memory": (("memory",), memory),
    "dispatcher": (("scale_workers",), dispatcher),
    "decisions": (("dispatch", "growth"), decisions),
    "full-first": (("scale", "scale_workers"), full_first),
    "live": (("live",), live),
}


# -- words


def measured_on(results: Results, benches: Iterable[str]) -> str:
    """Where and when these were measured; machines with fewer of them last, with their commands."""
    on: dict[str, list[str]] = {}
    for name in benches:
        if name in results:
            on.setdefault(machine(results[name]["hardware"]), []).append(name)
    first, *others = sorted(on, key=lambda where: -len(on[where])) or ["no machine yet"]
    parts = [f"Measured on {first}", *(f"{_commands(on[where])} on {where}" for where in others)]
    dates = sorted(results[name]["hardware"]["date"] for names in on.values() for name in names)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    return f"*{'; '.join(parts)}{f', {when}' if when else ''}.*"


def _commands(names: Sequence[str]) -> str:
    return ", ".join(f"`bench/{name}.py`" for name in names)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(_lines(head, rows))


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _line(head)
    yield "|" + "---|" * len(head)
    yield from map(_line, rows)


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _elsewhere(scores: Mapping[str, Any]) -> str:
    """What a head is worth on texts of another source, where that was measured."""
    found = scores.get("elsewhere")
    return (
        f"; {_share(found['accuracy'])} of {found['rows']:,} {found['source'].partition(' (')[0]}"
        if found
        else ""
    )


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _significant(amount: float, digits: int) -> int:
    return int(float(f"{amount:.{digits}g}"))
