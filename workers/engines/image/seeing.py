"""A loaded model that sees pictures: bytes of pixels onto the device, scaled there, a few pictures at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Prepared
from workers.engines.image.files import MODEL_TYPE
from workers.engines.image.hub import TwoTowers, load_hub, processor_of, wrapped
from workers.engines.image.lite import ImageVectors, Lite
from workers.engines.image.pictures import trial_pictures
from workers.engines.image.preparing import MiddleSquare, Preparation, chunks, prepared
from workers.engines.trunk import DTYPES, cpu_computes, imitated, onto, torch_errors

#: Pixels that go through a model at once on a CPU: 8 pictures of 224 x 224. Of more, activations exceed 32 MiB, glibc maps
#: each of them anew, and a picture takes twice as long.
CPU_PIXELS = 8 * 224 * 224
#: As good as all of a micro-batch: a GPU has no such edge.
GPU_PIXELS = 1 << 40
T = TypeVar("T")
#: What pixels are multiplied by, and what is added then.
Scaling = tuple[tuple[float, ...], tuple[float, ...]]
#: EfficientNet-Lite reads (x - 127) / 128.
LITE_SCALING: Scaling = ((1 / 128,), (-127 / 128,))


@dataclass(slots=True)
class Sight:
    """A model on its device, and how pictures are prepared for it."""

    device: str
    dtype: torch.dtype
    preparation: Preparation
    scaling: Scaling | None
    model: Any

    def see(self, batch: Sequence[Prepared], forward: Callable[[Tensor], T]) -> list[T]:
        """What ``forward`` says of the pixels (n, 3, height, width), chunk by chunk."""
        most = CPU_PIXELS if self.device == "cpu" else GPU_PIXELS
        return [forward(self._scaled(onto(pixels, self.device))) for pixels in chunks(batch, most)]

    def _scaled(self, pixels: Tensor) -> Tensor:
        # (n, height, width, 3) seen from the other side is what torch calls channels_last.
        x = pixels.permute(0, 3, 1, 2)
        if self.scaling is None:
            return x.to(self.dtype)
        factor, shift = (torch.tensor(one, device=x.device).reshape(1, -1, 1, 1) for one in self.scaling)
        return (x.float() * factor + shift).to(self.dtype)


def blank(preparation: Preparation) -> Prepared:
    """A grey picture, to warm up with."""
    from PIL import Image

    pixels = preparation(Image.new("RGB", (256, 256), "grey"))
    return Prepared(0, 1, False, pixels)


def trial_rows(preparation: Preparation) -> list[Prepared]:
    """A few pictures that models are tried on, ready to be seen."""
    rows = prepared(preparation, trial_pictures(4), "cpu")
    return [row for row in rows if isinstance(row, Prepared)]


def load_trunk(model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Sight:
    """A trunk or two towers. Raises CannotLoad, OutOfMemory, DeviceBroken."""
    if is_lite(files):
        return _lite(files, device, in_format)
    preparation = processor_of(files)
    loaded = load_hub("AutoModel", files, device=device, in_format=in_format)
    return Sight(device, _dtype(loaded), preparation, preparation.scaling, wrapped(model, loaded, files))


def load_classifier(files: Mapping[str, Path], *, device: str, in_format: str) -> Sight:
    """A whole classifier. Raises CannotLoad, OutOfMemory, DeviceBroken."""
    preparation = processor_of(files)
    loaded = load_hub("AutoModelForImageClassification", files, device=device, in_format=in_format)
    return Sight(device, _dtype(loaded), preparation, preparation.scaling, loaded)


def is_lite(files: Mapping[str, Path]) -> bool:
    return _config(files).get("model_type") == MODEL_TYPE


def _config(files: Mapping[str, Path]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(files["config.json"].read_text("utf-8"))
    except (KeyError, OSError, ValueError) as error:
        raise CannotLoad(f"config.json cannot be read: {type(error).__name__}") from error
    return found


def _lite(files: Mapping[str, Path], device: str, in_format: str) -> Sight:
    from safetensors.torch import load_file

    config = _config(files)
    try:
        with torch_errors():
            weights = load_file(files["model.safetensors"], device=device)
            model = Lite.of(weights).to(DTYPES[in_format])
            # One of its overloads says so, in words that the checker does not find.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.requires_grad_(False)
            if device == "cpu" and not cpu_computes(in_format):
                model = imitated(model)
        cut = MiddleSquare(int(config["short_side"]), int(config["image_size"]))
    except (OutOfMemory, DeviceBroken):
        raise
    except Exception as error:
        raise CannotLoad(
            f"no EfficientNet-Lite can be loaded from this folder: {type(error).__name__}"
        ) from error
    return Sight(device, _dtype(model), cut, LITE_SCALING, model)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """What it computes in: fp32 where the CPU imitates a format."""
    return next(model.parameters()).dtype


def two_towers(sight: Sight) -> TwoTowers | None:
    return sight.model if isinstance(sight.model, TwoTowers) else None


def joined(parts: Sequence[ImageVectors]) -> ImageVectors:
    """The parts of a batch as one."""
    stages = [part.stages for part in parts if part.stages is not None]
    return ImageVectors(torch.cat([part.last for part in parts]), torch.cat(stages) if stages else None)
