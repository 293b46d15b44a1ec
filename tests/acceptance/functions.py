"""What the workers of the acceptance cluster run beside real models. Copied beside them, with entry points."""

from __future__ import annotations

import re
from array import array
from itertools import accumulate
from typing import Any

from motet.protocol.columns import OK, Column, little_endian
from motet.protocol.manifest import Manifest
from workers.engine import Prepared


def told(rows: list[dict[str, Any]], *, k: int, note: str = "none", artefact: Any = None) -> list[Any]:
    """All that it was given. The artefact's identity tells whether it was read again."""
    return [
        {
            "row": {**row, "vector": [len(row["vector"]), sum(x * x for x in row["vector"])]},
            "types": {name: type(value).__name__ for name, value in row.items()},
            "arguments": [k, note],
            "titles": artefact and artefact["titles"][:k],
            "id": id(artefact),
        }
        for row in rows
    ]


def capitals(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


class Names:
    """Spans: each word in capitals."""

    def describe(self, name: str, version: str) -> Manifest:
        return Manifest(name=name, version=version, engine="names", answers="spans", labels=("name",))

    def memory_mb(self, *_: Any) -> int:
        return 0

    def load(self, *_: Any, **__: Any) -> None:
        return None

    def attach(self, *_: Any) -> None:
        return None

    def unload(self, _: Any) -> None:
        return None

    def prepare(self, _: Any, texts: Any) -> list[Prepared]:
        return [Prepared(row, 1, False, text) for row, text in enumerate(texts)]

    def run(self, pass_: Any, batch: Any) -> dict[str, Column]:
        found = [[m.span() for m in re.finditer(r"\b[A-Z]\w+", row.inputs)] for row in batch]
        flat = [span for spans in found for span in spans]
        offsets = accumulate(map(len, found), initial=0)
        arrays = {
            "offsets": little_endian(array("i", offsets)),
            "starts": little_endian(array("i", [start for start, _ in flat])),
            "ends": little_endian(array("i", [end for _, end in flat])),
            "codes": little_endian(array("h", [0] * len(flat))),
            "scores": little_endian(array("f", [1.0] * len(flat))),
        }
        column = Column(kind="spans", status=bytes([OK]) * len(found), arrays=arrays)
        return {task.name: column for task in pass_.tasks}
