"""LoRA adapters on one base model, in one batch: each token takes the way of its own task's adapter.

What an adapter adds to a linear layer is ``x A^T B^T * scale`` (Hu et al., LoRA, ICLR 2022), computed for its tokens only
(Chen et al., Punica, MLSys 2024, do so with a kernel of their own).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workers.engine import CannotLoad

_BEFORE = "base_model.model."


@dataclass(slots=True)
class Adapters:
    """The adapters of a loaded model."""

    model: torch.nn.Module
    device: str
    #: Adapter -> name of a linear layer -> A (rank, in) and B (out, rank), B scaled.
    weights: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    #: Of the step that runs: each adapter with its tokens.
    tokens: Sequence[tuple[str, torch.Tensor]] = ()
    _hooked: set[str] = field(default_factory=set)

    def add(self, name: str, files: Mapping[str, Path]) -> None:
        """Raises CannotLoad where it does not fit the model."""
        if name in self.weights:
            return
        from safetensors.torch import load_file

        try:
            spec = json.loads(files["adapter_config.json"].read_text("utf-8"))
            read = load_file(files["adapter_model.safetensors"])
            scale = _scale(spec)
        except Exception as error:
            raise CannotLoad(f"the adapter cannot be read: {type(error).__name__}") from error
        dtype = next(self.model.parameters()).dtype
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in read.items():
            layer, _, side = key.removeprefix(_BEFORE).removesuffix(".weight").rpartition(".")
            if side not in ("lora_A", "lora_B"):
                raise CannotLoad(
                    f"the adapter changes {key}; only lora_A and lora_B of linear layers can be added"
                )
            layers.setdefault(layer, {})[side] = tensor.to(self.device, dtype)
        found = {}
        for layer, sides in layers.items():
            linear = self._linear(layer)
            a, b = sides.get("lora_A"), sides.get("lora_B")
            fits = a is not None and b is not None and a.shape[1] == linear.in_features
            if a is None or b is None or not fits or b.shape != (linear.out_features, a.shape[0]):
                raise CannotLoad(f"the adapter does not fit {layer}")
            found[layer] = (a, b * scale)
        for layer in found.keys() - self._hooked:
            self._linear(layer).register_forward_hook(self._hook(layer))
            self._hooked.add(layer)
        self.weights[name] = found

    def release(self) -> None:
        """Let go of all memory."""
        self.weights.clear()
        self.model = torch.nn.Identity()

    def _linear(self, layer: str) -> torch.nn.Linear:
        try:
            found = self.model.get_submodule(layer)
        except AttributeError:
            raise CannotLoad(f"the adapter changes {layer}, which this model has not") from None
        if not isinstance(found, torch.nn.Linear):
            raise CannotLoad(f"the adapter changes {layer}, which is no linear layer")
        return found

    def _hook(self, layer: str) -> Any:
        def add(_: torch.nn.Module, given: tuple[torch.Tensor, ...], answer: torch.Tensor) -> torch.Tensor:
            for name, tokens in self.tokens:
                if (pair := self.weights[name].get(layer)) is not None:
                    a, b = pair
                    answer[0, tokens] += given[0][0, tokens] @ a.T @ b.T
            return answer

        return add


def _scale(spec: Mapping[str, Any]) -> float:
    rank, alpha = int(spec["r"]), float(spec["lora_alpha"])
    return alpha / (math.sqrt(rank) if spec.get("use_rslora") else rank)
