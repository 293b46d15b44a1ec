"""LoRA adapters as PEFT saves them: a small model that names the language model it changes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motet.errors import SetupError
from motet.protocol.manifest import Manifest
from workers.registrar.describe import PICKLES, Described, read_json, sitting_on, tensor_sizes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT can do beyond two low-rank matrices for each product, and engines do not.
_MORE = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's folder, before its base model is known by digest."""

    folder: Path
    spec: Mapping[str, Any] = field(repr=False)
    #: Name of the registered model that it changes.
    trunk: str

    def on(self, trunk: Manifest, *, name: str, version: str, licence: str) -> Described:
        """The adapter on this model. Raises SetupError where that writes nothing."""
        if trunk.answers != "text" or trunk.trunk_model or not trunk.trunk:
            raise SetupError(
                f"{self.folder.name}: {trunk.ref} is no language model of its own; name the one it was trained on: "
                "--trunk NAME"
            )
        files = {file: self.folder / file for file in (CONFIG, WEIGHTS)}
        tensor_sizes(files[WEIGHTS])
        base = str(self.spec.get("base_model_name_or_path", ""))[:200]
        return sitting_on(
            trunk,
            files,
            name=name,
            version=version,
            answers="text",
            licence=licence or trunk.licence,
            source={"folder": self.folder.name, "base": base},
        )


def read_adapter(folder: Path, trunk: str | None = None) -> Adapter | None:
    """The adapter in a folder; None where it holds none. ``trunk``: the model it changes, where its own word for that
    is not the registered name. Raises SetupError where engines cannot apply it."""
    if not (folder / CONFIG).is_file():
        return None
    spec = read_json(folder / CONFIG)
    kind = spec.get("peft_type")
    more = [option for option in _MORE if spec.get(option)]
    if kind != "LORA" or more or spec.get("bias", "none") != "none":
        got = ", ".join([str(kind), *more, *([] if spec.get("bias", "none") == "none" else ["bias"])])
        raise SetupError(
            f"{folder.name}: got an adapter of {got}; expected plain LoRA; merge it into its model "
            "(merge_and_unload) and register that"
        )
    rank = spec.get("r")
    if (
        not isinstance(rank, int)
        or not 1 <= rank <= 1024
        or spec.get("rank_pattern")
        or spec.get("alpha_pattern")
    ):
        raise SetupError(f"{folder.name}: got rank {rank!r}; expected one rank from 1 to 1,024 for all of it")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise SetupError(
            f"{folder.name}: got {', '.join(pickles[:3]) or 'no weights'}; expected {WEIGHTS}, because pickled weights "
            "run code when they are read; save it again with safe_serialization=True"
        )
    said = re.split(r"[/\\]", str(spec.get("base_model_name_or_path") or ""))[-1]
    if not (trunk or said):
        raise SetupError(f"{folder.name}: it names no base model; name the registered one: --trunk NAME")
    return Adapter(folder=folder, spec=spec, trunk=trunk or said)
