"""Training runs over HTTP: under whose lease they read and report, what they may learn from, and what is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from motet.protocol.columns import CellError, Column
from motet.protocol.envelope import unpack
from motet.protocol.manifest import Manifest
from scheduler.api import blobs
from scheduler.api.resources import Resources
from scheduler.store import registry
from tests.integration.api_house import CLASSIFY, TWO, House, house, problems
from tests.integration.proxy import proxied
from workers.engines.training.journal import HttpJournal
from workers.engines.training.learner import Hopeless

__all__ = ["house"]

TRAINER = Manifest(name="tiny-trainer", version="1", engine="trainer", answers="models", deterministic=False)
FIT = {"fit": {"kind": "fit", "model": "tiny-trainer"}}
EMBED = {"vector": {"kind": "embed", "model": "tiny"}}
EPOCH = {"stage": "heads", "epoch": 1, "of": 3, "loss": 0.5, "validation": {}, "test": {}}


@pytest.fixture
def training(house: House) -> str:
    """A training job of two recipes, whose sub-task a worker holds."""
    with house.database.transaction() as connection:
        registry.add_model(connection, TRAINER)
    return house.submit(["a recipe", "another"], FIT)["id"]


def lease_of(house: House, job: str) -> str:
    """A live lease of a new sub-task of this job, as its worker shows it."""
    ((subtask,),) = house.sql(
        "WITH s AS (INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
        " VALUES (:job, 0, '{0}', '{0}', '{1}', '{1}', 1, 1, 1) RETURNING id)"
        " INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)"
        " SELECT id, 1, 'w', 'b', 'n0nce', 1, now() + interval '1 minute' FROM s RETURNING subtask_id",
        job=job,
    )
    return f"{subtask}.1.n0nce"


class Hand:
    """The worker that holds a lease."""

    def __init__(self, house: House, job: str) -> None:
        self.house, self.lease = house, lease_of(house, job)

    def ask(self, method: str, path: str, *, lease: str | None = None, **more: Any) -> httpx.Response:
        headers = {"Motet-Lease": self.lease if lease is None else lease}
        return self.house.call(method, path, headers=headers, **{"token": "worker", **more})

    def tell(self, row: int = 0, **body: Any) -> httpx.Response:
        return self.ask("PUT", f"/v1/fits/{row}", json=body)

    def learn(self, job: str, number: int, **params: Any) -> httpx.Response:
        """By a run whose recipe names this job."""
        path = f"/v1/fits/0/data/{job}/{number}"
        return learner(self.house, job).ask("GET", path, params=params)

    def checkpoint(self, row: int = 0) -> Any:
        return self.ask("GET", f"/v1/fits/{row}").json()["checkpoint"]

    def put(self, raw: bytes) -> str:
        sha = hashlib.sha256(raw).hexdigest()
        assert self.ask("PUT", f"/v1/blobs/{sha}", content=raw).status_code == 201
        return sha


def learner(house: House, job: str) -> Hand:
    """The worker that holds a run which learns from this job."""
    return Hand(house, house.submit([json.dumps({"job": job})], FIT)["id"])


@pytest.fixture
def hand(house: House, training: str) -> Hand:
    return Hand(house, training)


def embedded(house: House, texts: list[str], failing: dict[int, CellError] | None = None) -> str:
    """An Embed job that has ended."""
    job = house.submit(texts, EMBED)["id"]
    for number in range(house.job(job)["blocks"]["total"]):
        house.answer(job, number, failing if number == 0 else None)
    assert house.job(job)["state"] == "succeeded"
    return job


def epochs(house: House, job: str, **more: Any) -> Any:
    answer = house.call("GET", f"/v1/jobs/{job}/fits", **more)
    assert answer.status_code == 200, answer.text
    return answer.json()["fits"]


def test_runs_beyond_those_told_are_counted(
    house: House, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.store.fits.MAX_FITS", 2)
    for row in range(5):
        house.sql("INSERT INTO fit (job_id, row_index) VALUES (:job, :row)", job=training, row=row)
    told = house.call("GET", f"/v1/jobs/{training}/fits").json()
    assert ([fit["row"] for fit in told["fits"]], told["left_out"]) == ([0, 1], 3)


# -- who may


def test_only_a_worker_that_shows_a_live_lease_of_a_training_job_reads_and_reports(
    house: House, hand: Hand
) -> None:
    learned = embedded(house, ["x"])
    hand = learner(house, learned)
    subtask = hand.lease.partition(".")[0]
    routes = [
        ("GET", "/v1/fits/0", {}),
        ("PUT", "/v1/fits/0", {"json": {"key": "heads 0001", "report": EPOCH}}),
        ("GET", f"/v1/fits/0/data/{learned}/0", {}),
    ]
    leases = {
        "none": "",
        "rubbish": "n0nce",
        "a wrong nonce": f"{subtask}.1.n1nce",
        "another attempt": f"{subtask}.2.n0nce",
        "another sub-task": f"{int(subtask) + 1_000_000}.1.n0nce",
        "an ordinary job's": lease_of(house, house.submit(["a"], CLASSIFY)["id"]),
    }
    for method, path, more in routes:
        for what, lease in leases.items():
            refused = hand.ask(method, path, lease=lease, **more)
            assert refused.status_code == 403, (method, path, what)
            assert "Motet-Lease" in refused.json()["error"]["message"]
        for token in ("user", "read", "admin", "stranger"):
            assert hand.ask(method, path, token=token, **more).status_code == 403, (method, path, token)
        assert hand.ask(method, path, token=None, **more).status_code == 401
        assert hand.ask(method, path, **more).status_code in (200, 204), (method, path)
    house.sql("UPDATE lease SET until = clock_timestamp()")
    for method, path, more in routes:
        assert hand.ask(method, path, **more).status_code == 403, "its lease has ended"


def test_a_cancelled_run_is_told_by_its_next_request(house: House, hand: Hand, training: str) -> None:
    assert hand.tell(key="heads 0001", report=EPOCH).status_code == 204
    assert house.call("POST", f"/v1/jobs/{training}/cancel").is_success
    assert hand.tell(key="heads 0002", report={**EPOCH, "epoch": 2}).status_code == 403
    assert [e["epoch"] for e in epochs(house, training)[0]["epochs"]] == [1], "what it said before stays"


# -- what is learned from


def test_a_run_reads_the_job_that_its_recipe_names_and_no_other_of_its_tenant(
    house: House, training: str
) -> None:
    mine, other = embedded(house, ["mine"]), embedded(house, ["a secret of another team"])
    hand = learner(house, mine)
    assert hand.ask("GET", f"/v1/fits/0/data/{mine}/0").status_code == 200
    for row, job in ((0, other), (1, mine), (2**31 - 1, mine)):
        refused = hand.ask("GET", f"/v1/fits/{row}/data/{job}/0")
        assert refused.status_code == 404
        assert "is not the one that the recipe" in refused.json()["error"]["message"]
    bare = Hand(house, house.submit(["no recipe", "[]"], FIT)["id"])
    for row in (0, 1):
        assert bare.ask("GET", f"/v1/fits/{row}/data/{mine}/0").status_code == 404


def test_the_rows_come_block_by_block_and_then_the_end(house: House, hand: Hand) -> None:
    texts = [f"text {i}" for i in range(1030)]
    job = embedded(house, texts)
    found: list[str] = []
    sizes = []
    for number in range(2):
        answer = hand.learn(job, number)
        assert answer.headers["Content-Type"] == "application/msgpack"
        block = unpack(answer.content)
        found += block["texts"]
        vectors = Column.from_wire(block["vectors"])
        assert (vectors.kind, vectors.dim, vectors.counts()[0]) == ("vector", 2, len(block["texts"]))
        sizes.append(len(vectors))
    assert (found, sizes) == (texts, [1024, 6])
    for beyond in (2, 3, 2**31 - 1):
        assert unpack(hand.learn(job, beyond).content) == {"end": True}
    assert unpack(hand.learn(job, 1, texts=0).content)["texts"] == []


def test_what_is_read_is_what_was_embedded(house: House, hand: Hand) -> None:
    tasks = {"vector": {"kind": "embed", "model": "tiny", "input": "{title}: {body}"}}
    opened = house.call("POST", "/v1/jobs", json={"tasks": tasks, "rows": [{"title": "A", "body": "b"}]})
    house.answer(opened.json()["id"], 0)
    assert unpack(hand.learn(opened.json()["id"], 0).content)["texts"] == ["A: b"]


def test_a_row_without_an_answer_has_no_vector(house: House, hand: Hand, training: str) -> None:
    job = embedded(house, ["a", "b", "c"], {1: CellError("too_long", "it is")})
    worker = house.tokens["worker"]
    journal = HttpJournal(house.url, worker, learner(house, job).lease, 0, job)
    rows = journal.block(0, texts=True)
    assert rows is not None
    assert rows.texts == ("a", "b", "c")
    assert rows.vectors[[0, 2]].tolist() == [[0.0, 0.5], [2.0, 0.5]]
    assert all(number != number for number in rows.vectors[1]), "NaN, which the run refuses by its row"
    assert journal.block(1, texts=True) is None
    journal.close()


def test_a_block_without_any_answer_has_vectors_of_the_trunks_length(house: House, hand: Hand) -> None:
    job = embedded(house, ["a", "b"], {i: CellError("too_long", "it is") for i in range(2)})
    journal = HttpJournal(house.url, house.tokens["worker"], learner(house, job).lease, 0, job)
    rows = journal.block(0, texts=True)
    assert rows is not None
    assert rows.vectors.shape == (2, 2)
    assert (rows.vectors != rows.vectors).all(), "NaN, which the run refuses by its row"
    journal.close()


def test_what_cannot_be_learned_from_is_not_found_and_says_what_to_do(house: House, hand: Hand) -> None:
    theirs = house.call(
        "POST", "/v1/jobs", token="stranger", json={"tasks": EMBED, "rows": ["a secret"]}
    ).json()["id"]
    house.answer(theirs, 0)
    two = house.submit(["a"], TWO)["id"]
    house.answer(two, 0)
    labels = house.submit(["a"], CLASSIFY)["id"]
    house.answer(labels, 0)
    half = house.submit([f"row {i}" for i in range(1030)], EMBED)["id"]
    house.answer(half, 0)
    cut_off = house.submit([f"cut {i}" for i in range(1030)], EMBED)["id"]
    house.answer(cut_off, 0)
    house.call("POST", f"/v1/jobs/{cut_off}/cancel")
    loading = house.open(EMBED)["id"]
    house.put(loading, 0, ["a"])
    never = "00000000-0000-4000-8000-000000000000"
    for job, number, words in (
        (theirs, 0, "is not there; embed them again"),
        (theirs, 1, "is not there"),
        (never, 0, "is not there"),
        ("none", 0, "no job of this id"),
        (two, 0, "whose one task is Embed"),
        (two, 1, "whose one task is Embed"),
        (labels, 0, "whose one task is Embed"),
        (half, 0, "wait for it"),
        (half, 1, "wait for it"),
        (loading, 0, "wait for it"),
        (cut_off, 1, "without the vectors of block 1; embed its rows again"),
    ):
        answer = hand.learn(job, number)
        assert answer.status_code == 404, (words, answer.content)
        assert words in answer.json()["error"]["message"]
        assert "secret" not in answer.text
    assert unpack(hand.learn(cut_off, 0).content)["texts"][0] == "cut 0"
    # So it is the row's own error, in the same words, and not a run that waits for ever.
    journal = HttpJournal(house.url, house.tokens["worker"], learner(house, two).lease, 0, two)
    with pytest.raises(Hopeless, match="whose one task is Embed"):
        journal.block(0, texts=False)
    journal.close()


def test_a_proxy_that_takes_no_large_files_ends_a_run_with_what_to_set(
    house: House, hand: Hand, tmp_path: Path
) -> None:
    job = embedded(house, ["a"])
    (large := tmp_path / "model.safetensors").write_bytes(bytes(2000))
    with proxied(house.url, most_body_bytes=1000) as proxy:
        journal = HttpJournal(proxy.url, house.tokens["worker"], learner(house, job).lease, 0, job)
        with pytest.raises(Hopeless, match="client_max_body_size"):
            journal.store(large)
        journal.close()


# -- what is told


def test_epochs_come_in_order_whatever_order_they_were_told_in(
    house: House, hand: Hand, training: str
) -> None:
    assert epochs(house, training) == [], "nothing was said yet"
    for stage, number in (("all", 2), ("heads", 10), ("all", 1), ("heads", 2), ("heads", 1), ("all", 10)):
        told = hand.tell(
            key=f"{stage} {number:04}", report={**EPOCH, "stage": stage, "epoch": number, "of": 10}
        )
        assert (told.status_code, told.content) == (204, b"")
    assert hand.tell(1, key="lora 0001", report={**EPOCH, "stage": "lora"}).status_code == 204
    first, second = epochs(house, training)
    assert (first["row"], second["row"]) == (0, 1)
    assert [(e["stage"], e["epoch"]) for e in first["epochs"]] == [
        *(("heads", number) for number in (1, 2, 10)),
        *(("all", number) for number in (1, 2, 10)),
    ]
    assert second["epochs"] == [{**EPOCH, "stage": "lora"}]
    assert epochs(house, training, token="read") == epochs(house, training, token="admin") == [first, second]
    stranger = house.call("GET", f"/v1/jobs/{training}/fits", token="stranger")
    assert stranger.status_code == 404
    assert house.call("GET", f"/v1/jobs/{training}/fits", token="worker").status_code == 403
    assert epochs(house, house.submit(["a"])["id"]) == [], "an ordinary job has none"


def test_an_attempt_that_does_an_epoch_again_replaces_what_was_said_of_it(
    house: House, hand: Hand, training: str
) -> None:
    hand.tell(key="heads 0001", report=EPOCH)
    hand.tell(key="heads 0002", report={**EPOCH, "epoch": 2})
    hand.tell(key="heads 0001", report={**EPOCH, "loss": 0.25})
    hand.tell(key="checkpoint", report={})
    assert [e["loss"] for e in epochs(house, training)[0]["epochs"]] == [0.25, 0.5]


def test_a_checkpoint_stays_until_another_or_the_files_come(house: House, hand: Hand) -> None:
    first, second, model = hand.put(b"first"), hand.put(b"second"), hand.put(b"model")
    assert hand.checkpoint() is None
    for sha in (first, second):
        assert hand.tell(key="checkpoint", checkpoint=sha).status_code == 204
        assert hand.checkpoint() == sha
    hand.tell(key="all 0001", report=EPOCH)
    assert hand.checkpoint() == second, "a report without one leaves it"
    assert hand.checkpoint(1) is None, "each row has its own"
    hand.tell(files=[model])
    assert hand.checkpoint() is None
    assert house.sql("SELECT files FROM fit WHERE row_index = 0") == [([model],)]
    assert house.sql("SELECT sha256 FROM blob") == [(model,)], "what no run needs any more is gone at once"
    # The outcome was lost, and the run begins again.
    assert hand.tell(key="checkpoint", checkpoint=first).status_code == 422
    hand.put(b"first")
    hand.tell(key="checkpoint", checkpoint=first)
    assert hand.checkpoint() == first
    assert house.sql("SELECT files FROM fit WHERE row_index = 0") == [([model],)]


def test_a_row_that_the_job_does_not_have_is_refused(house: House, hand: Hand) -> None:
    told = hand.tell(2, key="heads 0001", report=EPOCH)
    assert (told.status_code, told.json()["error"]["type"]) == (404, "not_found")
    assert hand.tell(2**31, key="heads 0001", report=EPOCH).status_code == 422
    assert hand.tell(-1, key="heads 0001", report=EPOCH).status_code == 422
    assert house.sql("SELECT count(*) FROM fit") == [(0,)]


def test_what_is_told_wrong_is_refused_by_its_field_and_nothing_is_kept(house: House, hand: Hand) -> None:
    stored, absent = hand.put(b"stored"), "0" * 64
    for body, field in (
        ({"key": "../heads"}, "key"),
        ({"key": 7}, "key"),
        ({"key": "x" * 41}, "key"),
        ({"report": []}, "report"),
        ({"report": None}, "report"),
        ({"checkpoint": "latest"}, "checkpoint"),
        ({"checkpoint": [stored]}, "checkpoint"),
        ({"files": stored}, "files"),
        ({"files": [7]}, "files"),
        ({"files": [stored.upper()]}, "files"),
        ({"files": [stored] * 1001}, "files"),
        ({"files": [stored, absent]}, "files"),
        ({"checkpoint": absent}, "files"),
        ({"key": "heads 0001", "report": {"text": "\0"}}, "report.text"),
    ):
        found = problems(hand.tell(**body))
        assert field in [problem["field"] for problem in found], (body, found)
        assert all(problem["remedy"] for problem in found)
    for raw in (b"", b"[]", b'{"report": {"loss": NaN}}', b'{"report": {"loss": -Infinity}}', b"{"):
        assert problems(hand.ask("PUT", "/v1/fits/0", content=raw)), raw
    huge = b'{"key": "heads 0001", "report": {"a": "' + b"x" * (1 << 20) + b'"}}'
    assert hand.ask("PUT", "/v1/fits/0", content=huge).status_code == 413
    assert house.sql("SELECT count(*) FROM fit") == [(0,)]


def test_an_odd_report_of_a_worker_breaks_no_page(house: House, hand: Hand, training: str) -> None:
    for key, report in (("heads 0001", {"stage": "heads"}), ("x", {"stage": 1, "epoch": []})):
        assert hand.tell(key=key, report=report).status_code == 204
    assert len(epochs(house, training)[0]["epochs"]) == 2


# -- what is kept


def test_blobs_that_a_run_names_stay_as_long_as_its_job(house: House, hand: Hand, training: str) -> None:
    old, new, model = (hand.put(raw) for raw in (b"old", b"new", b"model"))
    hand.put(b"named by nobody")
    hand.tell(0, key="checkpoint", checkpoint=old)
    hand.tell(0, key="checkpoint", checkpoint=new)
    hand.tell(1, files=[model])
    with sweeper(house) as sweep:
        assert sweep() == {new, model}, "the checkpoint of before and what nobody named are gone"
        hand.tell(0, files=[model])
        assert sweep() == {model}
        assert house.call("DELETE", f"/v1/jobs/{training}").status_code == 204
        assert house.sql("SELECT count(*) FROM fit") == [(0,)]
        assert sweep() == set()
    assert [p for p in Path(house.settings.blob_dir).rglob("*") if p.is_file()] == []
    assert house.call("GET", f"/v1/jobs/{training}/fits").status_code == 404


@contextmanager
def sweeper(house: House) -> Iterator[Any]:
    """A sweep a day from now; it gives the digests that are left."""
    use = Resources.of(house.settings)

    def sweep() -> set[str]:
        house.sql("UPDATE blob SET created = created - interval '2 days'")
        blobs.sweep(use)
        return {row.sha256 for row in house.sql("SELECT sha256 FROM blob")}

    try:
        yield sweep
    finally:
        use.close()


def test_a_job_says_of_which_kind_it_is(house: House, training: str) -> None:
    assert house.job(training)["kind"] == "train"
    assert house.job(house.submit(["a"])["id"])["kind"] == "infer"
    kinds = {job["id"]: job["kind"] for job in house.call("GET", "/v1/jobs").json()["jobs"]}
    assert kinds[training] == "train"
