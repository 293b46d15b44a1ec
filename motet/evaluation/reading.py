"""Truth and answers, row beside row: labels from any source of rows, cells from a job. Decides nothing of figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from motet.errors import InvalidJob, NotFound
from motet.evaluation.answered import Answered, AnswerKind
from motet.evaluation.further import FurtherFigures
from motet.evaluation.measures import LabelReader, folded
from motet.evaluation.parts import task_and_path
from motet.evaluation.truth import NAMED, TAKE, TrueLabels
from motet.evaluation.views import plain_kind, positive_score, told
from motet.protocol.columns import ERROR, OK, STATE_MASK
from motet.results import Answers, Block
from motet.sources import Source
from motet.states import State
from motet.tasks import short
from motet.templates import Selector, part_of

#: Task -> the field of its labels; names of tasks, whose fields are called alike; None for all that there are. A task
#: may be followed by the path to a part of its JSON answers.
Fields: TypeAlias = "Mapping[str, str] | Sequence[str] | None"

#: A written answer is read as a label where the truth has at most FEW_LABELS different values, each of at most
#: SHORT_LABEL characters, and each twice on average. Above that they are texts, and compared as such.
FEW_LABELS, SHORT_LABEL = 50, 50


class AnsweredJob(Protocol):
    """What an evaluation asks of a job."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def record(self) -> Mapping[str, Any]: ...

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...

    def reading(self, tasks: Sequence[str]) -> AbstractContextManager[Iterator[Block]]:
        """Its blocks of answers to ``tasks``, as they come."""
        ...


def read(
    job: AnsweredJob,
    labels: Source,
    tasks: Fields,
    *,
    index: str | None,
    as_labels: Collection[str],
    as_text: Collection[str],
    asked: FurtherFigures,
    group: str | None,
) -> tuple[dict[str, Answered], dict[str, str]]:
    """Task -> its answers beside the truth, and task -> the field that the truth stands in.

    Waits for the job. Raises InvalidJob for labels that do not fit, NotFound for a task that the job does not have,
    JobFailed as ``Job.results``.
    """
    _check_tasks(job, tasks, (*as_labels, *as_text))
    specs = job.tasks
    named = tasks is not None
    if tasks is None:
        # A vector has no label that it could be compared with, though a field may be called as its task is.
        tasks = [name for name, spec in specs.items() if spec["kind"] != "embed"]
    wanted = dict(tasks) if isinstance(tasks, Mapping) else {name: name for name in tasks}
    if not wanted:
        raise InvalidJob.of("tasks", "no task", "one that answers no vectors", "name a task")
    table = TrueLabels(wanted, index, group)
    table.read(labels)
    fields = table.found(wanted, named=named)
    _check_positive(table, fields, asked.positive)
    if job.record["state"] != State.LOADING:
        table.check_rows(job.id, job.rows)

    places = {name: _place(job, name) for name in fields}
    columns: dict[str, _Column] = {}
    with job.reading(list(dict.fromkeys(task for task, _ in places.values()))) as blocks:
        for block in blocks:
            for name, (task, path) in places.items():
                answers = block.answers[task]
                if name not in columns:
                    columns[name] = _Column(name, specs[task], answers, table, fields[name], path, asked)
                columns[name].add(block.first_row, answers)
    table.check_rows(job.id, job.rows)
    answered = {}
    for name, (_, path) in places.items():
        found = plain_kind(columns[name].close(), asked, is_part=bool(path))
        if found.kind in ("text", "json"):
            found = _read_labels(found, asked=name in as_labels, never=name in as_text)
        answered[name] = told(found, asked, columns[name].sure)
    _check_asked(answered, asked)
    return answered, fields


def _place(job: AnsweredJob, name: str) -> tuple[str, tuple[Selector, ...]]:
    """The task that is named, and the path to the part of its answers. Raises NotFound, InvalidJob."""
    found = task_and_path(name, job.tasks)
    if found is None:
        raise NotFound(f"job {job.id} has no task {short(name)!r}; it has {', '.join(job.tasks)}")
    return found


def _check_positive(table: TrueLabels, fields: Mapping[str, str], positive: str | None) -> None:
    """The positive label occurs. Raises InvalidJob; lists of labels are looked at when they are read."""
    if positive is None:
        return
    there = set().union(*(table.labels(field) for field in fields.values()))
    single = {folded(label) for label in there}
    several = {folded(each) for label in there for each in label.split("|")}
    lists = any(isinstance(value, list | tuple) for field in fields.values() for value in table.values[field])
    if folded(positive) not in single | several and not lists:
        named = ", ".join(short(label) for label in sorted(there)[:NAMED])
        raise InvalidJob.of(
            "positive",
            short(positive),
            f"a label of the truth ({named})",
            "name the one that scores are about",
        )


def _check_asked(answered: Mapping[str, Answered], asked: FurtherFigures) -> None:
    """Whatever was asked for was there for one task at least. Raises InvalidJob."""
    kinds = {view.kind for found in answered.values() for view in (found, *found.views)}
    scores = "a number or a label's score beside a binary truth"
    name = "0 and 1, true and false, or name the label that scores are about (--positive LABEL)"
    for field, wanted, kind, expected, remedy in (
        ("top", asked.top, "binary", scores, name),
        # A label without scores has costs all the same.
        ("positive", asked.positive and not asked.outcomes, "binary", scores, "name a task with scores"),
        ("at", asked.at, "ranking", "answers that are JSON lists of ids", "name the task or the part"),
        ("costs", asked.outcomes, "cost", "a binary truth", name),
        ("costs", asked.matrix, "cost", "a task that answers one label a row", "name the task"),
    ):
        if wanted and kind not in kinds:
            raise InvalidJob.of(field, f"no such answers in {', '.join(answered)}", expected, remedy)


def _check_tasks(job: AnsweredJob, tasks: Fields, others: Collection[str]) -> None:
    """The job has all of them, and answers to ``tasks`` can be right or wrong. Raises NotFound, InvalidJob, TypeError."""
    if isinstance(tasks, str):
        raise TypeError(f"got tasks={tasks!r}; expected a list of task names, such as [{tasks!r}]")
    specs = job.tasks
    for name in others:
        _place(job, name)
    for name in tasks or ():
        if specs[_place(job, name)[0]]["kind"] == "embed":
            raise _vectors(name)


def _vectors(task: str) -> InvalidJob:
    return InvalidJob.of(
        f"tasks.{task}", "vectors", "answers that can be right or wrong", "leave this task out"
    )


class _Column:
    """One task's truth and answers, filled block by block."""

    def __init__(
        self,
        task: str,
        spec: Mapping[str, Any],
        answers: Answers,
        labels: TrueLabels,
        field: str,
        path: tuple[Selector, ...],
        asked: FurtherFigures,
    ) -> None:
        self._task, self._path = task, path
        self._kind = _kind(task, answers)
        if path and self._kind != "json":
            raise InvalidJob.of(
                f"tasks.{task}",
                "a part of an answer that is no JSON",
                "a task that answers JSON",
                "name the task alone; --positive LABEL asks for a label's score",
            )
        self._known: tuple[str, ...] = (
            tuple(answers.labels) if self._kind in ("label", "labels", "spans") else ()
        )
        self._positive = self._positive_of(labels, field, asked.positive)
        #: For labels with a positive one: its score in each row.
        self.sure: list[float | None] | None = None
        if self._kind == "number" and (self._positive is not None or labels.flags(field)):
            self._kind = "binary"
            truth = labels.truth(field, TAKE["label"])
            wanted = "true" if self._positive is None else folded(self._positive)
            self._truth: dict[int, Any] = {row: folded(value) == wanted for row, value in truth.items()}
        else:
            self._truth = labels.truth(field, TAKE[self._kind])
            if self._positive is not None and self._kind in ("label", "labels"):
                self.sure = []
        self._warnings = self._fit_to_model()
        self._groups = labels.groups
        self._rows: list[int] = []
        self._answers: list[Any] = []
        self._scores: list[Any] = []
        self._errors = self._skipped = self._unlabelled = self._partless = 0

    def _positive_of(self, labels: TrueLabels, field: str, positive: str | None) -> str | None:
        """The positive label as the model spells it; None where no row of the field has it."""
        if positive is None:
            return None
        there = {folded(label) for label in labels.labels(field)}
        if self._kind != "labels" and folded(positive) not in there:
            return None
        return next((label for label in self._known if folded(label) == folded(positive)), positive)

    def _fit_to_model(self) -> tuple[str, ...]:
        """Spell true labels as the model does, and tell those that it never gives."""
        if not self._known:
            return ()
        model = Counter(map(folded, self._known))
        spelt = {folded(label): label for label in self._known if model[folded(label)] == 1}
        never, respelt = Counter[str](), 0

        def fit(label: str) -> str:
            nonlocal respelt
            if label in self._known:
                return label
            if (own := spelt.get(folded(label))) is not None:
                respelt += 1
                return own
            never[label] += 1
            return label

        for row, value in self._truth.items():
            match self._kind:
                case "label":
                    self._truth[row] = fit(value)
                case "labels":
                    self._truth[row] = frozenset(map(fit, value))
                case _:
                    self._truth[row] = frozenset((start, end, fit(label)) for start, end, label in value)
        told = []
        if never:
            named = ", ".join(f"{short(label)} ({n:,})" for label, n in never.most_common(NAMED))
            more = f" and {len(never) - NAMED:,} more" if len(never) > NAMED else ""
            which = "label" if never.total() == 1 else "labels"
            told.append(f"{never.total():,} {which} that the model never gives: {named}{more}")
        if respelt:
            which = "label was" if respelt == 1 else "labels were"
            told.append(
                f"{respelt:,} {which} spelt otherwise than by the model, in case or spaces; taken for the same"
            )
        return tuple(told)

    def add(self, first_row: int, answers: Answers) -> None:
        """Take the cells of one block."""
        for offset, status in enumerate(answers.column.status):
            row = first_row + offset
            if row not in self._truth:
                self._unlabelled += 1
                continue
            state = status & STATE_MASK
            self._errors += state == ERROR
            self._skipped += state not in (OK, ERROR)
            value = answers.decoded(offset) if state == OK else None
            if state == OK and self._path:
                value = part_of(value, self._path)
                self._partless += value is None
            answer, score = _answer(self._kind, value) if state == OK else (None, None)
            if self.sure is not None:
                self.sure.append(self._sure(value) if state == OK else None)
            self._rows.append(row)
            self._answers.append(answer)
            self._scores.append(score)

    def _sure(self, value: Any) -> float:
        """The score of the positive label in an answer. Raises InvalidJob where it is not told."""
        score = positive_score(value, str(self._positive), self._known, self._kind)
        if math.isnan(score):
            many = len(self._known)
            never = self._positive not in self._known
            raise InvalidJob.of(
                "positive",
                f"task {short(self._task)!r}, which never gives {short(str(self._positive))!r}"
                if never
                else f"task {short(self._task)!r}, which tells the surest of {many:,} labels alone",
                f"one of its labels ({', '.join(map(short, self._known[:NAMED]))})"
                if never
                else "every label's score",
                "name one of its labels, or another task" if never else "submit it with scores=True",
            )
        return score

    def close(self) -> Answered:
        """All of it; rows by index."""
        if self._partless:
            which = "answer has" if self._partless == 1 else "answers have"
            self._warnings += (f"{self._partless:,} {which} no such part; they count as no answer",)
        return Answered(
            kind=self._kind,
            rows=self._rows,
            truth=[self._truth[row] for row in self._rows],
            answers=self._answers,
            scores=self._scores if any(score is not None for score in self._scores) else (),
            labels=self._known,
            errors=self._errors,
            skipped=self._skipped,
            unlabelled=self._unlabelled,
            warnings=self._warnings,
            groups=[self._groups[row] for row in self._rows] if self._groups else (),
        )


def _kind(task: str, answers: Answers) -> AnswerKind:
    match answers.kind:
        case "json":
            return "text" if answers.written else "json"
        case "vector":
            # A function may give vectors too.
            raise _vectors(task)
        case kind:
            return kind


def _answer(kind: AnswerKind, value: Any) -> tuple[Any, Any]:
    """An answer in the form of its truth, and its score or scores."""
    match kind:
        case "label":
            return value[0], value[1]
        case "labels":
            pairs, every = value if isinstance(value, tuple) else (value, None)
            return frozenset(label for label, _ in pairs), every
        case "spans":
            return frozenset((start, end, label) for start, end, label, _ in value), None
        case "text":
            return value["text"], None
        case "binary":
            return (value if math.isfinite(value) else None), None
        case _:
            return value, None


def _read_labels(found: Answered, *, asked: bool, never: bool) -> Answered:
    """Written answers read as labels, where the task asked for labels."""
    texts = all(
        isinstance(value, str) for value in (*found.truth, *(a for a in found.answers if a is not None))
    )
    if not texts:
        return found
    found = replace(found, kind="text")
    labels = set(found.truth)
    few = len(labels) <= FEW_LABELS and 2 * len(labels) <= len(found.truth)
    if never or not (asked or (few and all(0 < len(label) <= SHORT_LABEL for label in labels))):
        return found
    reader = LabelReader(labels)
    answers = [None if answer is None else reader.read(answer) for answer in found.answers]
    return replace(
        found,
        kind="label",
        truth=[reader.read(label) for label in found.truth],
        answers=answers,
        labels=(),
        unread=answers.count(None) - found.errors - found.skipped,
    )
