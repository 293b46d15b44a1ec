"""Task specs: what a user asks of every row. Immutable data, shared by client, scheduler and workers.

``Classify(model="news-topics")`` is a value; ``to_json`` and ``parse`` carry it over the wire. ``parse``
is the one place where a stranger's task is checked for form; whether its model exists is the API's to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from motet.conditions import condition
from motet.errors import InvalidJob, Problem
from motet.labels import labels_flaw
from motet.options import EXPECTED, HEADS_INPUT, NEW_TOKENS, Expected, condition_flaw
from motet.templates import NAME, placeholders, resolved

#: What a classifier says that abstains, unless a task names another word.
UNSURE = "unsure"

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
        values = {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default or not f.metadata.get("later")
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


#: Kinds of tasks in which ``max_tokens`` counts what is written, not what is read.
_WRITES = (Generate, Chat, Extract)

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


def deciding_fields(name: str, task: Task, names: Collection[str]) -> tuple[str, ...]:
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
                needed = EXPECTED[key]
                problems.append(Problem(f"{where}.{key}", "nothing", needed.words, needed.remedy))
            continue
        expected = _expected(cls, key)
        if key == "when" and spec[key] is not None and (flaw := condition_flaw(spec[key])):
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


def _expected(kind: type[Task], option: str) -> Expected:
    if option == "max_tokens" and issubclass(kind, _WRITES):
        return NEW_TOKENS
    return HEADS_INPUT if option == "input" and issubclass(kind, Headed) else EXPECTED[option]


def notify_problems(written: object, tasks: Mapping[str, Task]) -> list[Problem]:
    """What is wrong with the condition that says which rows of a job with these tasks are events; None: with none."""
    if written is None:
        return []
    expected, remedy = f"a condition on answers of {', '.join(tasks)}", EXPECTED["when"].remedy
    if any(task.kind == "fit" for task in tasks.values()):
        return [Problem("notify_when", "a training run", "tasks that answer rows", "leave it out")]
    if flaw := condition_flaw(written):
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
