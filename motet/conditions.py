"""Conditions: ``when="alert != 'none' and risk > 0.4"`` says on which rows a task runs. Stdlib only.

A condition compares fields of the row, answers of other tasks and parts of them (``event.kind``, ``messages[-1].content``,
written as in a template, with or without braces) with each other and with texts, numbers, true, false, null and lists:
``== != < <= > >= in not in and or not`` and parentheses. A label is its name, what was generated is its text. Values of
different types are unequal, and none of them is less than the other; what is not there is null. Nothing is called and
nothing is computed, so that a stranger's condition can be held against any row.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from motet.templates import is_placeholder

#: Characters of a condition at most, and operators and values in it: each row is held against all of them.
MAX_CHARACTERS, MAX_NODES = 1000, 200
_BRACED = re.compile(r"\{([^{}]*)\}")
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None}

#: Of a row, by placeholder.
Values = Mapping[str, Any]


class BadCondition(ValueError):
    """What is wrong with a condition, in words."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that was understood."""

    #: What it reads, as it would stand in a template.
    placeholders: tuple[str, ...]
    _is_true: Callable[[Values], bool]

    def holds(self, values: Values) -> bool:
        """``values``: of a row, of each of ``placeholders``."""
        return self._is_true(values)


@lru_cache(256)
def condition(written: str) -> Condition:
    """Understand a condition. Raises BadCondition."""
    _, tree, braced = _parsed(written)
    reading = _Reading(braced)
    is_true = reading.truth(tree.body)
    if not reading.placeholders:
        raise BadCondition("a condition that reads no field and no answer")
    return Condition(tuple(dict.fromkeys(reading.placeholders)), is_true)


def with_names(written: str, change: Callable[[str], str]) -> str:
    """The same condition with what ``change`` makes of each placeholder in it. Raises BadCondition."""
    plain, tree, braced = _parsed(written)
    raw, spans = plain.encode(), list[tuple[int, int, str]]()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Attribute | ast.Subscript) or (
            isinstance(node, ast.Name) and node.id not in _WORDS
        ):
            written = ast.unparse(node)
            # One in braces was set apart by a space on either side.
            apart = written in braced
            begin = node.col_offset - (apart and node.col_offset > 0)
            spans.append((begin, (node.end_col_offset or 0) + apart, braced.get(written, written)))
            return
        for inner in ast.iter_child_nodes(node):
            look(inner)

    look(tree.body)
    for begin, end, meant in sorted(spans, reverse=True):
        raw = raw[:begin] + f"{{{change(meant)}}}".encode() + raw[end:]
    return raw.decode()


def _parsed(written: str) -> tuple[str, ast.Expression, Mapping[str, str]]:
    """The condition with a name for each placeholder in braces, its tree, and what those names mean. Raises BadCondition."""
    if len(written) > MAX_CHARACTERS:
        raise BadCondition(f"more than {MAX_CHARACTERS} characters")
    if "\0" in written or "\n" in written:
        raise BadCondition("a NUL character or a line break")
    _check_texts(written)
    braced: dict[str, str] = {}

    def without_braces(found: re.Match[str]) -> str:
        name = f"placeholder_{len(braced)}_"
        braced[name] = found[1]
        return f" {name} "

    plain = _outside_texts(written, without_braces).strip()
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadCondition("what cannot be read as a condition") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise BadCondition(f"more than {MAX_NODES} operators and values")
    return plain, tree, braced


_TEXTS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


def _check_texts(written: str) -> None:
    """Raises BadCondition for what Python reads, and means otherwise than it looks."""
    bare = _TEXTS.sub("''", written)
    if "#" in bare:
        raise BadCondition("a # outside of quotes")
    # 'it''s' of SQL would be the text its.
    if re.search(r"''\s*''", bare):
        raise BadCondition("two texts side by side; a quote within a text is written \\'")


def _outside_texts(written: str, change: Callable[[re.Match[str]], str]) -> str:
    """The condition with its placeholders in braces changed; braces within quoted texts are theirs."""
    pieces, at = list[str](), 0
    for quoted in _TEXTS.finditer(written):
        pieces += [_BRACED.sub(change, written[at : quoted.start()]), quoted[0]]
        at = quoted.end()
    return "".join([*pieces, _BRACED.sub(change, written[at:])])


class _Reading:
    """Turns a tree into functions of a row's values; notes what is read."""

    def __init__(self, braced: Mapping[str, str]) -> None:
        self._braced = braced
        self.placeholders: list[str] = []

    def truth(self, node: ast.expr) -> Callable[[Values], bool]:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                every = [self.truth(part) for part in parts]
                return lambda row: all(part(row) for part in every)
            case ast.BoolOp(values=parts):
                some = [self.truth(part) for part in parts]
                return lambda row: any(part(row) for part in some)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                is_true = self.truth(inner)
                return lambda row: not is_true(row)
            case ast.Compare(left=left, ops=ops, comparators=others):
                values = [self.value(one) for one in (left, *others)]
                compared = [_comparison(op) for op in ops]
                return lambda row: _chain(compared, [value(row) for value in values])
        if isinstance(node, ast.List | ast.Tuple):
            raise BadCondition(f"{_short(node)}, a list that is compared with nothing")
        value = self.value(node)
        # A value alone is true as its JSON would be in most languages: not null, false, 0, "" or empty.
        return lambda row: bool(value(row))

    def value(self, node: ast.expr) -> Callable[[Values], Any]:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as plain):
                return lambda _: plain
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as plain)):
                return lambda _: -plain
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                values = [self.value(part) for part in parts]
                return lambda row: [value(row) for value in values]
            case ast.Name(id=word) if word in _WORDS:
                return lambda _: _WORDS[word]
            case ast.Name() | ast.Attribute() | ast.Subscript():
                placeholder = self._placeholder(node)
                self.placeholders.append(placeholder)
                return lambda row: row[placeholder]
        raise BadCondition(f"{_short(node)}, which is neither a name nor a value nor a comparison")

    def _placeholder(self, node: ast.expr) -> str:
        written = ast.unparse(node)
        meant = self._braced.get(written, written)
        if not is_placeholder(meant):
            told = f"{{{_cut(meant)}}}" if written in self._braced else _cut(written)
            raise BadCondition(f"{told}, which names no field, answer or part of one")
        return meant


def _short(node: ast.expr) -> str:
    return _cut(ast.unparse(node))


def _cut(written: str) -> str:
    return written if len(written) <= 40 else f"{written[:39]}…"


def _chain(compared: list[Callable[[Any, Any], bool]], values: list[Any]) -> bool:
    return all(holds(values[i], values[i + 1]) for i, holds in enumerate(compared))


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    match op:
        case ast.Eq():
            return _equal
        case ast.NotEq():
            return lambda a, b: not _equal(a, b)
        case ast.Lt():
            return _less
        case ast.LtE():
            return lambda a, b: _less(a, b) or (_ordered(a, b) and _equal(a, b))
        case ast.Gt():
            return lambda a, b: _less(b, a)
        case ast.GtE():
            return lambda a, b: _less(b, a) or (_ordered(a, b) and _equal(a, b))
        case ast.In():
            return _within
        case ast.NotIn():
            return lambda a, b: not _within(a, b)
    raise BadCondition(f"the operator {type(op).__name__.lower()}; compare with == != < <= > >= in")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _ordered(a: Any, b: Any) -> bool:
    """Whether one of them can be less: numbers, or two of one type that has an order."""
    if _is_number(a) and _is_number(b):
        return True
    return type(a) is type(b) and not isinstance(a, bool | dict | list | None)


def _less(a: Any, b: Any) -> bool:
    try:
        return _ordered(a, b) and bool(a < b)
    except TypeError:
        # Times of which one has a zone and the other none.
        return False


def _equal(a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        return bool(a == b)
    return type(a) is type(b) and bool(a == b)


def _within(a: Any, b: Any) -> bool:
    """An element of a list, a piece of a text, a key of an object."""
    if isinstance(b, list):
        return any(_equal(a, one) for one in b)
    return isinstance(a, str) and isinstance(b, str | dict) and a in b
