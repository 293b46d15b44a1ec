"""What all messages share: to and from JSON, and limits of the fields of requests, in checks and in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints


def json_name(field: str) -> str:
    """A field's name in JSON: its own, without the line behind a keyword of Python (``pass_``)."""
    return field.removesuffix("_")


class ApiMessage:
    """Base of all messages: frozen dataclasses whose fields are the fields of a JSON object."""

    __slots__ = ()
    #: For FastAPI: names as in ``to_json``, and an answer that has all of its fields.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {
        "alias_generator": json_name,
        "json_schema_serialization_defaults_required": True,
    }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Read it from an answer. Fields of a newer server are passed over; those that an older one does not know, and
        nulls where null means nothing, have their default. Raises KeyError for a missing field that has none."""
        values = {}
        for f in _codecs(cls):
            if (value := record.get(f.key)) is not None:
                values[f.name] = f.read(value) if f.read else value
            elif f.needed or (f.nullable and f.key in record):
                values[f.name] = record[f.key]
        return cls(**values)

    @classmethod
    def checked(cls, record: Any) -> Self:
        """Read it from JSON that may be anything. Raises ValueError that names the fields that do not fit."""
        wrong = misfits(cls, record) if isinstance(record, Mapping) else ["value"]
        if wrong:
            raise ValueError(f"got another {' and '.join(wrong)}; expected a {cls.__name__.lower()}")
        return cls.of(record)

    def __getitem__(self, key: str) -> Any:
        """A field by its name in JSON."""
        return self.to_json()[key]

    def to_json(self, *, sparse: bool = False) -> dict[str, Any]:
        """As a JSON object; ``sparse``: without the fields that are None."""
        return {
            f.key: value if f.write is None or value is None else f.write(value)
            for f in _codecs(type(self))
            if (value := getattr(self, f.name)) is not None or not sparse
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        """The schema in the API's description, with the ``#:`` line of each field."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)  # type: ignore[attr-defined]
        for name, said in field_docs(cls).items():
            described["properties"][json_name(name)].setdefault("description", said)
        return schema


def field_docs(message: type[ApiMessage]) -> dict[str, str]:
    """The ``#:`` line of each field that has one."""
    import inspect

    docs: dict[str, str] = {}
    for of in reversed(message.__mro__[:-2]):
        said: list[str] = []
        for line in map(str.strip, inspect.getsource(of).splitlines()):
            if line.startswith("#:"):
                said.append(line[2:].strip())
            else:
                if said and (declared := re.match(r"(\w+): ", line)):
                    docs[declared[1]] = " ".join(said)
                said = []
    return docs


@dataclass(frozen=True, slots=True)
class Limit:
    """What a field of a request may hold beside its type: ``Annotated[str, Limit("up to 40 letters", most=40)]``."""

    #: In words: what was expected, for a sender who got it wrong.
    says: str
    _: KW_ONLY
    #: Bounds of a number, or of the length of anything else.
    least: float | None = None
    most: float | None = None
    #: The number is larger than this.
    above: float | None = None
    #: The whole of the text has this form.
    pattern: str | None = None
    #: No item stands twice.
    unique: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type keeps it."""
        size = value if isinstance(value, int | float) else len(value)
        return (
            (self.least is None or size >= self.least)
            and (self.most is None or size <= self.most)
            and (self.above is None or size > self.above)
            and (self.pattern is None or re.fullmatch(self.pattern, value) is not None)
            and (not self.unique or len(set(value)) == len(value))
        )

    def __get_pydantic_json_schema__(
        self, core: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        schema = handler(core)
        number = schema.get("type") in ("integer", "number")
        bounds = {
            "minimum" if number else "minLength": self.least,
            "maximum" if number else "maxLength": self.most,
            "exclusiveMinimum": self.above,
        }
        if number or schema.get("type") == "string":
            schema.update({name: bound for name, bound in bounds.items() if bound is not None})
        return schema


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of this type and keeps its limits."""
    of = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin is Annotated:
            return fits(value, of[0]) and (value is None or all(limit.allows(value) for limit in of[1:]))
        case origin if origin in (Union, UnionType):
            return any(fits(value, one) for one in of)
        case origin if origin is Literal:
            return isinstance(value, str) and value in of
        case origin if origin is tuple:
            return isinstance(value, list) and (of[0] is Any or all(fits(one, of[0]) for one in value))
        case origin if origin is Mapping:
            return isinstance(value, dict) and all(
                fits(k, of[0]) and fits(v, of[1]) for k, v in value.items()
            )
        case origin if origin is float:
            return (
                isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
            )
        case origin if origin is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case origin:
            return origin is Any or isinstance(value, origin)


_SIMPLE = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def expected(kind: Any) -> str:
    """What a value of this type is, in words."""
    of = get_args(kind)
    match get_origin(kind):
        case origin if origin is Annotated:
            return str(of[1].says)
        case origin if origin in (Union, UnionType):
            return " or ".join(expected(one) for one in of if one is not NoneType)
        case origin if origin is Literal:
            return f"one of {', '.join(of)}"
        case origin:
            return _SIMPLE.get(kind) or ("an object" if origin is Mapping else "a list")


def misfits(message: type[ApiMessage], body: Mapping[str, Any]) -> list[str]:
    """The fields of a JSON object, by name, that are missing or do not fit the message."""
    return [
        f.key for f in _codecs(message) if (f.needed or f.key in body) and not fits(body.get(f.key), f.kind)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldCodec:
    """How one field of a message is read, written and checked; made once for each class."""

    name: str
    key: str
    #: Its type, with its limits.
    kind: Any
    #: It has no default.
    needed: bool
    nullable: bool
    #: From JSON and to JSON; None: as it is.
    read: Callable[[Any], Any] | None
    write: Callable[[Any], Any] | None


def _made_codecs(message: type[ApiMessage]) -> tuple[FieldCodec, ...]:
    full, bare = (get_type_hints(message, include_extras=extras) for extras in (True, False))
    return tuple(
        FieldCodec(
            name=f.name,
            key=json_name(f.name),
            kind=full[f.name],
            needed=f.default is MISSING and f.default_factory is MISSING,
            nullable=NoneType in get_args(bare[f.name]),
            read=_reader(bare[f.name]),
            write=_writer(bare[f.name]),
        )
        for f in fields(message)  # type: ignore[arg-type]
    )


def expectations(message: type[ApiMessage]) -> Mapping[str, str]:
    """Each field's name in JSON -> what may stand there, in words."""
    return {f.key: expected(f.kind) for f in _codecs(message)}


def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """How a value of this type is read from JSON."""
    of = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin in (Union, UnionType):
            return _reader(next(one for one in of if one is not NoneType))
        case origin if origin is tuple:
            read = _reader(of[0])
            return tuple if read is None else lambda values: tuple(map(read, values))
        case origin if isinstance(origin, type) and issubclass(origin, ApiMessage):
            return origin.of
        case origin if isinstance(origin, type) and issubclass(origin, StrEnum):
            # A word of a newer server stays what it is.
            return lambda value: origin(value) if value in set(origin) else value
        case origin:
            return float if origin is float else None


def _writer(kind: Any) -> Callable[[Any], Any] | None:
    """How a value of this type is written as JSON."""
    of = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin in (Union, UnionType):
            return _writer(next(one for one in of if one is not NoneType))
        case origin if origin is tuple:
            write = _writer(of[0])
            return list if write is None else lambda values: list(map(write, values))
        case origin if isinstance(origin, type) and issubclass(origin, ApiMessage):
            return origin.to_json
        case origin:
            return str if isinstance(origin, type) and issubclass(origin, StrEnum) else None


_codecs: Callable[[Any], tuple[FieldCodec, ...]] = cache(_made_codecs)
