"""What customers say: dialogues with services (Schema-Guided Dialogue), and questions to a bank (Banking77).

Rastogi et al., Towards Scalable Multi-Domain Conversational Agents, AAAI 2020 (CC BY-SA 4.0); Casanueva et al., Efficient
Intent Detection with Dual Sentence Encoders, NLP4ConvAI 2020 (CC BY 4.0). Both are fetched, and never shipped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from motet import datasets
from motet.apps.data.files import DataFile, FetchUrl, located
from motet.templates import filled

_SGD = "https://raw.githubusercontent.com/google-research-datasets/dstc8-schema-guided-dialogue/e852981ae34990f4358979625854259302feaa78"
_BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data"
_SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A dialogue up to one of the customer's turns."""

    #: ``{"role": "user" or "assistant", "content": …}``, the customer's last.
    messages: Sequence[Mapping[str, str]]
    #: What the customer wants at that turn, such as ``FindRestaurants``.
    intent: str

    @property
    def last(self) -> str:
        return self.messages[-1]["content"]

    def history(self, template: str) -> str:
        """The turns as a task's template renders them, so that a head learns what it will read."""
        return filled(template, {"messages": list(map(dict, self.messages))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question to a bank, and which of 77 it is."""

    text: str
    intent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """A text, and the mood that people read in it: ``negative``, ``neutral`` or ``positive``."""

    text: str
    mood: str
    #: What a list of rated words says of it.
    listed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomerSets:
    """All of it, each set as (to learn from, to test with) where there is something to learn."""

    dialogues: tuple[Sequence[Dialogue], Sequence[Dialogue]]
    questions: tuple[Sequence[Question], Sequence[Question]]
    felt: Sequence[Felt]


def said() -> CustomerSets:
    """Everything that the application reads, with 30 questions of each intent to learn from. Raises SetupError."""
    return CustomerSets(dialogues=dialogues(), questions=questions(each=30), felt=felt_texts())


def dialogues() -> tuple[list[Dialogue], list[Dialogue]]:
    """1,500 dialogues to learn from and 958 to test with, of 33 intents. Raises SetupError."""
    found: dict[str, list[Dialogue]] = {"train": [], "test": []}
    for row in _rows(DIALOGUES):
        found[row["split"]].append(Dialogue(messages=row["messages"], intent=row["intent"]))
    return found["train"], found["test"]


def questions(each: int) -> tuple[list[Question], list[Question]]:
    """``each`` questions of every intent to learn from, drawn always alike, and all 3,080 to test with. Raises SetupError."""
    found: dict[str, list[Question]] = {"train": [], "test": []}
    for row in _rows(QUESTIONS):
        found[row["split"]].append(Question(text=row["text"], intent=row["intent"]))
    random.Random(0).shuffle(found["train"])
    taken: dict[str, list[Question]] = {}
    for question in found["train"]:
        taken.setdefault(question.intent, []).append(question)
    return [one for intent in sorted(taken) for one in taken[intent][:each]], found["test"]


def _rows(file: DataFile) -> Iterator[Mapping[str, Any]]:
    with located(file).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _make_dialogues(download: FetchUrl) -> bytes:
    """The dialogues and turns that were drawn (sgd-turns.txt: split, file, then ``dialogue.turns`` each)."""
    lines = []
    for drawn in (files(__package__) / "sgd-turns.txt").read_text("utf-8").splitlines():
        split, number, *turns = drawn.split()
        published = json.loads(download(f"{_SGD}/train/dialogues_{int(number):03d}.json"))
        known = {dialogue["dialogue_id"]: dialogue["turns"] for dialogue in published}
        for one in turns:
            dialogue, length = one.split(".")
            name = f"{number}_{int(dialogue):05d}"
            lines.append(_dialogue(split, name, known[name], int(length)))
    return _jsonl(lines)


def _dialogue(split: str, name: str, turns: Sequence[Mapping[str, Any]], length: int) -> dict[str, Any]:
    frame = turns[length - 1]["frames"][0]
    return {
        "split": split,
        "id": name,
        "messages": [
            {"role": _SPEAKERS[turn["speaker"]], "content": turn["utterance"]} for turn in turns[:length]
        ],
        "intent": frame["state"]["active_intent"],
        "service": frame["service"],
        "slots": frame["state"]["slot_values"],
        "reply": turns[length]["utterance"],
    }


def _make_questions(download: FetchUrl) -> bytes:
    lines = []
    for split in ("train", "test"):
        table = io.StringIO(download(f"{_BANKING}/{split}.csv").decode("utf-8"), newline="")
        lines += [
            {"split": split, "text": row["text"], "intent": row["category"]} for row in csv.DictReader(table)
        ]
    return _jsonl(lines)


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


DIALOGUES = DataFile(
    filename="sgd-2458.jsonl",
    sha256="141e0169106c8d179e6f16ff4ea3ac6b21716d67df2c9fa84321c57e6c53a637",
    published="Schema-Guided Dialogue (github.com/google-research-datasets/dstc8-schema-guided-dialogue)",
    make=_make_dialogues,
)
QUESTIONS = DataFile(
    filename="banking77.jsonl",
    sha256="f15bcb3a8387d963531fff4258ec1607ccde90a24d38d8e97cb7d441343d64d9",
    published="Banking77 (github.com/PolyAI-LDN/task-specific-datasets)",
    make=_make_questions,
)


def felt_texts() -> list[Felt]:
    """Tweets and product reviews whose mood people rated, those that the shipped head did not learn from. Raises SetupError."""
    _, held_out = datasets.split(datasets.vader())
    rated = [one for one in held_out if one.domain in ("tweet", "product")]
    listed = by_word_list([one.text for one in rated])
    return [
        Felt(text=one.text, mood=_mood(one.mean, 0.5), listed=by_list)
        for one, by_list in zip(rated, listed, strict=True)
    ]


def by_word_list(texts: Sequence[str]) -> list[str]:
    """Their moods by VADER's list of rated words alone: the sum of what they say, squeezed into -1 to 1. Raises SetupError."""
    with tarfile.open(datasets.fetch(datasets.VADER)) as archive:
        [member] = [one for one in archive.getmembers() if one.name.endswith("/vader_lexicon.txt")]
        listed = archive.extractfile(member)
        assert listed is not None
        lines = [line.split("\t") for line in listed.read().decode("utf-8").splitlines() if line.strip()]
    felt = {word: float(rating) for word, rating, *_ in lines}
    sums = [sum(felt.get(word, 0.0) for word in re.findall(r"[\w']+", text.lower())) for text in texts]
    return [_mood(said / math.sqrt(said * said + 15), 0.05) for said in sums]


def _mood(value: float, least: float) -> str:
    return "positive" if value >= least else "negative" if value <= -least else "neutral"
