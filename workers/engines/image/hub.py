"""Models of transformers that read pictures: their processors without torchvision, their trunks, their two towers."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad
from workers.engines.image.files import PROCESSORS
from workers.engines.image.lite import ImageVectors
from workers.engines.image.preparing import Pixels
from workers.engines.trunk import load_transformer

#: What a folder must hold beside its weights.
NEEDED = ("config.json",)
#: Pictures that a processor is tried on: wide, high, small.
TRIED = ((300, 200), (200, 340), (20, 30))
#: How far our numbers may be from the processor's own: rounding in fp32.
CLOSE = 1e-4
WITHOUT_TORCHVISION = (
    "its pictures are prepared by {name}, which needs torchvision, and motet prepares pictures without it, by Pillow; "
    "choose a model whose image processor has a form for Pillow (its class in transformers ends in Pil)"
)


def processor_of(files: Mapping[str, Path]) -> Processed:
    """How the pictures of a folder are prepared. Raises CannotLoad, with the word torchvision where that is why."""
    import transformers

    if not any(name in files for name in PROCESSORS):
        raise CannotLoad(f"the model has no {PROCESSORS[0]}, which says how pictures are prepared")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            files["config.json"].parent, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:
        if "torchvision" in str(error):
            raise CannotLoad(WITHOUT_TORCHVISION.format(name="a class of transformers")) from None
        raise CannotLoad(f"its image processor cannot be read: {type(error).__name__}") from error
    if getattr(processor, "backend", "pil") != "pil":
        raise CannotLoad(WITHOUT_TORCHVISION.format(name=type(processor).__name__))
    return Processed.of(processor)


@dataclass(frozen=True, slots=True)
class Processed:
    """The preparation of an image processor: its resizing and cutting here, its scaling on the device."""

    processor: Any
    side: int | None
    #: What pixels of 0 to 255 are multiplied by and added to, by channel; None: the processor's own numbers are taken.
    scaling: tuple[tuple[float, ...], tuple[float, ...]] | None

    @classmethod
    def of(cls, processor: Any) -> Processed:
        """Raises CannotLoad where its pictures are not all of one size."""
        scaling = _scaling(processor)
        own = cls(processor, _side(processor), scaling)
        dice = np.random.default_rng(0)
        pictures = [
            Image.fromarray(dice.integers(0, 256, (height, width, 3), np.uint8)) for width, height in TRIED
        ]
        try:
            exact = [_run(processor, picture) for picture in pictures]
            if len({one.shape for one in exact}) > 1 or exact[0].ndim != 3:
                raise CannotLoad(
                    "its image processor brings pictures to several sizes; expected one size for all"
                )
            if scaling is None or not all(
                _alike(own(picture), one, scaling) for picture, one in zip(pictures, exact, strict=True)
            ):
                own = cls(processor, own.side, None)
        except CannotLoad:
            raise
        except Exception as error:
            raise CannotLoad(
                f"its image processor cannot prepare a picture: {type(error).__name__}"
            ) from error
        return own

    def __call__(self, picture: Image.Image) -> Pixels:
        if self.scaling is None:
            return np.ascontiguousarray(_run(self.processor, picture), np.float32)
        plain = _run(self.processor, picture, do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(plain.astype(np.uint8))


def _run(processor: Any, picture: Image.Image, **options: bool) -> Pixels:
    """(height, width, 3)"""
    (found,) = processor(images=picture, return_tensors="np", **options)["pixel_values"]
    return np.moveaxis(np.asarray(found), 0, -1)


def _scaling(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    rescale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if getattr(processor, "do_normalize", False):
        mean, std = (
            tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
            for value in (processor.image_mean, processor.image_std)
        )
    if not all(std):
        return None
    return tuple(rescale / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def _alike(pixels: Pixels, exact: Pixels, scaling: tuple[tuple[float, ...], tuple[float, ...]]) -> bool:
    factor, shift = (np.asarray(one, np.float32) for one in scaling)
    return pixels.shape == exact.shape and bool(np.allclose(pixels * factor + shift, exact, atol=CLOSE))


def _side(processor: Any) -> int | None:
    """Pixels that the shorter side is needed with: the largest number that its sizes name, and the frame it cuts off."""
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size")]
    found = [
        value for size in sizes if size is not None for value in _numbers(size) if isinstance(value, int)
    ]
    return int(max(found) / (getattr(processor, "crop_pct", None) or 1.0)) if found else None


def _numbers(size: Any) -> list[Any]:
    if isinstance(size, int):
        return [size]
    return list(size.values()) if isinstance(size, Mapping) else list(vars(size).values())


class HubTrunk:
    """A trunk of transformers: one vector of each picture."""

    def __init__(self, model: Any, pooling: str) -> None:
        self.loaded, self._pooling = model, pooling

    def __call__(self, pixels: Tensor, *, stages: bool = False) -> ImageVectors:
        return ImageVectors(pooled(self.loaded(pixel_values=pixels).last_hidden_state, self._pooling))


class TwoTowers:
    """CLIP, SigLIP and models of their form: a vector of each picture and of each text, in one space."""

    def __init__(self, model: Any, tokenizer: Path) -> None:
        from tokenizers import Tokenizer

        self._model = model
        text = model.config.text_config
        self._most = int(text.max_position_embeddings)
        #: SigLIP was trained on texts that are filled up, without a mask, and with a chance for each label by itself.
        self.apart = hasattr(model, "logit_bias")
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._most)
        if self.apart:
            pad = getattr(text, "pad_token_id", None) or 0
            self._tokenizer.enable_padding(length=self._most, pad_id=pad)

    def __call__(self, pixels: Tensor, *, stages: bool = False) -> ImageVectors:
        return ImageVectors(self._model.get_image_features(pixel_values=pixels).pooler_output.float())

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) of unit length."""
        device = next(self._model.parameters()).device
        found = []
        for text in texts:
            text = _plain(text) if self.apart else text
            # One at a time: nothing is filled up, so no mask is needed.
            ids = torch.tensor([self._tokenizer.encode(text).ids], device=device)
            found.append(self._model.get_text_features(input_ids=ids).pooler_output.float())
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def logits(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """(n, texts): how well they fit, as the model was trained to say it. ``pictures``: (n, dim), ``texts`` of unit length."""
        cosines = torch.nn.functional.normalize(pictures, dim=1) @ texts.T
        logits: Tensor = cosines * self._model.logit_scale.float().exp()
        return logits + self._model.logit_bias.float() if self.apart else logits


_MARKS = re.compile(f"[{re.escape(string.punctuation)}]")


def _plain(text: str) -> str:
    """As SigLIP was trained: lower case, no punctuation."""
    return " ".join(_MARKS.sub("", text.lower()).split())


def pooled(hidden: Tensor, pooling: str) -> Tensor:
    """One vector (n, dim) in fp32 of maps (n, dim, height, width) or of tokens (n, tokens, dim)."""
    if hidden.ndim == 4:
        return hidden.mean((2, 3), dtype=torch.float32)
    return hidden[:, 0].float() if pooling == "cls" else hidden.mean(1, dtype=torch.float32)


def load_hub(auto_class: str, files: Mapping[str, Path], *, device: str, in_format: str) -> Any:
    """A model of transformers. Raises CannotLoad, OutOfMemory, DeviceBroken."""
    return load_transformer(
        auto_class,
        files,
        device=device,
        in_format=in_format,
        # A pooler's own weights are often absent, and its answer is not read here.
        may_miss=("pooler.", "vit.pooler.") if auto_class == "AutoModel" else (),
        needed=NEEDED,
    )


def wrapped(model: Manifest, loaded: Any, files: Mapping[str, Path]) -> HubTrunk | TwoTowers:
    """A loaded trunk as its manifest says. Raises CannotLoad."""
    if model.answers != "match":
        return HubTrunk(loaded, model.pooling)
    if not (hasattr(loaded, "get_text_features") and hasattr(loaded, "logit_scale")):
        raise CannotLoad("its architecture gives no vectors of texts beside those of pictures")
    return TwoTowers(loaded, files["tokenizer.json"])
