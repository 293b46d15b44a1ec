"""What a row asks of a language model, as tokens: a prompt for each of its tasks, cut to fit the model's context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from motet.protocol.beginnings import common_prefix
from motet.protocol.columns import CellError
from motet.protocol.wire import TaskOrder
from workers.engine import Pass, Prepared
from workers.engines.causal.chat_tokens import ChatTokens, Prompt
from workers.engines.causal.prefix_cache import PrefixKey
from workers.engines.prompts import NOTHING, OWN_LABELS, BadLabels, labels_of, messages_of, row_spec
from workers.engines.thoughts import switches

#: Room that is left for an answer where a text is cut to fit.
ANSWER_SHARE = 1 / 4

CONTEXT_LENGTH = "context_length"
#: Rows share a beginning of so many tokens or more: a shorter one is computed faster than it is kept.
LEAST_SHARED = 16
#: A row joins others where it begins like them for this share of what they have in common. Lower: texts that have but a
#: system message in common share only that. Higher: rows about one text fall apart by their first words beyond it.
STILL_ALIKE = 0.75

#: What a label prior depends on: the adapter, the prompt without any text, the labels.
PriorKey = tuple[str, tuple[int, ...], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """One task's prompt for one row."""

    name: str
    spec: Mapping[str, Any]
    prompt: Prompt
    #: Choose: the tokens of each label, and the prompt without any text.
    labels: tuple[list[int], ...] = ()
    empty: Prompt | None = None
    #: Tokens that may be written.
    most: int = 0
    #: Digest of the adapter that answers it; "" for the model itself.
    adapter: str = ""
    #: Why it cannot be asked, where the row's other tasks can.
    refused: CellError | None = None

    @property
    def own_tokens(self) -> int:
        """Tokens that are this row's own: its text, or its dialogue."""
        if self.spec["kind"] == "chat":
            return len(self.prompt.ids) - self.prompt.fixed
        lo, hi = self.prompt.text
        return hi - lo

    @property
    def prior(self) -> PriorKey:
        return (self.adapter, tuple(self.empty.ids if self.empty else ()), tuple(map(tuple, self.labels)))

    @property
    def prefix(self) -> PrefixKey:
        """What all rows of the task begin with."""
        return (self.adapter, tuple(self.prompt.ids[: self.prompt.fixed]))


@dataclass(frozen=True, slots=True)
class RowPrompts:
    """What a row asks: ``Prepared.inputs``."""

    tasks: tuple[TaskPrompt, ...]
    index: int


def prepared(
    tokens: ChatTokens,
    context: int,
    pass_: Pass,
    row: int,
    text: str,
    ids: list[int],
    fields: Mapping[str, str],
) -> Prepared | CellError:
    """A row, its text cut to fit into ``context`` tokens; or why it cannot be asked. Raises BadMessages."""
    asked = [_asked(tokens, task, text, ids, fields) for task in pass_.tasks]
    if len(asked) == 1 and asked[0].refused is not None:
        return asked[0].refused
    # A text is cut where some prompt about it does not fit; for all of them, since they share it.
    over = max(_over(a, context) for a in asked)
    truncated = over > 0
    if truncated:
        shortest = min(a.prompt.text[1] - a.prompt.text[0] for a in asked)
        over = max(_over(a, context, answer=int(context * ANSWER_SHARE)) for a in asked)
        if pass_.tasks[0].spec["kind"] == "chat" or over >= shortest:
            longest = max(len(a.prompt.ids) for a in asked)
            return CellError(
                CONTEXT_LENGTH, f"a prompt of {longest} tokens; the model's context has {context}"
            )
        cut = ids[: len(ids) - over]
        asked = [_asked(tokens, task, text, cut, fields) for task in pass_.tasks]
    index = pass_.indices[row] if row < len(pass_.indices) else row
    return Prepared(
        row, _own_tokens(asked), truncated, RowPrompts(tuple(_bounded(a, context) for a in asked), index)
    )


def sharing(rows: Sequence[Prepared | CellError]) -> list[Prepared | CellError]:
    """The rows of a pass with one task; those that begin alike have their beginning as a fixed prefix, so that it is
    computed once for all of them."""
    prompts = {i: row.inputs for i, row in enumerate(rows) if isinstance(row, Prepared)}
    told = {i: asked.tasks[0].prompt.ids for i, asked in prompts.items()}
    order = sorted(told, key=told.__getitem__)
    found = list(rows)
    at = 0
    while at < len(order):
        common, end = _group(order, told, at)
        for i in order[at:end] if end - at > 1 else ():
            (task,) = prompts[i].tasks
            fixed = max(task.prompt.fixed, min(common, len(task.prompt.ids) - 1))
            alike = replace(task, prompt=replace(task.prompt, fixed=fixed))
            row = rows[i]
            assert isinstance(row, Prepared)
            found[i] = replace(row, inputs=replace(prompts[i], tasks=(alike,)))
        at = end
    return found


def _group(order: Sequence[int], told: Mapping[int, list[int]], at: int) -> tuple[int, int]:
    """(tokens in common, end) of the rows from ``at`` on that begin alike."""
    common, end = 0, at + 1
    while end < len(order):
        alike = common_prefix(told[order[end - 1]], told[order[end]])
        if alike < max(LEAST_SHARED, common * STILL_ALIKE):
            break
        common = min(common, alike) if common else alike
        end += 1
    return common, end


def _asked(
    tokens: ChatTokens, task: TaskOrder, text: str, ids: list[int], fields: Mapping[str, str]
) -> TaskPrompt:
    adapter = task.manifest.digest if task.manifest.trunk_model else ""
    try:
        spec = row_spec(task.spec, fields)
    except BadLabels as bad:
        # The text alone: the row's other tasks read it too.
        bare = {**task.spec, OWN_LABELS: [NOTHING]}
        alone = tokens.prompt(messages_of(bare, text, fields), {text: ids}, switches(bare))
        return TaskPrompt(task.name, bare, alone, adapter=adapter, refused=bad.cell)
    told = switches(spec)
    prompt = (
        tokens.raw(ids)
        if spec.get("raw")
        else tokens.prompt(messages_of(spec, text, fields), {text: ids}, told)
    )
    if spec["kind"] != "choose":
        return TaskPrompt(task.name, spec, prompt, most=int(spec["max_tokens"]), adapter=adapter)
    empty = None
    if spec.get("calibrate", True):
        nothing = dict.fromkeys(fields, NOTHING)
        empty = tokens.prompt(messages_of(spec, NOTHING, nothing), {}, told)
    labels = tuple(map(tokens.label, labels_of(spec)))
    return TaskPrompt(task.name, spec, prompt, labels, empty, adapter=adapter)


def _over(a: TaskPrompt, context: int, answer: int = 0) -> int:
    """Tokens by which a prompt, its labels and an answer of at least one token (or ``answer``) are too many."""
    behind = max((len(label) - 1 for label in a.labels), default=max(1, min(answer, a.most)))
    return len(a.prompt.ids) + behind - context


def _bounded(a: TaskPrompt, context: int) -> TaskPrompt:
    """With no more tokens to write than the context has room for."""
    room = context - len(a.prompt.ids)
    return a if a.labels or a.refused or a.most <= room else replace(a, most=room)


def _own_tokens(asked: Sequence[TaskPrompt]) -> int:
    """Those of the task with the most.

    What is the same for every row costs each of them the same, and says nothing of how much longer one takes.
    """
    return max(1, *(a.own_tokens for a in asked))
