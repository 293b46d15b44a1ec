"""Traces: jobs as lines of JSON, what their models cost, and how both are recorded from jobs that ran. Pure.

A line is one pass of one job, so an operator can write a trace by hand, and record one from a real cluster.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import NormalDist
from typing import Any

from motet.errors import SetupError
from motet.protocol.manifest import PATCH_PIXELS, Manifest
from scheduler.policy.cost import Rate, Rates, Workload
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL
from scheduler.simulation.cluster import Model, SimulatedJob
from scheduler.simulation.kinds import KINDS, kind_named

PRIORITIES = {"interactive": INTERACTIVE, "normal": NORMAL, "bulk": BULK}
#: Lengths that stand for all rows of a job.
LENGTHS = 64
#: Learned from this often, the few sub-tasks of a job say all that they can.
_ROUNDS = 4
#: Fields of a model of which one says how fast it was.
_MEASURED = {"tokens_s", "pixels_s"}
#: Fewer sub-tasks do not tell how the lengths of rows are spread.
_ENOUGH = 8

EXAMPLE = """\
{"name": "nightly-embeddings", "model": {"name": "encoder-110m", "parameters": 110000000}, "rows": 5000000, "tokens": 120, "tenant": "search", "priority": "bulk"}
{"name": "ticket-topics", "model": "encoder-110m", "rows": 400000, "tokens": 60, "tenant": "support", "at_s": 20}
{"name": "summaries", "model": {"name": "writer-8b", "parameters": 8000000000}, "rows": 60000, "tokens": 700, "spread": 0.9, "tenant": "support", "deadline_s": 900}
{"name": "translations", "model": {"name": "writer-3b", "parameters": 3000000000}, "rows": 40000, "tokens": 500, "tenant": "shop", "at_s": 60}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Jobs and their models, ready to be simulated."""

    jobs: tuple[SimulatedJob, ...]
    models: Mapping[str, Model]
    #: Models whose cost was guessed from their size.
    guessed: tuple[str, ...] = ()
    #: Seconds that jobs really took where they were recorded.
    took_s: Mapping[str, float] = field(default_factory=dict)


# -- reading


def read_models(text: str, source: str) -> dict[str, Mapping[str, Any]]:
    """The tables of a TOML file of models, by name. Raises SetupError."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{source}: not TOML: {error}") from None
    for name, table in found.items():
        if not isinstance(table, dict):
            raise SetupError(f"{source}, {name}: got a value; expected a table such as [{name}]")
    return found


def read_trace(lines: Iterable[str], source: str, models: Mapping[str, Mapping[str, Any]]) -> Trace:
    """The trace that these lines of JSON are. ``models``: as a file of models has them. Raises SetupError."""
    known = {name: _Fields(spec, f"{source}, model {name}").model(name) for name, spec in models.items()}
    guessed = [name for name, spec in models.items() if not _MEASURED & spec.keys()]
    jobs: dict[str, SimulatedJob] = {}
    took_s: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        fields = _Fields(_object(line, where), where)
        inline = fields.take("model")
        if isinstance(inline, dict):
            told = _Fields(inline, f"{where}, model")
            name = told.text("name")
            model = told.model(name)
            if known.setdefault(name, model) != model:
                raise SetupError(
                    f"{where}, model: {name!r} costs something else above; name it again by its name"
                )
            guessed += [name] if not _MEASURED & inline.keys() and name not in guessed else []
        elif isinstance(inline, str) and inline in known:
            name = inline
        else:
            raise SetupError(
                f"{where}, model: got {_short(inline)}; expected the name of a model told before or in --models,"
                ' or an object such as {"name": "my-encoder", "parameters": 110000000}'
            )
        job = fields.job(name, f"job-{number}")
        if job.name in jobs:
            raise SetupError(f"{where}, name: got {job.name!r} a second time; expected a name of its own")
        jobs[job.name] = job
        took = fields.number("took_s", 0.0)
        if took:
            took_s[job.name] = took
        fields.done()
    if not jobs:
        raise SetupError(f"{source}: no line of JSON in it; expected one job a line")
    used = {job.model for job in jobs.values()}
    return Trace(
        jobs=tuple(jobs.values()),
        models={name: model for name, model in known.items() if name in used},
        guessed=tuple(name for name in guessed if name in used),
        took_s=took_s,
    )


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise SetupError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise SetupError(
            f'{where}: got {_short(found)}; expected an object such as {{"model": …, "rows": …}}'
        )
    return found


@dataclass(slots=True)
class _Fields:
    """Fields of one object, taken out one by one; every refusal says where it stands."""

    left: Mapping[str, Any]
    where: str
    known: set[str] = field(default_factory=set)

    def job(self, model: str, name: str) -> SimulatedJob:
        """The job of a line. ``name``: where it has none."""
        at_s = self.number("at_s", 0.0)
        deadline_s = self.number("deadline_s", math.inf, above=0.0)
        priority = self.take("priority") or "normal"
        if priority not in PRIORITIES:
            self._refuse("priority", priority, f"one of {', '.join(PRIORITIES)}")
        rows = self.number("rows", None, above=0.0)
        if rows != int(rows):
            self._refuse("rows", rows, "a whole number")
        pixels = self.number("pixels", 0.0)
        if pixels and {"tokens", "spread", "lengths"} & self.left.keys():
            self._refuse("pixels", pixels, "tokens, or else pixels: a model brings all pictures to one size")
        tokens = pixels / PATCH_PIXELS or self.number("tokens", 64.0, above=0.0)
        spread = self.number("spread", 0.0 if pixels else 0.7)
        return SimulatedJob(
            name=self.text("name", name),
            model=model,
            rows=int(rows),
            tokens=tokens,
            spread=spread,
            recorded=self._lengths() or _lognormal(tokens, spread),
            tenant=self.text("tenant", "all"),
            weight=self.number("weight", 1.0, above=0.0),
            priority=PRIORITIES[priority],
            at_s=at_s,
            deadline_s=None if math.isinf(deadline_s) else at_s + deadline_s,
        )

    def model(self, name: str) -> Model:
        """What a model costs: as measured on a kind of device, or guessed from its size."""
        self.known.add("name")
        parameters = self.number("parameters", 0.0)
        tokens_s = self.number("tokens_s", 0.0) or self.number("pixels_s", 0.0) / PATCH_PIXELS
        if not (parameters or tokens_s):
            raise SetupError(
                f"{self.where}: expected parameters (a number), or tokens_s (of pictures pixels_s) and on, as measured"
            )
        on = self.text("on", "") if not tokens_s else self.text("on")
        if on and on not in KINDS:
            self._refuse("on", on, f"one of {', '.join(KINDS)}, where it was measured")
        speed = KINDS[on].speed if on else 1.0
        guess = Manifest(
            name=name, version="1", engine="encoder", answers="vector", parameters=int(parameters)
        )
        weights = guess.weights_bytes("bf16")
        memory_gb = self.number("memory_gb", guess.memory_mb("bf16") * (1 << 20) / 1e9)
        load_s = self.number("load_s", Rates().load_s("", "", weights_bytes=weights))
        model = Model(
            name=name,
            # Two operations a parameter and token; a device of speed 1 does 10^12 a second.
            token_s=speed / tokens_s if tokens_s else 2 * parameters / 1e12,
            row_s=speed * self.number("row_s", 0.0),
            square_s=speed * self.number("square_s", 0.0),
            start_s=speed * self.number("start_s", 0.0),
            load_s=load_s,
            memory_mb=max(1, int(memory_gb * 1e9 / (1 << 20))),
        )
        self.done()
        return model

    def take(self, name: str) -> Any:
        self.known.add(name)
        return self.left.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.take(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            self._refuse(name, value, "text")
        return str(value)

    def number(self, name: str, default: float | None, *, above: float = -1e-12) -> float:
        value = self.take(name)
        if value is None and default is not None:
            return default
        at_least = "above 0" if above >= 0 else "from 0"
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e18:
            self._refuse(name, value, f"a number {at_least}")
        return float(value)

    def done(self) -> None:
        """Raise SetupError where something is left over: a misspelt field would change nothing, silently."""
        if more := sorted(self.left.keys() - self.known):
            raise SetupError(
                f"{self.where}, {more[0]}: no such field; expected {', '.join(sorted(self.known))}"
            )

    def _lengths(self) -> tuple[float, ...]:
        value = self.take("lengths")
        if value is None:
            return ()
        fine = (
            isinstance(value, list)
            and value
            and all(isinstance(v, int | float) and 0 < v < 1e18 for v in value)
        )
        if not fine:
            self._refuse(
                "lengths", value, "tokens of rows, equally many of each, as a list of numbers above 0"
            )
        return tuple(float(v) for v in value)

    def _refuse(self, name: str, got: Any, expected: str) -> None:
        told = "nothing" if got is None else _short(got)
        raise SetupError(f"{self.where}, {name}: got {told}; expected {expected}")


def _lognormal(tokens: float, spread: float) -> tuple[float, ...]:
    """Equally likely lengths of a lognormal with this mean."""
    normal = NormalDist(0.0, max(1e-9, spread))
    found = [math.exp(normal.inv_cdf((i + 0.5) / LENGTHS)) for i in range(LENGTHS)]
    scale = tokens * LENGTHS / sum(found)
    return tuple(max(1.0, scale * one) for one in found)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


# -- recording


def record(activities: Sequence[Mapping[str, Any]], parameters: Mapping[str, int]) -> list[dict[str, Any]]:
    """Lines of a trace of jobs that ran, from their activities as docs/http.md shows them. Raises SetupError.

    ``parameters``: by reference of a model, for the memory that it takes.
    """
    started = [_moment(a["job"]["started"] or a["job"]["created"]) for a in activities]
    first = min(started, default=0.0)
    found: list[dict[str, Any]] = []
    for activity, came in zip(activities, started, strict=True):
        job = activity["job"]
        for p in activity["passes"]:
            subtasks = [s for s in done_in(activity) if s["pass"] == p["number"]]
            if not subtasks:
                continue
            later = p["number"] and min(s["carved_s"] for s in subtasks)
            at_s = came - first + later
            ended_s = _moment(job["created"]) + max(s["end_s"] for s in subtasks)
            name = job["name"] or job["id"]
            model = job["passes"][p["number"]]["model"]
            size = {"parameters": parameters[model]} if parameters.get(model) else {}
            mean = sum(s["tokens"] for s in subtasks) / sum(s["rows"] for s in subtasks)
            sees = job["passes"][p["number"]].get("kind", "").startswith("image")
            found.append(
                {
                    "name": f"{name} pass {p['number'] + 1}" if len(activity["passes"]) > 1 else name,
                    "model": {**_measured(model, activity, subtasks, sees), **size},
                    "rows": sum(s["rows"] for s in subtasks),
                    **(
                        {"pixels": round(mean * PATCH_PIXELS)}
                        if sees
                        else {"tokens": _figures(mean), **lengths_of(subtasks)}
                    ),
                    "priority": job["priority"],
                    "at_s": round(at_s, 3),
                    "took_s": round(ended_s - first - at_s, 3),
                }
            )
    if not found:
        raise SetupError(
            "no sub-task of these jobs is done; expected jobs that have run, not only been reused"
        )
    return _named_once(found)


def done_in(activity: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Sub-tasks of an activity that brought answers, in the order in which they ended."""
    done = (s for s in activity["timeline"] if s["state"] == "done" and s["busy_s"] > 0 and s["tokens"] > 0)
    return sorted(done, key=lambda s: s["end_s"])


def work_of(subtask: Mapping[str, Any]) -> Workload:
    """What a recorded sub-task was; its rows were of like length."""
    rows, tokens = subtask["rows"], subtask["tokens"]
    return Workload(rows, tokens, tokens * tokens / rows)


def rate_of(subtasks: Sequence[Mapping[str, Any]]) -> Rate:
    """What these sub-tasks of one kind of device teach, as the dispatcher would learn it."""
    rate = Rate.prior(sum(s["busy_s"] for s in subtasks) / sum(s["tokens"] for s in subtasks))
    for s in _ROUNDS * list(subtasks):
        rate = rate.observed(work_of(s), s["busy_s"])
    return rate


def lengths_of(subtasks: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The field ``lengths``, longest first: each sub-task held rows of like length. Without it where too few tell."""
    if len(subtasks) < _ENOUGH:
        return {}
    longest = sorted(((s["tokens"] / s["rows"], s["rows"]) for s in subtasks), reverse=True)
    share = sum(rows for _, rows in longest) / LENGTHS
    found = []
    at = 0
    mean, left = longest[0]
    for _ in range(LENGTHS):
        want, tokens = share, 0.0
        while want > 1e-9 and at < len(longest):
            taken = min(want, left)
            want, left, tokens = want - taken, left - taken, tokens + taken * mean
            if left <= 1e-9:
                at += 1
                mean, left = longest[at] if at < len(longest) else (mean, want)
        found.append(_figures(tokens / share))
    return {"lengths": found}


def _measured(
    model: str, activity: Mapping[str, Any], subtasks: Sequence[Mapping[str, Any]], sees: bool
) -> dict[str, Any]:
    """What a model cost, learned as the dispatcher learns it, on the kind of device that did most of the work.

    ``sees``: it reads pictures.
    """
    names = {d["worker"]: d["device_name"] for d in activity["devices"]}
    tokens: dict[str, float] = {}
    for s in subtasks:
        name = names.get(s["worker"], "")
        tokens[name] = tokens.get(name, 0.0) + s["tokens"]
    most = max(tokens, key=lambda name: tokens[name])
    kind = kind_named(most)
    if kind is None:
        raise SetupError(
            f"{model} ran on {most or 'a device without a name'}; expected one of {', '.join(KINDS)}: write the"
            " trace by hand, with tokens_s as `motet workers` tells it"
        )
    rate = rate_of([s for s in subtasks if names.get(s["worker"], "") == most])
    start, row, token, square = rate.coefficients
    speed = 1 / max(token, 1e-12)
    return {
        "name": model,
        **({"pixels_s": _figures(PATCH_PIXELS * speed)} if sees else {"tokens_s": _figures(speed)}),
        "row_s": _figures(row),
        "square_s": _figures(square),
        "start_s": _figures(start),
        "on": kind.name,
    }


def _named_once(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Jobs of one name get numbers; a model is told once, where the trace uses it first."""
    seen: dict[str, int] = {}
    told: set[str] = set()
    for line in lines:
        name = line["name"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            line["name"] = f"{name} ({seen[name]})"
        model = line["model"]["name"]
        if model in told:
            line["model"] = model
        told.add(model)
    return lines


def _moment(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _figures(value: float) -> float:
    return float(f"{value:.4g}")
