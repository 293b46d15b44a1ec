"""The dry run: what a submission would run, estimated from a sample of its rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import ceil
from typing import Any
from uuid import UUID

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from motet.conditions import condition
from motet.messages.jobs import Plan, PlannedPass, PlanRequest
from motet.protocol.manifest import PATCH_PIXELS, Manifest
from motet.protocol.transport import TransportLost
from motet.protocol.values import Value, plain_text
from motet.tasks import Prompted, Task, fields_read
from motet.templates import filled, placeholders, render, resolved, value_in
from scheduler.api.auth import Caller
from scheduler.api.bodies import json_body, whole_body
from scheduler.api.opening import SUBMISSION, inline_rows, planned_with, with_models
from scheduler.api.resources import Resources, Use
from scheduler.api.routing import Routes, takes
from scheduler.api.submissions import read_submission
from scheduler.blocks import IncomingPart, absent, askable
from scheduler.policy.capability import why_not, workers
from scheduler.policy.cost import Rates
from scheduler.policy.placing.records import WorkerState
from scheduler.policy.plan import PassPlan, Sample, estimate, reads_of
from scheduler.policy.prompt_cost import TaskTokens, estimate_prompts
from scheduler.policy.prompt_order import instruction
from scheduler.store import drains
from scheduler.store.dependence import known_share
from scheduler.store.rates import rates as learned_rates
from scheduler.store.rates import refusals

routes = Routes(tags=["jobs"])


@routes.post(
    "/v1/plan",
    summary="What a submission would run",
    openapi_extra=takes(PlanRequest, {**SUBMISSION, "total_rows": 3000, "total_bytes": 250_000}),
)
async def plan_job(request: Request, use: Use, caller: Caller) -> Plan:
    async with whole_body(request, use, use.settings.max_part_bytes) as raw:
        return await run_in_threadpool(_dry_run, use, caller, raw)


def _dry_run(use: Resources, caller: Caller, raw: bytes) -> Plan:
    asked, found = with_models(
        use, read_submission(PlanRequest, json_body(raw), max_tasks=use.settings.max_tasks)
    )
    incoming = inline_rows(use, asked, found) if asked.said.rows else None
    planned = planned_with(asked, incoming, found)
    part = incoming.part() if incoming else IncomingPart(columns={name: [] for name in asked.fields})
    unread = {name: absent(part.bad, part.bad_fields, fields_read(name, asked.tasks)) for name in asked.tasks}
    rows: dict[int, dict[str, Value]] = {
        i: {name: values[i] for name, values in part.columns.items()}
        for i in askable(range(len(part)), list(unread.values()))
    }
    sample = Sample(
        rows=len(rows),
        total_rows=len(rows) if asked.said.total_rows is None else asked.said.total_rows,
        # Of a pass that reads some of the fields the others' bytes tell nothing: then rows count.
        text_bytes=sum(len(plain_text(value).encode()) for row in rows.values() for value in row.values()),
        total_bytes=asked.said.total_bytes,
    )
    by_rows = replace(sample, total_bytes=None)
    rates, devices = _devices(use)
    too_long: set[int] = set()
    passes: list[PlannedPass] = []
    names = list(asked.tasks)
    for p in planned.passes:
        # Of answers that are not there yet nothing is counted.
        unknown: dict[str, Value] = {names[number]: "" for number in p.needs}
        here = askable(list(rows), [unread[names[number]] for number in p.tasks])
        seen, share = _asked_of(use, caller.tenant, p, names, [{**rows[i], **unknown} for i in here])
        lengths, *others = [
            use.counter.lengths(p.model, [filled(text, row, unknown) for row in seen]) for text in p.texts
        ]
        demand = planned.demand(p)
        timing: dict[str, Any] = {
            "seconds_per_token": [
                demand.rate(rates, device.kind).seconds_per_token
                for device in devices
                if why_not(device, demand) is None
            ],
            "prior_s": demand.rate(rates, ("cpu", "")).seconds_per_token,
            "subtask_s": use.settings.subtask_s,
        }
        of_it = sample if all(reads_of(p, asked.tasks).times) else by_rows
        if p.prompts:
            prompts = [_asked(use, p, asked.tasks[names[number]], seen, unknown) for number in p.tasks]
            guess = estimate_prompts(p, lengths, prompts, of_it, **timing)
        else:
            too_long.update(
                i
                for text in (lengths, *others)
                for i, n in zip(here, text, strict=False)
                if p.max_tokens and n > p.max_tokens
            )
            guess = estimate(p, lengths, of_it, **timing, others=others)
        passes.append(
            PlannedPass(
                kind=p.kind,
                tasks=tuple(names[number] for number in p.tasks),
                model=p.model.ref,
                numerics=p.numerics,
                max_tokens=p.max_tokens,
                needs=tuple(names[number] for number in p.needs),
                first=p.first,
                share=share,
                tokens=guess.tokens,
                computed_tokens=guess.computed_tokens,
                unfused_tokens=guess.unfused_tokens,
                tokens_out=guess.tokens_out,
                pixels=guess.tokens * PATCH_PIXELS if p.model.reads != "text" else 0,
                seconds=guess.seconds,
                subtasks=guess.subtasks,
            )
        )
    return Plan(
        rows=sample.total_rows,
        models={name: _asked_ref(model.manifest) for name, model in planned.models.items()},
        passes=tuple(passes),
        tokens=sum(p.tokens for p in passes),
        computed_tokens=sum(p.computed_tokens for p in passes),
        unfused_tokens=sum(p.unfused_tokens for p in passes),
        tokens_out=sum(p.tokens_out for p in passes),
        pixels=sum(p.pixels for p in passes),
        # The passes share the devices, one after the other.
        seconds=_together([p.seconds for p in passes]),
        truncated_rows=round(len(too_long) * sample.rows_factor),
        devices=len(devices),
    )


def _asked_of(
    use: Resources, tenant: UUID, p: PassPlan, tasks: Collection[str], rows: list[dict[str, Value]]
) -> tuple[list[dict[str, Value]], float]:
    """Those of these rows that a pass runs on, or as many as these may be; and their share of all."""
    if p.condition is None or not rows:
        return rows, 1.0
    held = condition(p.condition)
    if not any(resolved(one, tasks).name in tasks for one in held.placeholders):
        kept = [row for row in rows if held.holds({one: value_in(one, row) for one in held.placeholders})]
        return kept, len(kept) / len(rows)
    with use.database.transaction() as connection:
        share = known_share(connection, tenant, p.condition)
    return rows[: ceil(share * len(rows))], share


def _together(seconds: Sequence[float | None]) -> float | None:
    """Their sum; None where one is not known: nothing that could run it is there."""
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None


def _asked(
    use: Resources, p: PassPlan, task: Task, rows: list[dict[str, Value]], answers: Collection[str]
) -> TaskTokens:
    """A task of a language model in tokens, by the tokenizer that will read it. ``answers``: names that are tasks."""
    system = str(getattr(task, "system", ""))
    asked = instruction(task) if isinstance(task, Prompted) else ""

    def tokens(template: str) -> list[int]:
        if not placeholders(template):
            return use.counter.lengths(p.model, [render(template, {})] if template else []) * len(rows) or [
                0
            ] * len(rows)
        return use.counter.lengths(p.model, [filled(template, row, answers) for row in rows])

    return TaskTokens(
        system=system,
        system_tokens=tokens(system),
        instruction_tokens=tokens(asked),
        system_fixed=not placeholders(system),
        instruction_fixed=not placeholders(asked),
        written=int(getattr(task, "max_tokens", 0)),
    )


def _devices(use: Resources) -> tuple[Rates, list[WorkerState]]:
    """What was learned, and workers that may be given work. None where Redis is away: a plan needs none."""
    with use.database.transaction() as connection:
        rates, known = learned_rates(connection), refusals(connection)
        drained = drains.drained(connection)
    try:
        beats = use.live_workers()
    except TransportLost:
        beats = {}
    found = workers(beats, known, use.settings.memory_share, drained=drained)
    return rates, [worker for worker in found if worker.barred is None]


def _asked_ref(answering: Manifest) -> str:
    """The model that a task asks: the function, where an artefact stands beside it."""
    return answering.trunk_model if answering.answers == "artefact" else answering.ref
