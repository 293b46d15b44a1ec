"""Folded state: what each row is given of the rows of its key before it, and what it adds to that. Pure.

A window is ``BUCKETS`` buckets of its time. A row at time t is given the buckets from that of t back: all that is
younger than the window but its oldest sixtieth, and nothing older. So a key holds at most ``BUCKETS`` numbers a fold,
however many rows it has. The state of a key is plain data for msgpack: an entry for each fold, in order of their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Context, Decimal
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

from motet.folds import HALF_LIVES, Ewm, Fold, Last, Windowed
from motet.protocol.values import Value, column_type, plain_text
from motet.templates import filled, placeholders, resolved, sole_placeholder, value_in
from scheduler.blocks import BadFields, IncomingPart

#: Buckets of a window. More: its old edge is sharper, and each key takes more storage and time.
BUCKETS = 60
#: UTF-8 bytes of the text of a value that ``Last`` keeps. More: a key takes as much storage.
MAX_LAST_BYTES = 1024
#: Decimals are exact up to so many digits, and rounded beyond.
_EXACT = Context(prec=38)
#: Seconds since 1970 of the first and the last moment that a datetime holds.
_FIRST_S, _LAST_S = -62_135_596_800.0, 253_402_300_799.0

#: The state of a key: an entry for each of its folds, None where nothing was folded.
KeyState: TypeAlias = list[Any]
#: Folds by name, of one template of keys.
FoldGroup: TypeAlias = Mapping[str, Fold]


class Misfit(NamedTuple):
    """Why a row cannot be folded: a field that holds another kind of value."""

    field: str
    got: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedRows:
    """Rows with what they were given, and the state behind them."""

    part: IncomingPart
    #: Digest of a key -> its state, of the keys of these rows.
    states: Mapping[bytes, KeyState]


def groups_of(folds: Mapping[str, Fold]) -> Mapping[str, FoldGroup]:
    """Template of keys -> its folds: a key has one state, whatever is folded of it."""
    found: dict[str, dict[str, Fold]] = {}
    for name in sorted(folds):
        found.setdefault(folds[name].key, {})[name] = folds[name]
    return found


def keeps_s(group: FoldGroup) -> float | None:
    """Seconds after its last row in which nothing of a key counts any more; None: never."""
    each = [fold.keeps_s for fold in group.values()]
    known = [one for one in each if one is not None]
    return max(known) if len(known) == len(each) else None


def keys_of(template: str, part: IncomingPart) -> list[Value]:
    """The key of each row; None: it has none, or what the template reads is bad."""
    reads = {resolved(one, ()).name for one in placeholders(template)}
    sole = sole_placeholder(template)
    keys: list[Value] = []
    for i in range(len(part)):
        row = {name: None if _is_bad(part, name, i) else part.columns[name][i] for name in reads}
        lacks = any(value is None for value in row.values())
        keys.append(None if lacks else value_in(sole, row) if sole else filled(template, row))
    return keys


def _is_bad(part: IncomingPart, name: str, i: int) -> bool:
    return i in part.bad or i in part.bad_fields.get(name, {})


# -- what can be folded ----------------------------------------------------------------------------


def misfits(
    folds: Mapping[str, Fold],
    columns: Mapping[str, Sequence[Value]],
    passed_over: Mapping[str, Collection[int]],
) -> dict[str, dict[int, Misfit]]:
    """Name of a fold -> rows that hold what it cannot fold.

    ``passed_over``: field -> rows whose value there is known to be bad.
    """
    found: dict[str, dict[int, Misfit]] = {}
    for name, fold in folds.items():
        for template, check in ((getattr(fold, "value", ""), _value_misfit), (fold.at, _time_misfit)):
            read = sole_placeholder(template)
            for i, value in enumerate(columns[read] if read else ()):
                if i in passed_over.get(read or "", {}):
                    continue
                if (expected := check(fold, value)) is not None:
                    found.setdefault(name, {})[i] = Misfit(str(read), column_type([value]), expected)
    return found


def _value_misfit(fold: Fold, value: Value) -> str | None:
    """What it wants in place of the value; None: that will do."""
    if isinstance(fold, Last):
        fits = len(plain_text(value).encode()) <= MAX_LAST_BYTES
        return None if fits else f"at most {MAX_LAST_BYTES:,} bytes, which are kept"
    fits = value is None or (_is_number(value) and math.isfinite(float(value)))  # type: ignore[arg-type]
    return None if fits else "a number that a float can hold, or null"


def _is_number(value: Value) -> bool:
    # True is an int of Python, and no amount.
    return type(value) in (int, float, Decimal)


def _time_misfit(fold: Fold, value: Value) -> str | None:
    return None if time_of(value) is not None else "a time: ISO 8601, or seconds since 1970"


def time_of(value: Value) -> float | None:
    """Seconds since 1970 of a row's time; None where it is none. Without a zone it is UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        # Without a zone of its own the arithmetic is plain, also for the first year.
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if _is_number(value) and _FIRST_S <= value <= _LAST_S:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    return None


# -- folding ---------------------------------------------------------------------------------------


def fold_rows(
    folds: Mapping[str, Fold],
    part: IncomingPart,
    digests: Mapping[str, Sequence[bytes | None]],
    states: Mapping[bytes, KeyState],
    now: float,
) -> FoldedRows:
    """Give each row, in their order, what was folded of its key before it; then fold it.

    ``digests``: template of keys -> the digest of each row's key, None without one. ``states``: what is stored of these
    keys; it is not changed. ``now``: when the rows land, in seconds since 1970.
    A fold that a row is bad for gives it nothing and takes nothing of it. A sum beyond what a value can hold is bad too.
    """
    given: dict[str, list[Value]] = {name: [] for name in folds}
    too_large: dict[str, dict[int, tuple[str, str]]] = {}
    after: dict[bytes, KeyState] = {}
    groups = groups_of(folds)
    for i in range(len(part)):
        for template, group in groups.items():
            digest = digests[template][i]
            if digest is not None and digest not in after:
                after[digest] = _copied(states.get(digest), len(group))
            state = [None] * len(group) if digest is None else after[digest]
            for place, (name, fold) in enumerate(group.items()):
                if _is_bad(part, name, i):
                    given[name].append("")
                    continue
                at = _time_in(fold, part, i, now)
                value = shown(fold, state[place], at)
                if not _can_be_stored(value):
                    why = f"{name}: what was folded of its key is beyond 64 bits"
                    too_large.setdefault(name, {})[i] = ("overflow", why)
                    value = ""
                given[name].append(value)
                if digest is not None:
                    state[place] = folded(fold, state[place], at, _value_in(fold, part, i))
    bad_fields: BadFields = {
        name: {**part.bad_fields.get(name, {}), **too_large.get(name, {})}
        for name in (*part.bad_fields, *(name for name in too_large if name not in part.bad_fields))
    }
    columns = {**part.columns, **given}
    return FoldedRows(part=IncomingPart(columns=columns, bad=part.bad, bad_fields=bad_fields), states=after)


def _copied(state: KeyState | None, n: int) -> KeyState:
    return [None] * n if state is None else [dict(one) if isinstance(one, dict) else one for one in state]


def _time_in(fold: Fold, part: IncomingPart, i: int, now: float) -> float:
    read = sole_placeholder(fold.at)
    if read is None:
        return now
    at = time_of(part.columns[read][i])
    assert at is not None, "a row without a time is bad for the fold"
    return at


def _value_in(fold: Fold, part: IncomingPart, i: int) -> Value:
    """What the row adds; None: nothing. Of a count, the row itself."""
    read = sole_placeholder(getattr(fold, "value", ""))
    return part.columns[read][i] if read else 1


def _can_be_stored(value: Value) -> bool:
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return not isinstance(value, float | Decimal) or math.isfinite(value)


def shown(fold: Fold, entry: Any, at: float) -> Value:
    """What a row of this time is given of a key's entry."""
    if isinstance(fold, Ewm):
        return None if entry is None or at - entry[2] > HALF_LIVES * fold.half_life_s else entry[0]
    if isinstance(fold, Last):
        window = fold.keeps_s
        return None if entry is None or (window is not None and at - entry[0] >= window) else entry[1]
    assert isinstance(fold, Windowed)
    rule, here = _RULES[fold.kind], _bucket(fold, at)
    parts = [(entry or {})[b] for b in sorted(entry or ()) if here - BUCKETS < b <= here]
    return rule.told(reduce(rule.join, parts)) if parts else rule.of_none


def folded(fold: Fold, entry: Any, at: float, value: Value) -> Any:
    """A key's entry with one more value of this time; the entry itself may be changed."""
    if value is None:
        return entry
    if isinstance(fold, Ewm):
        return _weighted(fold, entry, at, float(value))  # type: ignore[arg-type]
    if isinstance(fold, Last):
        return [at, value] if entry is None or at >= entry[0] else entry
    assert isinstance(fold, Windowed)
    rule, here = _RULES[fold.kind], _bucket(fold, at)
    entry = {} if entry is None else entry
    oldest = max(here, *entry) - BUCKETS if entry else here - BUCKETS
    if here > oldest:
        lifted = rule.lift(value)
        entry[here] = rule.join(entry[here], lifted) if here in entry else lifted
    # Those too old to count are few, and dropped all at once.
    return entry if len(entry) <= BUCKETS else {b: one for b, one in entry.items() if b > oldest}


def _bucket(fold: Windowed, at: float) -> int:
    window = fold.keeps_s
    return 0 if window is None else math.floor(at / (window / BUCKETS))


def _weighted(fold: Ewm, entry: Any, at: float, value: float) -> list[float]:
    """Mean, weight and newest time. Weights are as of the newest time: its own value weighs 1 there."""
    if entry is None or at - entry[2] > HALF_LIVES * fold.half_life_s:
        return [value, 1.0, at]
    mean, weight, newest = entry
    age = 2.0 ** (-abs(at - newest) / fold.half_life_s)
    held, more = (weight * age, 1.0) if at >= newest else (weight, age)
    total = held + more
    return [mean * (held / total) + value * (more / total), total, max(at, newest)]


# -- what is kept of a bucket ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """How the values of a bucket are kept, how two buckets make one, and what is told of them."""

    lift: Callable[[Any], Any]
    join: Callable[[Any, Any], Any]
    told: Callable[[Any], Value]
    #: Of no row.
    of_none: Value


def _lift_sum(value: Any) -> list[Any]:
    """The ints, the decimals and the floats apart: the first two are exact. None: there was none."""
    if isinstance(value, Decimal):
        return [0, value, None]
    return [0, None, value] if isinstance(value, float) else [value, None, None]


def _join_sum(one: list[Any], other: list[Any]) -> list[Any]:
    whole = int(one[0]) + int(other[0])
    # Msgpack holds 64 bits: beyond, it is kept as text.
    kept = whole if -(2**63) <= whole < 2**63 else str(whole)
    return [kept, _plus(one[1], other[1], _EXACT.add), _plus(one[2], other[2], float.__add__)]


def _plus(one: Any, other: Any, add: Callable[[Any, Any], Any]) -> Any:
    return other if one is None else one if other is None else add(one, other)


def _told_sum(kept: list[Any]) -> Value:
    whole, exact, rough = int(kept[0]), kept[1], kept[2]
    if rough is not None:
        return float(whole) + float(exact or 0) + float(rough)
    return whole if exact is None else _EXACT.add(Decimal(whole), exact)


_RULES: Mapping[str, _Rule] = {
    "count": _Rule(lambda value: 1, int.__add__, lambda kept: kept, 0),
    "sum": _Rule(_lift_sum, _join_sum, _told_sum, 0),
    "mean": _Rule(
        lambda value: [1, float(value)],
        lambda one, other: [one[0] + other[0], one[1] + other[1]],
        lambda kept: kept[1] / kept[0],
        None,
    ),
    "max": _Rule(lambda value: value, max, lambda kept: kept, None),
}
