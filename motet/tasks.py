"""Task specs: what a user asks of every row. Immutable data, shared by client, scheduler and workers.

``Classify(model="news-topics")`` is a value; ``to_json`` and ``parse`` carry it over the wire. ``parse``
is the one place where a stranger's task is checked for form; whether its model exists is the API's to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from keyword import iskeyword
from typing import Any, ClassVar, Literal

from motet.conditions import BadCondition, condition
from motet.errors import InvalidJob, Problem
from motet.labels import is_listed, labels_flaw
from motet.templates import NAME, is_placeholder, is_well_formed, placeholders, resolved, sole_placeholder

#: What a classifier says that abstains, unless a task names another word.
UNSURE = "unsure"
#: Texts of one row that a head may read. Each is a pass of the trunk over it.
MOST_TEXTS = 8
#: Numbers that it may read beside them.
MOST_NUMBERS = 64

TooLong = Literal["truncate", "error"]
Numerics = Literal["fast", "exact"]
First = Literal["auto", "text", "instruction"]
#: Which of a trunk's features of a picture: its last ones, or those of its stages and the last ones.
Features = Literal["last", "stages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One named AI operation asked of every row. Use a subclass; they differ in the kind of their cells.

    A template is text with ``{name}`` for a field of the row, or for the answer of another task of the job: then
    this task waits for that cell. ``{name[0]}`` or ``{name.score}`` is a part of it (``motet.templates``). A value that
    is no text stands there as its plain text (``motet.protocol.values.plain_text``). ``{{`` and ``}}`` are braces.
    """

    kind: ClassVar[str] = ""
    #: Names of the options that are templates. The first one is the pass' input: what its tasks share.
    templates: ClassVar[tuple[str, ...]] = ("input",)

    #: Name of a registered model, ``name`` or ``name@version``.
    model: str = field(kw_only=False)
    #: ``exact`` is fp32; ``fast`` allows the formats whose accuracy check passed when the model was registered.
    numerics: Numerics = "fast"
    #: Rows may say that they are none of this task's (``condition_of``); their cells are skipped. The server sets it.
    conditional: bool = field(default=False, metadata={"later": True, "reserved": True})
    #: The task runs on the rows for which this condition (``motet.conditions``) holds; its other cells are skipped.
    when: str | None = field(default=None, metadata={"later": True})

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON, defaults included, so that its digest does not depend on how it was written.

        An option that came later is left out where it says nothing: digests from before it stay what they are.
        """
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {
            f.name: told[f.name]
            for f in fields(self)
            if told[f.name] != f.default or not f.metadata.get("later")
        }
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @property
    def registered(self) -> tuple[str, ...]:
        """What it names of the registry."""
        return (self.model,)

    @property
    def shared_input(self) -> str:
        """The template that tasks of one pass have in common: what is read once for all of them."""
        return "".join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The templates of the texts that it reads apart: one, unless it asks a head on several."""
        read = getattr(self, self.templates[0])
        return read if isinstance(read, tuple) else (read,)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What this task's templates name, in order of first use: fields of the row, other tasks, and parts of them."""
        return _named(self)

    @property
    def valued(self) -> tuple[str, ...]:
        """What the model is given as a dict of values, each with its type, by these placeholders; (): it reads a text."""
        return ()

    def reads(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        """The fields of the row and the other tasks that a task of this ``name`` reads, where its job has these names."""
        others = frozenset(names) - {name}
        of_condition = condition(self.when).placeholders if self.when else ()
        return tuple(dict.fromkeys(resolved(one, others).name for one in (*self.placeholders, *of_condition)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Task):
    """A task of a model that reads a text and answers at once: encoders, classifiers, functions."""

    #: What the model reads. Of a head on several texts a template for each, in the order in which it was trained.
    input: str | tuple[str, ...] = "{text}"
    #: A row with more tokens than the model (or ``max_tokens``) reads is cut and marked, or its cell is an error.
    too_long: TooLong = "truncate"
    #: Tokens read per row, special ones included; None means as many as the model was made for.
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Headed(Reading):
    """A task that a head may answer. One that was trained on several texts, or on numbers beside them, knows the names
    that it was trained on: they are read unless the task gives others."""

    #: Names of fields or answers that are numbers, or parts of them, without braces, for a head that reads numbers.
    numbers: tuple[str, ...] | None = field(default=None, metadata={"later": True})

    @property
    def placeholders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*_named(self), *(self.numbers or ()))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify(Headed):
    """A label with its score; a list of (label, score) where the model is multi-label."""

    kind: ClassVar[str] = "classify"
    #: Return every label's score, not only the winner's.
    scores: bool = False
    #: Where the best label's score is below this, the cell says ``otherwise`` with that score: the model abstains.
    min_score: float | None = field(default=None, metadata={"later": True})
    #: A label of the model, or another word. None with a ``min_score``: "unsure".
    otherwise: str | None = field(default=None, metadata={"later": True})

    def labels_of(self, known: Sequence[str]) -> tuple[str, ...]:
        """The labels that its cells may hold, where the model knows these."""
        if self.min_score is None or (word := self.otherwise or UNSURE) in known:
            return tuple(known)
        return (*known, word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Headed):
    """A float, from a model with a number head."""

    kind: ClassVar[str] = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Reading):
    """A vector: the model's pooled representation, of unit length unless ``normalize`` is off."""

    kind: ClassVar[str] = "embed"
    dtype: Literal["fp32", "fp16"] = "fp32"
    normalize: bool = True
    #: Of pictures: ``stages`` puts the features of earlier stages, which know edges and strokes, before the last ones.
    features: Features = field(default="last", metadata={"later": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entities(Reading):
    """Spans (start, end, label, score) in code points of the rendered input."""

    kind: ClassVar[str] = "entities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Function(Reading):
    """The JSON value that a registered Python function returns for the input.

    Where ``input`` is one field alone, such as ``{age}``, the function is given its value with its type (an int, a date,
    None …); otherwise the rendered text. With ``inputs`` it is given a dict of these fields and answers, each with its
    type: a label is ``{"label", "score"}``, spans are a list of ``{"text", "label", "score", "start", "end"}``, a vector
    is a list of floats; None where a part is not there. ``params`` and the data of ``artefact`` are keyword arguments:
    ``def rank(rows, *, k=10, artefact=None)``.
    """

    kind: ClassVar[str] = "function"

    #: Fields, answers of other tasks, or parts of them, without braces: ``("mood", "event.kind", "messages[-1]")``.
    #: ``input`` is not read then.
    inputs: tuple[str, ...] | None = field(default=None, metadata={"later": True})
    #: Keyword arguments for the function: a JSON object.
    params: Mapping[str, Any] | None = field(default=None, metadata={"later": True})
    #: A registered artefact, ``name``, ``name@version`` or ``name@alias``: the function gets its data as ``artefact``.
    artefact: str | None = field(default=None, metadata={"later": True})

    @property
    def registered(self) -> tuple[str, ...]:
        return (self.model, self.artefact) if self.artefact else (self.model,)

    @property
    def texts(self) -> tuple[str, ...]:
        return (template_of(self.inputs),) if self.inputs else (str(self.input),)

    @property
    def placeholders(self) -> tuple[str, ...]:
        return self.inputs or _named(self)

    @property
    def valued(self) -> tuple[str, ...]:
        return self.inputs or ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank(Task):
    """The documents of a list in the order in which they answer a query: a list of ``{"index", "score"}``, the best first.

    ``index`` counts from 0 in the row's list; ``score`` is from 0 to 1. The model is a cross-encoder, which reads the query
    with each document; ``max_tokens`` and ``too_long`` are about such a pair.
    """

    kind: ClassVar[str] = "rank"
    templates: ClassVar[tuple[str, ...]] = ("query", "documents")

    #: What the documents are held against.
    query: str = "{query}"
    #: The field, or the answer of another task, that holds a list of texts, or of objects with a ``text``.
    documents: str = "{documents}"
    #: As of Reading.
    too_long: TooLong = "truncate"
    max_tokens: int | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return (template_of(self.placeholders),)

    @property
    def placeholders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*placeholders(self.query), *placeholders(self.documents))))

    @property
    def valued(self) -> tuple[str, ...]:
        return self.placeholders


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit(Reading):
    """Models trained as the recipe in each row says (motet/training/recipe.py); ``Client.train`` writes such rows."""

    kind: ClassVar[str] = "fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted(Task):
    """A task of a language model. All those about one text share its prefill, whatever each of them asks.

    The prompt is written as the model's chat template wants it: system, then text and instruction in the order that
    saves more (``first``), so that what is common stands in front.
    """

    templates: ClassVar[tuple[str, ...]] = ("about", "system")

    #: The text that the task is about.
    about: str = "{text}"
    #: The system message; "" for none, and then the chat template may bring its own.
    system: str = ""
    #: A prompt that does not fit the model's context: its cell is an error, or the text is cut and the cell marked.
    too_long: TooLong = "error"
    #: What stands in front: the text, which tasks of one row share, or the instruction, which rows of one task share.
    first: First = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Prompted):
    """A text that the model writes, and how it ended: ``stop``, or ``length`` where ``max_tokens`` were not enough.

    With ``schema`` (JSON Schema) the answer is a JSON value that keeps it.
    """

    kind: ClassVar[str] = "generate"
    templates: ClassVar[tuple[str, ...]] = ("about", "prompt", "system", "options")

    #: The instruction.
    prompt: str
    #: Tokens written at most.
    max_tokens: int = 256
    #: Writing ends before any of these.
    stop: tuple[str, ...] = ()
    #: 0: always the likeliest token. Above, tokens are drawn, the same ones for equal seed, row and task.
    temperature: float = 0.0
    seed: int = 0
    schema: Mapping[str, Any] | None = None
    #: Whether the model thinks before it answers, where it can: None leaves it to the model, and its thoughts in the
    #: cell; else the cell holds the answer alone. Thoughts count as tokens written.
    thinking: bool | None = field(default=None, metadata={"later": True})
    #: A template of JSON: what a row says of these options for itself. Its cell also counts tokens. The server sets it.
    options: str = field(default="", metadata={"later": True, "reserved": True})
    #: The text is continued as it stands, without a chat template. The server sets it.
    raw: bool = field(default=False, metadata={"later": True, "reserved": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Task):
    """The model's next message in a dialogue: a row holds a list of ``{"role": …, "content": …}`` so far."""

    kind: ClassVar[str] = "chat"
    templates: ClassVar[tuple[str, ...]] = ("messages", "system", "options")

    #: The field that holds the dialogue.
    messages: str = "{messages}"
    system: str = ""
    too_long: TooLong = "error"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    #: As of Generate.
    thinking: bool | None = field(default=None, metadata={"later": True})
    options: str = field(default="", metadata={"later": True, "reserved": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choose(Prompted):
    """One of the given labels with its score: the likeliest continuation, nothing is written.

    A label's likelihood is compared with the one that it has without any text (``calibrate``; Zhao et al., Calibrate
    Before Use, ICML 2021), so that a word which the model likes anyway does not win by that.
    """

    kind: ClassVar[str] = "choose"
    templates: ClassVar[tuple[str, ...]] = ("about", "question", "system")

    #: Two labels or more, up to MOST_LABELS, the same for every row; or the field, or the part of another task's answer,
    #: that lists each row's own: ``"{candidates}"``.
    labels: tuple[str, ...] | str
    #: The instruction; "" asks which of the labels fits.
    question: str = ""
    calibrate: bool = True
    #: Return every label's score, not only the winner's.
    scores: bool = False
    #: False: the model's template is told that no thought comes before the label. None leaves it as it is.
    thinking: bool | None = False

    @property
    def fixed_labels(self) -> tuple[str, ...]:
        """The labels that every row has; () where each row brings its own."""
        return () if isinstance(self.labels, str) else self.labels

    @property
    def placeholders(self) -> tuple[str, ...]:
        listed = placeholders(self.labels) if isinstance(self.labels, str) else ()
        return tuple(dict.fromkeys((*_named(self), *listed)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extract(Prompted):
    """A JSON value that keeps ``schema`` (JSON Schema): what the text says of it."""

    kind: ClassVar[str] = "extract"
    templates: ClassVar[tuple[str, ...]] = ("about", "prompt", "system")

    schema: Mapping[str, Any]
    prompt: str = "Extract the information as JSON."
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    #: As of Generate; a model that thinks keeps the schema from the end of its thoughts on.
    thinking: bool | None = False


def _named(task: Task) -> tuple[str, ...]:
    """What a task's templates name, in order of first use."""
    beside = [getattr(task, option) for option in task.templates[1:]]
    return tuple(dict.fromkeys(n for t in (*task.texts, *beside) for n in placeholders(t)))


def template_of(inputs: Sequence[str]) -> str:
    """The template that stands for a function's ``inputs``: it names what they name."""
    return "".join(f"{{{one}}}" for one in inputs)


#: Every kind of task that can cross the wire.
KINDS: Mapping[str, type[Task]] = {
    k.kind: k
    for k in (Classify, Number, Embed, Entities, Function, Rank, Fit, Generate, Chat, Choose, Extract)
}


def fields_of(tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """Fields of the row that some task reads, in order of first use.

    The name of another task is no field: that task's answer is meant. A task's own name means the field.
    """
    return tuple(dict.fromkeys(read for name in tasks for read in fields_read(name, tasks)))


def fields_read(name: str, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """Fields of the row that this task reads."""
    return row_fields(name, tasks[name], tasks)


def row_fields(name: str, task: Task, names: Collection[str]) -> tuple[str, ...]:
    """Fields of the row that a task of this name reads in a job whose tasks have these names."""
    return tuple(read for read in task.reads(name, names) if read == name or read not in names)


def condition_of(name: str) -> str:
    """The reserved field of a row that holds no value: marked as bad there, the row is none of the task's."""
    return f"?{name}"


def asked_fields(name: str, task: Task, names: Collection[str]) -> tuple[str, ...]:
    """The fields of a row that decide whether a task is asked it: its condition, and those that it reads."""
    read = row_fields(name, task, names)
    return (condition_of(name), *read) if task.conditional else read


def dialogues_of(tasks: Mapping[str, Task]) -> frozenset[str]:
    """Fields of the row that hold a dialogue, for some chat reads them as one."""
    return frozenset(
        read
        for name, task in tasks.items()
        if isinstance(task, Chat)
        for read in placeholders(task.messages)
        if resolved(read, tasks.keys() - {name}).name not in tasks.keys() - {name}
    )


def stored_task(spec: Mapping[str, Any]) -> Task:
    """A task from the spec that a job's record tells, which was checked when the job was opened."""
    kind = KINDS[spec["kind"]]
    known: dict[str, Any] = {
        f.name: tuple(value) if isinstance(value := spec[f.name], list) else value
        for f in fields(kind)
        if f.name in spec
    }
    return kind(**known)


def parse(tasks: object) -> dict[str, Task]:
    """Check and build the tasks of a submission from JSON. Raises InvalidJob with every problem found."""
    if not isinstance(tasks, Mapping):
        raise InvalidJob.of(
            "tasks",
            type(tasks).__name__,
            "an object of task name to task",
            'send {"topic": {"kind": "classify", "model": "news-topics"}}',
        )
    if not tasks:
        raise InvalidJob.of("tasks", "no task", "at least one task", "name what should be asked of each row")
    problems: list[Problem] = []
    parsed: dict[str, Task] = {}
    for name, spec in tasks.items():
        if not isinstance(name, str) or not NAME.match(name):
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
        raise InvalidJob.of(where, type(spec).__name__, "an object", "give the task a kind and a model")
    kind = spec.get("kind")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise InvalidJob.of(
            f"{where}.kind", short(kind), f"one of {', '.join(sorted(KINDS))}", "choose a known kind of task"
        )
    known = {f.name: f for f in fields(cls) if not f.metadata.get("reserved")}
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
                needed = _EXPECTED[key]
                problems.append(Problem(f"{where}.{key}", "nothing", needed.words, needed.remedy))
            continue
        expected = _expected(cls, key)
        if key == "when" and spec[key] is not None and (flaw := _flaw_of(spec[key])):
            problems.append(Problem(f"{where}.when", flaw, expected.words, expected.remedy))
        elif key == "labels" and isinstance(spec[key], list) and (flaw := labels_flaw(spec[key], least=2)):
            problems.append(Problem(f"{where}.labels", flaw, expected.words, expected.remedy))
        elif expected.check(spec[key]) or (spec[key] is None and f.default is None):
            values[key] = tuple(spec[key]) if isinstance(spec[key], list) else spec[key]
        else:
            problems.append(Problem(f"{where}.{key}", short(spec[key]), expected.words, expected.remedy))
    if problems:
        raise InvalidJob(problems)
    return cls(**values)


def _expected(kind: type[Task], option: str) -> _Expected:
    if option == "max_tokens" and issubclass(kind, _WRITES):
        return _NEW_TOKENS
    return _HEADS_INPUT if option == "input" and issubclass(kind, Headed) else _EXPECTED[option]


def _flaw_of(written: object) -> str:
    """What is wrong with a condition, in words; "" where nothing is."""
    if not isinstance(written, str):
        return short(written)
    try:
        condition(written)
    except BadCondition as bad:
        return str(bad)
    return ""


def notify_problems(written: object, tasks: Mapping[str, Task]) -> list[Problem]:
    """What is wrong with the condition that says which rows of a job with these tasks are events; None: with none."""
    if written is None:
        return []
    expected, remedy = f"a condition on answers of {', '.join(tasks)}", _EXPECTED["when"].remedy
    if any(task.kind == "fit" for task in tasks.values()):
        return [Problem("notify_when", "a training run", "tasks that answer rows", "leave it out")]
    if flaw := _flaw_of(written):
        return [Problem("notify_when", flaw, expected, remedy)]
    others = {resolved(one, tasks).name for one in condition(str(written)).placeholders} - tasks.keys()
    return [
        Problem("notify_when", f"{short(name)}, which is no task", expected, remedy)
        for name in sorted(others)
    ]


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


def _is_placeholder_alone(value: object) -> bool:
    written = sole_placeholder(value) if isinstance(value, str) else None
    return written is not None and is_placeholder(written)


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
    _LIST: _is_placeholder_alone,
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
    _CONDITION: lambda v: not _flaw_of(v),
    _SHARE: lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1,
    _LABEL: lambda v: _clean_text(v) and len(v) <= 200,
    _SEED: _is_whole(0, 2**63 - 1),
    _SCHEMA: _is_schema,
}
_BRACES = "write {field} where the row's field belongs, {{ and }} for braces"
_EXPECTED: Mapping[str, _Expected] = {
    "model": _Expected(_MODEL, "see `motet models`"),
    "input": _Expected(_TEMPLATE, _BRACES),
    "inputs": _Expected(_INPUTS, "list them without braces: mood, event.kind, messages[-1]"),
    "numbers": _Expected(_NUMBERS, "list them without braces: age, customer[income], mood.score"),
    "params": _Expected(_PARAMS, 'name them as the function does, such as {"k": 10}'),
    "artefact": _Expected(_ARTEFACT, "see `motet models`"),
    "about": _Expected(_TEMPLATE, _BRACES),
    "prompt": _Expected(_PROMPT, _BRACES),
    "question": _Expected(_PROMPT_OR_NOTHING, _BRACES),
    "system": _Expected(_PROMPT_OR_NOTHING, _BRACES),
    "query": _Expected(_PROMPT, _BRACES),
    "documents": _Expected(_LIST, "name the field that holds the list of texts"),
    "messages": _Expected(_FIELD, "name the field that holds the list of messages"),
    "max_tokens": _Expected(_TOKENS, "leave it out to use the model's own limit"),
    "too_long": _Expected("truncate or error", "choose one", ("truncate", "error")),
    "when": _Expected(_CONDITION, "compare with == != < <= > >= in, and join with and, or, not"),
    "numerics": _Expected("fast or exact", "choose one", ("fast", "exact")),
    "first": _Expected("auto, text or instruction", "choose one", ("auto", "text", "instruction")),
    "dtype": _Expected("fp32 or fp16", "choose one", ("fp32", "fp16")),
    "normalize": _Expected("true or false", "choose one", kind=bool),
    "features": _Expected("last or stages", "choose one", ("last", "stages")),
    "scores": _Expected("true or false", "choose one", kind=bool),
    "min_score": _Expected(_SHARE, "say below which score the model should abstain, such as 0.5"),
    "otherwise": _Expected(_LABEL, "say what stands in the cell then, such as unsure"),
    "calibrate": _Expected("true or false", "choose one", kind=bool),
    "labels": _Expected(_LABELS, "list the labels to choose from"),
    "stop": _Expected(_STOP, "list the texts before which writing ends"),
    "temperature": _Expected(_TEMPERATURE, "0 takes the likeliest token always"),
    "seed": _Expected(_SEED, "choose a number"),
    "schema": _Expected(_SCHEMA, "see json-schema.org"),
    "thinking": _Expected("true, false or null", "null leaves it to the model", (None,), kind=bool),
}
#: Kinds of tasks in which ``max_tokens`` counts what is written, not what is read.
_WRITES = (Generate, Chat, Extract)
_HEADS_INPUT = _Expected(_TEXTS, _BRACES)
_NEW_TOKENS = _Expected(_WRITTEN, "say how many tokens may be written at most")
