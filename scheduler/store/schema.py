"""How ``tables`` writes a table: kinds of columns, keys of the tables around, and comments from docstrings."""

from __future__ import annotations

import re
from collections.abc import Collection
from inspect import cleandoc
from typing import Any, TypeVar, cast

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Constraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    Table,
    TypedColumns,
    text,
)
from sqlalchemy.types import TypeEngine

from motet.states import State

T = TypeVar("T")
C = TypeVar("C", bound=TypedColumns)

metadata = MetaData()

TIME = DateTime(timezone=True)
NOW = "clock_timestamp()"


def spelt(states: Collection[State]) -> str:
    """These states for IN; spelt out, since a parameter finds no partial index."""
    return "(" + ", ".join(f"'{state}'" for state in State if state in states) + ")"


def table(name: str, columns: type[C], *more: Constraint | Index, **rest: Any) -> Table[C]:
    """A table; the docstring of its columns is its comment, and then those of columns, a line for each."""
    says, _, each = cleandoc(columns.__doc__ or "").partition("\n\n")
    made = Table(name, metadata, columns, *more, comment=_one_line(says), **rest)
    for line in re.split(r"\n(?! )", each) if each else ():
        column, _, meaning = line.partition(": ")
        made.c[column].comment = _one_line(meaning)
    return made


def within(table: str, **columns: str) -> ForeignKeyConstraint:
    """Rows that go with a row of another table: column here -> column there."""
    return ForeignKeyConstraint([*columns], [f"{table}.{c}" for c in columns.values()], ondelete="CASCADE")


def _one_line(words: str) -> str:
    return " ".join(words.split())


def index(name: str, *columns: str, unique: bool = False, where: str | None = None) -> Index:
    """An index on columns, or on what SQL says of them; only of the rows for which ``where`` holds."""
    condition = None if where is None else text(where)
    parts = [c if c.isidentifier() else text(c) for c in columns]
    return Index(name, *parts, unique=unique, postgresql_where=condition)


def must(
    kind: type[TypeEngine[T]] | TypeEngine[T],
    *more: ForeignKey,
    default: str | None = None,
    check: str | None = None,
    external: bool = False,
    **rest: Any,
) -> Column[T]:
    """A column that is never NULL.

    ``default`` and ``check`` are SQL; ``external``: large values are stored as they are, since they are compressed already.
    """
    checks = () if check is None else (CheckConstraint(check),)
    server_default = None if default is None else text(default)
    rest.setdefault("nullable", False)
    return Column(kind, *more, *checks, server_default=server_default, info={"external": external}, **rest)


def may(kind: type[TypeEngine[T]] | TypeEngine[T], *more: ForeignKey, **rest: Any) -> Column[T | None]:
    """A column that may be NULL."""
    return cast("Column[T | None]", must(kind, *more, nullable=True, **rest))


def key(kind: type[TypeEngine[T]] | TypeEngine[T], *more: ForeignKey, **rest: Any) -> Column[T]:
    """A column of the primary key."""
    return must(kind, *more, primary_key=True, autoincrement=False, **rest)


def identity() -> Column[int]:
    """The primary key, counted up by Postgres."""
    return Column(BigInteger, Identity(always=True), primary_key=True)
