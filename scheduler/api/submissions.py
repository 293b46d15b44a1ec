"""Submissions: the JSON that opens a job or asks for a plan, checked and planned. Pure.

The task specs themselves are checked by ``motet.tasks.parse``; whether their models exist, by ``scheduler.policy.plan``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from uuid import UUID

from motet.conditions import condition
from motet.errors import InvalidJob, Problem
from motet.folds import Fold, parse_folds, stored_fields
from motet.messages.jobs import DEFAULT_KEEP_S, Submission
from motet.protocol.manifest import Manifest
from motet.protocol.values import MAX_DEPTH, Doubled, byte_lengths
from motet.tasks import (
    Choose,
    Classify,
    Function,
    Task,
    dialogues_of,
    fields_of,
    notify_problems,
    parse,
    short,
)
from motet.templates import resolved
from scheduler.api.answer_schemas import schema_problems
from scheduler.api.bodies import clean_object, misfits_of
from scheduler.blocks import IncomingPart, absent
from scheduler.policy.fairness import NORMAL
from scheduler.policy.functions import artefacts_mb, beside_functions
from scheduler.policy.placing.records import Demand
from scheduler.policy.plan import PassPlan, in_order, loaded_model, plan, reads_of, task_digest
from scheduler.store.opening import PRIORITIES, NewJob, NewPass, NewTask
from scheduler.store.registry import Registered

S_co = TypeVar("S_co", bound=Submission, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSubmission(Generic[S_co]):
    """What a client asks for, checked for form; its rows are not yet checked."""

    said: S_co
    tasks: Mapping[str, Task]
    #: Of the whole request: the same request gives the same digest, however its JSON was laid out.
    digest: bytes
    #: What is folded of its rows, by name.
    folds: Mapping[str, Fold] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that some task reads, in order of first use: names that are no other task's; then those of folds."""
        return stored_fields(self.tasks, self.folds) if self.folds else fields_of(self.tasks)

    @property
    def dialogues(self) -> frozenset[str]:
        """Fields among them that hold dialogues."""
        return dialogues_of(self.tasks)


#: Options that an open job does not take, and what to do instead.
_NOT_OPEN = {"rows": "ask them when it is open", "deadline_s": "give each ask its within_s"}


def read_submission(message: type[S_co], body: Any, *, max_tasks: int) -> CheckedSubmission[S_co]:
    """Check a parsed body. Raises InvalidJob with every problem found, but for those of its rows."""
    if isinstance(body, dict) and isinstance(body.get("tasks"), Doubled):
        again = min(body["tasks"].doubled)
        raise InvalidJob(
            Problem("tasks", f"two tasks named {short(again)}", "a name for each task", "rename one of them")
        )
    # Rows are looked at one by one later: theirs may be bad without the submission being so.
    clean_object({k: v for k, v in body.items() if k != "rows"} if type(body) is dict else body)
    problems = [
        replace(p, got=f"{len(rows):,} rows" if isinstance(rows := body["rows"], list) else "no list")
        if p.field == "rows"
        else p
        for p in misfits_of(message, body)
        if p.field not in ("tasks", "state")
    ]
    if "rows" in body and body["rows"] is None:
        problems.append(Problem("rows", "no list", "a list of rows", "leave it out to send parts"))
    try:
        tasks = parse(body.get("tasks"))
    except InvalidJob as error:
        raise InvalidJob([*problems, *error.problems]) from None
    if len(tasks) > max_tasks:
        many = Problem("tasks", f"{len(tasks)} tasks", f"at most {max_tasks}", "split them over two jobs")
        problems.append(many)
    folds: Mapping[str, Fold] = {}
    if body.get("state") is not None:
        try:
            folds = parse_folds(body["state"], tasks)
        except InvalidJob as error:
            problems += error.problems
        if body.get("open") is not True:
            told = Problem("state", "a job that is not open", "an open job", "open it, or leave state out")
            problems.append(told)
        problems += [
            Problem(f"state.{name}", "a field that holds a dialogue", "another name", "rename it")
            for name in sorted(dialogues_of(tasks).intersection(folds))
        ]
    problems += schema_problems(tasks)
    if body.get("keep_s") is not None and body.get("open") is not True:
        problems.append(
            Problem("keep_s", short(body["keep_s"]), "an open job", "say retention_days of any other")
        )
    if isinstance(written := body.get("notify_when"), str):
        problems += notify_problems(written, tasks)
    if body.get("open") is True:
        problems += [
            Problem(name, short(body[name]), f"no {name} in an open job", remedy)
            for name, remedy in _NOT_OPEN.items()
            if body.get(name) is not None
        ]
        if any(task.kind == "fit" for task in tasks.values()):
            problems.append(
                Problem("open", "a training run", "tasks that answer rows", "submit it with rows")
            )
    if problems:
        raise InvalidJob(problems)
    return CheckedSubmission(said=message.of(body), tasks=tasks, digest=_digest(body), folds=folds)


def _digest(body: Mapping[str, Any]) -> bytes:
    try:
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=repr).encode()).digest()
    except RecursionError:
        deep = Problem("rows", f"JSON nested deeper than {MAX_DEPTH}", "rows of text", "mend the rows")
        raise InvalidJob(deep) from None


def mean_bytes_of(part: IncomingPart) -> dict[str, float]:
    """UTF-8 bytes of each field in the rows where it is good, as far as there are any."""
    good = {name: len(part) - len(absent(part.bad, part.bad_fields, (name,))) for name in part.columns}
    return {
        name: sum(byte_lengths(values)) / good[name] for name, values in part.columns.items() if good[name]
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A submission with its models found and its passes made."""

    passes: tuple[PassPlan, ...]
    #: Task name -> its model, or the artefact that its function reads.
    models: Mapping[str, Registered]
    #: ``name@version`` -> what it stands beside: the trunk of a head, the function of an artefact.
    trunks: Mapping[str, Registered]

    def loaded_id(self, planned: PassPlan) -> int:
        """Registry id of the model that a pass loads."""
        by_ref = {**self.trunks, **{m.manifest.ref: m for m in self.models.values()}}
        return by_ref[planned.model.ref].id

    def demand(self, planned: PassPlan) -> Demand:
        """A pass as it would wait, without rows."""
        models = list(self.models.values())
        return Demand(
            job="",
            pass_number=planned.number,
            tenant="",
            weight=1.0,
            priority=NORMAL,
            age=0,
            model_ids=frozenset((self.loaded_id(planned), *(models[number].id for number in planned.tasks))),
            model=planned.model,
            beside_mb=artefacts_mb(models[number].manifest for number in planned.tasks),
            numerics=planned.numerics,
            rate_key=planned.rate_key,
            rows_waiting=0,
            bytes_waiting=0,
        )


def plan_submission(
    tasks: Mapping[str, Task],
    found: Mapping[str, Registered],
    trunks: Mapping[str, Registered],
    registered: Sequence[str],
    mean_bytes: Mapping[str, float] | None = None,
) -> Planned:
    """Plan with what the registry knows: ``found`` by the refs that tasks name. Raises InvalidJob."""
    models = {name: found[task.model] for name, task in tasks.items() if task.model in found}
    artefacts = {
        name: found[task.artefact]
        for name, task in tasks.items()
        if isinstance(task, Function) and task.artefact and task.artefact in found
    }
    of_artefacts = _manifests(artefacts)
    passes = plan(
        tasks,
        _manifests(models),
        _manifests(trunks),
        artefacts=of_artefacts,
        registered=registered,
        mean_bytes=mean_bytes,
    )
    answering, _ = beside_functions(_manifests(models), of_artefacts)
    return Planned(
        passes=passes,
        models={
            name: Registered((artefacts.get(name) or m).id, answering[name]) for name, m in models.items()
        },
        trunks={**trunks, **{models[name].manifest.ref: models[name] for name in artefacts}},
    )


def _manifests(registered: Mapping[str, Registered]) -> dict[str, Manifest]:
    return {name: r.manifest for name, r in registered.items()}


def _labels(task: Task, model: Manifest) -> tuple[str, ...]:
    """What the codes of the task's cells mean."""
    if isinstance(task, Choose):
        return task.fixed_labels
    return task.labels_of(model.labels) if isinstance(task, Classify) else model.labels


def new_job(
    job: UUID, tenant: UUID, asked: CheckedSubmission[Submission], planned: Planned, key: str | None
) -> NewJob:
    """What the store needs to open the job."""
    pass_of = {number: p for p in planned.passes for number in p.tasks}
    trunks = _manifests(planned.trunks)
    reads = [reads_of(p, asked.tasks) for p in planned.passes]
    tasks = []
    for number, (name, submitted) in enumerate(asked.tasks.items()):
        model, task = planned.models[name], in_order(submitted, pass_of[number])
        tasks.append(
            NewTask(
                name=name,
                pass_number=pass_of[number].number,
                model_id=model.id,
                kind=task.kind,
                spec=task.to_json(),
                labels=_labels(task, model.manifest),
                digest=task_digest(task, model.manifest, loaded_model(model.manifest, trunks)),
            )
        )
    return NewJob(
        id=job,
        tenant=tenant,
        name=asked.said.name,
        priority=PRIORITIES[asked.said.priority],
        # Groups of callers that meet by chance never come again.
        reuse=asked.said.reuse and not asked.said.open,
        bad_rows=asked.said.bad_rows,
        fields=asked.fields,
        tasks=tuple(tasks),
        passes=tuple(
            NewPass(
                kind=p.kind,
                model_id=planned.loaded_id(p),
                numerics=p.numerics,
                max_tokens=p.max_tokens,
                input=p.input,
                needs=p.needs,
                rate_key=p.rate_key,
                reads=read.times,
                bytes_beside=read.beside,
                condition=p.condition,
            )
            for p, read in zip(planned.passes, reads, strict=True)
        ),
        request_digest=asked.digest,
        idempotency_key=key,
        deadline_s=asked.said.deadline_s,
        retention_days=asked.said.retention_days,
        open=asked.said.open,
        keep_s=(asked.said.keep_s or DEFAULT_KEEP_S) if asked.said.open else None,
        folds={name: fold.to_json() for name, fold in asked.folds.items()} or None,
        notify_when=asked.said.notify_when,
        notify_needs=_notify_needs(asked),
    )


def _notify_needs(asked: CheckedSubmission[Submission]) -> tuple[int, ...]:
    """Numbers of the tasks whose answers tell which rows are events."""
    if asked.said.notify_when is None:
        return ()
    names = list(asked.tasks)
    reads = condition(asked.said.notify_when).placeholders
    return tuple(sorted({names.index(resolved(one, names).name) for one in reads}))
