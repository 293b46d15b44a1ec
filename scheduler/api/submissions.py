"""Submissions: the JSON that opens a job or asks for a plan, checked and planned. Pure.

The task specs themselves are checked by ``motet.tasks.parse``; whether their models exist, by ``scheduler.policy.plan``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from motet.errors import InvalidJob, Problem
from motet.protocol.manifest import Manifest
from motet.protocol.settings import MAX_RETENTION_DAYS
from motet.protocol.values import MAX_DEPTH, Doubled, byte_lengths
from motet.tasks import Choose, Task, parse, short
from scheduler.api.answer_schemas import schema_problems
from scheduler.api.bodies import clean_object
from scheduler.blocks import IncomingPart, absent
from scheduler.policy.fairness import NORMAL
from scheduler.policy.needs import dialogues_of, fields_of
from scheduler.policy.placing.records import Demand
from scheduler.policy.plan import PassPlan, in_order, loaded_model, plan, reads_of, task_digest
from scheduler.store.opening import PRIORITIES, NewJob, NewPass, NewTask
from scheduler.store.registry import Registered

#: Rows that a job may bring along in its first request.
MAX_INLINE_ROWS = 1024
_MAX_NAME = 200
#: A deadline farther away than a year is a slip of the hand.
_MAX_DEADLINE_S = 366 * 86_400
#: Bytes of a row are never more than this in the mean.
_MAX_MEAN_BYTES = 1 << 30
_OPTIONS = (
    "tasks",
    "name",
    "priority",
    "reuse",
    "bad_rows",
    "rows",
    "deadline_s",
    "retention_days",
    "mean_bytes",
)
_PLAN_OPTIONS = (*_OPTIONS, "total_rows", "total_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a client asks for, checked for form."""

    tasks: Mapping[str, Task]
    name: str
    priority: int
    reuse: bool
    bad_rows: Literal["refuse", "error"]
    #: Rows brought along, not yet checked; None: they come in parts.
    rows: Sequence[Any] | None
    #: Seconds in which it must end, or it fails; None: no hurry.
    deadline_s: float | None
    #: Days for which it is kept after its end, where the cluster does not delete it sooner.
    retention_days: float | None
    total_rows: int | None
    total_bytes: int | None
    #: Field -> UTF-8 bytes in a row, about: what decides whether prompts begin with the text.
    mean_bytes: Mapping[str, float] = field(default_factory=dict)
    #: Of the whole request: the same request gives the same digest, however its JSON was laid out.
    digest: bytes

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that some task reads, in order of first use: names that are no other task's."""
        return fields_of(self.tasks)

    @property
    def dialogues(self) -> frozenset[str]:
        """Fields among them that hold dialogues."""
        return dialogues_of(self.tasks)


def read_submission(body: Any, *, max_tasks: int, dry_run: bool = False) -> Submission:
    """Check a parsed body. Raises InvalidJob with every problem found, but for those of its rows."""
    if isinstance(body, dict) and isinstance(body.get("tasks"), Doubled):
        again = min(body["tasks"].doubled)
        raise InvalidJob(
            Problem("tasks", f"two tasks named {short(again)}", "a name for each task", "rename one of them")
        )
    rows = body.get("rows") if isinstance(body, dict) else None
    # Rows are looked at one by one later: theirs may be bad without the submission being so.
    clean_object({k: v for k, v in body.items() if k != "rows"} if type(body) is dict else body)
    known = _PLAN_OPTIONS if dry_run else _OPTIONS
    problems = [
        Problem(short(key), "an unknown option", f"one of {', '.join(known)}", "remove it")
        for key in body
        if key not in known
    ]
    for key, ok, words in _checks(body, rows, dry_run):
        if not ok:
            problems.append(
                Problem(key, short(body.get(key)) if key != "rows" else _rows_got(rows), words, "mend it")
            )
    try:
        tasks = parse(body.get("tasks"))
    except InvalidJob as error:
        raise InvalidJob([*problems, *error.problems]) from None
    if len(tasks) > max_tasks:
        many = Problem("tasks", f"{len(tasks)} tasks", f"at most {max_tasks}", "split them over two jobs")
        problems.append(many)
    problems += schema_problems(tasks)
    if problems:
        raise InvalidJob(problems)
    return Submission(
        tasks=tasks,
        name=body.get("name", ""),
        priority=PRIORITIES[body.get("priority", "normal")],
        reuse=body.get("reuse", True),
        bad_rows=body.get("bad_rows", "refuse"),
        rows=rows,
        deadline_s=body.get("deadline_s"),
        retention_days=body.get("retention_days"),
        total_rows=body.get("total_rows"),
        total_bytes=body.get("total_bytes"),
        mean_bytes=body.get("mean_bytes") or {},
        digest=_digest(body),
    )


def _digest(body: Mapping[str, Any]) -> bytes:
    try:
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=repr).encode()).digest()
    except RecursionError:
        deep = Problem("rows", f"JSON nested deeper than {MAX_DEPTH}", "rows of text", "mend the rows")
        raise InvalidJob(deep) from None


def _checks(body: Mapping[str, Any], rows: Any, dry_run: bool) -> list[tuple[str, bool, str]]:
    """(option, whether it may be so, what was expected) of every option beside the tasks."""
    name = body.get("name", "")
    total_rows, total_bytes = body.get("total_rows"), body.get("total_bytes")
    least = 0 if dry_run else 1
    inline = isinstance(rows, list) and least <= len(rows) <= MAX_INLINE_ROWS
    return [
        ("name", isinstance(name, str) and len(name) <= _MAX_NAME, f"text of at most {_MAX_NAME} characters"),
        ("priority", _one_of(body.get("priority", "normal"), PRIORITIES), f"one of {', '.join(PRIORITIES)}"),
        ("reuse", isinstance(body.get("reuse", True), bool), "true or false"),
        ("bad_rows", _one_of(body.get("bad_rows", "refuse"), ("refuse", "error")), "refuse or error"),
        ("rows", inline or "rows" not in body, f"a list of {least} to {MAX_INLINE_ROWS:,} rows"),
        (
            "deadline_s",
            _amount_or_none(body.get("deadline_s"), _MAX_DEADLINE_S),
            f"seconds from now, more than 0 and at most {_MAX_DEADLINE_S:,}",
        ),
        (
            "retention_days",
            _amount_or_none(body.get("retention_days"), MAX_RETENTION_DAYS),
            f"days, more than 0 and at most {MAX_RETENTION_DAYS:,}",
        ),
        ("total_rows", _count_or_none(total_rows), "a whole number"),
        ("total_bytes", _count_or_none(total_bytes), "a whole number"),
        (
            "mean_bytes",
            _are_sizes(body.get("mean_bytes")),
            "an object of field to bytes in a row, 0 or more",
        ),
    ]


def _one_of(value: Any, allowed: Mapping[str, int] | Sequence[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _count_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**15)


def _amount_or_none(value: Any, most: float) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    )


def _are_sizes(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and not isinstance(value, Doubled)
        and len(value) <= 1000
        and all(
            isinstance(size, int | float) and not isinstance(size, bool) and 0 <= size <= _MAX_MEAN_BYTES
            for size in value.values()
        )
    )


def mean_bytes_of(part: IncomingPart) -> dict[str, float]:
    """UTF-8 bytes of each field in the rows where it is good, as far as there are any."""
    good = {name: len(part) - len(absent(part.bad, part.bad_fields, (name,))) for name in part.columns}
    return {
        name: sum(byte_lengths(values)) / good[name] for name, values in part.columns.items() if good[name]
    }


def _rows_got(rows: Any) -> str:
    return f"{len(rows):,} rows" if isinstance(rows, list) else "no list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A submission with its models found and its passes made."""

    passes: tuple[PassPlan, ...]
    #: Task name -> its model.
    models: Mapping[str, Registered]
    #: ``name@version`` -> trunk, for the heads among them.
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
    passes = plan(tasks, _manifests(models), _manifests(trunks), registered=registered, mean_bytes=mean_bytes)
    return Planned(passes=passes, models=models, trunks=trunks)


def _manifests(registered: Mapping[str, Registered]) -> dict[str, Manifest]:
    return {name: r.manifest for name, r in registered.items()}


def new_job(job: UUID, tenant: UUID, asked: Submission, planned: Planned, key: str | None) -> NewJob:
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
                labels=task.labels if isinstance(task, Choose) else model.manifest.labels,
                digest=task_digest(task, model.manifest, loaded_model(model.manifest, trunks)),
            )
        )
    return NewJob(
        id=job,
        tenant=tenant,
        name=asked.name,
        priority=asked.priority,
        reuse=asked.reuse,
        bad_rows=asked.bad_rows,
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
            )
            for p, read in zip(planned.passes, reads, strict=True)
        ),
        request_digest=asked.digest,
        idempotency_key=key,
        deadline_s=asked.deadline_s,
        retention_days=asked.retention_days,
    )
