"""Labelled rows, read and checked for a training run: their texts or pictures, and what is true of each."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from motet.errors import InvalidJob, Problem
from motet.rows import MAX_PROBLEMS, records
from motet.sources import Source
from motet.tasks import Number, short
from motet.training.recipe import Target

#: Share of the rows that is kept for the test where no test rows are given.
TEST_SHARE = 0.15
#: Fewer rows teach nothing that could be measured.
_LEAST_ROWS = 20


@dataclass(frozen=True, slots=True)
class Labels:
    """Learn the labels in a field of the rows: one of a row, or with ``multi`` any number of them.

    A row may lack them (null, or no such field): then it teaches the other tasks only. With ``multi`` the field holds a
    list, or text with bars between the labels (``a|b``). ``balance``: rare labels count for more.
    """

    field: str
    _: KW_ONLY
    multi: bool = False
    balance: bool = False


#: ``Number("urgency")`` learns the number in a field; elsewhere it is the task that asks a model for one.
Learned = Labels | Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Labelled rows, read and checked."""

    #: What is read of each row: its text, or what stands for its picture. Training rows first.
    inputs: Sequence[Any]
    train_rows: int
    targets: tuple[Target, ...]
    #: Sha256 of all of it.
    digest: str


def read_lesson(
    train: Source,
    test: Source | None,
    tasks: Mapping[str, Learned],
    *,
    text: str = "text",
    image: str | None = None,
    seed: int = 0,
) -> Lesson:
    """Read labelled rows. Without ``test`` some rows of ``train`` are kept for it, by ``seed``.

    ``text``: the field that is read; or ``image``, a field that holds pictures, in any form that ``Client.submit`` takes.
    Raises InvalidJob that names rows and fields: no text, no such field, a label that no training row has, one label
    only, NaN.
    """
    if not tasks:
        raise InvalidJob.of("tasks", "none", "what to learn", 'give {"topic": Labels("topic")}')
    found = _Reading(tasks, image or text, pictures=image is not None)
    found.read("train", train)
    n = len(found.inputs)
    if test is not None:
        found.read("test", test)
        order = list(range(len(found.inputs)))
    else:
        order = list(range(n))
        random.Random(seed).shuffle(order)
        kept = max(1, round(TEST_SHARE * n)) if n > 1 else 0
        order = [*sorted(order[kept:]), *sorted(order[:kept])]
        n -= kept
    if n < _LEAST_ROWS:
        found.problems.append(
            Problem("train", f"{n} rows", f"at least {_LEAST_ROWS} to learn from", "add rows")
        )
    if found.problems:
        raise InvalidJob(found.problems[:MAX_PROBLEMS])
    inputs = [found.inputs[i] for i in order]
    targets = tuple(found.target(name, order, n, held_out=test is not None) for name in tasks)
    if found.problems:
        raise InvalidJob(found.problems[:MAX_PROBLEMS])
    told = [one if isinstance(one, str) else _digest_of(one) for one in inputs]
    digest = hashlib.sha256(json.dumps([told, n], ensure_ascii=False).encode("utf-8", "replace"))
    for target in targets:
        digest.update(json.dumps([target.name, target.kind, target.labels]).encode() + target.truth)
    return Lesson(inputs=inputs, train_rows=n, targets=targets, digest=digest.hexdigest())


def _digest_of(picture: object) -> str:
    """Of the pixels or bytes of a picture, so that the record of what was learned from names them."""
    raw = picture.tobytes() if hasattr(picture, "tobytes") else picture
    if isinstance(raw, Mapping):
        raw = raw.get("bytes") or json.dumps(raw, default=str)
    return hashlib.sha256(raw if isinstance(raw, bytes) else str(raw).encode()).hexdigest()


class _Reading:
    """Rows as they are read, and what is wrong with them."""

    def __init__(self, tasks: Mapping[str, Learned], field: str, *, pictures: bool) -> None:
        self.tasks, self._field, self._pictures = tasks, field, pictures
        self.inputs: list[Any] = []
        self.problems: list[Problem] = []
        #: Task -> what is true of each row: a label, labels, a number; None where it is not known.
        self._truth: dict[str, list[Any]] = {name: [] for name in tasks}
        #: Of each row: which part it is of, and its place there.
        self._places: list[tuple[str, int]] = []

    def read(self, part: str, source: Source) -> None:
        has: set[str] = set()
        for index, (row, _) in enumerate(records(source)):
            if len(self.problems) >= MAX_PROBLEMS:
                return
            if not isinstance(row, Mapping):
                self._wrong(part, "", "a row that is no mapping", "fields: a text and its labels", index)
                continue
            has |= row.keys()
            said = row.get(self._field)
            self._check_input(part, said, index)
            self.inputs.append(said if self._pictures or isinstance(said, str) else "")
            self._places.append((part, index))
            for name, learned in self.tasks.items():
                self._truth[name].append(self._true(part, learned, row, index))
        if not self._places or self._places[-1][0] != part:
            self.problems.append(Problem(part, "no rows", "labelled rows", "check the source"))
            return
        for name, learned in self.tasks.items():
            field = field_of(learned)
            if field not in has:
                names = ", ".join(short(one) for one in sorted(map(str, has))[:8])
                self.problems.append(
                    Problem(
                        f"{part}.{field}", "no such field in any row", f"the labels of {name} (rows have {names})",
                        "name the field that holds them",
                    )
                )  # fmt: skip

    def _check_input(self, part: str, said: object, index: int) -> None:
        what = "picture" if self._pictures else "text"
        if isinstance(said, str) and not said.strip():
            self._wrong(part, self._field, f"an empty {what}", f"a {what}", index)
        elif said is None or not (self._pictures or isinstance(said, str)):
            self._wrong(part, self._field, f"no {what} in {short(self._field)}", f"a {what}", index)

    def _true(self, part: str, learned: Learned, row: Mapping[str, Any], index: int) -> Any:
        field = field_of(learned)
        value = row.get(field)
        if value is None:
            return None
        if isinstance(value, float) and not math.isfinite(value):
            got = "NaN" if math.isnan(value) else "infinity"
            return self._wrong(part, field, got, "a finite number, or null where it is not known", index)
        if isinstance(learned, Number):
            try:
                return (
                    float(value)
                    if not isinstance(value, bool)
                    else self._no_number(part, field, value, index)
                )
            except (TypeError, ValueError, OverflowError):
                return self._no_number(part, field, value, index)
        if not learned.multi:
            return self._label(part, field, value, index)
        if isinstance(value, str):
            value = [one for one in value.split("|") if one]
        elif type(value).__name__ == "ndarray":
            value = value.tolist()
        if not isinstance(value, list | tuple | set):
            return self._wrong(
                part, field, short(type(value).__name__), "a list of labels, or text as a|b", index
            )
        labels = [self._label(part, field, one, index) for one in value]
        return None if None in labels else labels

    def _label(self, part: str, field: str, value: object, index: int) -> str | None:
        if isinstance(value, bool | int):
            return str(value).lower()
        if isinstance(value, str) and value.strip() and len(value) <= 200 and "\0" not in value:
            return value
        got = "an empty label" if value == "" else short(type(value).__name__)
        self._wrong(part, field, got, "a label: text of up to 200 characters", index)
        return None

    def _no_number(self, part: str, field: str, value: object, index: int) -> None:
        self._wrong(part, field, f"{short(value)!r}", "a number", index)

    def _wrong(self, part: str, field: str, got: str, expected: str, index: int) -> None:
        where = f"{part}.{field}" if field else part
        self.problems.append(Problem(where, got, expected, "mend the row or leave it out", index))

    def target(self, name: str, order: Sequence[int], train_rows: int, *, held_out: bool) -> Target:
        """What is true of the rows in this order. Notes as problems what cannot be learned."""
        learned = self.tasks[name]
        truth = [self._truth[name][i] for i in order]
        if isinstance(learned, Number):
            if len({one for one in truth[:train_rows] if one is not None}) < 2:
                self._too_few(name, learned, "one number only", "different numbers")
            return Target.number(name, truth)
        said = [[one] if isinstance(one, str) else one or () for one in truth]
        labels = sorted({label for labels in said[:train_rows] for label in labels})
        if len(labels) < (1 if learned.multi else 2):
            got = f"the label {short(labels[0])!r} only" if labels else "no label at all"
            self._too_few(
                name, learned, got, "at least two different labels" if not learned.multi else "labels"
            )
            labels = labels or ["none"]
        known = set(labels)
        for place, given in enumerate(said[train_rows:], train_rows):
            for label in given:
                if label not in known:
                    part, index = self._places[order[place]]
                    got = f"the label {short(label)!r}, which no training row has"
                    if not held_out:
                        got += " (this row was drawn for the test by its seed)"
                    self._wrong(
                        part, learned.field, got, f"one of {', '.join(map(short, labels[:8]))}", index
                    )
                    truth[place] = None
        if learned.multi:
            return Target.multi(name, labels, truth, balance=learned.balance)
        known_truth = [one if one is None or one in known else None for one in truth]
        return Target.single(name, labels, known_truth, balance=learned.balance)

    def _too_few(self, name: str, learned: Learned, got: str, expected: str) -> None:
        self.problems.append(
            Problem(
                f"train.{field_of(learned)}",
                got,
                f"{expected} to learn {name} from",
                "add rows of another kind",
            )
        )


def field_of(learned: Learned) -> str:
    """The field that holds what is learned."""
    return learned.model if isinstance(learned, Number) else learned.field
