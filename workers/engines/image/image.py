"""A trunk that sees pictures, and any number of heads in one pass: one decoding, one forward, one product with all heads.

Takes EfficientNet-Lite as motet converts it, any image trunk of transformers, and two towers (CLIP, SigLIP), which also
choose among labels by the vectors of their words. Heads are those of texts (workers/engines/heads.py); one that was trained
on the stages' features (``pooling`` of its manifest) reads them from the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Features
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.answers import Floats, label_column, logits_column, vector_answer
from workers.engines.heads import FUSED, Fused, Head, fused, read_head
from workers.engines.image.lite import ImageVectors
from workers.engines.image.preparing import prepared
from workers.engines.image.seeing import Sight, blank, joined, load_trunk, trial_rows, two_towers
from workers.engines.newest import Newest
from workers.engines.proof import apart
from workers.engines.trunk import free_cache, torch_errors

#: Sets of labels whose vectors are kept: each takes a few hundred kilobytes.
LABEL_SETS = 256


@dataclass(slots=True)
class ImageTrunk:
    """A loaded trunk with its heads."""

    manifest: Manifest
    sight: Sight
    #: Manifest digest -> head, fp32 on the device.
    heads: dict[str, Head] = field(default_factory=dict)
    #: Digests of a pass' heads -> all of them as one.
    fused: Newest[tuple[str, ...], Fused] = field(default_factory=lambda: Newest(FUSED))
    #: Texts -> their vectors, of two towers.
    texts: Newest[tuple[str, ...], Tensor] = field(default_factory=lambda: Newest(LABEL_SETS))


class ImageEngine:
    """Answers classify, number, embed and choose. ``Provable``."""

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return model.memory_mb(in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> ImageTrunk:
        handle = ImageTrunk(model, load_trunk(model, files, device=device, in_format=in_format))
        seen = self._seen(handle, [blank(handle.sight.preparation)], stages=bool(model.stage_dim))  # warm up
        stage_dim = 0 if seen.stages is None else seen.stages.shape[1]
        if (seen.last.shape[1], stage_dim) != (model.dim, model.stage_dim):
            raise CannotLoad(
                f"its vectors have {seen.last.shape[1]} numbers, and {stage_dim} with its stages; the manifest says "
                f"{model.dim} and {model.stage_dim}"
            )
        return handle

    def attach(self, handle: ImageTrunk, task: TaskOrder, files: Mapping[str, Path]) -> None:
        if not task.manifest.trunk_model or task.manifest.digest in handle.heads:
            return
        trunk = handle.manifest
        dim = trunk.stage_dim if source_of(task) == "stages" else trunk.dim
        head = read_head(task.manifest, files, dim)
        with torch_errors():
            handle.heads[task.manifest.digest] = head.to(handle.sight.device)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        sight: Sight = pass_.handle.sight
        return prepared(sight.preparation, pass_.values or texts, sight.device)

    def run(self, pass_: Pass, batch: Sequence[Prepared]) -> Mapping[str, Column]:
        handle: ImageTrunk = pass_.handle
        asks_stages = any(source_of(task) == "stages" for task in pass_.tasks)
        seen = self._seen(handle, batch, stages=asks_stages)
        with torch_errors(), torch.inference_mode():
            parts = [
                (task, answer)
                for source, vectors in (("last", seen.last), ("stages", seen.stages))
                if vectors is not None
                for task, answer in self._answers(
                    handle, [task for task in pass_.tasks if source_of(task) == source], vectors
                )
            ]
            # One way back from the device for everything.
            numbers = torch.cat([answer for _, answer in parts], 1).cpu().numpy()
        columns, lo = {}, 0
        for task, answer in parts:
            hi = lo + answer.shape[1]
            columns[task.name] = self._column(handle, task, numbers[:, lo:hi])
            lo = hi
        return columns

    def unload(self, handle: ImageTrunk) -> None:
        handle.sight.model = None
        handle.heads.clear()
        handle.fused.clear()
        handle.texts.clear()
        free_cache(handle.sight.device)

    def among_others(self, handle: ImageTrunk, texts: Sequence[str]) -> float:
        """``Provable``: of the vectors of pictures, whatever the texts."""
        rows = trial_rows(handle.sight.preparation)
        together = self._seen(handle, rows, stages=False).last
        alone = torch.cat([self._seen(handle, [row], stages=False).last for row in rows])
        return max(apart(a, b) for a, b in zip(together[:, None], alone[:, None], strict=True))

    def _seen(self, handle: ImageTrunk, batch: Sequence[Prepared], *, stages: bool) -> ImageVectors:
        with torch_errors(), torch.inference_mode():
            return joined(handle.sight.see(batch, lambda pixels: handle.sight.model(pixels, stages=stages)))

    def _answers(
        self, handle: ImageTrunk, tasks: Sequence[TaskOrder], vectors: Tensor
    ) -> list[tuple[TaskOrder, Tensor]]:
        """(n, outputs) of each task that reads these vectors."""
        heads = [task for task in tasks if task.manifest.trunk_model]
        made = fused(heads, handle.heads, handle.fused)(vectors) if heads else []
        answers = list(zip(heads, made, strict=True))
        for task in tasks:
            if task.spec["kind"] == "choose":
                answers.append((task, self._fitting(handle, task, vectors)))
            elif not task.manifest.trunk_model:
                answers.append((task, vectors))
        return answers

    def _fitting(self, handle: ImageTrunk, task: TaskOrder, vectors: Tensor) -> Tensor:
        towers = two_towers(handle.sight)
        assert towers is not None
        words = tuple(f"{task.spec.get('question', '')} {label}".strip() for label in task.spec["labels"])
        if (known := handle.texts.get(words)) is None:
            known = towers.texts(words)
            handle.texts.put(words, known)
        return towers.logits(vectors, known)

    def _column(self, handle: ImageTrunk, task: TaskOrder, numbers: Floats) -> Column:
        if task.spec["kind"] == "choose":
            towers = two_towers(handle.sight)
            every = bool(task.spec.get("scores"))
            return label_column(numbers, every_score=every, apart=towers is not None and towers.apart)
        return logits_column(task, numbers) if task.manifest.trunk_model else vector_answer(task, numbers)


def source_of(task: TaskOrder) -> Features:
    """Which features a task reads: a head those that it was trained on."""
    stages = task.manifest.pooling == "stages" or task.spec.get("features") == "stages"
    return "stages" if stages else "last"
