"""Folders of language models and adapters, read without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from motet.errors import SetupError
from motet.protocol.manifest import Manifest
from workers.registrar.adapters import read_adapter
from workers.registrar.describe import Described, describe_folder

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def test_a_model_that_writes_is_described_with_what_attention_keeps_and_all_that_shapes_a_prompt(
    tmp_path: Path,
) -> None:
    found = described(a_folder(tmp_path, LLAMA, chat_template="{{ messages }}", generation_config="{}"))
    manifest = found.manifest
    assert (manifest.engine, manifest.answers, manifest.max_tokens) == ("causal", "text", 2048)
    assert manifest.kv_width == 2 * 3 * 2 * (32 // 4)
    assert (manifest.dim, manifest.pooling, manifest.labels) == (0, "", ())
    assert set(found.files) == {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert manifest.parameters == 5 * 32 + 7 * 32
    assert manifest.trunk != ""


@pytest.mark.parametrize(("tied", "parameters"), [(True, 5 * 32), (False, 5 * 32 + 7 * 32)])
def test_an_output_that_is_tied_to_the_input_counts_once_even_where_it_is_stored_twice(
    tmp_path: Path, tied: bool, parameters: int
) -> None:
    found = described(a_folder(tmp_path, {**LLAMA, "tie_word_embeddings": tied}))
    assert found.manifest.parameters == parameters


@pytest.mark.parametrize(
    ("config", "kv_width"),
    [
        ({**LLAMA, "head_dim": 16}, 2 * 3 * 2 * 16),
        ({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, 2 * 3 * 4 * 8),
        (
            {
                "architectures": ["GPT2LMHeadModel"],
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
            },
            2 * 2 * 32,
        ),
        ({"architectures": ["NewForCausalLM"], "text_config": {**LLAMA, "head_dim": 4}}, 2 * 3 * 2 * 4),
    ],
)
def test_shapes_are_read_by_the_names_that_architectures_give_them(
    tmp_path: Path, config: Mapping[str, Any], kv_width: int
) -> None:
    assert described(a_folder(tmp_path, config)).manifest.kv_width == kv_width


def test_a_tokenizer_that_says_less_than_there_are_positions_bounds_the_context(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, LLAMA, tokenizer_config='{"model_max_length": 512}')
    assert described(folder).manifest.max_tokens == 512
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert described(folder).manifest.max_tokens == 2048


def test_equal_weights_with_another_chat_template_are_another_trunk(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, LLAMA, chat_template="{{ messages }}")
    before = described(folder).manifest
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    after = described(folder).manifest
    assert before.trunk != after.trunk


@pytest.mark.parametrize("file", ["config", "tokenizer_config", "generation_config"])
def test_code_named_in_any_file_is_refused(tmp_path: Path, file: str) -> None:
    folder = a_folder(tmp_path, LLAMA)
    known = json.loads((folder / f"{file}.json").read_text()) if (folder / f"{file}.json").exists() else {}
    (folder / f"{file}.json").write_text(json.dumps({**known, "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(SetupError, match="auto_map"):
        described(folder)


def test_a_shape_that_is_not_told_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="got no num_hidden_layers"):
        described(a_folder(tmp_path, {"architectures": ["OddForCausalLM"], "hidden_size": 8, "n_head": 2}))


def test_an_adapter_is_a_model_on_its_base(tmp_path: Path) -> None:
    trunk = described(a_folder(tmp_path, LLAMA)).manifest
    adapter = read_adapter(an_adapter(tmp_path, base_model_name_or_path="org/base"))
    assert adapter is not None
    assert adapter.trunk == "base"
    manifest = adapter.on(trunk, name="formal", version="2", licence="").manifest
    assert (manifest.engine, manifest.answers, manifest.ref) == ("causal", "text", "formal@2")
    assert (manifest.trunk, manifest.trunk_model) == (trunk.trunk, trunk.ref)
    assert (manifest.max_tokens, manifest.kv_width) == (trunk.max_tokens, trunk.kv_width)
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest.source == {"folder": "adapter", "base": "org/base"}
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_registered_name_of_the_base_may_be_given(tmp_path: Path) -> None:
    adapter = read_adapter(an_adapter(tmp_path, base_model_name_or_path="/home/me/x"), "smollm2-135m")
    assert adapter is not None
    assert adapter.trunk == "smollm2-135m"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"peft_type": "IA3"}, "got an adapter of IA3; expected plain LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "rank 0"),
        ({"rank_pattern": {"q": 4}}, "one rank"),
        ({"base_model_name_or_path": None}, "--trunk NAME"),
        ({"auto_map": {}}, "auto_map"),
    ],
)
def test_an_adapter_that_engines_cannot_apply_is_refused(
    tmp_path: Path, spec: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(SetupError, match=said):
        read_adapter(an_adapter(tmp_path, **spec))


def test_an_adapter_of_pickles_is_refused(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SetupError, match=r"got adapter_model\.bin"):
        read_adapter(folder)


def test_an_adapter_sits_on_no_encoder_and_on_no_other_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(an_adapter(tmp_path))
    assert adapter is not None
    for trunk in (
        Manifest(name="e", version="1", engine="encoder", answers="vector", trunk="0" * 64),
        Manifest(
            name="a", version="1", engine="causal", answers="text", trunk="0" * 64, trunk_model="base@1"
        ),
        Manifest(name="o", version="1", engine="openai", answers="text"),
    ):
        with pytest.raises(SetupError, match="no language model of its own"):
            adapter.on(trunk, name="x", version="1", licence="")


def described(folder: Path) -> Described:
    return describe_folder(folder, name="tiny", version="1", licence="MIT", source={"folder": folder.name})


def a_folder(tmp_path: Path, config: Mapping[str, Any], *, chat_template: str = "", **beside: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(
        safetensors({"model.norm.weight": (5, 32), "lm_head.weight": (7, 32)})
    )
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template)
    for name, text in beside.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def an_adapter(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    spec = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**spec, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"q.lora_A.weight": (4, 32)}))
    return folder


def safetensors(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """A well-formed file of zeros."""
    header, end = {}, 0
    for name, (rows, width) in shapes.items():
        size = 2 * rows * width
        header[name] = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)
