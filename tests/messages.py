"""Messages in tests: whether an answer is one, and two answers to show."""

from __future__ import annotations

from typing import Any

from motet.messages.message import ApiMessage


def holds(message: type[ApiMessage], answer: dict[str, Any], *, sparse: bool = False) -> None:
    """Assert that an answer has the fields of the message, all of them and no others. ``sparse``: without nulls."""
    assert message.of(answer).to_json(sparse=sparse) == answer


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
    "closed": "2026-11-23T18:33:01Z",
    "finished": None,
    "deadline": None,
    "retention_days": None,
    "keep_s": None,
    "first_row": 0,
    "eta_s": 7.4,
}
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
    "asks": None,
    "left_out": {"timeline": 4, "devices": 0, "errors": 0},
}
