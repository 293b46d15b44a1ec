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
from motet.head_inputs import number_in
from motet.options import MOST_NUMBERS, MOST_TEXTS, is_template
from motet.protocol.values import NoValue, clean, plain_text
from motet.rows import MAX_PROBLEMS, whole_rows
from motet.sources import Source
from motet.tasks import Number, short
from motet.templates import filled, is_placeholder, part_of, placeholders, resolved
from motet.training.recipe import Numbers, Target

#: Share of the rows that is kept for the test where no test rows are given.
TEST_SHARE = 0.15
#: Fewer rows teach nothing that could be measured.
_LEAST_ROWS = 20
#: Different labels of a task, as many as a model may have; and the size of a number, which a recipe holds in 32 bits.
_MOST_LABELS, _MOST_NUMBER = 32_000, 3.4e38


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

    #: What is read of each row: its text, or what stands for its picture; of a row that has several texts, one behind the
    #: other. Training rows first.
    inputs: Sequence[Any]
    train_rows: int
    targets: tuple[Target, ...]
    #: Of the texts, where heads read several of them, or numbers beside: as a recipe's ``inputs``.
    templates: tuple[str, ...] = ()
    #: As in a recipe.
    numbers: tuple[Numbers, ...] = ()
    #: Sha256 of all of it.
    digest: str

    @property
    def rows(self) -> int:
        return len(self.inputs) // max(1, len(self.templates))


def read_lesson(
    train: Source,
    test: Source | None,
    tasks: Mapping[str, Learned],
    *,
    text: str | Sequence[str] = "text",
    numbers: Sequence[str] = (),
    image: str | None = None,
    seed: int = 0,
) -> Lesson:
    """Read labelled rows. Without ``test`` some rows of ``train`` are kept for it, by ``seed``.

    ``text``: the field that is read, or a template, or several of either; or ``image``, a field that holds pictures, in any
    form that ``Client.submit`` takes. ``numbers``: names of fields, or parts of them, that are numbers, read beside the
    texts. Raises InvalidJob that names rows and fields: no text, no such field, a label that no training row has, one
    label only, NaN, what is no number.
    """
    if not tasks:
        raise InvalidJob.of("tasks", "none", "what to learn", 'give {"topic": Labels("topic")}')
    found = _Reading(tasks, text, numbers, image)
    found.read("train", train)
    n = len(found.rows)
    if test is not None:
        found.read("test", test)
        order = list(range(len(found.rows)))
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
    inputs = [one for i in order for one in found.rows[i]]
    targets = tuple(found.target(name, order, n, held_out=test is not None) for name in tasks)
    beside = tuple(found.number(name, order, n) for name in found.numbers)
    if found.problems:
        raise InvalidJob(found.problems[:MAX_PROBLEMS])
    told = [one if isinstance(one, str) else _digest_of(one) for one in inputs]
    digest = hashlib.sha256(json.dumps([told, n], ensure_ascii=False).encode("utf-8", "replace"))
    for target in targets:
        digest.update(json.dumps([target.name, target.kind, target.labels]).encode() + target.truth)
    for one in beside:
        digest.update(one.name.encode() + one.values)
    return Lesson(
        inputs=inputs,
        train_rows=n,
        targets=targets,
        templates=found.templates if len(found.templates) > 1 or beside else (),
        numbers=beside,
        digest=digest.hexdigest(),
    )


def _digest_of(picture: object) -> str:
    """Of the pixels or bytes of a picture, so that the record of what was learned from names them."""
    raw = picture.tobytes() if hasattr(picture, "tobytes") else picture
    if isinstance(raw, Mapping):
        raw = raw.get("bytes") or json.dumps(raw, default=str)
    return hashlib.sha256(raw if isinstance(raw, bytes) else str(raw).encode()).hexdigest()


class _Reading:
    """Rows as they are read, and what is wrong with them."""

    def __init__(
        self,
        tasks: Mapping[str, Learned],
        text: str | Sequence[str],
        numbers: Sequence[str],
        image: str | None,
    ) -> None:
        """Raises InvalidJob for what names no text, and no number."""
        self.tasks, self._image = tasks, image
        #: The field of the only text or picture, where it is no template.
        self._field = image or (text if isinstance(text, str) and "{" not in text else None)
        self.templates = () if image else templates_of(text)
        self.numbers = names_of(numbers)
        #: Of each row its texts, or its picture.
        self.rows: list[tuple[Any, ...]] = []
        self._numbers: dict[str, list[float | None]] = {name: [] for name in self.numbers}
        self.problems: list[Problem] = []
        #: Task -> what is true of each row: a label, labels, a number; None where it is not known.
        self._truth: dict[str, list[Any]] = {name: [] for name in tasks}
        #: Of each row: which part it is of, and its place there.
        self._places: list[tuple[str, int]] = []

    def read(self, part: str, source: Source) -> None:
        has: set[str] = set()
        for index, (row, _) in enumerate(whole_rows(source)):
            if len(self.problems) >= MAX_PROBLEMS:
                return
            if not isinstance(row, Mapping):
                self._wrong(part, "", "a row that is no mapping", "fields: a text and its labels", index)
                continue
            has |= row.keys()
            self.rows.append(self._read_of(part, row, index))
            self._places.append((part, index))
            for name, values in self._numbers.items():
                values.append(self._number_of(part, name, row, index))
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

    def _read_of(self, part: str, row: Mapping[str, Any], index: int) -> tuple[Any, ...]:
        """A row's picture or texts."""
        if self._field is not None:
            said = row.get(self._field)
            self._check_input(part, self._field, said, index)
            return (said if self._image or isinstance(said, str) else "",)
        texts = []
        for template in self.templates:
            values = {}
            for name in dict.fromkeys(resolved(one, ()).name for one in placeholders(template)):
                values[name] = self._value(part, name, row, index)
            texts.append(filled(template, values))
        if not any(text.strip() for text in texts):
            self._wrong(part, "", "no text at all", f"a text in {' or '.join(self.templates)}", index)
        return tuple(texts)

    def _check_input(self, part: str, field: str, said: object, index: int) -> None:
        what = "picture" if self._image else "text"
        if isinstance(said, str) and not said.strip():
            self._wrong(part, field, f"an empty {what}", f"a {what}", index)
        elif said is None or not (self._image or isinstance(said, str)):
            self._wrong(part, field, f"no {what} in {short(field)}", f"a {what}", index)

    def _number_of(self, part: str, name: str, row: Mapping[str, Any], index: int) -> float | None:
        """A number beside the texts; None where it is null."""
        meant = resolved(name, ())
        value = self._value(part, meant.name, row, index)
        try:
            return number_in(plain_text(part_of(value, meant.steps)))
        except ValueError:
            self._wrong(part, name, "no number", "a number, or null where it is not known", index)
            return None

    def _value(self, part: str, name: str, row: Mapping[str, Any], index: int) -> Any:
        if name not in row:
            self._wrong(part, name, "no such field", "a value, or null", index)
            return None
        try:
            return clean(row[name])
        except NoValue as no:
            self._wrong(part, name, no.got, no.expected, index)
            return None

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
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            # NaN also of text: a table holds "nan" where a number is not known.
            return number if abs(number) <= _MOST_NUMBER else self._no_number(part, field, value, index)
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
        if len(labels) > _MOST_LABELS:
            got, most = f"{len(labels):,} different labels", f"at most {_MOST_LABELS:,}"
            told = Problem(
                f"train.{learned.field}", got, most, "name the field that holds labels, not texts or ids"
            )
            self.problems.append(told)
            return Target.multi(name, [], [])
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

    def number(self, name: str, order: Sequence[int], train_rows: int) -> Numbers:
        """A number beside the texts, of the rows in this order. Notes as a problem that no training row has it."""
        values = [self._numbers[name][i] for i in order]
        if all(one is None for one in values[:train_rows]):
            told = "a number in some training rows"
            self.problems.append(Problem(f"train.{name}", "null in all of them", told, "leave it out"))
        return Numbers.of(name, values)

    def _too_few(self, name: str, learned: Learned, got: str, expected: str) -> None:
        self.problems.append(
            Problem(
                f"train.{field_of(learned)}",
                got,
                f"{expected} to learn {name} from",
                "add rows of another kind",
            )
        )


def templates_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of the texts: a name without braces is a field. Raises InvalidJob."""
    given = (text,) if isinstance(text, str) else tuple(text)
    templates = tuple(f"{{{one}}}" if isinstance(one, str) and "{" not in one else one for one in given)
    remedy = 'name a field, such as "body", or write templates, such as ("{history}", "{messages[-1]}")'
    if not 1 <= len(templates) <= MOST_TEXTS:
        raise InvalidJob.of("text", f"{len(templates)} texts", f"1 to {MOST_TEXTS}", remedy)
    for one, template in zip(given, templates, strict=True):
        if not is_template(template):
            raise InvalidJob.of("text", short(one), "a field, or a template", remedy)
    return templates


def names_of(numbers: Sequence[str]) -> tuple[str, ...]:
    """The names of the numbers. Raises InvalidJob."""
    given = (numbers,) if isinstance(numbers, str) else tuple(numbers)
    if len(given) > MOST_NUMBERS or len(set(given)) < len(given):
        got = f"{len(given)} names"
        raise InvalidJob.of("numbers", got, f"up to {MOST_NUMBERS} different ones", "leave some out")
    for one in given:
        if not isinstance(one, str) or not is_placeholder(one):
            remedy = "write it without braces, such as age or customer[income]"
            raise InvalidJob.of("numbers", short(one), "the name of a field, or of a part of one", remedy)
    return given


def field_of(learned: Learned) -> str:
    """The field that holds what is learned."""
    return learned.model if isinstance(learned, Number) else learned.field
