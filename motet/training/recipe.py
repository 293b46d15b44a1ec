"""What a training run is to do, as one row of a job: which rows, whose labels, on which trunk, for how long.

The texts and their vectors are those of another job, which the worker reads under its lease; their labels travel in
the recipe, packed. So a run needs no file, and many recipes in one job are a sweep over many devices.
"""

from __future__ import annotations

import base64
import json
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from motet.protocol.columns import little_endian, typed
from motet.protocol.envelope import BadMessage, pack, unpack
from motet.tasks import Features

HeadKind = Literal["single", "multi", "number"]
Tune = Literal["heads", "lora", "all"]

#: Truth of a row whose label is not known: no loss, no score.
MISSING, MISSING_BIT = -1, 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One task to learn: what is asked, and what is true of each row."""

    name: str
    kind: HeadKind
    #: In the order of the head's outputs; none of a number.
    labels: tuple[str, ...] = ()
    #: Each label counts as if all were equally frequent: sqrt(mean share / share), for imbalanced classes.
    balance: bool = False
    #: Single: a label's place per row, or MISSING. Multi: 0, 1 or MISSING_BIT, labels side by side. Number: float32,
    #: NaN where it is missing. Training rows first, then test rows.
    truth: bytes = b""

    @property
    def width(self) -> int:
        """Outputs of its head."""
        return max(1, len(self.labels))

    def to_json(self) -> dict[str, Any]:
        packed = base64.b64encode(pack(self.truth)).decode()
        return {**asdict(self), "labels": list(self.labels), "truth": packed}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any], rows: int) -> Target:
        """Raises ValueError where it is none for so many rows."""
        kind, labels = spec["kind"], tuple(map(str, spec["labels"]))
        if kind not in _CODES or bool(labels) is (kind == "number"):
            raise ValueError("kind")
        size = rows * struct.calcsize(f"<{_CODES[kind]}") * (len(labels) if kind == "multi" else 1)
        raw = unpack(base64.b64decode(spec["truth"], validate=True))
        if not isinstance(raw, bytes) or len(raw) != size:
            raise ValueError("truth")
        target = cls(
            name=str(spec["name"]), kind=kind, labels=labels, balance=bool(spec["balance"]), truth=raw
        )
        if (
            kind == "single"
            and rows
            and not MISSING <= min(target.places()) <= max(target.places()) < len(labels)
        ):
            raise ValueError("truth")
        return target

    def places(self) -> Sequence[int]:
        """Of a single-label task: each row's label."""
        return typed(_CODES["single"], self.truth)

    @classmethod
    def single(
        cls, name: str, labels: Sequence[str], truth: Sequence[str | None], *, balance: bool = False
    ) -> Target:
        place = {label: at for at, label in enumerate(labels)} | {None: MISSING}
        packed = little_endian(array("h", (place[one] for one in truth)))
        return cls(name=name, kind="single", labels=tuple(labels), balance=balance, truth=packed)

    @classmethod
    def multi(
        cls, name: str, labels: Sequence[str], truth: Sequence[Sequence[str] | None], *, balance: bool = False
    ) -> Target:
        rows = bytearray()
        for given in truth:
            rows += (
                bytes([MISSING_BIT]) * len(labels)
                if given is None
                else bytes(label in given for label in labels)
            )
        return cls(name=name, kind="multi", labels=tuple(labels), balance=balance, truth=bytes(rows))

    @classmethod
    def number(cls, name: str, truth: Sequence[float | None]) -> Target:
        packed = little_endian(array("f", (float("nan") if one is None else one for one in truth)))
        return cls(name=name, kind="number", truth=packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A number that heads read beside the texts: its name, and its value in each row."""

    #: As templates name it, without braces.
    name: str
    #: Little-endian float64, NaN where it is missing. Training rows first, then test rows.
    values: bytes

    @classmethod
    def of(cls, name: str, values: Sequence[float | None]) -> Numbers:
        packed = little_endian(array("d", (float("nan") if one is None else one for one in values)))
        return cls(name=name, values=packed)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "values": base64.b64encode(pack(self.values)).decode()}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any], rows: int) -> Numbers:
        """Raises ValueError where it is none for so many rows."""
        raw = unpack(base64.b64decode(spec["values"], validate=True))
        if not isinstance(raw, bytes) or len(raw) != 8 * rows:
            raise ValueError("numbers")
        return cls(name=str(spec["name"]), values=raw)


#: Struct code of a truth.
_CODES: Mapping[str, str] = {"single": "h", "multi": "B", "number": "f"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run."""

    #: Of the models that come out: ``<name>.<task>`` for heads, ``<name>`` for a trunk of their own.
    name: str
    version: str
    #: ``name@version`` of the trunk that it begins with.
    trunk: str
    #: The job whose rows are learned from, and which holds their vectors under its one task.
    job: str
    #: Its first rows are for training, the rest for the test.
    train_rows: int
    test_rows: int
    targets: tuple[Target, ...]
    #: The templates of the texts that a head reads, which are so many rows of that job for each row, one behind the
    #: other; (): one text, whichever a task names.
    inputs: tuple[str, ...] = ()
    #: The numbers that a head reads beside them.
    numbers: tuple[Numbers, ...] = ()
    #: What learns: heads alone, the trunk by low-rank changes as well (Hu et al., 2021), or all of it.
    tune: Tune = "heads"
    #: Epochs of the heads on the frozen trunk, then those in which the trunk learns too.
    head_epochs: int = 30
    epochs: int = 3
    seed: int = 0
    #: How the tasks' losses become one: by learned uncertainty (Kendall et al., CVPR 2018), or their sum.
    loss: Literal["uncertainty", "sum"] = "uncertainty"
    #: Epochs without a better score on the validation rows after which it ends; 0: never.
    patience: int = 5
    #: Share of the training rows that are kept for validation.
    validation: float = 0.1
    #: Units of the hidden layer of a head; 0: a linear one.
    hidden: int = 256
    #: Learning rate of the trunk; None: 5e-5, or 5e-4 for low-rank changes.
    rate: float | None = None
    #: Rank of a low-rank change.
    rank: int = 16
    batch_rows: int = 32
    #: Tokens read of a row; 0: as many as the trunk reads.
    max_tokens: int = 0
    #: Of pictures: what heads learn from, as ``motet.tasks.Embed`` names it.
    features: Features = "last"
    #: Sha256 of texts and labels, and what was typed: the record that stays with the models.
    data: str = ""
    command: str = ""
    licence: str = ""

    def to_json(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_ROWS}
        told = {name: [one.to_json() for one in getattr(self, name)] for name in _OF_ROWS}
        return {**plain, **told}

    @property
    def texts(self) -> int:
        """Texts of a row."""
        return max(1, len(self.inputs))

    def dumps(self) -> str:
        return json.dumps(self.to_json(), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def loads(cls, text: str) -> Recipe:
        """Raises ValueError where it is none; the message names the field."""
        try:
            spec = json.loads(text)
            known = {f.name: spec[f.name] for f in fields(cls) if f.name in spec and f.name not in _OF_ROWS}
            known["inputs"] = tuple(map(str, spec.get("inputs", ())))
            rows = int(spec["train_rows"]) + int(spec["test_rows"])
            recipe = cls(
                **known,
                targets=tuple(Target.from_json(t, rows) for t in spec["targets"]),
                numbers=tuple(Numbers.from_json(n, rows) for n in spec.get("numbers", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadMessage) as error:
            raise ValueError(f"no recipe of a training run: {type(error).__name__} {error}"[:200]) from None
        for field_, (low, high) in _BOUNDS.items():
            value = getattr(recipe, field_)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"no recipe of a training run: {field_} is not from {low} to {high}")
        if recipe.tune not in ("heads", "lora", "all") or recipe.loss not in ("uncertainty", "sum"):
            raise ValueError("no recipe of a training run: tune or loss is none that is known")
        if recipe.features not in ("last", "stages"):
            raise ValueError("no recipe of a training run: features are none that are known")
        if not recipe.targets:
            raise ValueError("no recipe of a training run: no targets")
        if recipe.numbers and not recipe.inputs:
            raise ValueError("no recipe of a training run: numbers beside no text")
        return recipe


#: Fields of a recipe that hold something of every row.
_OF_ROWS = ("targets", "numbers")
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "train_rows": (2, 2**31),
    "test_rows": (0, 2**31),
    "head_epochs": (1, 1000),
    "epochs": (0, 1000),
    "seed": (0, 2**31 - 1),
    "patience": (0, 1000),
    "validation": (0, 0.5),
    "hidden": (0, 8192),
    "rank": (1, 1024),
    "batch_rows": (1, 4096),
    "max_tokens": (0, 1_000_000),
}
