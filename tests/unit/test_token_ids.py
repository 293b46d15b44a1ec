"""Token ids without an embedding never reach a device, where they would poison it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.protocol.columns import CellError
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Embed
from tests.processes.test_worker_register import trunk_folder
from tests.tiny_language import a_llama
from workers.engine import CannotLoad, Pass, Prepared
from workers.engines.causal.causal import CausalEngine
from workers.engines.encoder.classifier import ClassifierEngine
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.training.trainer import TrainerEngine
from workers.registrar.describe import Described, describe_folder

#: Ids of MiniLM's tokenizer.
VOCABULARY = 30522

Change = Callable[[dict[str, Any]], object]


def a_bert(folder: Path, *, rows: int, change: Change = lambda spec: None, heads: bool = False) -> Described:
    """A tiny model with embeddings for so many ids, and MiniLM's tokenizer with a change."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    shape = BertConfig(
        vocab_size=rows,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
    )
    (BertForSequenceClassification if heads else BertModel)(shape).save_pretrained(folder)
    spec = json.loads((trunk_folder() / "tokenizer.json").read_text("utf-8"))
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return describe_folder(folder, name="tiny", version="1", licence="", source={})


def a_token(spec: dict[str, Any], content: str, number: int, *, special: bool) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": number, "content": content, "special": special, **flags})


def load(engine: Any, model: Described, manifest: Manifest | None = None) -> Any:
    return engine.load(manifest or model.manifest, model.files, device="cpu", in_format="fp32")


@pytest.mark.parametrize("engine", [EncoderEngine(), ClassifierEngine(), TrainerEngine()])
def test_a_model_whose_tokenizer_knows_more_than_it_does_is_refused_with_both_numbers(
    engine: Any, tmp_path: Path
) -> None:
    model = a_bert(tmp_path, rows=1000, heads=isinstance(engine, ClassifierEngine))
    with pytest.raises(
        CannotLoad, match=r"ids up to 30,?521.*embeddings for 1,?000.*resize_token_embeddings"
    ):
        load(engine, model)


def test_a_word_that_was_added_without_an_embedding_is_refused_too(tmp_path: Path) -> None:
    model = a_bert(
        tmp_path, rows=VOCABULARY, change=lambda spec: a_token(spec, "motet", VOCABULARY, special=False)
    )
    with pytest.raises(CannotLoad, match="ids up to 30,522"):
        load(EncoderEngine(), model)


def test_a_language_model_is_refused_as_well(tmp_path: Path) -> None:
    folder = a_llama(tmp_path / "tiny")
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    rows = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    a_token(spec, "motet", rows, special=False)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    model = describe_folder(folder, name="tiny", version="1", licence="", source={})
    with pytest.raises(CannotLoad, match=f"ids up to {rows}, and it has embeddings for {rows} "):
        load(CausalEngine(), model)


def test_a_row_with_a_control_token_that_has_no_embedding_is_its_own_error_before_the_device(
    tmp_path: Path,
) -> None:
    """Such as a token for pictures, which models have in their tokenizer alone: texts rarely spell it."""
    model = a_bert(
        tmp_path, rows=VOCABULARY, change=lambda spec: a_token(spec, "<picture>", VOCABULARY, special=True)
    )
    engine = EncoderEngine()
    handle = load(engine, model)
    task = TaskOrder(name="v", spec=Embed("tiny").to_json(), manifest=model.manifest)
    pass_ = Pass(handle, (task,), 0)
    good, bad, again = engine.prepare(pass_, ["a word", "a <picture>", "another word"])
    assert isinstance(bad, CellError)
    assert bad.error == "unknown_token"
    assert "30,522" in bad.message
    assert "picture" not in bad.message, "never a text"
    rows = [row for row in (good, again) if isinstance(row, Prepared)]
    assert engine.run(pass_, rows)["v"].counts()[0] == 2


def test_rows_are_filled_up_with_an_id_that_has_an_embedding(tmp_path: Path) -> None:
    """The usual slip: a [PAD] that was added to the tokenizer alone."""

    def padded_with_more(spec: dict[str, Any]) -> None:
        a_token(spec, "<fill>", VOCABULARY, special=True)
        spec["padding"] = {**(spec.get("padding") or {}), "pad_id": VOCABULARY, "pad_token": "<fill>"}
        spec["padding"] |= {"strategy": "BatchLongest", "direction": "Right", "pad_type_id": 0}
        spec["padding"].setdefault("pad_to_multiple_of", None)

    model = a_bert(tmp_path, rows=VOCABULARY, change=padded_with_more)
    engine = EncoderEngine()
    handle = load(engine, model)
    task = TaskOrder(name="v", spec=Embed("tiny").to_json(), manifest=model.manifest)
    pass_ = Pass(handle, (task,), 0)
    rows = [r for r in engine.prepare(pass_, ["a word", "several words here"]) if isinstance(r, Prepared)]
    assert engine.run(pass_, rows)["v"].counts()[0] == 2


def test_packed_weights_are_counted_as_well(tmp_path: Path) -> None:
    from workers.engines.encoder.compression import write_trunk

    model = a_bert(tmp_path / "was", rows=1000)
    write_trunk(model.files, tmp_path / "packed", layers=0, weights="int8")
    if not (tmp_path / "packed" / "tokenizer.json").exists():
        shutil.copy(model.files["tokenizer.json"], tmp_path / "packed")
    packed = describe_folder(tmp_path / "packed", name="small", version="1", licence="", source={})
    manifest = replace(packed.manifest, pooling=model.manifest.pooling)
    with pytest.raises(CannotLoad, match="embeddings for 1,000"):
        load(EncoderEngine(), packed, manifest)
