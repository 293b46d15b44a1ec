"""Weights of eight bits: matrices and embedding tables kept as int8 or fp8 with a scale a row, widened as they are used.

What is computed stays in the format of the pass (fp32, bf16), so this saves memory and not products: a matrix of eight
bits is widened in a hundredth of the time that a micro-batch is multiplied with it. In a file ``X.weight`` becomes
``X.weight_int8`` (or ``X.weight_fp8``: the bytes of float8_e4m3fn) and ``X.weight_scale``. So whoever does not know this
finds that ``X.weight`` is missing, and never takes small whole numbers for weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers.engine import CannotLoad

#: Kind -> largest number of a row, once it was divided by its scale.
LARGEST: Mapping[str, float] = {"int8": 127.0, "fp8": 448.0}
_SCALE = "weight_scale"


def pack(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as eight bits each, and the rows' scales (rows, 1) in bf16.

    Scales are rounded up to what bf16 can hold, so that they are the same in every format that is computed in.
    """
    exact = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    # bf16 keeps eight bits of a number: 2**-8 more is at least the next one.
    near = exact.bfloat16()
    scale = torch.where(near.float() < exact, (exact * (1 + 2**-8)).bfloat16(), near)
    small = weight.float() / scale.float()
    if kind == "fp8":
        return small.to(torch.float8_e4m3fn).view(torch.uint8), scale
    return small.round().to(torch.int8), scale


class _Packed(nn.Module):
    """Eight bits and scales, under names that say the kind."""

    weight_scale: torch.Tensor

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer(f"weight_{kind}", stored)
        self.register_buffer(_SCALE, scale)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, widened. Some architectures read it from outside."""
        return self._widened(self.stored, self.weight_scale)

    @property
    def stored(self) -> torch.Tensor:
        found: torch.Tensor = self._buffers[f"weight_{self.kind}"]  # type: ignore[assignment]
        return found

    def _widened(self, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.kind == "fp8":
            # Kept as bytes, because a module that is cast to a format would cast fp8 as well.
            stored = stored.view(torch.float8_e4m3fn).to(scale.dtype)
        # Whole numbers take the format of the scale on the way: one pass over the memory.
        return stored * scale


class PackedLinear(_Packed):
    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, kind: str, bias: Any) -> None:
        super().__init__(stored, scale, kind)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class PackedEmbedding(_Packed):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._widened(self.stored[ids], self.weight_scale[ids])


def pack_model(model: nn.Module, kind: str) -> None:
    """Replace every linear layer and every embedding of a model by its packed form, in place."""
    for path, module in _packable(model):
        _put(model, path, _as_packed(module, *pack(module.weight.data, kind), kind))


def packed_kind(files: Mapping[str, Path]) -> str:
    """How the weights of a folder are packed, "int8" or "fp8"; "" where they are not. Reads headers alone."""
    names = {name.rpartition(".")[2] for path in _shards(files) for name in _tensors(path)}
    return next((kind for kind in LARGEST if f"weight_{kind}" in names), "")


def load_packed(
    auto_class: str,
    files: Mapping[str, Path],
    kind: str,
    *,
    in_format: torch.dtype,
    attention: str | None,
    device: str = "cpu",
) -> tuple[nn.Module, list[str]]:
    """The model of a packed folder, computing in a format, and the names of weights that the folder lacks.

    Its weights are on the device; buffers that no file holds are not yet.
    """
    import transformers
    from safetensors.torch import load_file
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(files["config.json"].parent, local_files_only=True)
    with no_init_weights():
        # Not touched before it is replaced, so that the wide weights never take any memory.
        model: nn.Module = getattr(transformers, auto_class).from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
    tensors: dict[str, torch.Tensor] = {}
    for shard in _shards(files):
        tensors |= load_file(shard, device=device)
    packable = dict(_packable(model))
    for name in [name for name in tensors if name.endswith(f".weight_{kind}")]:
        path = name.rpartition(".")[0]
        stored, scale = tensors[name], tensors.get(f"{path}.{_SCALE}")
        module = packable.get(path)
        if module is None or scale is None or stored.shape != module.weight.shape:
            raise CannotLoad(f"its {kind} weights do not fit its configuration at {path}")
        _put(model, path, _as_packed(module, stored, scale, kind))
    told = model.load_state_dict(tensors, strict=False, assign=True)
    # Buffers that no file holds are computed from the configuration; parameters never are.
    return model.to(in_format), list(told.missing_keys)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers that a model holds, those that are used twice counted once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def _packable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from (
        (path, module)
        for path, module in list(model.named_modules())
        # Not a layer that inherits from one of these, and may do something else.
        if type(module) in (nn.Linear, nn.Embedding)
    )


def _as_packed(module: Any, stored: torch.Tensor, scale: torch.Tensor, kind: str) -> _Packed:
    if isinstance(module, nn.Linear):
        return PackedLinear(stored, scale, kind, module.bias)
    return PackedEmbedding(stored, scale, kind)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _shards(files: Mapping[str, Path]) -> list[Path]:
    return [path for name, path in sorted(files.items()) if name.endswith(".safetensors")]


def _tensors(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())
