"""A stock sequence classifier (``AutoModelForSequenceClassification``) as a pass of its own.

It shares its trunk with nothing: it was fine-tuned whole. Single-label, multi-label and regression, as its
manifest says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import Floats, logits_column
from workers.engines.proof import beside_others
from workers.engines.trunk import Tokens, free_cache, load_reader, padded, torch_errors


@dataclass(slots=True)
class Classifier:
    """A loaded classifier."""

    manifest: Manifest
    device: str
    model: Any
    tokens: Tokens


class ClassifierEngine:
    """Answers classify and number. ``Provable``."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Classifier:
        kind = "AutoModelForSequenceClassification"
        loaded, tokens = load_reader(kind, model, files, device=device, in_format=in_format)
        outputs = 1 if model.answers == "number" else len(model.labels)
        if loaded.config.num_labels != outputs:
            raise CannotLoad(f"it answers {loaded.config.num_labels} scores; the manifest names {outputs}")
        handle = Classifier(model, device, loaded, tokens)
        self._logits(handle, [Prepared(0, 1, False, np.zeros(1, np.int32))])  # warm up
        return handle

    def attach(self, handle: Classifier, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if task.manifest.trunk_model:
            raise CannotLoad(f"head {task.manifest.ref} cannot sit on a whole classifier")

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        tokens: Tokens = pass_.handle.tokens
        return tokens.prepare(texts, pass_.max_tokens)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        logits = self._logits(pass_.handle, batch)
        return {task.name: logits_column(task, logits) for task in pass_.tasks}

    def unload(self, handle: Classifier) -> None:
        handle.model = None
        free_cache(handle.device)

    def among_others(self, handle: Classifier, texts: Sequence[str]) -> float:
        """``Provable``: of the scores before any softmax."""
        return beside_others(lambda batch: self._logits(handle, batch), handle.tokens, texts)

    def _logits(self, handle: Classifier, batch: Sequence[Prepared]) -> Floats:
        with torch_errors(), torch.inference_mode():
            ids, mask = padded(batch, handle.tokens.pad, handle.device)
            # A decoder used as a classifier looks for its last real token: it must always see a mask.
            mask = torch.ones_like(ids) if mask is None else mask
            logits: Floats = handle.model(input_ids=ids, attention_mask=mask).logits.float().cpu().numpy()
            return logits
