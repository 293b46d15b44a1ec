"""Plan: tasks become passes, and a sample of rows becomes an estimate of what they will cost. Pure.

Fusion is decided here and nowhere else: tasks that read the same input with the same trunk share one pass, and so do
tasks of one language model about the same text. A task that reads another's answer comes in a later pass.
The API plans a job when it is opened; carve, place and the workers only see the passes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import reduce
from math import ceil
from operator import or_
from typing import Literal

from motet.errors import InvalidJob, Problem
from motet.head_inputs import input_problems
from motet.protocol.manifest import ANSWERS, Manifest, column_kind
from motet.tasks import (
    Chat,
    Choose,
    Classify,
    First,
    Function,
    Prompted,
    Rank,
    Reading,
    Task,
    fields_of,
    short,
)
from motet.templates import render, resolved, uses
from scheduler.blocks import Reads
from scheduler.policy.carve import MAX_ROWS
from scheduler.policy.cost import learned_as
from scheduler.policy.functions import beside_functions, function_problems
from scheduler.policy.needs import cycle_problem, levels_of, needs_of
from scheduler.policy.pictures import picture_problems
from scheduler.policy.prompt_order import ANSWER_BYTES, first_of, rate_key

#: Tokens of a micro-batch that padding is estimated with: what a CPU slot starts from.
BUDGET_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """One model pass over every row, and the tasks that it answers."""

    number: int
    #: What Flower shows: few in number, never an id.
    kind: str
    #: What is loaded: the trunk, or the whole model where nothing is shared. Its ``engine`` runs the pass.
    model: Manifest
    numerics: Literal["fast", "exact"]
    #: Tokens read per row, special ones included; 0 where tokens mean nothing. Of a language model: its context.
    max_tokens: int
    #: The template that all its tasks read; of several texts all of their templates, one behind the other.
    input: str
    #: Numbers of its tasks in the job, ascending.
    tasks: tuple[int, ...]
    #: Numbers of the tasks whose cells it reads: a block of it waits until these are sealed there.
    needs: tuple[int, ...] = ()
    #: It runs on the rows for which this holds; None: on all.
    condition: str | None = None
    #: What stands in front in its prompts: "text" or "instruction"; "" where there are none.
    first: Literal["text", "instruction", ""] = ""
    #: The name under which this pass' speed is learned, where that is not its trunk's; "": it is.
    rate_key: str = ""
    #: The templates of the texts that its trunk reads apart, each once for all tasks.
    texts: tuple[str, ...] = ()
    #: Of each of its tasks the texts that it reads, by their places; (): all of them.
    reads: tuple[tuple[int, ...], ...] = ()

    @property
    def prompts(self) -> bool:
        """A language model runs it."""
        return self.model.answers == "text"


def plan(
    tasks: Mapping[str, Task],
    models: Mapping[str, Manifest],
    trunks: Mapping[str, Manifest],
    *,
    artefacts: Mapping[str, Manifest] | None = None,
    registered: Collection[str] = (),
    mean_bytes: Mapping[str, float] | None = None,
) -> tuple[PassPlan, ...]:
    """Fuse tasks into passes: those that need no other first, in the order of each pass' first task, then the rest.

    ``models``: task name -> manifest of its model; a task without one names an unknown model. ``trunks``:
    ``name@version`` -> manifest, for every trunk that a head of these names. ``artefacts``: task name -> the artefact that
    its function reads, where it names a registered one. ``registered``: versions and aliases to suggest.
    ``mean_bytes``: field -> UTF-8 bytes in a row, as far as they are known.
    Two tasks fuse when trunk, template, tokens read, numeric class, condition and the tasks that they need are the same;
    ``too_long`` may differ, for it only decides what becomes of a row's answer. Since all tasks of a pass need the
    same ones, passes can no more wait for each other than tasks can. Raises InvalidJob with every problem found.
    """
    names, needs = list(tasks), needs_of(tasks)
    problems = [p for name, task in tasks.items() for p in _wrong(name, task, models, trunks, registered)]
    for name, model in models.items():
        task, artefact = tasks[name], (artefacts or {}).get(name)
        named = getattr(task, "artefact", None) or ""
        problems += function_problems(name, task, model, artefact, _suggest(named, registered))
    problems += [p for name, model in models.items() for p in input_problems(name, tasks[name], model)]
    problems += picture_problems(tasks, models)
    problems += _unreadable(tasks, models, needs)
    problems += cycle_problem(names, needs)
    if problems:
        raise InvalidJob(problems)
    models, functions = beside_functions(models, artefacts or {})
    trunks = {**trunks, **functions}
    levels = levels_of(needs)
    # In order of level and first task, since a group begins with its first task.
    order = sorted(range(len(names)), key=lambda number: (levels[number], number))
    fused: dict[tuple[object, ...], list[int]] = {}
    #: What tasks have in common beside what they read -> the texts that heads read together, in sets without a common one.
    together: dict[tuple[object, ...], list[set[str]]] = {}
    alike: list[tuple[tuple[object, ...], tuple[str, ...], int]] = []
    for number in order:
        task, model = tasks[names[number]], models[names[number]]
        loaded = loaded_model(model, trunks)
        max_tokens = tokens_read(task, model, loaded)
        own = (task.numerics, needs[number], task.when)
        what = (*_what_is_shared(model, loaded), _called(task), max_tokens, *own, _order(task, loaded))
        alike.append((what, task.texts, number))
        _join(together.setdefault(what, []), task.texts)
    for what, texts, number in alike:
        read = next(frozenset(found) for found in together[what] if texts[0] in found)
        fused.setdefault((*what[:-1], read, what[-1]), []).append(number)
    resolved: dict[tuple[object, ...], list[int]] = {}
    for (*common, first), numbers in fused.items():
        if first == "auto":
            asked = [t for number in numbers if isinstance(t := tasks[names[number]], Prompted)]
            answers = frozenset(names[number] for number in needs[numbers[0]])
            first = first_of(asked, mean_bytes or {}, answers)
        resolved.setdefault((*common, first), []).extend(numbers)
    groups = sorted(
        ((levels[numbers[0]], sorted(numbers), first) for (*_, first), numbers in resolved.items()),
        key=lambda group: group[:2],
    )
    return tuple(
        _pass(at, [names[number] for number in numbers], tasks, models, trunks, numbers, needs, first)
        for at, (_, numbers, first) in enumerate(groups)
    )


def _pass(
    at: int,
    names: Sequence[str],
    tasks: Mapping[str, Task],
    models: Mapping[str, Manifest],
    trunks: Mapping[str, Manifest],
    numbers: Sequence[int],
    needs: Sequence[tuple[int, ...]],
    first: object,
) -> PassPlan:
    """The pass of these tasks, which have all that matters in common with the first of them."""
    task, model = tasks[names[0]], models[names[0]]
    loaded = loaded_model(model, trunks)
    texts = tuple(dict.fromkeys(text for name in names for text in tasks[name].texts))
    speaks = loaded.answers == "text"
    return PassPlan(
        number=at,
        kind=f"{loaded.engine} {loaded.name}",
        model=loaded,
        numerics=task.numerics,
        max_tokens=tokens_read(task, model, loaded),
        input="".join(texts),
        texts=texts,
        reads=tuple(tuple(map(texts.index, tasks[name].texts)) for name in names) if len(texts) > 1 else (),
        tasks=tuple(numbers),
        needs=needs[numbers[0]],
        condition=task.when,
        first="instruction"
        if first == "instruction"
        else "text"
        if speaks and isinstance(task, Prompted)
        else "",
        rate_key=rate_key(learned_as("", loaded), [tasks[name] for name in names]) if speaks else "",
    )


def _join(sets: list[set[str]], texts: Sequence[str]) -> None:
    """Note that these texts are read together: sets that have one of them become one."""
    met = [found for found in sets if not found.isdisjoint(texts)]
    sets[:] = [found for found in sets if found.isdisjoint(texts)] + [set(texts).union(*met)]


def _called(task: Task) -> tuple[object, ...]:
    """What else must be alike where the model is given values, which are no text, whatever template stands for them."""
    match task:
        case Function():
            # Calls with other parameters share nothing, and one that raises must not be the other's error.
            return (task.inputs is not None, json.dumps(task.params, sort_keys=True))
        case Rank():
            return (task.query, task.documents, task.max_tokens)
    return ()


def _order(task: Task, loaded: Manifest) -> First | Literal["chat", ""]:
    """Equal for tasks whose prompts may be written in one order; "auto": whatever is best for all of them."""
    if loaded.answers != "text":
        return ""
    if isinstance(task, Prompted):
        return task.first
    return "chat" if isinstance(task, Chat) else ""


def in_order(task: Task, planned: PassPlan) -> Task:
    """The task as its pass runs it: nothing of it is left to be decided."""
    if isinstance(task, Prompted) and planned.first:
        return replace(task, first=planned.first)
    return task


def _what_is_shared(model: Manifest, loaded: Manifest) -> tuple[object, ...]:
    """Equal for tasks that one loaded model can answer in one go.

    Two registrations of the same weights may differ in pooling or in the formats that passed their check:
    then the answers would depend on which of the two was loaded, so they stay apart.
    """
    if model.trunk and model.answers != "text":
        return (model.trunk, loaded.engine, loaded.pooling, loaded.formats)
    return ("", model.digest, loaded.digest)


def loaded_model(model: Manifest, trunks: Mapping[str, Manifest]) -> Manifest:
    """What a worker loads to answer with this model: a head's trunk, or the model itself."""
    return trunks[model.trunk_model] if model.trunk_model else model


def tokens_read(task: Task, model: Manifest, loaded: Manifest) -> int:
    """Tokens read per row at most: the least of what task, model and trunk allow; 0 where tokens mean nothing, or where a
    row is read in many pieces."""
    if isinstance(task, Rank):
        return 0
    asked = task.max_tokens if isinstance(task, Reading) else None
    return min((n for n in (asked, model.max_tokens, loaded.max_tokens) if n), default=0)


def reads_of(planned: PassPlan, tasks: Mapping[str, Task]) -> Reads:
    """What a pass reads of each field of its job, in their order: its input, and what its prompts name beside it.

    A row of prompts takes as long as its longest one, so what several of them name counts once. What they say in the
    same words for every row says nothing of how long one takes.
    """
    names = list(tasks)
    answers = {names[number] for number in planned.needs}
    own = [tasks[names[number]] for number in planned.tasks]
    often = Counter(uses(planned.input))
    fixed = render(planned.input, dict.fromkeys(often, ""))
    # Of each name what the prompt says that names it most.
    often += reduce(or_, (Counter(_uses_beside_input(task)) for task in own))
    # How long a part is nobody knows: it counts as the whole.
    for one in [one for one in often if resolved(one, answers).name != one]:
        often[resolved(one, answers).name] += often.pop(one)
    return Reads(
        tuple(often[name] for name in fields_of(tasks)),
        len(fixed.encode()) + ANSWER_BYTES * sum(often[name] for name in answers),
        planned.max_tokens,
    )


def _uses_beside_input(task: Task) -> list[str]:
    # Of one that is given values, all of them are its input.
    beside = () if task.valued else task.templates[1:]
    named = [name for template in beside for name in uses(getattr(task, template))]
    if isinstance(task, Choose) and isinstance(task.labels, str):
        # Each label is scored, and unless the task asks in its own words the question names them too.
        named += uses(task.labels) * (1 if task.question else 2)
    return named


def task_digest(task: Task, model: Manifest, loaded: Manifest) -> bytes:
    """Sha256 of all that decides a task's answers beside the row: half of every reuse key.

    ``fast`` counts as the formats that it allows, so it equals ``exact`` where no other format passed. The answers of
    other tasks that it reads are not in it: see ``scheduler.blocks.reuse_key``.
    """
    decisive = {
        name: value
        for name, value in task.to_json().items()
        # A task that leaves thoughts to the model says no more of them than those before it could.
        if name not in ("model", "artefact", "max_tokens", "numerics", "conditional")
        and (name, value) != ("thinking", None)
    }
    if not isinstance(task, Reading):
        # Of these it says how much is written.
        decisive["written"] = getattr(task, "max_tokens", 0)
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
    problems += _cannot_abstain(name, task, model)
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


def _cannot_abstain(name: str, task: Task, model: Manifest) -> list[Problem]:
    if not isinstance(task, Classify):
        return []
    if task.min_score is not None and model.answers == "labels":
        return [
            Problem(
                f"tasks.{name}.min_score",
                f"{task.min_score} for {model.ref}, which gives each label that reaches its own threshold",
                "a model that gives one label",
                "leave min_score out: a row may get no label at all",
            )
        ]
    if task.otherwise is not None and task.min_score is None:
        return [
            Problem(
                f"tasks.{name}.otherwise",
                f"{short(task.otherwise)} without min_score",
                "the score below which it is said",
                "add min_score=0.5, or leave otherwise out",
            )
        ]
    return []


#: Kinds of columns that cannot stand in a template.
_NO_TEXT = {"vector": "a vector", "spans": "a list of spans"}


def _unreadable(
    tasks: Mapping[str, Task], models: Mapping[str, Manifest], needs: Sequence[tuple[int, ...]]
) -> list[Problem]:
    """Answers that some template names and that cannot be read as text."""
    names = list(tasks)
    kinds = {
        name: column_kind(tasks[name].to_json(), model.answers)
        for name, model in models.items()
        if model.answers in ANSWERS[tasks[name].kind]
    }
    return [
        Problem(
            f"tasks.{name}",
            f"{{{written}}}, which is {_NO_TEXT[kinds[meant.name]]}",
            "a field of the row, an answer that is a label, a number, a text or JSON, or a part of it",
            f"name a part of it, such as {{{meant.name}[0]}}, or give a function the whole by inputs=(…); rename the task "
            f"{meant.name} if a field of that name is meant",
        )
        for name, read_by in zip(names, needs, strict=True)
        if not (task := tasks[name]).valued
        for written in task.placeholders
        for meant in [resolved(written, {names[read] for read in read_by})]
        if not meant.steps and kinds.get(meant.name) in _NO_TEXT and meant.name != name
    ]


def _suggest(asked: str, registered: Collection[str]) -> str:
    base = asked.partition("@")[0]
    close = get_close_matches(base, sorted({n.partition("@")[0] for n in registered}), n=3, cutoff=0.6)
    if base in close:
        mine = [n for n in registered if n.startswith(f"{base}@")]
        close = sorted(get_close_matches(asked, mine, n=5, cutoff=0.0))
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
    #: Tokens that language models write at most.
    tokens_out: int = 0


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
    planned: PassPlan,
    lengths: Sequence[int],
    sample: Sample,
    *,
    seconds_per_token: Sequence[float],
    prior_s: float,
    subtask_s: float,
    others: Sequence[Sequence[int]] = (),
) -> PassEstimate:
    """What a pass will cost, from the true token count of each sampled row.

    ``others``: token counts of its further texts, where its trunk reads several of a row. ``seconds_per_token``: one
    number for each live device. ``prior_s``: seconds per token to cut sub-tasks by where no device is there. All of it is
    an estimate: carve decides later, by what is measured then.
    """
    limit = planned.max_tokens
    texts = [[min(n, limit) for n in text] if limit else list(text) for text in (lengths, *others)]
    read = [n for text in texts for n in text]
    truncated = sum(1 for row in zip(lengths, *others, strict=True) if limit and max(row) > limit)
    factor = sample.bytes_factor
    tokens = round(sum(read) * factor)
    # Of a task that reads some of the texts only these.
    alone = round(sum(sum(texts[place]) for places in planned.reads for place in places) * factor)
    seconds, subtasks = passing_time(tokens, sample, seconds_per_token, prior_s, subtask_s)
    return PassEstimate(
        tokens=tokens,
        computed_tokens=round(padded_tokens(read) * factor),
        unfused_tokens=alone if planned.reads else tokens * len(planned.tasks),
        truncated_rows=round(truncated * sample.rows_factor),
        seconds=seconds,
        subtasks=subtasks,
    )


def passing_time(
    tokens: int, sample: Sample, seconds_per_token: Sequence[float], prior_s: float, subtask_s: float
) -> tuple[float | None, int]:
    """Seconds that so many tokens take on all devices together, None where there is none; and in how many sub-tasks."""
    speed = sum(1 / s for s in seconds_per_token)
    each_s = len(seconds_per_token) / speed if speed else prior_s
    subtasks = max(
        ceil(tokens * each_s / subtask_s), ceil(sample.total_rows / MAX_ROWS), min(1, sample.total_rows)
    )
    return tokens / speed if speed else None, subtasks


def padded_tokens(lengths: Sequence[int], budget: int = BUDGET_TOKENS) -> int:
    """Tokens computed when rows are packed longest first into micro-batches of at most ``budget`` tokens."""
    total = rows = longest = 0
    for length in sorted(lengths, reverse=True):
        if rows and (rows + 1) * longest > budget:
            total, rows = total + rows * longest, 0
        longest = longest if rows else length
        rows += 1
    return total + rows * longest
