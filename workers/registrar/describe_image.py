"""From a folder to the manifest of a model that reads pictures. What no file tells is found by showing it a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from motet.errors import SetupError
from motet.protocol.manifest import Answer, Manifest, trunk_digest
from workers.engine import CannotLoad
from workers.engines.image.files import MODEL_TYPE, PROCESSORS

#: End of the names of architectures that are whole classifiers of pictures.
CLASSIFIER = "ForImageClassification"


def reads_pictures(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the model of this folder reads pictures and nothing beside them, but the words of labels."""
    if config.get("model_type") == MODEL_TYPE or architecture_of(config).endswith(CLASSIFIER):
        return True
    prepares = any((folder / name).is_file() for name in PROCESSORS)
    # A vision-language model has both, too; it writes.
    writes = architecture_of(config).endswith(
        ("ForConditionalGeneration", "ForImageTextToText", "ForCausalLM")
    )
    return prepares and not writes and (has_towers(config) or "text_config" not in config)


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether it gives vectors of pictures and of texts, as CLIP does."""
    return "vision_config" in config and "text_config" in config


def needed_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What its folder must hold beside its weights."""
    return ("config.json", "tokenizer.json") if has_towers(config) else ("config.json",)


def described_image(
    base: Manifest,
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    classes: tuple[Answer, Sequence[str]],
) -> Manifest:
    """The manifest. ``base``: what all models have; ``classes``: of a whole classifier, what it answers and its labels by
    code. Raises SetupError."""
    from workers.engines.image.facts import facts_of, tokens_of

    base = replace(base, reads="image", engine="image", dim=0, pooling="")
    try:
        if architecture_of(config).endswith(CLASSIFIER):
            return replace(
                base,
                engine="image-classifier",
                answers=classes[0],
                labels=unique(classes[1]),
                max_tokens=tokens_of(files),
            )
        answers: Answer = "match" if has_towers(config) else "vector"
        found = facts_of(files, answers)
    except CannotLoad as error:
        raise SetupError(f"{base.name}: {error}") from None
    return replace(
        base,
        answers=answers,
        dim=found.dim,
        stage_dim=found.stage_dim,
        pooling=found.pooling,
        max_tokens=found.tokens,
        trunk=image_digest(base.files),
    )


def image_digest(files: Mapping[str, str]) -> str:
    """The trunk digest of a model of pictures with these files (relative path -> sha256)."""
    weights = [digest for name, digest in sorted(files.items()) if name.endswith(".safetensors")]
    beside = [files[name] for name in (*PROCESSORS, "tokenizer.json") if name in files]
    return trunk_digest(
        weights_sha256="\n".join(weights),
        tokenizer_sha256="\n".join(beside),
        config_sha256=files["config.json"],
    )


def unique(labels: Sequence[str]) -> tuple[str, ...]:
    """The same labels, each once: those that repeat are told apart by their code (ImageNet has two cranes)."""
    often = Counter(labels)
    return tuple(label if often[label] == 1 else f"{label} ({code})" for code, label in enumerate(labels))


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first architecture that a configuration names; "" for none."""
    return str((config.get("architectures") or [""])[0])
