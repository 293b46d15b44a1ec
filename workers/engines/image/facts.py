"""What registration must know of a model that reads pictures, found by loading it: nothing tells it for all architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from motet.protocol.manifest import Answer, Manifest
from workers.engines.image.hub import processor_of
from workers.engines.image.lite import ImageVectors, Lite
from workers.engines.image.preparing import patches
from workers.engines.image.seeing import blank, load_trunk
from workers.engines.trunk import torch_errors


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of a trunk or two towers."""

    dim: int
    stage_dim: int
    pooling: Literal["mean", "cls", ""]
    #: What a picture counts for.
    tokens: int


def facts_of(files: Mapping[str, Path], answers: Answer) -> ImageFacts:
    """Load it on the CPU and show it a picture. Raises CannotLoad, OutOfMemory."""
    # Whatever it is, its first token and their mean are of one length.
    model = Manifest(
        name="unnamed", version="1", engine="image", answers=answers, pooling="mean", reads="image"
    )
    sight = load_trunk(model, files, device="cpu", in_format="fp32")
    row = blank(sight.preparation)
    stages = isinstance(sight.model, Lite)
    with torch_errors(), torch.inference_mode():
        [seen] = sight.see([row], lambda pixels: sight.model(pixels, stages=stages))
    assert isinstance(seen, ImageVectors)
    pooling: Literal["mean", "cls", ""] = (
        "" if answers == "match" else "cls" if _has_cls(sight.model) else "mean"
    )
    return ImageFacts(
        dim=seen.last.shape[1],
        stage_dim=0 if seen.stages is None else seen.stages.shape[1],
        pooling=pooling,
        tokens=patches(row.inputs.shape[0] * row.inputs.shape[1]),
    )


def tokens_of(files: Mapping[str, Path]) -> int:
    """What a picture counts for in a whole classifier. Raises CannotLoad."""
    pixels = blank(processor_of(files)).inputs
    return patches(pixels.shape[0] * pixels.shape[1])


def _has_cls(trunk: object) -> bool:
    """Whether the first token of its answer stands for the whole picture."""
    inner = getattr(trunk, "loaded", None)
    return inner is not None and any(name.endswith("cls_token") for name, _ in inner.named_parameters())
