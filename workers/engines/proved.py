"""Which models may read rows beside rows: architectures that were proved here, and what registration proves of others.

A causal language model reads the tokens of all rows in one line; only attention tells rows apart. Layers that carry
what they read from token to token (convolutions, recurrences) would carry it from row to row, and so from tenant to
tenant; positions that depend on the longest row change with a row's neighbours. So an architecture is admitted where
tests/architectures/test_proved.py proves it on a small model of its kind, or where registration has proved it on the true
weights (workers/engines/proof.py). Pure, and imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad

#: ``model_type`` of the language models that tests prove.
PROVED_LANGUAGE = frozenset({
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "cwm", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
    "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
#: ``model_type`` of the encoders and classifiers that tests prove.
PROVED_ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "modernbert", "mpnet",
    "nomic_bert", "rembert", "roberta", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip
#: Layers that only attention connects to other tokens, as configurations name them. All others carry what they read
#: along the line, or attend in a way of their own.
CONNECTED_BY_ATTENTION = frozenset({"full_attention", "sliding_attention", "attention"})
#: Where configurations name the kinds of their layers.
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types")
#: Rotary positions that depend on the longest row of a step, beyond the length that the model was trained for.
_OF_THE_LONGEST = frozenset({"dynamic", "longrope", "su"})

#: Key in ``Manifest.scores``: of each numeric format, the distance that registration measured.
PROOF = "among_others"
#: Numeric format -> the largest distance of a row among others from the same row alone, as a share of its numbers'
#: length. Below 1e-6 on small models, where rows mix beyond 0.15. Whether they mix is decided in fp32; bf16 rounds more,
#: and most of all where a router chooses between experts that are nearly as good.
TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.25}
#: What an administrator may do about a language model that is refused.
ELSEWHERE = "serve it through vLLM instead: motet models add … --engine vllm"


@runtime_checkable
class Provable(Protocol):
    """An engine that can prove of a loaded model that its rows do not mix."""

    def among_others(self, handle: Any, texts: Sequence[str]) -> float:
        """The largest distance of a row among others from the same row alone. Raises what ``Engine.run`` raises."""
        ...


def check_language(model: Manifest, config: Any) -> None:
    """Raise CannotLoad where a language model's rows may mix. ``config``: as transformers has read it."""
    kind = str(config.model_type)
    if strange := sorted(_kinds(config) - CONNECTED_BY_ATTENTION):
        raise CannotLoad(
            f"{kind} has layers of the kind {', '.join(strange)}; expected attention to all tokens or to a sliding "
            "window, since layers that hand on what they read from token to token would mix rows here; "
            f"{ELSEWHERE}"
        )
    _check_positions(model, config.to_dict(), f", or {ELSEWHERE}")
    _check_listed(model, kind, PROVED_LANGUAGE, f", or {ELSEWHERE}")


def check_encoder(model: Manifest, config: Any) -> None:
    """The same of an encoder or a classifier."""
    _check_positions(model, config.to_dict(), "")
    _check_listed(model, str(config.model_type), PROVED_ENCODERS, "")


def is_listed(model: Manifest, kind: str) -> bool:
    """Whether the architecture of this ``model_type`` is one that tests prove."""
    return kind in (PROVED_LANGUAGE if model.answers == "text" else PROVED_ENCODERS)


def steady_tokens(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which a row's positions do not depend on other rows; None: they never do.

    ``config``: a ``config.json``, or what transformers made of it.
    """
    shape = config.get("text_config") or config
    limits = [_steady(shape, rope) for rope in _ropes(shape) if _rope_type(rope) in _OF_THE_LONGEST]
    return min(limits, default=None)


def within(distance: float, in_format: str) -> bool:
    """Whether a row among others is the same as alone."""
    return distance <= TOLERANCE[in_format]


def mixes(model: Manifest, distance: float) -> str:
    """Why a model is refused whose rows among others are so far, in fp32, from the same rows alone."""
    if model.answers == "text":
        what, remedy = "the logits of a row among others", f"; {ELSEWHERE}"
    else:
        what, remedy = "the answer to a row beside longer ones", "; choose a model of another architecture"
    return (
        f"rows would mix: {what} differ from those of the row alone by {distance:.2g} of their length, where "
        f"{TOLERANCE['fp32']:g} is rounding{remedy}"
    )


def on_trial(model: Manifest) -> Manifest:
    """The manifest of a model that is about to be proved: engines load it whatever its architecture."""
    return model if PROOF in model.scores else _with_proof(model, {})


def inherited(model: Manifest, source: Manifest) -> Manifest:
    """The manifest of a model of the same shape as another one, whose proof holds for it: weights do not matter."""
    return _with_proof(model, source.scores[PROOF]) if PROOF in source.scores else model


def _with_proof(model: Manifest, proof: Any) -> Manifest:
    return replace(model, scores={**model.scores, PROOF: proof})


def _check_positions(model: Manifest, config: Mapping[str, Any], otherwise: str) -> None:
    steady = steady_tokens(config)
    if steady is not None and model.max_tokens > steady:
        raise CannotLoad(
            f"a row of more than {steady} tokens changes the rotary positions of the rows beside it, and the manifest "
            f"lets it read {model.max_tokens}; register it again under another --version with --max-tokens {steady}"
            f"{otherwise}"
        )


def _check_listed(model: Manifest, kind: str, listed: frozenset[str], otherwise: str) -> None:
    if kind not in listed and PROOF not in model.scores:
        raise CannotLoad(
            f"the architecture {kind} is none of those proved to keep rows apart, and {model.ref} was registered before "
            f"that was proved of each model; register it again under another --version{otherwise}"
        )


def _kinds(config: Any) -> set[str]:
    config = config.get_text_config()
    return {str(kind) for name in _KINDS_OF_LAYERS for kind in getattr(config, name, None) or ()}


def _ropes(shape: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters: one for all layers, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = shape.get(name)
        if isinstance(found, Mapping):
            yield found
            yield from (rope for rope in found.values() if isinstance(rope, Mapping))


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "")


def _steady(shape: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    trained = shape.get("max_position_embeddings")
    if _rope_type(rope) != "dynamic":
        trained = (
            shape.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or trained
        )
    return int(trained or 0)
