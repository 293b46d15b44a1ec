"""What each option of a task may hold, and the words that say so: for ``motet.tasks``, which knows which task has which. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from motet.conditions import BadCondition, condition
from motet.labels import is_listed, labels_flaw
from motet.templates import NAME, is_placeholder, is_well_formed, placeholders

#: Texts of one row that a head may read. Each is a pass of the trunk over it.
MOST_TEXTS = 8
#: Numbers that it may read beside them.
MOST_NUMBERS = 64


def condition_flaw(written: object) -> str:
    """What is wrong with a condition (``motet.conditions``), in words; "" where nothing is."""
    if not isinstance(written, str):
        return repr(written)[:40]
    try:
        condition(written)
    except BadCondition as bad:
        return str(bad)
    return ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an option may be, in words and as a check, and what to do about anything else."""

    words: str
    remedy: str
    allowed: tuple[object, ...] = ()
    kind: type | None = None

    def check(self, value: object) -> bool:
        if self.kind is bool:
            return isinstance(value, bool) or (value is None and None in self.allowed)
        if self.allowed:
            return value in self.allowed
        return _CHECKS[self.words](value)


def _clean_text(value: object) -> bool:
    if not isinstance(value, str) or not value or len(value) > 20_000 or "\0" in value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_template(value: object) -> bool:
    return _is_prompt(value) and bool(placeholders(str(value)))


def _is_prompt(value: object) -> bool:
    """A template that need not name a field."""
    return isinstance(value, str) and _clean_text(value) and is_well_formed(value)


def _is_prompt_or_nothing(value: object) -> bool:
    return value == "" or _is_prompt(value)


def is_one_field(value: object) -> bool:
    return isinstance(value, str) and value[:1] + value[-1:] == "{}" and bool(NAME.match(value[1:-1]))


def _is_whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _is_temperature(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10


def _are_texts(least: int, most: int, length: int) -> Callable[[object], bool]:
    """So many different texts, each of at most ``length`` characters."""

    def check(value: object) -> bool:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            return False
        return all(_clean_text(v) and len(v) <= length for v in value) and len(set(value)) == len(value)

    return check


def _is_schema(value: object) -> bool:
    """An object that could be a JSON Schema. Whether it is one, and one that can be kept, the API asks."""
    try:
        return isinstance(value, dict) and len(json.dumps(value, allow_nan=False)) <= 20_000
    except (ValueError, TypeError, RecursionError):
        return False


def _are_params(value: object) -> bool:
    """An object of keyword arguments. Whether the function takes them, the API asks."""
    return (
        _is_schema(value)
        and isinstance(value, dict)
        and all(
            isinstance(name, str) and name.isidentifier() and not iskeyword(name) and name != "artefact"
            for name in value
        )
    )


_MODEL = "the name of a registered model"
_ARTEFACT = "the name of a registered artefact"
_PARAMS = "an object of the function's keyword arguments, of up to 20,000 characters of JSON; artefact is none of them"
_TEMPLATE = "text that names at least one field, such as {text}, or a part of one, such as {messages[-1]}"
_PROMPT = "text, with {field} where a field of the row or another task's answer belongs"
_PROMPT_OR_NOTHING = "such text, or nothing"
_FIELD = "one field in braces, such as {messages}"
_LIST = "one field or answer in braces that is a list, such as {documents}"
_TOKENS = "a whole number from 3 to 1,000,000, or null"
_WRITTEN = "a whole number from 1 to 100,000"
_STOP = "up to 16 different texts of up to 100 characters"
_TEXTS = "text that names at least one field, such as {text}; of a head on several texts a list of one for each, up to 8"
_INPUTS = "1 to 64 different names of fields or tasks, or parts of them such as event.kind"
_NUMBERS = (
    "1 to 64 different names of fields or tasks that are numbers, or parts of them such as customer[age]"
)
_LABELS = "2 to 1,000 different texts of up to 200 characters, or the field that lists a row's own, such as {candidates}"
_TEMPERATURE = "a number from 0 to 10"
_CONDITION = "a condition on fields and answers, such as alert != 'none' and risk > 0.4"
_SHARE = "a number above 0, at most 1"
_LABEL = "a text of up to 200 characters"
_SEED = "a whole number from 0 to 2^63 - 1"
_SCHEMA = "a JSON Schema of up to 20,000 characters"
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    _MODEL: lambda v: _clean_text(v) and len(str(v)) <= 200,
    _ARTEFACT: lambda v: _clean_text(v) and len(str(v)) <= 200,
    _PARAMS: _are_params,
    _TEMPLATE: is_template,
    _PROMPT: _is_prompt,
    _PROMPT_OR_NOTHING: _is_prompt_or_nothing,
    _FIELD: is_one_field,
    _LIST: is_listed,
    _TOKENS: _is_whole(3, 1_000_000),
    _WRITTEN: _is_whole(1, 100_000),
    _STOP: _are_texts(0, 16, 100),
    _TEXTS: lambda v: (
        all(map(is_template, v)) if isinstance(v, list) and 1 <= len(v) <= MOST_TEXTS else is_template(v)
    ),
    _INPUTS: lambda v: _are_texts(1, 64, 200)(v) and all(is_placeholder(one) for one in v),
    _NUMBERS: lambda v: _are_texts(1, MOST_NUMBERS, 200)(v) and all(is_placeholder(one) for one in v),
    _LABELS: lambda v: is_listed(v) or not labels_flaw(v, least=2),
    _TEMPERATURE: _is_temperature,
    _CONDITION: lambda v: not condition_flaw(v),
    _SHARE: lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1,
    _LABEL: lambda v: _clean_text(v) and len(v) <= 200,
    _SEED: _is_whole(0, 2**63 - 1),
    _SCHEMA: _is_schema,
}
_BRACES = "write {field} where the row's field belongs, {{ and }} for braces"
EXPECTED: Mapping[str, Expected] = {
    "model": Expected(_MODEL, "see `motet models`"),
    "input": Expected(_TEMPLATE, _BRACES),
    "inputs": Expected(_INPUTS, "list them without braces: mood, event.kind, messages[-1]"),
    "numbers": Expected(_NUMBERS, "list them without braces: age, customer[income], mood.score"),
    "params": Expected(_PARAMS, 'name them as the function does, such as {"k": 10}'),
    "artefact": Expected(_ARTEFACT, "see `motet models`"),
    "about": Expected(_TEMPLATE, _BRACES),
    "prompt": Expected(_PROMPT, _BRACES),
    "question": Expected(_PROMPT_OR_NOTHING, _BRACES),
    "system": Expected(_PROMPT_OR_NOTHING, _BRACES),
    "query": Expected(_PROMPT, _BRACES),
    "documents": Expected(_LIST, "name the field that holds the list of texts"),
    "messages": Expected(_FIELD, "name the field that holds the list of messages"),
    "max_tokens": Expected(_TOKENS, "leave it out to use the model's own limit"),
    "too_long": Expected("truncate or error", "choose one", ("truncate", "error")),
    "when": Expected(_CONDITION, "compare with == != < <= > >= in, and join with and, or, not"),
    "numerics": Expected("fast or exact", "choose one", ("fast", "exact")),
    "first": Expected("auto, text or instruction", "choose one", ("auto", "text", "instruction")),
    "dtype": Expected("fp32 or fp16", "choose one", ("fp32", "fp16")),
    "normalize": Expected("true or false", "choose one", kind=bool),
    "features": Expected("last or stages", "choose one", ("last", "stages")),
    "scores": Expected("true or false", "choose one", kind=bool),
    "min_score": Expected(_SHARE, "say below which score the model should abstain, such as 0.5"),
    "otherwise": Expected(_LABEL, "say what stands in the cell then, such as unsure"),
    "calibrate": Expected("true or false", "choose one", kind=bool),
    "labels": Expected(_LABELS, "list the labels to choose from"),
    "stop": Expected(_STOP, "list the texts before which writing ends"),
    "temperature": Expected(_TEMPERATURE, "0 takes the likeliest token always"),
    "seed": Expected(_SEED, "choose a number"),
    "schema": Expected(_SCHEMA, "see json-schema.org"),
    "thinking": Expected("true, false or null", "null leaves it to the model", (None,), kind=bool),
}
#: Of tasks that heads may answer, and of those in which ``max_tokens`` counts what is written, not what is read.
HEADS_INPUT = Expected(_TEXTS, _BRACES)
NEW_TOKENS = Expected(_WRITTEN, "say how many tokens may be written at most")
