"""Plan: tasks become passes, and a sample of rows becomes an estimate of what they will cost. Pure.

Fusion is decided here and nowhere else: tasks that read the same input with the same trunk share one pass.
The API plans a job when it is opened; carve, place and the workers only see the passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil
from typing import Literal

from motet.errors import InvalidJob, Problem
from motet.manifest import ANSWERS, Manifest
from motet.tasks import Task, short
from scheduler.carve import MAX_ROWS

#: Tokens of a micro-batch that padding is estimated with: what a CPU slot starts from.
BUDGET_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass:
    """One model pass over every row, and the tasks that it answers."""

    number: int
    #: What Flower shows: few in number, never an id.
    kind: str
    #: What is loaded: the trunk, or the whole model where nothing is shared. Its ``engine`` runs the pass.
    model: Manifest
    numerics: Literal["fast", "exact"]
    #: Tokens read per row, special ones included; 0 where tokens mean nothing.
    max_tokens: int
    #: The template that all its tasks read.
    input: str
    #: Numbers of its tasks in the job, ascending.
    tasks: tuple[int, ...]

    @property
    def trunk(self) -> str:
        """The name under which this pass' speed is learned."""
        return self.model.trunk or self.model.digest


def plan(
    tasks: Mapping[str, Task],
    models: Mapping[str, Manifest],
    trunks: Mapping[str, Manifest],
    *,
    registered: Collection[str] = (),
) -> tuple[PlannedPass, ...]:
    """Fuse tasks into passes, in the order of each pass' first task.

    ``models``: task name -> manifest of its model; a task without one names an unknown model. ``trunks``:
    ``name@version`` -> manifest, for every trunk that a head of these names. ``registered``: names to suggest.
    Two tasks fuse when trunk, template, tokens read and numeric class are the same; ``too_long`` may differ,
    for it only decides what becomes of a row's answer. Raises InvalidJob with every problem found.
    """
    problems = [p for name, task in tasks.items() for p in _wrong(name, task, models, trunks, registered)]
    if problems:
        raise InvalidJob(problems)
    shared: dict[tuple[object, ...], list[int]] = {}
    loads: dict[tuple[object, ...], tuple[Task, Manifest, int]] = {}
    for number, (name, task) in enumerate(tasks.items()):
        loaded = loaded_model(models[name], trunks)
        max_tokens = tokens_read(task, models[name], loaded)
        key = (*_what_is_shared(models[name], loaded), task.input, max_tokens, task.numerics)
        shared.setdefault(key, []).append(number)
        loads.setdefault(key, (task, loaded, max_tokens))
    return tuple(
        PlannedPass(
            number=number,
            kind=f"{loaded.engine} {loaded.name}",
            model=loaded,
            numerics=task.numerics,
            max_tokens=max_tokens,
            input=task.input,
            tasks=tuple(shared[key]),
        )
        for number, (key, (task, loaded, max_tokens)) in enumerate(loads.items())
    )


def _what_is_shared(model: Manifest, loaded: Manifest) -> tuple[object, ...]:
    """Equal for tasks that one loaded model can answer in one go.

    Two registrations of the same weights may differ in pooling or in the formats that passed their check:
    then the answers would depend on which of the two was loaded, so they stay apart.
    """
    if model.trunk:
        return (model.trunk, loaded.engine, loaded.pooling, loaded.formats)
    return ("", model.digest)


def loaded_model(model: Manifest, trunks: Mapping[str, Manifest]) -> Manifest:
    """What a worker loads to answer with this model: a head's trunk, or the model itself."""
    return trunks[model.trunk_model] if model.trunk_model else model


def tokens_read(task: Task, model: Manifest, loaded: Manifest) -> int:
    """Tokens read per row at most: the least of what task, model and trunk allow; 0 where tokens mean nothing."""
    return min((n for n in (task.max_tokens, model.max_tokens, loaded.max_tokens) if n), default=0)


def task_digest(task: Task, model: Manifest, loaded: Manifest) -> bytes:
    """Sha256 of all that decides a task's answers beside the row: half of every reuse key.

    ``fast`` counts as the formats that it allows, so it equals ``exact`` where no other format passed.
    """
    decisive = {
        name: value
        for name, value in task.to_json().items()
        if name not in ("model", "max_tokens", "numerics")
    }
    decisive |= {
        "model": model.digest,
        "loaded": loaded.digest,
        "formats": sorted(loaded.formats) if task.numerics == "fast" else [],
        "max_tokens": tokens_read(task, model, loaded),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).digest()


def _wrong(
    name: str,
    task: Task,
    models: Mapping[str, Manifest],
    trunks: Mapping[str, Manifest],
    registered: Collection[str],
) -> list[Problem]:
    """What stands between a task and its model."""
    where = f"tasks.{name}.model"
    model = models.get(name)
    if model is None:
        return [Problem(where, short(task.model), "a registered model", _suggest(task.model, registered))]
    fitting = ANSWERS[task.kind]
    problems = []
    if model.answers not in fitting:
        problems.append(
            Problem(
                where,
                f"{model.ref}, which answers {model.answers}",
                f"a model that answers {' or '.join(sorted(fitting))}",
                f"choose a model made for {task.kind}, or another kind of task: see `motet models`",
            )
        )
    if model.trunk_model and model.trunk_model not in trunks:
        problems.append(
            Problem(
                where,
                f"{model.ref}, whose trunk {model.trunk_model} is not registered",
                "a head whose trunk is registered",
                f"register {model.trunk_model} first",
            )
        )
    elif model.trunk_model and trunks[model.trunk_model].trunk != model.trunk:
        problems.append(
            Problem(
                where,
                f"{model.ref}, made for other weights than those of {model.trunk_model}",
                "a head made for its trunk's weights",
                "train the head again on this trunk",
            )
        )
    return problems


def _suggest(asked: str, registered: Collection[str]) -> str:
    base = asked.partition("@")[0]
    close = get_close_matches(base, sorted({n.partition("@")[0] for n in registered}), n=3, cutoff=0.6)
    if base in close:
        close = sorted(n for n in registered if n.startswith(f"{base}@"))[:5]
    return f"did you mean {' or '.join(close)}? see `motet models`" if close else "see `motet models`"


# -- what it will cost


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEstimate:
    """What one pass will read and take, extrapolated from a sample."""

    #: Tokens read by the pass, after truncation.
    tokens: int
    #: Tokens computed, padding included.
    computed_tokens: int
    #: Tokens that its tasks would read with a pass each.
    unfused_tokens: int
    truncated_rows: int
    #: Seconds on all live devices together; None where there is none.
    seconds: float | None
    subtasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a sample of rows stands for."""

    rows: int
    total_rows: int
    #: UTF-8 bytes of the fields read: of the sample, and of the whole (None: not known).
    text_bytes: int
    total_bytes: int | None

    @property
    def rows_factor(self) -> float:
        return self.total_rows / self.rows if self.rows else 0.0

    @property
    def bytes_factor(self) -> float:
        """How much more text the whole has: tokens follow bytes, not rows."""
        known = self.total_bytes is not None and self.text_bytes > 0
        return (self.total_bytes or 0) / self.text_bytes if known else self.rows_factor


def estimate(
    planned: PlannedPass,
    lengths: Sequence[int],
    sample: Sample,
    *,
    seconds_per_token: Sequence[float],
    prior_s: float,
    subtask_s: float,
) -> PassEstimate:
    """What a pass will cost, from the true token count of each sampled row.

    ``seconds_per_token``: one number for each live device. ``prior_s``: seconds per token to cut sub-tasks by
    where no device is there. All of it is an estimate: carve decides later, by what is measured then.
    """
    limit = planned.max_tokens
    read = [min(n, limit) for n in lengths] if limit else list(lengths)
    truncated = sum(1 for n in lengths if limit and n > limit)
    factor = sample.bytes_factor
    tokens = round(sum(read) * factor)
    speed = sum(1 / s for s in seconds_per_token)
    each_s = len(seconds_per_token) / speed if speed else prior_s
    return PassEstimate(
        tokens=tokens,
        computed_tokens=round(padded_tokens(read) * factor),
        unfused_tokens=tokens * len(planned.tasks),
        truncated_rows=round(truncated * sample.rows_factor),
        seconds=tokens / speed if speed else None,
        subtasks=max(
            ceil(tokens * each_s / subtask_s), ceil(sample.total_rows / MAX_ROWS), min(1, sample.total_rows)
        ),
    )


def padded_tokens(lengths: Sequence[int], budget: int = BUDGET_TOKENS) -> int:
    """Tokens computed when rows are packed longest first into micro-batches of at most ``budget`` tokens."""
    total = rows = longest = 0
    for length in sorted(lengths, reverse=True):
        if rows and (rows + 1) * longest > budget:
            total, rows = total + rows * longest, 0
        longest = longest if rows else length
        rows += 1
    return total + rows * longest
