"""Task specs: what a user asks of every row. Immutable data, shared by client, scheduler and workers.

``Classify(model="news-topics")`` is a value; ``to_json`` and ``parse`` carry it over the wire. ``parse``
is the one place where a stranger's task is checked for form; whether its model exists is the API's to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from motet.errors import InvalidJob, Problem

#: A placeholder in a template: ``{field}``. Only names are replaced: no attributes, no formats, no code.
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")

TooLong = Literal["truncate", "error"]
Numerics = Literal["fast", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One named AI operation asked of every row. Use a subclass; they differ in the kind of their cells."""

    kind: ClassVar[str] = ""

    #: Name of a registered model, ``name`` or ``name@version``.
    model: str = field(kw_only=False)
    #: What the model reads: text with ``{field}`` for fields of the row; ``{{`` and ``}}`` are braces.
    input: str = "{text}"
    #: A row with more tokens than the model (or ``max_tokens``) reads is cut and marked, or its cell is an error.
    too_long: TooLong = "truncate"
    #: Tokens read per row, special ones included; None means as many as the model was made for.
    max_tokens: int | None = None
    #: ``exact`` is fp32; ``fast`` allows the formats whose accuracy check passed when the model was registered.
    numerics: Numerics = "fast"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON, defaults included, so that its digest does not depend on how it was written."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the row fields that this task reads, in order of first use."""
        return placeholders(self.input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify(Task):
    """A label with its score; a list of (label, score) where the model is multi-label."""

    kind: ClassVar[str] = "classify"
    #: Return every label's score, not only the winner's.
    scores: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Task):
    """A float, from a model with a number head."""

    kind: ClassVar[str] = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Task):
    """A vector: the model's pooled representation, of unit length unless ``normalize`` is off."""

    kind: ClassVar[str] = "embed"
    dtype: Literal["fp32", "fp16"] = "fp32"
    normalize: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Entities(Task):
    """Spans (start, end, label, score) in code points of the rendered input."""

    kind: ClassVar[str] = "entities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Function(Task):
    """The JSON value that a registered Python function returns for the rendered input."""

    kind: ClassVar[str] = "function"


#: Every kind of task that can cross the wire.
KINDS: Mapping[str, type[Task]] = {k.kind: k for k in (Classify, Number, Embed, Entities, Function)}


def placeholders(template: str) -> tuple[str, ...]:
    """Field names in a template, in order of first use. ``{{`` and ``}}`` are literal braces."""
    bare = template.replace("{{", "").replace("}}", "")
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(bare)))


def render(template: str, row: Mapping[str, str]) -> str:
    """Fill a template by named replacement only. Raises KeyError for a field that the row lacks.

    A row's text is data: braces inside it are never looked at again.
    """
    if template == "{text}":
        return row["text"]
    parts = re.split(r"(\{\{|\}\}|\{[^{}]*\})", template)
    return "".join(
        p[0] if p in ("{{", "}}") else row[p[1:-1]] if len(p) > 1 and p[0] == "{" and p[-1] == "}" else p
        for p in parts
    )


def parse(tasks: object) -> dict[str, Task]:
    """Check and build the tasks of a submission from JSON. Raises InvalidJob with every problem found."""
    if not isinstance(tasks, Mapping):
        raise InvalidJob(
            Problem(
                "tasks",
                type(tasks).__name__,
                "an object of task name to task",
                'send {"topic": {"kind": "classify", "model": "news-topics"}}',
            )
        )
    if not tasks:
        raise InvalidJob(
            Problem("tasks", "no task", "at least one task", "name what should be asked of each row")
        )
    problems: list[Problem] = []
    parsed: dict[str, Task] = {}
    for name, spec in tasks.items():
        if not isinstance(name, str) or not _NAME.match(name):
            problems.append(
                Problem(
                    "tasks", short(name), "a name of letters, digits, _ . -, up to 64", "rename this task"
                )
            )
            continue
        try:
            parsed[name] = _parse_one(f"tasks.{name}", spec)
        except InvalidJob as error:
            problems.extend(error.problems)
    if problems:
        raise InvalidJob(problems)
    return parsed


def _parse_one(where: str, spec: object) -> Task:
    if not isinstance(spec, Mapping):
        raise InvalidJob(Problem(where, type(spec).__name__, "an object", "give the task a kind and a model"))
    kind = spec.get("kind")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise InvalidJob(
            Problem(
                f"{where}.kind",
                short(kind),
                f"one of {', '.join(sorted(KINDS))}",
                "choose a known kind of task",
            )
        )
    known = {f.name: f for f in fields(cls)}
    problems = [
        Problem(
            f"{where}.{short(key)}", "an unknown option", f"one of {', '.join(sorted(known))}", "remove it"
        )
        for key in spec
        if key != "kind" and key not in known
    ]
    values: dict[str, Any] = {}
    for key, f in known.items():
        if key not in spec:
            if f.default is MISSING:
                problems.append(
                    Problem(f"{where}.{key}", "nothing", "a value", "name a model: see `motet models`")
                )
            continue
        expected = _EXPECTED[key]
        if expected.check(spec[key]):
            values[key] = spec[key]
        else:
            problems.append(Problem(f"{where}.{key}", short(spec[key]), expected.words, expected.remedy))
    if problems:
        raise InvalidJob(problems)
    return cls(**values)


def short(value: object, limit: int = 40) -> str:
    """A value as words for a message: never more than ``limit`` characters of it."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class _Expected:
    words: str
    remedy: str
    allowed: tuple[object, ...] = ()
    kind: type | None = None

    def check(self, value: object) -> bool:
        if self.kind is bool or self.allowed:
            return isinstance(value, bool) if self.kind is bool else value in self.allowed
        return _CHECKS[self.words](value)


def _clean_text(value: object) -> bool:
    if not isinstance(value, str) or not value or len(value) > 20_000 or "\0" in value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_template(value: object) -> bool:
    if not _clean_text(value) or not isinstance(value, str):
        return False
    names = placeholders(value)
    bare = _PLACEHOLDER.sub("", value.replace("{{", "").replace("}}", ""))
    return bool(names) and all(_NAME.match(n) for n in names) and "{" not in bare and "}" not in bare


def _is_token_count(value: object) -> bool:
    return value is None or (
        isinstance(value, int) and not isinstance(value, bool) and 3 <= value <= 1_000_000
    )


_MODEL = "the name of a registered model"
_TEMPLATE = "text that names at least one field, such as {text}"
_TOKENS = "a whole number from 3 to 1,000,000, or null"
_CHECKS = {
    _MODEL: lambda v: _clean_text(v) and len(str(v)) <= 200,
    _TEMPLATE: _is_template,
    _TOKENS: _is_token_count,
}
_EXPECTED: Mapping[str, _Expected] = {
    "model": _Expected(_MODEL, "see `motet models`"),
    "input": _Expected(_TEMPLATE, "write {field} where the row's field belongs, {{ and }} for braces"),
    "max_tokens": _Expected(_TOKENS, "leave it out to use the model's own limit"),
    "too_long": _Expected("truncate or error", "choose one", ("truncate", "error")),
    "numerics": _Expected("fast or exact", "choose one", ("fast", "exact")),
    "dtype": _Expected("fp32 or fp16", "choose one", ("fp32", "fp16")),
    "normalize": _Expected("true or false", "choose one", kind=bool),
    "scores": _Expected("true or false", "choose one", kind=bool),
}
