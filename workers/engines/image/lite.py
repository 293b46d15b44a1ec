"""EfficientNet-Lite in plain torch (Tan & Le, EfficientNet, ICML 2019; Lite: no squeeze-and-excitation, ReLU6).

The widths and depths follow from the shapes of the weights, so lite0 and lite2 are one module. BatchNorm is folded into
the convolutions when the weights are converted (workers/engines/image/converting.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional as f

#: Strides of the seven stages. A stage begins where the width of the blocks changes.
STRIDES = (1, 2, 2, 2, 1, 2, 1)
#: Stages whose last block gives features: not the first, of raw edges, nor the last, which the pooled output follows.
POOLED = range(1, 6)
#: Side of the grid that a stage's features are pooled to: where in the picture something is, roughly.
GRID = 2

Shape = tuple[int, ...]


class ImageVectors(NamedTuple):
    """What a trunk says of pictures, in fp32."""

    #: (n, dim): the pooled last features.
    last: Tensor
    #: (n, stage_dim): those of the stages before the last ones; None where nobody asked.
    stages: Tensor | None = None


@cache
def _is_packed(device: str, dtype: torch.dtype) -> bool:
    """Whether convolutions there are computed by oneDNN with weights in its own order, and ReLU6 inside.

    Else torch orders the weights anew for each batch, walks over every activation once more for ReLU6, and computes those
    of 1 x 1 on one thread by its slowest way: a picture takes a quarter longer.
    """
    found = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return found and device == "cpu" and dtype in (torch.float32, torch.bfloat16) and mkldnn.is_available()  # type: ignore[no-untyped-call]


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: what cannot be shared evenly is added at the right and the bottom.

    Without gradients.
    """

    def __init__(self, shape: Shape, *, stride: int = 1, relu6: bool = True) -> None:
        out, into, side, _ = shape
        # A depthwise one has a weight for each channel alone.
        groups = out if into == 1 else 1
        even = (side - 1) // 2 if stride == 1 else 0
        super().__init__(into * groups, out, side, stride, even, groups=groups)
        self._relu6 = relu6
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        stride, side = self.stride[0], self.kernel_size[0]
        if stride > 1:
            high, wide = (max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[-2:])
            x = f.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        if not _is_packed(x.device.type, x.dtype):
            y = super().forward(x)
            return f.relu6(y, inplace=True) if self._relu6 else y
        how = self.padding, self.stride, self.dilation, self.groups
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *how, x.shape)
        after = ("hardtanh", [0.0, 6.0]) if self._relu6 else ("none", [])
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *how, *after, "")
        return out


class LiteBlock(nn.Module):
    """An inverted residual block: wider, over the picture, narrower."""

    def __init__(self, shapes: Mapping[str, Shape], *, stride: int) -> None:
        super().__init__()
        expand, depthwise, project = shapes.get("expand"), shapes["depthwise"], shapes["project"]
        self.expand = None if expand is None else SameConv(expand)
        self.depthwise = SameConv(depthwise, stride=stride)
        self.project = SameConv(project, relu6=False)
        into = depthwise[0] if expand is None else expand[1]
        self._adds = stride == 1 and into == project[0]

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        out: Tensor = x + y if self._adds else y
        return out


class Lite(nn.Module):
    """The trunk without its classifier."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        """``shapes``: of ``stem.weight``, ``blocks.0.project.weight``, ``head.weight`` …"""
        super().__init__()
        self.stem = SameConv(shapes["stem.weight"], stride=2)
        self.head = SameConv(shapes["head.weight"])
        count = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        blocks = [_shapes_of(shapes, number) for number in range(count)]
        widths = [block["project"][0] for block in blocks]
        begins = [i for i, width in enumerate(widths) if i == 0 or width != widths[i - 1]]
        if len(begins) != len(STRIDES):
            raise ValueError(f"{len(begins)} stages; expected {len(STRIDES)}")
        strides = dict(zip(begins, STRIDES, strict=True))
        self.blocks = nn.ModuleList(
            LiteBlock(block, stride=strides.get(i, 1)) for i, block in enumerate(blocks)
        )
        ends = [*(begin - 1 for begin in begins[1:]), count - 1]
        self._pooled = frozenset(ends[stage] for stage in POOLED)
        self.dim = shapes["head.weight"][0]
        self.stage_dim = self.dim + GRID * GRID * sum(widths[at] for at in self._pooled)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Lite:
        """The trunk with these weights. Raises KeyError, ValueError, RuntimeError for those of something else."""
        with torch.device("meta"):
            model = cls({name: tuple(weight.shape) for name, weight in weights.items()})
        model.load_state_dict(dict(weights), assign=True)
        return model.eval()

    def forward(self, pixels: Tensor, *, stages: bool = False) -> ImageVectors:
        """``pixels``: (n, 3, side, side), from -1 to 1."""
        x = self.stem(pixels)
        found: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if stages and number in self._pooled:
                found.append(f.adaptive_avg_pool2d(x.float(), GRID).flatten(1))
        last = self.head(x).mean((2, 3), dtype=torch.float32)
        return ImageVectors(last, torch.cat([*found, last], 1) if stages else None)


def _shapes_of(shapes: Mapping[str, Shape], number: int) -> dict[str, Shape]:
    prefix = f"blocks.{number}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight")
    }
