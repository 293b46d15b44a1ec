"""Truth and answers, row beside row: labels from any source of rows, cells from a job. Decides nothing of figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from motet.errors import InvalidJob, NotFound
from motet.evaluation.answered import Answered, AnswerKind
from motet.evaluation.measures import LabelReader, folded
from motet.evaluation.truth import NAMED, TAKE, TrueLabels
from motet.protocol.columns import ERROR, OK, STATE_MASK
from motet.results import Answers, Block
from motet.sources import Source
from motet.states import State
from motet.tasks import short

#: Task -> the field of its labels; names of tasks, whose fields are called alike; None for all that there are.
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
    table = TrueLabels(wanted, index)
    table.read(labels)
    fields = table.found(wanted, named=named)
    if job.record["state"] != State.LOADING:
        table.check_rows(job.id, job.rows)

    columns: dict[str, _Column] = {}
    with job.reading(list(fields)) as blocks:
        for block in blocks:
            for task, answers in block.answers.items():
                if task not in columns:
                    columns[task] = _Column(task, specs[task], answers, table, fields[task])
                columns[task].add(block.first_row, answers)
    table.check_rows(job.id, job.rows)
    answered = {}
    for task in fields:
        found = columns[task].close()
        if found.kind in ("text", "json"):
            found = _read_labels(found, asked=task in as_labels, never=task in as_text)
        answered[task] = found
    return answered, fields


def _check_tasks(job: AnsweredJob, tasks: Fields, others: Collection[str]) -> None:
    """The job has all of them, and answers to ``tasks`` can be right or wrong. Raises NotFound, InvalidJob, TypeError."""
    if isinstance(tasks, str):
        raise TypeError(f"got tasks={tasks!r}; expected a list of task names, such as [{tasks!r}]")
    specs = job.tasks
    for name in (*(tasks or ()), *others):
        if name not in specs:
            raise NotFound(f"job {job.id} has no task {short(name)!r}; it has {', '.join(specs)}")
    for name in tasks or ():
        if specs[name]["kind"] == "embed":
            raise _vectors(name)


def _vectors(task: str) -> InvalidJob:
    return InvalidJob.of(
        f"tasks.{task}", "vectors", "answers that can be right or wrong", "leave this task out"
    )


class _Column:
    """One task's truth and answers, filled block by block."""

    def __init__(
        self, task: str, spec: Mapping[str, Any], answers: Answers, labels: TrueLabels, field: str
    ) -> None:
        self._kind = _kind(task, answers)
        self._known: tuple[str, ...] = (
            tuple(spec.get("labels") or ()) if self._kind in ("label", "labels", "spans") else ()
        )
        self._truth = labels.truth(field, TAKE[self._kind])
        self._warnings = self._fit_to_model()
        self._rows: list[int] = []
        self._answers: list[Any] = []
        self._scores: list[Any] = []
        self._errors = self._skipped = self._unlabelled = 0

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
            answer, score = _answer(self._kind, answers.decoded(offset)) if state == OK else (None, None)
            self._rows.append(row)
            self._answers.append(answer)
            self._scores.append(score)

    def close(self) -> Answered:
        """All of it; rows by index."""
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
        )


def _kind(task: str, answers: Answers) -> AnswerKind:
    match answers.column.kind:
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
