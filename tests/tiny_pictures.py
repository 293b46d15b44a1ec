"""Tiny random models that read pictures, made without a download: EfficientNet-Lite in small, and ten of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Pixels of a side of what they read.
SIDE = 32
#: Widths of the seven stages of a small EfficientNet-Lite; the third has two blocks.
WIDTHS = (4, 6, 8, 8, 10, 12, 14, 16)
DIM = 24
#: Its stages behind which features are pooled, 2 x 2 of each.
STAGE_DIM = 4 * (6 + 8 + 10 + 12 + 14) + DIM


def lite_weights(seed: int = 0) -> dict[str, Any]:
    """As workers/engines/image/converting.py leaves them."""
    import torch

    dice = torch.Generator().manual_seed(seed)

    def conv(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice) * (shape[1] * shape[2] * shape[3]) ** -0.5 * 1.6

    found = {"stem.weight": conv(4, 3, 3, 3)}
    into = 4
    for number, width in enumerate(WIDTHS):
        wide = into if number == 0 else 2 * into
        if wide != into:
            found[f"blocks.{number}.expand.weight"] = conv(wide, into, 1, 1)
        side = 5 if number == 4 else 3
        found[f"blocks.{number}.depthwise.weight"] = conv(wide, 1, side, side)
        found[f"blocks.{number}.project.weight"] = conv(width, wide, 1, 1)
        into = width
    found["head.weight"] = conv(DIM, into, 1, 1)
    biases = {
        name.replace("weight", "bias"): torch.randn(len(weight), generator=dice) * 0.1
        for name, weight in found.items()
    }
    return found | biases


def a_lite(folder: Path, seed: int = 0) -> Path:
    """Its folder, as registration takes it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "efficientnet_lite", "architectures": ["EfficientNetLite"], "image_size": SIDE}
    (folder / "config.json").write_text(json.dumps({**config, "short_side": SIDE + 4}))
    save_file(lite_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 8,
}
_TOWER: Mapping[str, Any] = {k: v for k, v in _VIT.items() if k not in ("image_size", "patch_size")}
#: ``model_type`` -> its configuration, its processor, and what that is told.
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any], str, Mapping[str, Any]]] = {
    "vit": ("ViT", _VIT, "ViTImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}}),
    "deit": ("DeiT", _VIT, "DeiTImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": {"height": SIDE, "width": SIDE}}),
    "dinov2": ("Dinov2", {**_VIT, "mlp_ratio": 2}, "BitImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}}),
    "beit": ("Beit", _VIT, "BeitImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": SIDE}, "ConvNextImageProcessorPil", {"size": {"shortest_edge": SIDE}}),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"}, "ConvNextImageProcessorPil", {"size": {"shortest_edge": SIDE}}),
    "swin": ("Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4}, "ViTImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": SIDE}, "MobileNetV2ImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}}),
}  # fmt: skip
LABELS = ("cat", "dog", "tree")


def an_image_model(folder: Path, kind: str, *, trunk: bool = False, seed: int = 0) -> Path:
    """A classifier of three labels, or its trunk, of one of ARCHITECTURES, saved with its processor."""
    import torch
    import transformers

    name, shape, processor, options = ARCHITECTURES[kind]
    classes = dict(enumerate(LABELS))
    config = getattr(transformers, f"{name}Config")(
        **shape, id2label=classes, label2id={label: i for i, label in classes.items()}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}Model" if trunk else f"{name}ForImageClassification")(config)
    model.eval().save_pretrained(folder)
    getattr(transformers, processor)(**options).save_pretrained(folder)
    return folder


def two_towers(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    """A CLIP or a SigLIP with a byte-level tokenizer."""
    import torch
    import transformers

    from tests.tiny_language import a_tokenizer

    vocabulary = a_tokenizer(folder, None)
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    text = {**_TOWER, "vocab_size": vocabulary, "max_position_embeddings": 40}
    # CLIP's text ends at its last token, whose id is the largest where none is named.
    ends = {"eos_token_id": 2} if kind == "clip" else {"pad_token_id": 0}
    more = {"projection_dim": 16} if kind == "clip" else {}
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, **ends}, vision_config=dict(_VIT), **more
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}Model")(config)
    model.eval().save_pretrained(folder)
    size = {"clip": {"shortest_edge": SIDE}, "siglip": {"height": SIDE, "width": SIDE}}[kind]
    crop = {"crop_size": {"height": SIDE, "width": SIDE}} if kind == "clip" else {}
    getattr(transformers, f"{name}ImageProcessorPil")(size=size, **crop).save_pretrained(folder)
    return folder
