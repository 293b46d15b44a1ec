"""The oracle: jobs made of a seed, the cells that they must end with, and what is wrong with those that came.

Nothing of motet computes an expectation: a row's answers follow from its text by the few lines below.
"""

from __future__ import annotations

import binascii
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Priority = Literal["interactive", "normal", "bulk"]

TASKS = ("digest", "measure", "weigh")
#: A task that reads another's answer beside the text, and the function that it asks: it waits, block by block.
WAITS: Mapping[str, tuple[str, str, str]] = {"echo": ("digest", "weigh", "{weigh}: {text}")}
#: Words in a text, the task that they make fail, and the class of that error.
POISON: Mapping[str, tuple[str, str]] = {
    "#raise-digest": ("digest", "engine"),
    "#raise-measure": ("measure", "engine"),
    "#kill": ("weigh", "poison"),
    "#exit": ("weigh", "poison"),
    "#segfault": ("weigh", "poison"),
    "#hang": ("weigh", "poison"),
    "#hog": ("weigh", "out_of_memory"),
}
DEADLY = ("#kill", "#exit", "#segfault", "#hang")
WORDS = [
    "amber",
    "birch",
    "cedar",
    "dune",
    "ember",
    "fjord",
    "grove",
    "harbor",
    "inlet",
    "juniper",
    "knoll",
    "lagoon",
    "meadow",
    "noon",
    "orchard",
]
BACKGROUND: Sequence[Priority] = ("normal", "normal", "bulk")
#: Rows of a job, and how often such a job comes; the largest takes two parts to upload.
SIZES = {1: 2, 7: 3, 40: 5, 160: 5, 420: 3, 1500: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job of the run, made from the seed: the same number is the same job in every replay."""

    number: int
    tenant: int
    tasks: tuple[str, ...]
    texts: tuple[str, ...]
    priority: Priority

    @property
    def deadly(self) -> bool:
        return any(word in text for text in self.texts for word in DEADLY)

    @property
    def cells(self) -> int:
        return len(self.texts) * len(self.tasks)


def order(
    seed: int,
    number: int,
    tenants: int,
    *,
    rows: int = 0,
    tasks: Sequence[str] = (),
    poison: Sequence[str] = (),
) -> Order:
    """Job ``number`` of this seed; with so many rows, these tasks and these words of POISON where they are given."""
    dice = random.Random(f"{seed}/{number}")
    rows = rows or dice.choices(list(SIZES), list(SIZES.values()))[0]
    if not tasks:
        tasks = dice.sample(TASKS, dice.choice((1, 2, 3, 3)))
        # By a die of its own: the same seed gives the same jobs as before, some with a task more.
        if "weigh" in tasks and random.Random(f"{seed}/{number}/waits").random() < 0.3:
            tasks = (*tasks, *WAITS)
    texts = [
        f"{' '.join(dice.choices(WORDS, k=dice.randint(1, 40)))} {seed}.{number}.{i}" for i in range(rows)
    ]
    for word in poison:
        texts[dice.randrange(rows)] += f" {word}"
    priority: Priority = "interactive" if rows <= 40 and dice.random() < 0.3 else dice.choice(BACKGROUND)
    return Order(
        number=number,
        tenant=number % tenants,
        tasks=tuple(sorted(tasks)),
        texts=tuple(texts),
        priority=priority,
    )


def expected(task: str, text: str) -> tuple[str, Any]:
    """("ok", value), or ("error", class) or ("skipped", class) of one cell."""
    if task in WAITS:
        task, needed, template = WAITS[task]
        status, answer = expected(needed, text)
        if status != "ok":
            return "skipped", "upstream"
        text = template.replace(f"{{{needed}}}", str(answer)).replace("{text}", text)
    for word, (of, error) in POISON.items():
        if of == task and word in text:
            return "error", error
    raw = text.encode()
    match task:
        case "digest":
            return "ok", hashlib.sha256(raw).digest()[:6].hex()
        case "measure":
            return "ok", {"letters": len(text), "words": 1 + text.count(" ")}
        case _:
            return "ok", binascii.crc32(raw)


@dataclass(slots=True)
class Verdict:
    """The zero columns, and the words about each breach."""

    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    wrong: int = 0
    cells: int = 0
    breaches: list[str] = field(default_factory=list)

    def breach(self, column: str, words: str, count: int = 1) -> None:
        setattr(self, column, getattr(self, column) + count)
        self.breaches.append(f"{column}: {words}")

    def add(self, other: Verdict) -> None:
        """Take what another judged on top."""
        for column in ("lost", "doubled", "stuck", "wrong", "cells"):
            setattr(self, column, getattr(self, column) + getattr(other, column))
        self.breaches += other.breaches

    @property
    def clean(self) -> bool:
        return not self.breaches


@dataclass(frozen=True, slots=True)
class Came:
    """One cell as it came back: its state, and its value or the class of its error."""

    status: str
    value: Any


def judge(
    verdict: Verdict, asked: Order, rows: Iterable[tuple[int, Mapping[str, Came]]], ended: str
) -> dict[str, int]:
    """Compare what came with what must come. Returns how many cells of each state came.

    ``ended``: the job's state. A cancelled one may lack rows and skip cells; what it has must be right.
    """
    whole = ended == "succeeded"
    seen: set[int] = set()
    count = {"ok": 0, "error": 0, "skipped": 0}
    for index, cells in rows:
        if index in seen:
            verdict.breach("doubled", f"job {asked.number}: row {index} came twice")
        seen.add(index)
        for task in asked.tasks:
            came = cells.get(task)
            if came is None:
                verdict.breach("lost", f"job {asked.number}: row {index} has no cell of {task}")
                continue
            verdict.cells += 1
            count[came.status] += 1
            if came.status == "skipped" and not whole:
                continue
            wanted = expected(task, asked.texts[index])
            if (came.status, came.value) != wanted:
                column = "lost" if wanted[0] == "ok" and came.status != "ok" else "wrong"
                verdict.breach(
                    column, f"job {asked.number}: row {index}, {task}: got {came}, expected {wanted}"
                )
    missing = set(range(len(asked.texts))) - seen
    if whole and missing:
        verdict.breach("lost", f"job {asked.number}: {len(missing)} rows never came", len(missing))
    return count
