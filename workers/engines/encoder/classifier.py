"""A stock sequence classifier (``AutoModelForSequenceClassification``) as a pass of its own.

It shares its trunk with nothing: it was fine-tuned whole. Single-label, multi-label, regression, and cross-encoders
(pairs.py), as its manifest says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import Floats, logits_column
from workers.engines.encoder import pairs
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
    """Answers classify, number and rank. ``Provable``."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Classifier:
        kind = "AutoModelForSequenceClassification"
        loaded, tokens = load_reader(kind, model, files, device=device, in_format=in_format)
        outputs = 1 if model.answers in ("number", "ranking") else len(model.labels)
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
        if pass_.handle.manifest.answers == "ranking":
            return pairs.prepared(tokens, pass_, texts)
        return tokens.prepare(texts, pass_.max_tokens)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        if pass_.handle.manifest.answers == "ranking":
            column = self._ranking(pass_.handle, batch)
            return {task.name: column for task in pass_.tasks}
        logits = self._logits(pass_.handle, batch)
        return {task.name: logits_column(task, logits) for task in pass_.tasks}

    def unload(self, handle: Classifier) -> None:
        handle.model = None
        free_cache(handle.device)

    def among_others(self, handle: Classifier, texts: Sequence[str]) -> float:
        """``Provable``: of the scores before any softmax."""
        return beside_others(lambda batch: self._logits(handle, batch), handle.tokens, texts)

    def _ranking(self, handle: Classifier, batch: Sequence[Prepared]) -> Column:
        # BERT and its like were taught which of two texts a token is of.
        told = int(getattr(handle.model.config, "type_vocab_size", 0) or 0) > 1

        def score(some: Sequence[pairs.Pair]) -> Floats:
            kinds = [replace(pair.row, inputs=pair.kinds) for pair in some] if told else None
            return self._logits(handle, [pair.row for pair in some], kinds)[:, 0]

        return pairs.ranking_column(batch, score, handle.device)

    def _logits(
        self, handle: Classifier, batch: Sequence[Prepared], kinds: Sequence[Prepared] | None = None
    ) -> Floats:
        """``kinds``: of each token, which of two texts it is of."""
        with torch_errors(), torch.inference_mode():
            ids, mask = padded(batch, handle.tokens.pad, handle.device)
            # A decoder used as a classifier looks for its last real token: it must always see a mask.
            mask = torch.ones_like(ids) if mask is None else mask
            more = {} if kinds is None else {"token_type_ids": padded(kinds, 0, handle.device)[0]}
            logits: Floats = (
                handle.model(input_ids=ids, attention_mask=mask, **more).logits.float().cpu().numpy()
            )
            return logits
