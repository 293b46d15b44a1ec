"""The shapes of answers and requests, for the interactive description at /docs. Nothing is computed from them.

A test holds real answers against these models, so that the description cannot drift from what is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """Closed: an answer with a field that is not described fails the test."""

    model_config = ConfigDict(extra="forbid")


class ProblemShape(Shape):
    field: str
    row: int | None
    got: str
    expected: str
    remedy: str


class ErrorShape(Shape):
    type: str
    message: str
    problems: list[ProblemShape] | None = None
    more: int | None = None
    next_part: int | None = None


class ErrorBody(Shape):
    error: ErrorShape


class CellsShape(Shape):
    total: int
    ok: int
    error: int
    skipped: int
    reused: int


class PassShape(Shape):
    kind: str
    tasks: list[str]
    model: str
    numerics: Literal["fast", "exact"]
    max_tokens: int
    needs: list[str]


class BlocksShape(Shape):
    total: int
    done: int


class UsageShape(Shape):
    tokens: int
    computed_tokens: int
    tokens_cached: int
    tokens_out: int
    busy_s: float
    subtasks: int
    attempts_lost: int


class JobShape(Shape):
    id: str
    name: str
    state: Literal["loading", "running", "succeeded", "failed", "cancelled"]
    kind: Literal["infer", "train"]
    reason: str
    priority: Literal["interactive", "normal", "bulk"]
    rows: int
    parts: int
    tasks: dict[str, dict[str, Any]]
    cells: CellsShape
    passes: list[PassShape]
    blocks: BlocksShape
    version: int
    partial: bool
    usage: UsageShape
    created: str
    started: str | None
    finished: str | None
    deadline: str | None
    retention_days: float | None
    eta_s: float | None


class JobsShape(Shape):
    jobs: list[JobShape]
    next: str | None


class PartShape(Shape):
    part: int
    rows: int
    total_rows: int
    bad_rows: int
    next_part: int


class PlannedPassShape(PassShape):
    first: Literal["text", "instruction", ""]
    tokens: int
    computed_tokens: int
    unfused_tokens: int
    tokens_out: int
    seconds: float | None
    subtasks: int


class PlanShape(Shape):
    rows: int
    estimate: Literal[True]
    models: dict[str, str]
    passes: list[PlannedPassShape]
    tokens: int
    computed_tokens: int
    unfused_tokens: int
    tokens_out: int
    seconds: float | None
    truncated_rows: int
    devices: int


class CellErrorShape(Shape):
    row: int
    task: str
    error: str
    message: str


class ErrorsShape(Shape):
    errors: list[CellErrorShape]
    next: int | None


class PassBlocksShape(Shape):
    total: int
    sealed: int
    waiting: int


class PassRowsShape(Shape):
    total: int
    waiting: int
    open: int
    done: int


class PassSubtasksShape(Shape):
    open: int
    done: int
    lost: int
    failed: int


class PassActivityShape(Shape):
    number: int
    kind: str
    tasks: list[str]
    blocks: PassBlocksShape
    rows: PassRowsShape
    subtasks: PassSubtasksShape
    tokens: int
    unfused_tokens: int
    busy_s: float


class DeviceActivityShape(Shape):
    worker: str
    device_name: str
    state: Literal["starting", "ready", "draining", "silent", "gone"]
    subtasks: int
    open: int
    rows: int
    tokens: int
    busy_s: float
    tokens_s: float
    share: float
    utilisation: float | None
    backlog_s: float | None


class SubtaskActivityShape(Shape):
    subtask: int
    worker: str
    #: A keyword of Python, hence the alias.
    pass_: int = Field(alias="pass")
    state: Literal["open", "done", "lost", "failed"]
    exclusive: bool
    carved_s: float
    start_s: float
    end_s: float | None
    rows: int
    tokens: int
    busy_s: float


class ThroughputShape(Shape):
    at_s: float
    tokens_s: float
    rows_s: float


class ErrorClassShape(Shape):
    task: str
    error: str
    count: int
    first_row: int
    message: str


class LeftOutShape(Shape):
    timeline: int
    devices: int
    errors: int


class SubtasksShape(Shape):
    subtasks: list[SubtaskActivityShape]
    next: int | None


class ActivityShape(Shape):
    job: JobShape
    now_s: float
    passes: list[PassActivityShape]
    devices: list[DeviceActivityShape]
    timeline: list[SubtaskActivityShape]
    throughput: list[ThroughputShape]
    errors: list[ErrorClassShape]
    left_out: LeftOutShape


class CannotShape(Shape):
    why: Literal[
        "no_engine", "too_small", "refused", "drained", "draining", "starting", "incompatible", "exclusive"
    ]
    words: str
    workers: int
    names: list[str]
    need_mb: int | None
    have_mb: int | None


class CanLoadShape(Shape):
    device_name: str
    workers: int
    load_s: float


class LoadingShape(Shape):
    worker: str
    left_s: float


class ExplainedRowsShape(Shape):
    total: int
    waiting: int
    later: int
    open: int
    done: int
    blocked: int


class PassExplainedShape(Shape):
    number: int
    kind: str
    tasks: list[str]
    model: str
    rows: ExplainedRowsShape
    work_s: float | None
    resident: int
    resident_on: list[str]
    loads: int
    loading: list[LoadingShape]
    can_load: list[CanLoadShape]
    cannot: list[CannotShape]
    needs: list[str]


class RivalShape(Shape):
    job: str
    name: str
    work_s: float


class BesideShape(Shape):
    priority: Literal["interactive", "normal", "bulk"]
    own: list[RivalShape]
    own_jobs: int
    own_s: float
    other_tenants: int
    other_jobs: int
    other_s: float


class ShareShape(Shape):
    subtasks: int
    all: int
    workers: int


class RetriesShape(Shape):
    rows: int
    until_s: float
    tries: int


class DueShape(Shape):
    at: str
    left_s: float
    kept: Literal["yes", "likely", "no"] | None


class EtaShape(Shape):
    p50_s: float
    p90_s: float
    p50_at: str
    p90_at: str
    measured: bool
    complete: bool


class FitShape(Shape):
    row: int
    epochs: list[dict[str, Any]]


class FitsShape(Shape):
    fits: list[FitShape]
    left_out: int


class CheckpointShape(Shape):
    checkpoint: str | None


class ExplanationShape(Shape):
    job: str
    name: str
    state: Literal["loading", "running", "succeeded", "failed", "cancelled"]
    says: str
    notes: list[str]
    passes: list[PassExplainedShape]
    beside: list[BesideShape]
    share: ShareShape | None
    errors: int
    retries: RetriesShape | None
    throttle: float | None
    deadline: DueShape | None
    eta: EtaShape | None


class AliasShape(Shape):
    alias: str
    ref: str
    before: str | None
    since: str
    by: str


class ModelShape(BaseModel):
    """A manifest; ``motet.protocol.manifest.Manifest`` tells each field's meaning."""

    model_config = ConfigDict(extra="allow")

    name: str
    version: str
    ref: str
    digest: str
    engine: str
    answers: str
    files: dict[str, str]
    sizes: dict[str, int]
    labels: list[str]
    aliases: list[AliasShape]


class ModelsShape(Shape):
    models: list[ModelShape]


class DrainedShape(Shape):
    since: str
    by: str


class RunShape(Shape):
    job: str
    pass_: str = Field(alias="pass")
    subtasks: int
    rows: int


class WorkerShape(Shape):
    worker: str
    host: str
    state: Literal["starting", "ready", "draining", "drained", "silent", "incompatible", "gone"]
    device_kind: str
    device_name: str
    memory_mb: int
    memory_used_mb: int
    utilisation: float
    resident: list[str]
    backlog_s: float
    held: int
    rows_done: int
    rate_tokens_s: float | None
    protocol: int | None
    version: str
    drained: DrainedShape | None
    running: list[RunShape]
    running_other: int


class WorkersShape(Shape):
    workers: list[WorkerShape]


class OverloadShape(Shape):
    reason: Literal["disk", "redis_memory", "outcomes", "rows"]
    what: str
    remedy: str
    retry_after_s: float


class ClusterShape(Shape):
    pressure: dict[Literal["disk", "redis_memory", "outcomes", "rows"], float]
    throttle: float | None
    refused: list[OverloadShape]


class TokenShape(Shape):
    id: str
    name: str
    scope: str
    tenant: str
    created: str
    expires: str | None
    revoked: str | None


class NewTokenShape(TokenShape):
    token: str


class TokensShape(Shape):
    tokens: list[TokenShape]


class ReadyShape(Shape):
    ready: bool
    postgres: bool
    redis: bool
    leader: bool


_CLASSIFY = {
    "kind": "classify",
    "model": "news-topics",
    "input": "{text}",
    "too_long": "truncate",
    "max_tokens": None,
    "numerics": "fast",
    "scores": False,
}
_PASS = {
    "kind": "encoder all-MiniLM-L6-v2",
    "tasks": ["topic", "vector"],
    "model": "all-MiniLM-L6-v2@1",
    "numerics": "fast",
    "max_tokens": 256,
    "needs": [],
}
SUBMISSION = {
    "name": "tickets",
    "tasks": {
        "topic": {"kind": "classify", "model": "news-topics"},
        "vector": {"kind": "embed", "model": "all-MiniLM-L6-v2", "dtype": "fp16"},
        "reply": {
            "kind": "generate",
            "model": "qwen3-0.6b",
            "about": "{text}",
            "prompt": "Write one sentence about {topic}.",
            "max_tokens": 64,
        },
    },
    "mean_bytes": {"text": 48.5},
    "priority": "normal",
    "bad_rows": "refuse",
    "rows": [
        {"text": "Shares rose after the central bank held its rate."},
        {"text": "The cup final went to extra time."},
    ],
}
JOB = {
    "id": "0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11",
    "name": "tickets",
    "state": "running",
    "kind": "infer",
    "reason": "",
    "priority": "normal",
    "rows": 3000,
    "parts": 3,
    "tasks": {
        "topic": {
            **_CLASSIFY,
            "model_ref": "news-topics@1",
            "labels": ["business", "sports"],
            "column": {"kind": "label"},
        },
    },
    "cells": {"total": 3000, "ok": 1024, "error": 0, "skipped": 0, "reused": 0},
    "passes": [{**_PASS, "tasks": ["topic"]}],
    "blocks": {"total": 3, "done": 1},
    "version": 17,
    "partial": False,
    "usage": {
        "tokens": 41234,
        "computed_tokens": 42001,
        "tokens_cached": 0,
        "tokens_out": 0,
        "busy_s": 3.9,
        "subtasks": 4,
        "attempts_lost": 0,
    },
    "created": "2026-11-23T18:33:00Z",
    "started": "2026-11-23T18:33:01Z",
    "finished": None,
    "deadline": None,
    "retention_days": None,
    "eta_s": 7.4,
}
PLAN_REQUEST = {
    "tasks": SUBMISSION["tasks"],
    "rows": SUBMISSION["rows"],
    "total_rows": 3000,
    "total_bytes": 250000,
}
PLAN = {
    "rows": 3000,
    "estimate": True,
    "models": {"topic": "news-topics@1", "vector": "all-MiniLM-L6-v2@1"},
    "passes": [
        {
            **_PASS,
            "first": "",
            "tokens": 62000,
            "computed_tokens": 63100,
            "unfused_tokens": 124000,
            "tokens_out": 0,
            "seconds": 6.2,
            "subtasks": 4,
        }
    ],
    "tokens": 62000,
    "computed_tokens": 63100,
    "unfused_tokens": 124000,
    "tokens_out": 0,
    "seconds": 6.2,
    "truncated_rows": 0,
    "devices": 2,
}
PART = {"part": 0, "rows": 1024, "total_rows": 1024, "bad_rows": 0, "next_part": 1}
_SUBTASK = {
    "subtask": 7,
    "worker": "host-cpu0",
    "pass": 0,
    "state": "done",
    "exclusive": False,
    "carved_s": 0.12,
    "start_s": 0.2,
    "end_s": 1.9,
    "rows": 256,
    "tokens": 10310,
    "busy_s": 1.7,
}
ACTIVITY = {
    "job": JOB,
    "now_s": 4.1,
    "passes": [
        {
            "number": 0,
            "kind": "encoder all-MiniLM-L6-v2",
            "tasks": ["topic"],
            "blocks": {"total": 3, "sealed": 1, "waiting": 0},
            "rows": {"total": 3000, "waiting": 952, "open": 1024, "done": 1024},
            "subtasks": {"open": 1, "done": 4, "lost": 0, "failed": 0},
            "tokens": 41234,
            "unfused_tokens": 41234,
            "busy_s": 3.9,
        }
    ],
    "devices": [
        {
            "worker": "host-cpu0",
            "device_name": "CPU",
            "state": "ready",
            "subtasks": 4,
            "open": 1,
            "rows": 1024,
            "tokens": 41234,
            "busy_s": 3.9,
            "tokens_s": 10572.8,
            "share": 0.975,
            "utilisation": 0.98,
            "backlog_s": 2.1,
        }
    ],
    "timeline": [_SUBTASK],
    "throughput": [{"at_s": 2.0, "tokens_s": 10310.0, "rows_s": 256.0}],
    "errors": [{"task": "topic", "error": "too_long", "count": 3, "first_row": 17, "message": "301 tokens"}],
    "left_out": {"timeline": 4, "devices": 0, "errors": 0},
}
SUBTASKS = {"subtasks": [_SUBTASK], "next": 7}
FITS = {
    "fits": [
        {
            "row": 0,
            "epochs": [
                {
                    "stage": "heads",
                    "epoch": 1,
                    "of": 30,
                    "loss": 0.92,
                    "validation": {"topic": {"score": 0.91, "accuracy": 0.91, "macro_f1": 0.9}},
                    "test": {"topic": {"score": 0.91, "accuracy": 0.91, "macro_f1": 0.9}},
                }
            ],
        }
    ],
    "left_out": 0,
}
EXPLANATION = {
    "job": JOB["id"],
    "name": "tickets",
    "state": "running",
    "says": "It waits behind 2 jobs of another tenant (41 s of work for one device) and for a worker to load"
    " all-MiniLM-L6-v2@1, about 1.4 s on NVIDIA L4; done in 28 s to 34 s (p50 to p90).",
    "notes": [
        "Beside it in class normal: 2 jobs of 1 other tenant (41 s of work).",
        "host-gpu1 cannot run all-MiniLM-L6-v2@1: was drained; `motet resume` lets it work again.",
    ],
    "passes": [
        {
            "number": 0,
            "kind": "encoder all-MiniLM-L6-v2",
            "tasks": ["topic"],
            "model": "all-MiniLM-L6-v2@1",
            "rows": {"total": 3000, "waiting": 3000, "later": 0, "open": 0, "done": 0, "blocked": 0},
            "work_s": 6.2,
            "resident": 0,
            "resident_on": [],
            "loads": 0,
            "loading": [],
            "can_load": [{"device_name": "NVIDIA L4", "workers": 1, "load_s": 1.4}],
            "cannot": [
                {
                    "why": "drained",
                    "words": "was drained; `motet resume` lets it work again",
                    "workers": 1,
                    "names": ["host-gpu1"],
                    "need_mb": None,
                    "have_mb": None,
                }
            ],
            "needs": [],
        }
    ],
    "beside": [
        {
            "priority": "normal",
            "own": [],
            "own_jobs": 0,
            "own_s": 0.0,
            "other_tenants": 1,
            "other_jobs": 2,
            "other_s": 41.0,
        }
    ],
    "share": {"subtasks": 0, "all": 3, "workers": 0},
    "errors": 0,
    "retries": None,
    "throttle": 1.0,
    "deadline": None,
    "eta": {
        "p50_s": 28.1,
        "p90_s": 33.9,
        "p50_at": "2026-11-23T18:33:28Z",
        "p90_at": "2026-11-23T18:33:34Z",
        "measured": True,
        "complete": True,
    },
}
CELL_ERRORS = {
    "errors": [{"row": 41, "task": "topic", "error": "bad_row", "message": "text: got null; expected text"}],
    "next": None,
}
MODEL = {
    "name": "news-topics",
    "version": "1",
    "engine": "encoder",
    "answers": "label",
    "files": {"head.safetensors": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
    "trunk": "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752",
    "trunk_model": "all-MiniLM-L6-v2@1",
    "max_tokens": 256,
    "pooling": "mean",
    "labels": ["business", "entertainment", "politics", "sports", "tech"],
    "licence": "Apache-2.0",
}
ALIAS = {
    "alias": "news-topics@prod",
    "ref": "news-topics@1",
    "before": "news-topics@0",
    "since": "2026-11-23T18:33:00.000000Z",
    "by": "release",
}
WORKER = {
    "worker": "gpu-host-0",
    "host": "gpu-host",
    "state": "ready",
    "device_kind": "cuda",
    "device_name": "NVIDIA H200",
    "memory_mb": 143771,
    "memory_used_mb": 2048,
    "utilisation": 0.97,
    "resident": ["all-MiniLM-L6-v2@1"],
    "backlog_s": 3.8,
    "held": 2,
    "rows_done": 120000,
    "rate_tokens_s": 1250000.0,
    "protocol": 1,
    "version": "0.1.0",
    "drained": None,
    "running": [
        {
            "job": "0198f2c4-7a51-7c3e-9d2b-0a4c6f1e8b57",
            "pass": "encoder all-MiniLM-L6-v2",
            "subtasks": 2,
            "rows": 4096,
        }
    ],
    "running_other": 1,
}
TOKEN = {
    "id": "5f0c1d2e3a4b",
    "name": "nightly batch",
    "scope": "user",
    "tenant": "default",
    "created": "2026-11-23T18:33:00Z",
    "expires": None,
    "revoked": None,
}
CLUSTER = {
    "pressure": {"rows": 0.0, "outcomes": 1.0, "redis_memory": 0.1, "disk": 0.0},
    "throttle": 0.0,
    "refused": [
        {
            "reason": "outcomes",
            "what": "1,204 outcomes wait to be recorded, the oldest for 17 s",
            "remedy": "wait until they are, or start another aggregator",
            "retry_after_s": 5.0,
        }
    ],
}
READY = {"ready": True, "postgres": True, "redis": True, "leader": True}

_ERRORS: dict[int, tuple[str, dict[str, Any]]] = {
    401: (
        "No token, or one that is wrong, expired or revoked.",
        {"type": "unauthorized", "message": "the token is missing, wrong, expired or revoked"},
    ),
    403: (
        "The token's scope does not allow this.",
        {"type": "forbidden", "message": "a token of scope read may not do this; admin or user may"},
    ),
    404: (
        "It does not exist, or belongs to another tenant.",
        {"type": "not_found", "message": "no job of this id"},
    ),
    409: (
        "It does not fit the present state.",
        {"type": "conflict", "message": "part 3 is out of order; part 1 comes next", "next_part": 1},
    ),
    413: (
        "Too many bytes.",
        {"type": "too_large", "message": "body: got more than 33,554,432 bytes", "problems": []},
    ),
    422: (
        "The request is wrong; `problems` says where.",
        {
            "type": "invalid_job",
            "message": "tasks.topic.model: got nws-topics; expected a registered model; did you mean news-topics?",
            "problems": [
                {
                    "field": "tasks.topic.model",
                    "row": None,
                    "got": "nws-topics",
                    "expected": "a registered model",
                    "remedy": "did you mean news-topics? see `motet models`",
                }
            ],
        },
    ),
    429: (
        "Too much is under way; come back after `Retry-After` seconds.",
        {"type": "overloaded", "message": "1000 jobs are unfinished; wait for one, or cancel it"},
    ),
    503: (
        "Postgres or Redis does not answer; come back after `Retry-After` seconds.",
        {"type": "unavailable", "message": "the database does not answer; nothing is lost, try again"},
    ),
}


def answers(
    status: int, shape: type[BaseModel] | None, example: Any, says: str, *errors: int, anyone: bool = False
) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: its good answer with an example, and the errors that it may give.

    ``anyone``: the route needs no token.
    """
    good: dict[str, Any] = {"description": says}
    if shape is not None:
        good |= {"model": shape, "content": {"application/json": {"example": example}}}
    described: dict[int | str, dict[str, Any]] = {status: good}
    for code in sorted({401, 429, 503, *errors} - ({401, 429} if anyone else set())):
        words, error = _ERRORS[code]
        described[code] = {
            "model": ErrorBody,
            "description": words,
            "content": {"application/json": {"example": {"error": error}}},
        }
    return described


def takes(
    example: Any, says: str, content: str = "application/json", also: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``openapi_extra=`` of a route that reads its own body; ``also``: other content types and what they hold."""
    schema = {"type": "object"} if content == "application/json" else {"type": "string", "format": "binary"}
    forms: dict[str, Any] = {content: {"schema": schema}}
    if example is not None:
        forms[content]["example"] = example
    for name, words in (also or {}).items():
        forms[name] = {"schema": {"type": "string", "description": words}}
    return {"requestBody": {"required": True, "description": says, "content": forms}}
