"""A small motet API in this process, over a real socket: docs/http.md in memory, with faults on demand.

It answers every row at once: ``topic`` is "sport" for even rows and "tech" for odd ones, bad rows are errors. What a
language model writes is "<task> of row <i>"; what it chooses goes round its labels, what it extracts is the row and its
parity. A number is half the row. A row that an open job is asked is a block of its own. A training run has two epochs, and gives a head for each task of its recipe.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgpack

from motet.protocol.columns import ERROR, OK, CellError, Column
from motet.protocol.envelope import pack, zstd
from motet.protocol.wire import by_offset

LABELS = {"topic": ["sport", "tech"], "tone": ["glad", "sad", "loud"]}
TOKEN = "user.secret"
ADMIN = "admin.secret"

#: (method, path) -> None to do nothing, a status to answer with, or "lost" (before it is done), "unheard" (after
#: it is done, the answer is lost) and "torn" (half of the answer's body arrives).
Fault = Callable[[str, str], "int | str | None"]


@dataclass
class FakeJob:
    id: str
    tasks: dict[str, dict[str, Any]]
    opening: dict[str, Any]
    state: str = "loading"
    reason: str = ""
    version: int = 1
    #: Digest of each part's body.
    digests: list[str] = field(default_factory=list)
    #: (first row, number of rows, task -> offsets of rows that it cannot be asked) of each part.
    blocks: list[tuple[int, int, dict[str, dict[int, Any]]]] = field(default_factory=list)
    #: What is told of its usage beside what all jobs have.
    spent: Mapping[str, int] = field(default_factory=dict)
    columns: list[dict[str, list[str]]] = field(default_factory=list)
    #: Blocks in the order in which they are finished; what is not in it is not ready.
    done: list[int] = field(default_factory=list)
    #: Key of an ask -> (block, what was asked).
    asked: dict[str, tuple[int, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(n for _, n, _ in self.blocks)

    def record(self) -> dict[str, Any]:
        done = [self.blocks[b] for b in self.done]
        bad = sum(len(of) for _, _, bad in done for of in bad.values())
        total = self.rows * len(self.tasks)
        ok = sum(n for _, n, _ in done) * len(self.tasks) - bad
        return {
            "id": self.id,
            "name": self.opening.get("name", ""),
            "state": self.state,
            "kind": "infer",
            "reason": self.reason,
            "priority": self.opening.get("priority", "normal"),
            "rows": self.rows,
            "parts": len(self.blocks),
            "tasks": self.tasks,
            "cells": {
                "total": total,
                "ok": ok,
                "error": bad,
                "skipped": total - ok - bad if self.state in ("failed", "cancelled") else 0,
                "reused": 0,
            },
            "passes": passes_of(self.tasks),
            "blocks": {"total": len(self.blocks), "done": len(self.done)},
            "version": self.version,
            "partial": self.state == "succeeded" and bad > 0,
            "usage": {
                "tokens": 90,
                "computed_tokens": 100,
                "busy_s": 1.0,
                "subtasks": 1,
                "attempts_lost": 0,
                **self.spent,
            },
            "created": "2026-11-23T18:33:00Z",
            "started": "2026-11-23T18:33:01Z",
            "finished": "2026-11-23T18:33:03Z" if self.state not in ("open", "running") else None,
            "eta_s": None,
        }


class FakeApi:
    """The state of the server; tests look at it and change it."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.opened = 0
        #: What jobs consume, where that is not what all consume.
        self.spent: Mapping[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: None
        #: Finish jobs as soon as they are closed.
        self.eager = True
        #: What is told instead of an answer to a row that is asked: an error, or None.
        self.refuse: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda row: None
        #: Seconds that an ask takes, requests of asks under way and the most there were, and rows of each request.
        self.ask_s = 0.0
        self.asking = self.most_asking = 0
        self.asks: list[int] = []
        #: Blocks in one answer of results.
        self.blocks_per_answer = 2
        #: Workers that are ready.
        self.workers = 1
        #: Labels of the models that were registered here, by ``name@version``.
        self.registered: dict[str, list[str]] = {}
        #: ``name@alias`` -> what is told of it.
        self.aliases: dict[str, dict[str, Any]] = {}
        self.url = ""
        self.lock = threading.Lock()

    def count(self, method: str, end: str) -> int:
        return sum(m == method and p.endswith(end) for m, p in self.requests)

    def fail_once(self, method: str, end: str, how: int | str, times: int = 1) -> None:
        """Let the next ``times`` requests of this kind fail in this way."""
        left = [times]

        def fault(m: str, p: str) -> int | str | None:
            if m == method and p.endswith(end) and left[0]:
                left[0] -= 1
                return how
            return None

        self.fault = fault

    def finish(self, job: FakeJob, blocks: list[int] | None = None) -> None:
        """Answer these blocks, or all; the job ends with its last one."""
        job.done += [b for b in (range(len(job.blocks)) if blocks is None else blocks) if b not in job.done]
        job.version += 1
        if len(job.done) == len(job.blocks):
            job.state = "succeeded"

    # -- routes

    def answer(
        self, method: str, path: str, query: dict[str, str], body: bytes, key: str | None
    ) -> tuple[int, Any]:
        match method, path.strip("/").split("/")[1:]:
            case "POST", ["jobs"]:
                return self._open(body, key)
            case "GET", ["jobs"]:
                return self._list(query)
            case "POST", ["plan"]:
                return self._plan(json.loads(body))
            case "GET", ["models"]:
                return 200, {"models": [{**MODEL, "aliases": list(self.aliases.values())}]}
            case "PUT", ["models", name, "aliases", alias]:
                made = f"{name}@{alias}"
                before = self.aliases.get(made, {}).get("ref")
                ref = f"{name}@{json.loads(body)['version']}"
                self.aliases[made] = {"alias": made, "ref": ref, "before": before, "by": "laptop"}
                return 200, self.aliases[made]
            case "POST", ["models", name, "aliases", alias, "rollback"]:
                rolled = self.aliases[f"{name}@{alias}"]
                if rolled["before"] is None:
                    return _error(409, f"{name}@{alias}: nothing stood before; promote another version")
                rolled |= {"ref": rolled["before"], "before": None}
                return 200, rolled
            case "DELETE", ["models", name, "aliases", alias]:
                del self.aliases[f"{name}@{alias}"]
                return 204, None
            case "GET", ["models", name]:
                found = [m for m in (MODEL, TRUNK, TRAINER) if name in (m["name"], f"{m['name']}@1")]
                return (200, found[0]) if found else _error(404, f"no model {name}")
            case "POST", ["models"]:
                made = json.loads(body)
                ref = f"{made['name']}@{made['version']}"
                self.registered[ref] = made["labels"]
                return 201, {**made, "ref": ref}
            case "DELETE", ["models", _]:
                return _error(409, "news-topics@1 is used by a running job; cancel it first")
            case "POST", ["media", "missing"]:
                return 200, {"missing": json.loads(body)["media"]}
            case "POST", ["media"]:
                return 201, {"media": []}
            case "GET", ["workers"]:
                return 200, {"workers": [WORKER] * self.workers}
            case "GET", ["tokens"]:
                return 200, {"tokens": [{"id": "t1", "name": "laptop", "scope": "user", "tenant": "home"}]}
            case "POST", ["tokens"]:
                return 201, {"id": "t2", "token": "t2.made", **json.loads(body)}
            case "DELETE", ["tokens", _]:
                return 204, None
            case _, ["jobs", job_id, *rest] if job_id in self.jobs:
                return self._job(self.jobs[job_id], method, rest, query, body)
        return _error(404, "no such thing")

    def _open(self, body: bytes, key: str | None) -> tuple[int, Any]:
        digest = hashlib.sha256(body).hexdigest()
        if key in self.keys:
            job_id, before = self.keys[key]
            if before != digest:
                return _error(409, "this Idempotency-Key belongs to another job")
            return 200, self.jobs[job_id].record()
        opening = json.loads(body)
        for name, spec in opening["tasks"].items():
            if spec["model"] == "unknown":
                field = f"tasks.{name}.model"
                problem = {
                    "field": field,
                    "row": None,
                    "got": "unknown",
                    "expected": "a model",
                    "remedy": "look",
                }
                return _error(422, "one problem", problems=[problem])
        tasks = {
            name: {
                **spec,
                "model_ref": f"{spec['model']}@1",
                "labels": spec.get("labels") or self.registered.get(spec["model"]) or LABELS.get(name, []),
            }
            for name, spec in opening["tasks"].items()
        }
        for name, spec in tasks.items():
            empty = column(name, 0, 0, {}, spec)
            spec["column"] = {"kind": empty.kind, "dim": empty.dim, "dtype": empty.dtype}
        self.opened += 1
        job = FakeJob(id=f"job-{self.opened}", tasks=tasks, opening=opening, spent=self.spent)
        self.jobs[job.id] = job
        if key:
            self.keys[key] = (job.id, digest)
        if opening.get("open"):
            job.state = "open"
        if "rows" not in opening:
            return 201, job.record()
        rows = opening["rows"]
        self._land(job, {name: [row[name] for row in rows] for name in rows[0]}, {}, {}, "inline")
        self._start(job)
        return 202, job.record()

    def _land(
        self,
        job: FakeJob,
        columns: dict[str, list[str]],
        bad: dict[int, Any],
        bad_fields: dict[str, Any],
        digest: str,
    ) -> None:
        n = len(next(iter(columns.values())))
        of = {task: dict(bad) for task in job.tasks}
        for task, spec in job.tasks.items():
            read = "".join(str(option) for option in spec.values())
            for name, reasons in bad_fields.items():
                if f"{{{name}}}" in read:
                    of[task] = {**by_offset(reasons), **of[task]}
        job.blocks.append((job.rows, n, of))
        job.columns.append(columns)
        job.digests.append(digest)

    def _start(self, job: FakeJob) -> None:
        job.state = "running"
        if self.eager:
            self.finish(job)

    def _job(
        self, job: FakeJob, method: str, rest: list[str], query: dict[str, str], body: bytes
    ) -> tuple[int, Any]:
        match method, rest:
            case "GET", []:
                return 200, job.record()
            case "DELETE", []:
                del self.jobs[job.id]
                return 204, None
            case "PUT", ["parts", number]:
                return self._part(job, int(number), body)
            case "POST", ["close"]:
                said = json.loads(body)
                if job.state == "open":
                    self._start(job)
                    return 202, job.record()
                if (said["parts"], said["rows"]) != (len(job.blocks), job.rows):
                    return _error(409, "other parts than sent")
                if job.state == "loading":
                    self._start(job)
                return 202, job.record()
            case "POST", ["cancel"]:
                if job.state in ("open", "loading", "running"):
                    job.state, job.reason = "cancelled", "cancelled by its owner"
                return 200, job.record()
            case "POST", ["ask"]:
                return self._ask(job, msgpack.unpackb(body, timestamp=3, strict_map_key=False))
            case "GET", ["fits"]:
                return 200, {"fits": [{"row": 0, "epochs": epochs_of(json.loads(job.columns[0]["text"][0]))}]}
            case "GET", ["explain"]:
                return 200, {**EXPLANATION, "job": job.id}
            case "GET", ["errors"]:
                return self._errors(job, int(query.get("after", -1)), 2)
            case "GET", ["results"]:
                return 200, self._results(job, query)
        return _error(404, "no such route")

    def _part(self, job: FakeJob, number: int, raw: bytes) -> tuple[int, Any]:
        digest = hashlib.sha256(raw).hexdigest()
        body = msgpack.unpackb(raw, strict_map_key=False)
        if number > len(job.blocks):
            return _error(409, "a part out of order", next_part=len(job.blocks))
        if number < len(job.blocks):
            if job.digests[number] != digest:
                return _error(409, "other bytes than before", next_part=len(job.blocks))
        else:
            self._land(job, body["columns"], body.get("bad", {}), body.get("bad_fields", {}), digest)
        n = job.blocks[number][1]
        return 200, {
            "part": number,
            "rows": n,
            "total_rows": job.rows,
            "bad_rows": 0,
            "next_part": number + 1,
        }

    def _ask(self, job: FakeJob, body: dict[str, Any]) -> tuple[int, Any]:
        columns = body["columns"]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.asks.append(len(rows))
        frames = [self._answer(job, row, key) for row, key in zip(rows, body["keys"], strict=True)]
        return 200, framed(frames)

    def _answer(self, job: FakeJob, row: dict[str, Any], key: str) -> dict[str, Any]:
        if (error := self.refuse(row)) is not None:
            return {"error": error}
        block, before = job.asked.get(key, (len(job.blocks), row))
        if before != row:
            return {"error": {"type": "conflict", "message": "this key was used for other rows"}}
        if key not in job.asked:
            if job.state != "open":
                return {"error": {"type": "conflict", "message": f"job {job.id} is {job.state}"}}
            self._land(job, {name: [value] for name, value in row.items()}, {}, {}, key)
            job.asked[key] = (block, row)
            job.done.append(block)
        return self._frame(job, block, list(job.tasks)) | {"done": None}

    def wait(self, path: str, query: dict[str, str]) -> None:
        """Hold a request for results open until there are some, and one that asks for as long as asks take."""
        _, _, job_id, what = [*path.strip("/").split("/"), "", "", ""][:4]
        job = self.jobs.get(job_id)
        if what == "ask":
            with self.lock:
                self.asking += 1
                self.most_asking = max(self.most_asking, self.asking)
            time.sleep(self.ask_s)
        end = time.monotonic() + float(query.get("wait_s", 0))
        while (
            what == "results"
            and job is not None
            and job.state == "open"
            and len(job.done) <= int(query["after"])
            and time.monotonic() < end
        ):
            time.sleep(0.005)

    def _list(self, query: dict[str, str]) -> tuple[int, Any]:
        found = [j for j in reversed(self.jobs.values()) if query.get("state") in (None, j.state)]
        ids = [j.id for j in found]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        page = found[start : start + int(query["limit"])]
        more = start + len(page) < len(found)
        return 200, {"jobs": [j.record() for j in page], "next": page[-1].id if more else None}

    def _plan(self, asked: dict[str, Any]) -> tuple[int, Any]:
        k, tokens = len(asked["tasks"]), asked["total_bytes"] // 4

        def specs(p: dict[str, Any]) -> list[dict[str, Any]]:
            return [asked["tasks"][task] for task in p["tasks"]]

        passes = [
            p
            | {
                "max_tokens": 256,
                "tokens": tokens,
                "unfused_tokens": len(p["tasks"]) * tokens,
                "seconds": 1.5,
                "subtasks": 2,
                "tokens_out": asked["total_rows"] * sum(s.get("max_tokens") or 0 for s in specs(p)),
            }
            for p in passes_of(asked["tasks"])
        ]
        plan = {"rows": asked["total_rows"], "estimate": True, "passes": passes, "tokens": tokens}
        plan |= {"unfused_tokens": k * tokens, "seconds": 1.5, "truncated_rows": 1, "devices": 2}
        plan |= {"tokens_out": sum(p["tokens_out"] for p in passes)}
        return 200, plan

    def _errors(self, job: FakeJob, after: int, limit: int) -> tuple[int, Any]:
        found = [
            {"row": first + i, "task": task, "error": why[0], "message": why[1]}
            for first, n, bad in job.blocks
            for i in range(n)
            for task in job.tasks
            if (why := bad[task].get(i)) and first + i > after
        ]
        page = [e for e in found if e["row"] in sorted({e["row"] for e in found})[:limit]]
        return 200, {"errors": page, "next": page[-1]["row"] if len(page) < len(found) else None}

    def _results(self, job: FakeJob, query: dict[str, str]) -> bytes:
        tasks = query["tasks"].split(",") if "tasks" in query else list(job.tasks)
        after = int(query["after"])
        if query["order"] == "row":
            ready = [b for b in range(after, len(job.blocks)) if set(range(after, b + 1)) <= set(job.done)]
            sent = ready[: self.blocks_per_answer]
            end = after + len(sent)
        else:
            sent = job.done[after : after + self.blocks_per_answer]
            end = after + len(sent)
        frames = [self._frame(job, b, tasks) for b in sent]
        complete = job.state not in ("open", "loading", "running") and end >= len(job.done)
        return framed([*frames, {"end": True, "next": end, "state": job.state, "complete": complete}])

    def _frame(self, job: FakeJob, block: int, tasks: list[str]) -> dict[str, Any]:
        first, n, bad = job.blocks[block]
        specs = {task: {**job.tasks[task], "texts": job.columns[block].get("text")} for task in tasks}
        columns = {task: column(task, first, n, bad[task], specs[task]).to_wire() for task in tasks}
        done = job.done.index(block) + 1
        return {"block": block, "first_row": first, "rows": n, "done": done, "columns": columns}


def framed(frames: list[dict[str, Any]]) -> bytes:
    packed = [pack(frame) for frame in frames]
    return b"".join(struct.pack(">I", len(p)) + p for p in packed)


def passes_of(tasks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One pass, and one behind it for tasks whose prompt names another task."""
    prompts = any(spec["kind"] in ("generate", "choose") for spec in tasks.values())
    reads = {
        name: [other for other in tasks if other != name and f"{{{other}}}" in spec.get("prompt", "")]
        for name, spec in tasks.items()
    }
    groups = [[t for t in tasks if not reads[t]], [t for t in tasks if reads[t]]]
    return [
        {
            "kind": "causal fake" if prompts else "encoder fake",
            "tasks": names,
            "model": "fake@1",
            "numerics": "fast",
            "first": "text" if prompts else "",
            "needs": sorted({read for name in names for read in reads[name]}),
        }
        for names in groups
        if names
    ]


def column(task: str, first: int, n: int, bad: dict[int, Any], spec: dict[str, Any]) -> Column:
    """What the fake answers for rows first … first + n - 1."""
    status = bytes(ERROR if i in bad else OK for i in range(n))
    errors = {i: CellError(*why) for i, why in bad.items()}
    if spec["kind"] == "number":
        numbers = array("d", [0 if i in bad else (first + i) / 2 for i in range(n)])
        return Column(kind="number", status=status, arrays={"numbers": numbers.tobytes()}, errors=errors)
    if spec["kind"] in ("generate", "chat", "extract", "fit"):
        texts = [b"" if i in bad else json.dumps(written(task, first + i, spec)).encode() for i in range(n)]
        ends = array("i", [0])
        for text in texts:
            ends.append(ends[-1] + len(text))
        arrays = {"offsets": ends.tobytes(), "bytes": b"".join(texts)}
        return Column(kind="json", status=status, arrays=arrays, errors=errors)
    if task == "tone":
        counts = [0 if i in bad else (first + i) % 3 for i in range(n)]
        offsets = array("i", [0])
        for c in counts:
            offsets.append(offsets[-1] + c)
        arrays = {
            "offsets": offsets.tobytes(),
            "codes": array("h", [k for c in counts for k in range(c)]).tobytes(),
            "scores": array("f", [0.5 + k / 4 for c in counts for k in range(c)]).tobytes(),
        }
        return Column(kind="labels", status=status, arrays=arrays, errors=errors)
    if task == "vector":
        halves = struct.pack(f"<{2 * n}e", *(x for i in range(n) for x in (first + i, 0.5)))
        return Column(
            kind="vector", status=status, arrays={"vectors": halves}, errors=errors, dim=2, dtype="fp16"
        )
    arrays = {
        "codes": array("h", [(first + i) % (len(spec["labels"]) or 2) for i in range(n)]).tobytes(),
        "scores": array("f", [0.75] * n).tobytes(),
    }
    if spec.get("scores"):
        every = len(spec["labels"]) or 2
        arrays["all"] = array("f", [1 / every] * every * n).tobytes()
    return Column(kind="label", status=status, arrays=arrays, errors=errors)


def written(task: str, row: int, spec: dict[str, Any]) -> dict[str, Any]:
    """What a language model writes in the fake: a text and how it ended, or a JSON value; or what a run made."""
    if spec["kind"] == "fit":
        return trained(json.loads(spec["texts"][row]))
    if task == "films":
        # Behind the first row's film each row's own comes one place later, until it is no longer there.
        return {
            "best": [{"id": row if place == row else 100 + place} for place in range(4)],
            "risk": row / 10,
        }
    if spec["kind"] == "extract":
        return {"row": row, "parity": "odd" if row % 2 else "even"}
    return {"text": f"{task} of row {row}", "finish": "stop"}


def trained(recipe: dict[str, Any]) -> dict[str, Any]:
    """What comes of a recipe: a head for each of its tasks, and scores by heart."""
    heads = [
        {
            "name": f"{recipe['name']}.{target['name']}",
            "version": recipe["version"],
            "engine": "encoder",
            "answers": {"single": "label", "multi": "labels", "number": "number"}[target["kind"]],
            "labels": target["labels"],
            "trunk_model": recipe["trunk"],
        }
        for target in recipe["targets"]
    ]
    scores = epochs_of(recipe)[-1]["test"]
    return {"models": heads, "scores": scores, "frozen": scores, "seconds": 2.0}


def epochs_of(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    told = {target["name"]: SCORES[target["kind"]] for target in recipe["targets"]}
    more = {"stage": "heads", "of": 2, "validation": told, "test": told}
    return [{"epoch": epoch, "loss": 1 / epoch, **more} for epoch in (1, 2)]


@contextmanager
def serving() -> Iterator[FakeApi]:
    """Run the fake on a free port of this machine."""
    api = FakeApi()

    class Route(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body in one packet: two would wait for an acknowledgement in between.
        wbufsize = -1

        def serve(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "zstd":
                body = zstd.decompress(body)
            api.wait(parts.path, query)
            with api.lock:
                api.asking -= parts.path.endswith("/ask")
                api.requests.append((self.command, parts.path))
                fault = api.fault(self.command, parts.path)
                if fault == "lost":
                    self.hang_up()
                    return
                if isinstance(fault, int):
                    status, said = _error(fault, "come back later" if fault == 503 else "as asked")
                elif self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"Bearer {ADMIN}"):
                    status, said = _error(401, "the token is not known; ask for another")
                else:
                    key = self.headers.get("Idempotency-Key")
                    status, said = api.answer(self.command, parts.path, query, body, key)
            if fault == "unheard":
                self.hang_up()
                return
            raw = b"" if said is None else said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            if status in (429, 503):
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(raw[: len(raw) // 2] if fault == "torn" else raw)
            if fault == "torn":
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Route) as server:
        server.daemon_threads = True
        api.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()


def _error(status: int, message: str, **more: Any) -> tuple[int, Any]:
    kind = {404: "not_found", 409: "conflict", 422: "invalid_job", 401: "unauthorized"}.get(
        status, "unavailable"
    )
    return status, {"error": {"type": kind, "message": message, **more}}


MODEL = {
    "name": "news-topics",
    "version": "1",
    "engine": "encoder",
    "answers": "label",
    "labels": LABELS["topic"],
}
TRUNK = {"name": "all-MiniLM-L6-v2", "version": "1", "engine": "encoder", "answers": "vector", "dim": 2}
TRAINER = {**TRUNK, "name": "all-MiniLM-L6-v2-trainer", "engine": "trainer", "answers": "models"}
#: What each kind of task of a training run is worth.
SCORES: dict[str, dict[str, float]] = {
    "single": {"score": 0.9, "accuracy": 0.9, "macro_f1": 0.8},
    "multi": {"score": 0.85, "accuracy": 0.9, "macro_f1": 0.8},
    "number": {"score": 0.5, "mae": 1.5, "r2": 0.5},
}
EXPLANATION: dict[str, Any] = {
    "name": "",
    "state": "running",
    "says": "It waits for a worker to load fake@1, about 1.4 s on GPU; done in 28 s to 34 s (p50 to p90).",
    "notes": ["w2 cannot run fake@1: it needs 900 MB, and models may hold 300 MB there."],
    "passes": [
        {
            "number": 0,
            "kind": "encoder fake",
            "tasks": ["topic"],
            "model": "fake@1",
            "rows": {"total": 30, "waiting": 20, "later": 0, "open": 0, "done": 10},
            "work_s": 6.2,
            "resident": 0,
            "resident_on": [],
            "loads": 1,
            "loading": [{"worker": "w3", "left_s": 1.0}],
            "can_load": [{"device_name": "GPU", "workers": 1, "load_s": 1.4}],
            "cannot": [
                {
                    "why": "too_small",
                    "words": "fake@1 does not fit into its memory",
                    "workers": 1,
                    "names": ["w2"],
                    "need_mb": 900,
                    "have_mb": 300,
                }
            ],
        }
    ],
    "beside": [
        {
            "priority": "normal",
            "own": [{"job": "job-9", "name": "nightly", "work_s": 41.0}],
            "own_jobs": 1,
            "own_s": 41.0,
            "other_tenants": 1,
            "other_jobs": 2,
            "other_s": 7.0,
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
    "from_a_newer_server": True,
}
WORKER = {
    "worker": "w1",
    "host": "here",
    "state": "ready",
    "device_kind": "cpu",
    "device_name": "CPU slot",
    "memory_mb": 2048,
    "memory_used_mb": 512,
    "utilisation": 0.5,
    "resident": ["fake@1"],
    "backlog_s": 1.5,
    "held": 1,
    "rows_done": 12,
    "rate_tokens_s": None,
    "from_a_newer_server": True,
}
