"""`motet demo --llm`: a small language model does four tasks at once on real texts; what sharing saved, and how good it is.

The model has 135 million parameters. So its answers are held against what people said of the same texts, and one of its
translations is shown as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

from motet import datasets
from motet.cli.show import console, cut, result_table
from motet.demo.stage import StagedCluster, Story, staged, told_of
from motet.job import Job
from motet.messages.jobs import Plan
from motet.results import Row
from motet.tasks import Choose, Generate, Task
from motet.words import count

MODEL, _REGISTER = "smollm2-135m", "--smollm2"
LABELS = ("negative", "positive")
TASKS: Mapping[str, Task] = {
    "sentiment": Choose(MODEL, labels=LABELS, question="Is this text negative or positive?"),
    "summary": Generate(MODEL, prompt="Summarise this text in at most eight words.", max_tokens=24),
    "french": Generate(MODEL, prompt="Translate this text into French.", max_tokens=40),
    "reply": Generate(
        MODEL, prompt="Write one short sentence in reply to this {sentiment} comment.", max_tokens=32
    ),
}
#: Lengths of the texts in characters, and the least distance of their rating from 0 (of 4): a clear sentiment.
_LENGTHS, _CLEAR = (80, 260), 1.5
_ROWS_SHOWN = 5
#: Small words that are French and not English; a text with _FRENCH_WORDS different ones counts as French.
_FRENCH = re.compile(
    r"\b(?:le|la|les|des|du|une|et|est|un|pas|pour|dans|que|qui|ce|cette|il|elle|je|vous|nous|très)\b"
)
_FRENCH_WORDS = 3


@dataclass(frozen=True, slots=True)
class FeltText:
    """A text, and what people felt in it: ``negative`` or ``positive``."""

    text: str
    sentiment: str


def run(
    *, data: Path, rows: int = 40, cpus: int = 2, keep: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """As ``motet.demo.texts.run``, with a language model. The first run fetches 93 MB and converts them for a minute."""
    story = Story(quiet)
    with story.phase("reading public texts") as note:
        texts = choose(rows)
        note(f"{count(len(texts), 'short text')} whose sentiment people have rated")
    with staged(data, story, cpus=cpus, keep=keep, models=[_REGISTER]) as stage:
        return _run_job(stage, texts)


def choose(rows: int, cache: Path | None = None) -> list[FeltText]:
    """Pick short texts of one clear sentiment, always the same ones. Fewer than asked for where there are not so many."""
    clear = [
        FeltText(" ".join(t.text.split()), LABELS[t.mean > 0])
        for t in datasets.vader(cache)
        if t.domain in ("movie", "product")
        and _LENGTHS[0] <= len(t.text) <= _LENGTHS[1]
        and abs(t.mean) >= _CLEAR
    ]
    Random(datasets.SEED).shuffle(clear)
    return clear[:rows]


def _run_job(stage: StagedCluster, texts: Sequence[FeltText]) -> dict[str, Any]:
    story = stage.story
    source = [t.text for t in texts]
    plan = stage.plan(source, TASKS)
    story.say("")
    job, seconds = stage.run(source, TASKS)
    rows = list(job.results())
    story.show(result_table(list(islice(rows, _ROWS_SHOWN)), source, width=console().width))
    measured = _measure(job, plan, rows, texts, seconds)
    story.say(_summary(measured))
    _show_one(story, rows, source)
    return measured


def _measure(
    job: Job, plan: Plan, rows: Sequence[Row], texts: Sequence[FeltText], seconds: float
) -> dict[str, Any]:
    usage = job.usage
    rated = [(str(row["sentiment"]), texts[row.index].sentiment) for row in rows if row["sentiment"].ok]
    french = [str(row["french"]) for row in rows if row["french"].ok]
    majority, majority_rows = Counter(told for _, told in rated).most_common(1)[0] if rated else ("", 0)
    return {
        **told_of(job, seconds),
        "tokens": usage["tokens"],
        "tokens_cached": usage.get("tokens_cached") or 0,
        "tokens_out": usage.get("tokens_out") or 0,
        "busy_s": round(usage["busy_s"], 3),
        "planned_saving": round(1 - plan.tokens / plan.unfused_tokens, 4) if plan.unfused_tokens else None,
        "cut_short": sum(cell.finish == "length" for row in rows for cell in row.values()),
        "rated_rows": len(rated),
        "sentiment_accuracy": round(sum(a == b for a, b in rated) / len(rated), 4) if rated else None,
        "majority": majority,
        "majority_share": round(majority_rows / len(rated), 4) if rated else None,
        "translations": len(french),
        "translations_in_french": sum(map(looks_french, french)),
    }


def looks_french(text: str) -> bool:
    """Whether it holds some of French's small words: not whether it is a translation."""
    return len(set(_FRENCH.findall(text.lower()))) >= _FRENCH_WORDS


def _summary(m: Mapping[str, Any]) -> str:
    lines = [
        f"{m['rows']:,} rows × {m['tasks']} tasks in {m['seconds']:.1f} s, {m['ok']:,} of {m['cells']:,} cells ok, "
        f"{m['busy_s']:,.1f} device-seconds",
        f"sharing   {m['tokens']:,} tokens of prompts, {m['tokens_cached']:,} of them"
        + (f" ({m['tokens_cached'] / m['tokens']:.0%})" if m["tokens"] else "")
        + " not computed again",
        f"writing   {m['tokens_out']:,} tokens; {count(m['cut_short'], 'answer')} ended at max_tokens",
    ]
    if m["sentiment_accuracy"] is not None:
        share, n = m["sentiment_accuracy"], m["rated_rows"]
        lines.append(
            f"sentiment agrees with people on {share:.0%} of {n:,} texts (± {1.96 * sqrt(share * (1 - share) / n):.0%}); "
            f"saying {m['majority']} always agrees on {m['majority_share']:.0%}"
        )
    lines.append(
        f"french    {m['translations_in_french']:,} of {m['translations']:,} look like French at all; "
        "whether they say the same is another question:"
    )
    return "\n" + "\n".join(lines)


def _show_one(story: Story, rows: Sequence[Row], source: Sequence[str]) -> None:
    """One translation as it is: the first that ended by itself, or else the first."""
    with_answer = [row for row in rows if row["french"].ok]
    ended = [row for row in with_answer if row["french"].finish == "stop"] or with_answer
    if not ended:
        return
    row = ended[0]
    story.say(f"          {cut(source[row.index], 200)}")
    story.say(f"        → {cut(str(row['french']), 300)}")
    story.say(
        "Read it: what looks French need not say what the text says. A model of 135 million parameters shows how tasks "
        "share a prefill and wait for each other; for answers to rely on, register a larger one (docs/language-models.md)."
    )
