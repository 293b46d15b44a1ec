"""Folds: what an open job remembers of the rows of a key, and gives to each row of that key as fields. Specs only.

``Count(key="{customer_id}", window="7d")`` is a value, as tasks are; ``parse_folds`` is the one place where a stranger's
is checked for form. What a row is given is folded by scheduler/policy/folds.py; docs/live.md says what for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from motet.errors import InvalidJob, Problem
from motet.options import is_one_field, is_template
from motet.tasks import Task, fields_of, short
from motet.templates import NAME, placeholders, resolved

#: Half-lives without a row after which an exponentially weighted mean begins anew: what came before weighs 2^-32.
HALF_LIVES = 32
#: Folds of a job at most. More: each landing holds the job's lock for longer.
MAX_FOLDS = 32
#: A duration is from a second to ten years: what is longer is a slip of the hand.
_LEAST_S, _MOST_S = 1.0, 3660 * 86_400.0
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """An aggregate over those rows of a key that landed before a row. Use a subclass.

    A row is given what was folded before it, and is folded then. A row whose key is null has no key: it is given what a
    new key would be, and is not folded. Null is no value: it is not folded.
    """

    kind: ClassVar[str] = ""

    #: Whose rows: a template. One field alone is a key with its type, so 7 and "7" are two; others are texts.
    key: str
    #: The field that holds a row's time: a datetime, its text in ISO 8601 (without a zone: UTC), or seconds since 1970.
    #: "": the moment it landed.
    at: str = ""

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of the row that it reads, in order of first use."""
        templates = (getattr(self, option, "") for option in ("key", "value", "at"))
        return tuple(dict.fromkeys(resolved(one, ()).name for t in templates for one in placeholders(t)))

    @property
    def keeps_s(self) -> float | None:
        """Seconds after its last row in which a key is as one that never was; None: never."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowed(Fold):
    """A fold over the rows of the last while, or over all."""

    #: Length of the window, such as ``90s``, ``15m``, ``24h``, ``7d`` or ``2w``; "": all rows.
    window: str = ""

    @property
    def keeps_s(self) -> float | None:
        return duration_s(self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count(Windowed):
    """How many rows: an int."""

    kind: ClassVar[str] = "count"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(Windowed):
    """The sum of a field: exact where all are ints or decimals, a float where one is; 0 of no row."""

    kind: ClassVar[str] = "sum"
    #: The field, alone in braces.
    value: str = field(kw_only=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(Windowed):
    """The mean of a field: a float; null of no row."""

    kind: ClassVar[str] = "mean"
    #: The field, alone in braces.
    value: str = field(kw_only=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Max(Windowed):
    """The largest number of a field, with its type; null of no row."""

    kind: ClassVar[str] = "max"
    #: The field, alone in braces.
    value: str = field(kw_only=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Last(Windowed):
    """The newest value of a field, of any type, up to 1,024 bytes of text; null of no row."""

    kind: ClassVar[str] = "last"
    #: The field, alone in braces.
    value: str = field(kw_only=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ewm(Fold):
    """The exponentially weighted mean of a field: a float; null of no row. A value's weight halves in ``half_life``."""

    kind: ClassVar[str] = "ewm"
    #: The field, alone in braces.
    value: str = field(kw_only=False)
    #: As a window is given.
    half_life: str

    @property
    def half_life_s(self) -> float:
        found = duration_s(self.half_life)
        assert found is not None, "checked when the job was opened"
        return found

    @property
    def keeps_s(self) -> float | None:
        return HALF_LIVES * self.half_life_s


#: Every kind of fold.
FOLDS: Mapping[str, type[Fold]] = {k.kind: k for k in (Count, Sum, Mean, Max, Ewm, Last)}


def duration_s(duration: str) -> float | None:
    """Seconds of ``90s``, ``15m``, ``2h``, ``30d`` or ``1w``; None for what is no such text."""
    found = _DURATION.fullmatch(duration)
    return float(found[1]) * _UNITS[found[2]] if found else None


# -- fields ----------------------------------------------------------------------------------------


def sent_fields(tasks: Mapping[str, Task], folds: Mapping[str, Fold]) -> tuple[str, ...]:
    """Fields that a caller sends: those that tasks read and no fold gives, then those that folds read."""
    of_tasks = [name for name in fields_of(tasks) if name not in folds]
    return tuple(dict.fromkeys([*of_tasks, *(read for fold in folds.values() for read in fold.reads)]))


def stored_fields(tasks: Mapping[str, Task], folds: Mapping[str, Fold]) -> tuple[str, ...]:
    """Fields that are stored of a row: first those that tasks read, by whose places passes are priced."""
    return tuple(dict.fromkeys([*fields_of(tasks), *sent_fields(tasks, folds), *folds]))


# -- reading ---------------------------------------------------------------------------------------


def stored_folds(specs: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Fold]:
    """The folds of a job from its record, in which they were checked, by name."""
    return {name: _made(spec) for name, spec in sorted((specs or {}).items())}


def _made(spec: Mapping[str, Any]) -> Fold:
    kind = FOLDS[spec["kind"]]
    return kind(**{f.name: spec[f.name] for f in fields(kind) if f.name in spec})


def parse_folds(state: object, tasks: Mapping[str, Task]) -> dict[str, Fold]:
    """Check and build the folds of a submission from JSON. Raises InvalidJob with every problem found.

    ``tasks``: of the same job, whose names they may not take.
    """
    if not isinstance(state, Mapping) or not 1 <= len(state) <= MAX_FOLDS:
        got = f"{len(state)} folds" if isinstance(state, Mapping) else type(state).__name__
        raise InvalidJob.of(
            "state",
            got,
            f"an object of 1 to {MAX_FOLDS} names to folds",
            'send {"n_week": {"kind": "count", "key": "{customer_id}", "window": "7d"}}, or leave it out',
        )
    problems: list[Problem] = []
    parsed: dict[str, Fold] = {}
    for name, spec in state.items():
        if not isinstance(name, str) or not NAME.match(name):
            expected = "a name of letters, digits, _ . -, up to 64"
            problems.append(Problem("state", short(name), expected, "rename it"))
            continue
        where = f"state.{name}"
        if name in tasks:
            got = "the name of a task as well"
            problems.append(Problem(where, got, "a name of its own", "rename one of the two"))
        try:
            parsed[name] = _parse_fold(where, spec)
        except InvalidJob as error:
            problems.extend(error.problems)
    problems += [
        Problem(
            f"state.{name}",
            f"it reads {{{read}}}, which is state as well",
            "fields that callers send",
            "read a field of the row",
        )
        for name, fold in parsed.items()
        for read in fold.reads
        if read in state
    ]
    if "state" in tasks:
        got = "a task named state, which is what results call the folds"
        problems.append(Problem("tasks.state", got, "another name", "rename this task"))
    if problems:
        raise InvalidJob(problems)
    return parsed


def _is_field_or_nothing(value: object) -> bool:
    return value == "" or is_one_field(value)


def _is_duration(value: object) -> bool:
    seconds = duration_s(value) if isinstance(value, str) else None
    return seconds is not None and _LEAST_S <= seconds <= _MOST_S


def _is_duration_or_nothing(value: object) -> bool:
    return value == "" or _is_duration(value)


_SOME_DURATION = "a number and a unit, from 1s to 3660d, such as 90s, 15m, 24h or 7d"
#: Option -> its check, what it wants in words, and what to do.
_EXPECTED = {
    "key": (is_template, "text that names at least one field, such as {customer_id}", "name whose rows"),
    "value": (is_one_field, "one field in braces, such as {amount}", "name the field alone"),
    "at": (_is_field_or_nothing, "one field in braces, such as {time}", "leave it out for the landing"),
    "window": (_is_duration_or_nothing, _SOME_DURATION, "leave it out for all rows"),
    "half_life": (_is_duration, _SOME_DURATION, "say in which time a value's weight halves"),
}


def _parse_fold(where: str, spec: object) -> Fold:
    if not isinstance(spec, Mapping):
        raise InvalidJob.of(where, type(spec).__name__, "an object", "give the fold a kind and a key")
    kind = spec.get("kind")
    cls = FOLDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        known = f"one of {', '.join(sorted(FOLDS))}"
        raise InvalidJob.of(f"{where}.kind", short(kind), known, "choose a known kind of fold")
    options = {f.name: f for f in fields(cls)}
    problems = [
        Problem(
            f"{where}.{short(option)}",
            "an unknown option",
            f"one of {', '.join(sorted(options))}",
            "remove it",
        )
        for option in spec
        if option != "kind" and option not in options
    ]
    for name, option in options.items():
        check, words, remedy = _EXPECTED[name]
        if name not in spec:
            if option.default is MISSING:
                problems.append(Problem(f"{where}.{name}", "nothing", words, remedy))
        elif not check(spec[name]):
            problems.append(Problem(f"{where}.{name}", short(spec[name]), words, remedy))
    if problems:
        raise InvalidJob(problems)
    return _made(spec)
