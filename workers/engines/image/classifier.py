"""A stock image classifier (``AutoModelForImageClassification``) as a pass of its own: it was fine-tuned whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import logits_column
from workers.engines.image.preparing import prepared
from workers.engines.image.seeing import Sight, blank, load_classifier, trial_rows
from workers.engines.proof import apart
from workers.engines.trunk import free_cache, torch_errors


@dataclass(slots=True)
class WholeClassifier:
    """A loaded classifier."""

    manifest: Manifest
    sight: Sight


class ImageClassifierEngine:
    """Answers classify and number. ``Provable``."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(
        self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str
    ) -> WholeClassifier:
        handle = WholeClassifier(model, load_classifier(files, device=device, in_format=in_format))
        found = self._logits(handle, [blank(handle.sight.preparation)]).shape[1]  # warm up
        outputs = 1 if model.answers == "number" else len(model.labels)
        if found != outputs:
            raise CannotLoad(f"it answers {found} scores; the manifest names {outputs}")
        return handle

    def attach(self, handle: WholeClassifier, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if task.manifest.trunk_model:
            raise CannotLoad(f"head {task.manifest.ref} cannot sit on a whole classifier")

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        sight: Sight = pass_.handle.sight
        return prepared(sight.preparation, pass_.values or texts, sight.device)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        logits = self._logits(pass_.handle, batch).cpu().numpy()
        return {task.name: logits_column(task, logits) for task in pass_.tasks}

    def unload(self, handle: WholeClassifier) -> None:
        handle.sight.model = None
        free_cache(handle.sight.device)

    def among_others(self, handle: WholeClassifier, texts: Sequence[str]) -> float:
        """``Provable``: of the scores before any softmax, for pictures, whatever the texts."""
        rows = trial_rows(handle.sight.preparation)
        alone = torch.cat([self._logits(handle, [row]) for row in rows])
        return max(
            apart(a, b) for a, b in zip(self._logits(handle, rows)[:, None], alone[:, None], strict=True)
        )

    def _logits(self, handle: WholeClassifier, batch: Sequence[Prepared]) -> Tensor:
        """(n, labels) fp32 on the device."""
        sight = handle.sight
        with torch_errors(), torch.inference_mode():
            return torch.cat(sight.see(batch, lambda pixels: sight.model(pixel_values=pixels).logits.float()))
