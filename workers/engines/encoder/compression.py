"""Smaller forms of an encoder: fewer layers, weights of eight bits or bf16; and heads fitted anew to what it then says.

Dropping the last layers of a trunk changes what its vectors mean, so heads must learn from them; linear layers on
frozen vectors learn in seconds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from motet.protocol.columns import Column
from motet.protocol.manifest import Answer
from motet.training.recipe import Recipe, Target
from workers.engine import CannotLoad
from workers.engines.packed import LARGEST, pack_model, packed_kind
from workers.engines.training.heads import Heads, even_thresholds
from workers.engines.training.truth import Truth
from workers.engines.trunk import load_transformer
from workers.registrar.describe import SHAPE, read_json

#: Weight of the squared weights in a head's loss, on standardised features.
PENALTY = 0.01
ROUNDS = 200


def write_trunk(files: Mapping[str, Path], out: Path, *, layers: int, weights: str) -> None:
    """A folder with the first ``layers`` layers (0: all) of an encoder and its weights as fp32, bf16, int8 or fp8.

    Raises CannotLoad where the model cannot be cut or packed, OutOfMemory.
    """
    from safetensors.torch import save_file

    if packed_kind(files):
        raise CannotLoad("its weights are packed already; compress the model that it was made from")
    out.mkdir(parents=True, exist_ok=True)
    config = read_json(files["config.json"])
    if layers:
        config = _cut(config, layers)
    for name, path in files.items():
        if name.endswith(".json") and not name.endswith(".index.json"):
            shutil.copyfile(path, out / name)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model = load_transformer(
            "AutoModel",
            _beside(files, out / "config.json", Path(scratch)),
            device="cpu",
            in_format="fp32",
            may_miss=("pooler.",),
        )
        if weights in LARGEST:
            pack_model(model, weights)
        tensors = {
            name: (t.bfloat16() if weights == "bf16" and t.is_floating_point() else t).contiguous()
            for name, t in model.state_dict().items()
        }
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _cut(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration of a model that ends after so many layers. What it lists layer by layer is cut too."""
    name = next((name for name in SHAPE["layers"] if isinstance(config.get(name), int)), "")
    if not name or not 0 < layers < config[name]:
        raise CannotLoad(
            f"layers:{layers}: the model has {config.get(name, 'an unknown number of')} layers; "
            "expected a number below that, and above 0"
        )
    every = config[name]
    lists = {
        k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == every and "layer" in k
    }
    return {**config, **lists, name: layers}


def _beside(files: Mapping[str, Path], config: Path, folder: Path) -> dict[str, Path]:
    """The files in a folder of their own, with another configuration."""
    placed = {}
    for name, path in files.items():
        placed[name] = folder / name
        placed[name].symlink_to((config if name == "config.json" else path).resolve())
    return placed


def fit_head(
    vectors: Column, truth: Sequence[Any], answers: Answer, labels: Sequence[str], out: Path
) -> tuple[float, ...]:
    """Write the linear layer that best gives these answers from these vectors, and return its thresholds.

    ``vectors``: of the rows, not normalised. ``truth``: by row a label, a set of labels or a number; None: not known,
    and the row is not learned from. Logistic regression (of numbers: least squares) with a penalty, solved by L-BFGS:
    the same rows give the same head. Of several labels, each gets the threshold at which it is given as often as it is
    true.
    """
    from safetensors.torch import save_file

    known = [row for row, one in enumerate(truth) if one is not None]
    features = torch.frombuffer(bytearray(vectors.arrays["vectors"]), dtype=torch.float32)
    features = features.reshape(len(vectors), -1)[known]
    target = _target([truth[row] for row in known], answers, labels)
    rows = torch.arange(len(known))
    # One linear head and nothing at random: its loss and its standard features are those of every head.
    recipe = Recipe(
        name="", version="", trunk="", job="", train_rows=len(known), test_rows=0, targets=(target,), hidden=0
    )
    truths = [Truth.of(target)]
    heads = Heads(recipe, truths, features, rows).eval()
    _solve(heads, features, rows)
    head = heads.export(0)
    # Not save_file's own way with permissions: it is read by the same user alone.
    save_file(head, out)
    if answers != "labels":
        return ()
    return even_thresholds((features @ head["weight"].T + head["bias"]).sigmoid(), truths[0].values)


def _target(truth: Sequence[Any], answers: Answer, labels: Sequence[str]) -> Target:
    if answers == "number":
        return Target.number("head", truth)
    return (
        Target.multi("head", labels, truth) if answers == "labels" else Target.single("head", labels, truth)
    )


def _solve(heads: Heads, features: torch.Tensor, rows: torch.Tensor) -> None:
    weight = heads.out.weight
    solver = torch.optim.LBFGS([weight, heads.out.bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def step() -> float:
        solver.zero_grad()
        loss = heads.loss(heads(features), rows)[0] + PENALTY * weight.square().sum()
        torch.autograd.backward(loss)
        return loss.detach().item()

    solver.step(step)  # type: ignore[no-untyped-call]
