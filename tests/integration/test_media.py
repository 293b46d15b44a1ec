"""Pictures from a client's rows to a worker: stored once for each tenant, read under a lease, gone with the last job."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import msgpack
import pytest

from motet import Classify, Client, Embed, InvalidJob, Job, Overloaded
from motet.errors import Unauthorized
from motet.media import sending
from motet.media.medium import MAX_MEDIUM_BYTES, THUMB_SIDE, Medium, measured
from motet.protocol.envelope import unwrap
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment
from motet.states import State
from scheduler.blocks import decode_block
from scheduler.payloads import Payloads
from scheduler.store import endings, keeping, media, payload_rows, registry
from scheduler.store.manifests import Manifests
from tests.integration.api_house import House, a_house, house, problems
from tests.integration.test_api_asks import answering
from tests.integration.test_api_fits import lease_of
from tests.pictures import png
from workers.run.media import HttpMedia, Media

__all__ = ["house"]

EYES = Manifest(
    name="eyes",
    version="1",
    engine="image",
    answers="label",
    trunk="e" * 64,
    labels=("cat", "dog"),
    reads="image",
)
TASKS = {"object": Classify("eyes", input="{photo}"), "vector": Embed("tiny", input="{note}")}
SEES = {"object": {"kind": "classify", "model": "eyes", "input": "{photo}"}}


@pytest.fixture(autouse=True)
def eyes(house: House) -> None:
    with house.database.transaction() as connection:
        registry.add_model(connection, EYES)


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with Client(house.url, house.tokens["user"], timeout=5) as client:
        yield client


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    """Ten rows of six pictures."""
    folder = tmp_path / "claims"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(seed=n))
    lines = [json.dumps({"photo": f"{n % 6}.png", "note": f"note {n}"}) for n in range(10)]
    (folder / "claims.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def kept(house: House) -> list[tuple[int, int]]:
    """References and bytes of each medium that is stored; and that they are counted."""
    found = house.sql("SELECT refs, bytes, tenant_id FROM medium ORDER BY id")
    held = dict(house.sql("SELECT id, media_bytes FROM tenant"))
    for tenant, size in held.items():
        assert size == sum(row.bytes for row in found if row.tenant_id == tenant), "bytes are counted"
    return [(row.refs, row.bytes) for row in found]


def put(house: House, data: bytes, **more: Any) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    answer = house.call("PUT", f"/v1/media/{sha256}", content=data, **more)
    assert answer.status_code == 201, answer.text
    return sha256


def missing(house: House, *sha256s: str, token: str = "user") -> list[str]:
    answer = house.call("POST", "/v1/media/missing", json={"media": sha256s}, token=token)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["missing"])


def test_rows_and_pictures_land_each_once_and_go_with_the_last_job(
    house: House, client: Client, claims: Path
) -> None:
    job = client.submit(claims / "claims.jsonl", TASKS, media_root=claims)
    assert [refs for refs, _ in kept(house)] == [1] * 6, "one block"
    assert job.media is not None
    assert job.media.images == 10
    assert job.media.sent_bytes == sum(len(png(seed=n)) for n in range(6))
    assert job.media.bytes_sent_per_image == job.media.sent_bytes / 10
    ((payload, ids),) = house.sql("SELECT payload, media FROM block")
    photos = decode_block(bytes(payload)).values["photo"]
    assert photos == [Medium.of(png(seed=n % 6)) for n in range(10)]
    assert len(ids) == 6
    house.answer(job.id, 0)
    rows = list(job.results())
    assert [str(row["object"]) for row in rows][:2] == ["cat", "dog"]

    again = client.submit(claims / "claims.jsonl", TASKS, media_root=claims)
    assert again.media is not None
    assert again.media.sent_bytes == 0, "the tenant has them"
    assert house.job(again.id)["cells"]["reused"] == 20, "the same pictures are the same rows"
    assert [refs for refs, _ in kept(house)] == [2] * 6
    job.delete()
    assert [refs for refs, _ in kept(house)] == [1] * 6
    again.delete()
    assert kept(house) == []


def test_the_page_of_rows_shows_pictures_in_small_where_the_client_made_them(
    house: House, client: Client, claims: Path
) -> None:
    def queue(job: Job) -> str:
        house.answer(job.id, 0)
        page = house.call("GET", f"/jobs/{job.id}/queue")
        assert page.status_code == 200, page.text
        return page.text

    plain = client.submit(claims / "claims.jsonl", TASKS, media_root=claims)
    assert "<img" not in queue(plain)
    plain.delete()
    shown = client.submit(claims / "claims.jsonl", TASKS, media_root=claims, media_thumbs=True)
    assert queue(shown).count("<img") == 10
    ((thumb,),) = house.sql("SELECT thumb FROM medium LIMIT 1")
    kind, size = measured(bytes(thumb))
    assert kind == "image/jpeg"
    assert size is not None
    assert max(size) <= THUMB_SIDE


def test_retention_takes_pictures_with_their_job(house: House, client: Client) -> None:
    job = client.submit([{"photo": png(), "note": ""}], TASKS, retention_days=1)
    house.answer(job.id, 0)
    house.sql("UPDATE job SET finished = finished - interval '2 days'")
    with house.database.transaction() as connection:
        (due,) = endings.due_for_deletion(connection, 0)
        assert endings.delete_slice(connection, due.id)
    assert kept(house) == []


def test_a_job_of_many_pictures_is_deleted_in_slices_of_these(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.rows.BLOCK_ROWS", 4)
    monkeypatch.setattr(endings, "SLICE_MEDIA", 3)
    job = client.submit([{"photo": png(seed=n), "note": ""} for n in range(14)], TASKS)
    assert [n for (n,) in house.sql("SELECT n_rows FROM block ORDER BY number")] == [4, 4, 4, 2]
    at = UUID(job.id)
    left = []
    with house.database.transaction() as connection:
        assert endings.end_job(connection, at, State.CANCELLED, "")
    while not left or left[-1]:
        with house.database.transaction() as connection:
            whole = endings.delete_slice(connection, at)
        left.append(len(kept(house)))
        assert whole == (not left[-1])
    assert left == [8, 4, 0]


def test_an_upload_that_broke_off_goes_on_and_sends_no_picture_twice(
    house: House, client: Client, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "REQUEST_MEDIA", 2)
    requests: list[int] = []
    whole = client._http.request

    def dies(method: str, path: str, **more: Any) -> Any:
        if path == "/v1/media":
            requests.append(len(msgpack.unpackb(more["content"])["media"]))
            if len(requests) == 2:
                raise KeyboardInterrupt
        return whole(method, path, **more)

    monkeypatch.setattr(client._http, "request", dies)
    with pytest.raises(KeyboardInterrupt):
        client.submit(claims / "claims.jsonl", TASKS, media_root=claims, key="k")
    assert len(kept(house)) == 2
    job = client.submit(claims / "claims.jsonl", TASKS, media_root=claims, key="k")
    assert sum(requests) == 2 + 2 + 4, "of six pictures two were stored before"
    assert (job.rows, [refs for refs, _ in kept(house)]) == (10, [1] * 6)


def test_pictures_of_an_upload_that_never_ends_are_swept(house: House) -> None:
    put(house, png())
    job = house.open(SEES)["id"]
    used = put(house, png(seed=1))
    body = {"columns": {"photo": [{"medium": used}]}, "first_row": 0}
    assert house.put_raw(job, 0, msgpack.packb(body)).status_code == 200

    def sweep() -> int:
        with house.database.transaction() as connection:
            return media.sweep_media(connection)

    assert (sweep(), len(kept(house))) == (0, 2)
    house.sql("UPDATE medium SET claimed = claimed - interval '7 hours'")
    assert missing(house, used) == [], "asked for again, though rows refer to it"
    assert (sweep(), len(kept(house))) == (1, 1)
    assert house.call("DELETE", f"/v1/jobs/{job}").status_code == 204
    assert len(kept(house)) == 1, "an upload counts on it"
    house.sql("UPDATE medium SET claimed = claimed - interval '7 hours'")
    assert (sweep(), kept(house)) == (1, [])


def test_open_jobs_answer_pictures_and_forget_them_with_their_rows(
    house: House, client: Client, claims: Path
) -> None:
    with client.open({"object": TASKS["object"]}, name="eyes", media_root=claims) as feed:
        with answering(house, feed.job.id):
            assert str(feed.ask({"photo": "0.png"})["object"]) == "cat"
            assert str(feed.ask({"photo": png(seed=1)})["object"]) == "cat"
            assert str(feed.ask({"photo": png(seed=1)})["object"]) == "cat"
        with pytest.raises(InvalidJob, match="leaves media_root"):
            feed.ask({"photo": "../claims.jsonl"})
    assert [refs for refs, _ in kept(house)] == [1, 2]
    house.sql("UPDATE block SET done_at = now() - interval '9 days'")
    house.sql("UPDATE medium SET claimed = now() - interval '9 days'")
    with house.database.transaction() as connection:
        (due,) = keeping.due_fronts(connection)
        assert keeping.forget_front(connection, due).blocks == 3
    assert kept(house) == []


def test_an_ask_with_a_picture_that_is_not_stored_is_refused_alone(house: House) -> None:
    there = put(house, png())
    for bad_rows in ("refuse", "error"):
        job = house.open(SEES, open=True, name=bad_rows, bad_rows=bad_rows)["id"]
        with answering(house, job):
            asked = {"rows": [{"photo": {"medium": one}} for one in (there, "f" * 64)], "keys": ["a", "b"]}
            good, bad = house.call("POST", f"/v1/jobs/{job}/ask", json=asked).json()["rows"]
            assert good["object"] == "cat"
            assert "not stored" in json.dumps(bad)


# -- tenants


def test_nobody_learns_what_another_tenant_has(house: House) -> None:
    data = png()
    sha256 = put(house, data)
    never = "f" * 64
    assert missing(house, sha256, never) == [never]
    assert missing(house, sha256, never, token="stranger") == [sha256, never]
    job = house.call("POST", "/v1/jobs", json={"tasks": SEES}, token="stranger").json()["id"]
    answers = []
    for one in (sha256, never):
        body = msgpack.packb(
            {"columns": {"photo": [Medium(one, "image/png", 1)]}, "first_row": 0}, default=_wire
        )
        answer = house.call(
            "PUT",
            f"/v1/jobs/{job}/parts/0",
            content=body,
            headers={"Content-Type": "application/msgpack"},
            token="stranger",
        )
        assert answer.status_code == 422
        answers.append(answer.json())
    assert answers[0] == answers[1]
    put(house, data, token="stranger")
    assert missing(house, sha256, token="stranger") == []
    keys = {bytes(key) for (key,) in house.sql("SELECT key FROM medium")}
    assert len(keys) == 2, "stored for each of them"
    assert bytes.fromhex(sha256) not in keys


def _wire(value: object) -> msgpack.ExtType:
    assert isinstance(value, Medium)
    return msgpack.ExtType(5, value.to_wire().encode())


def test_what_a_sender_says_of_a_medium_is_not_believed(house: House) -> None:
    sha256 = put(house, png(8, 8))
    job = house.open(SEES)["id"]
    lie = Medium(sha256, "image/gif", 7, 60_000, 60_000)
    body = msgpack.packb({"columns": {"photo": [lie]}, "first_row": 0}, default=_wire)
    assert house.put_raw(job, 0, body).status_code == 200
    ((payload,),) = house.sql("SELECT payload FROM block")
    assert decode_block(bytes(payload)).values["photo"] == [Medium.of(png(8, 8))]


def test_bad_uploads_are_refused_by_name(house: House) -> None:
    data = png()
    sha256 = hashlib.sha256(data).hexdigest()

    def refused(method: str, path: str, status: int, words: str, **more: Any) -> None:
        answer = house.call(method, path, **more)
        assert (answer.status_code, words in answer.text) == (status, True), answer.text

    packed = {"Content-Type": "application/msgpack"}
    refused("PUT", f"/v1/media/{'0' * 64}", 422, "another digest", content=data)
    refused("PUT", "/v1/media/nothing", 404, "64 lower-case hex digits", content=data)
    refused("PUT", f"/v1/media/{hashlib.sha256(b'').hexdigest()}", 422, "no bytes", content=b"")
    refused(
        "PUT", f"/v1/media/{sha256}", 413, "make the picture smaller", content=b"0" * (MAX_MEDIUM_BYTES + 1)
    )
    refused("PUT", f"/v1/media/{sha256}", 403, "may not", content=data, token="read")
    for body in ({"media": []}, {"media": ["text"]}, {"media": {}}, [], {"x": 1}):
        refused("POST", "/v1/media", 422, "media", content=msgpack.packb(body), headers=packed)
    for thumbs in ("x", [], [data], [b"\xff\xd8" + b"0" * 9000], [None, None]):
        body = msgpack.packb({"media": [data], "thumbs": thumbs})
        refused("POST", "/v1/media", 422, "thumbs", content=body, headers=packed)
    refused("POST", "/v1/media", 422, "msgpack", content=b"\xc1", headers=packed)
    refused("POST", "/v1/media/missing", 422, "media", json={"media": ["x"]})
    refused("POST", "/v1/media/missing", 422, "media", json={"media": []})
    assert kept(house) == []


def test_a_tenant_has_a_quota_of_bytes(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, max_media_mb=1) as house:
        eyes.__wrapped__(house)  # type: ignore[attr-defined]
        put(house, png() + b"\0" * 600_000)
        over = png(seed=1) + b"\0" * 600_000
        answer = house.call("PUT", f"/v1/media/{hashlib.sha256(over).hexdigest()}", content=over)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "30")
        assert "quota is 1 MB of pictures" in answer.json()["error"]["message"]
        assert len(kept(house)) == 1
        put(house, over, token="stranger")
        put(house, png() + b"\0" * 600_000)
        with (
            Client(house.url, house.tokens["user"], timeout=2) as client,
            pytest.raises(Overloaded, match="quota"),
        ):
            client.submit([{"photo": over, "note": ""}], TASKS)
        assert house.call("GET", "/v1/jobs").json()["jobs"] == [], "nothing stays behind"


def test_rows_that_refer_to_no_picture_are_refused_in_every_form(house: House, client: Client) -> None:
    with pytest.raises(InvalidJob, match="media_root"):
        client.submit([{"photo": "a/path.png", "note": ""}], TASKS)
    for photo in ("a path", {"medium": "f" * 64}, None):
        answer = house.call("POST", "/v1/jobs", json={"tasks": SEES, "rows": [{"photo": photo}]})
        assert answer.status_code == 422
        assert problems(answer)[0]["field"] == "rows.photo"
    sha256 = put(house, png())
    job = house.open(SEES, rows=[{"photo": {"medium": sha256}}])
    assert (job["state"], [refs for refs, _ in kept(house)]) == ("running", [1])
    lines = house.open(SEES, bad_rows="error")["id"]
    body = f'{{"photo": {{"medium": "{sha256}"}}}}\n{{"photo": "text"}}'.encode()
    assert house.put_raw(lines, 0, body, "application/x-ndjson").json()["bad_rows"] == 1
    planned = client.plan([{"photo": png(), "note": "x"}], TASKS)
    assert planned.rows == 1


# -- workers


def order_of(house: House, job: str) -> Assignment:
    """What the dispatcher would send of a job's first block."""
    with house.database.reading() as connection:
        passes, blocks = payload_rows.passes_and_blocks(connection, {(job, 0)}, {(job, 0)}, Manifests())
    stored, block = passes[job, 0], blocks[job, 0]
    packed = Payloads(house.database, Manifests())
    assert stored.model == EYES
    n = len(decode_block(block.payload).values["photo"])
    carved = SimpleNamespace(ranges=[SimpleNamespace(block=0, lo=0, hi=n)], todo=1, exclusive=False)
    leased_one = SimpleNamespace(
        job=job,
        pass_number=0,
        worker="w",
        carved=carved,
        subtask=1,
        attempt=1,
        nonce="n0nce",
        predicted_s=1.0,
        measured=False,
    )
    (order,) = packed.assignments([leased_one])["w"]  # type: ignore[list-item]
    return Assignment.decode(order.encode())


def test_a_worker_reads_the_pictures_of_its_lease_and_no_others(house: House, client: Client) -> None:
    pictures = [png(seed=n) for n in range(5)]
    job = client.submit([{"photo": one, "note": ""} for one in pictures], TASKS)
    other = client.submit([{"photo": png(seed=9), "note": ""}], TASKS)
    lease, order = lease_of(house, job.id), order_of(house, job.id)
    assert [one.sha256 for one in order.values] == [Medium.of(one).sha256 for one in pictures]
    assert b"PNG" not in repr(unwrap(order.encode())).encode(), "no pixel goes through Redis"
    worker = HttpMedia(house.url, house.tokens["worker"])
    mine = [Medium.of(one).sha256 for one in pictures]
    assert worker.some(mine, lease) == dict(zip(mine, pictures, strict=True))
    theirs = Medium.of(png(seed=9)).sha256
    assert worker.some([theirs, mine[0]], lease) == {mine[0]: pictures[0]}
    assert worker.some([theirs], lease_of(house, other.id)) == {theirs: png(seed=9)}
    for wrong in ("", "1.1.x", lease + "x", lease.replace(".1.", ".2.")):
        with pytest.raises(Unauthorized, match="live lease"):
            worker.some(mine, wrong)
    house.sql("UPDATE lease SET until = now() - interval '1 second'")
    with pytest.raises(Unauthorized):
        worker.some(mine, lease)
    for token in ("user", "admin"):
        answer = house.call(
            "POST", "/v1/media/fetch", json={"media": mine}, headers={"Motet-Lease": lease}, token=token
        )
        assert answer.status_code == 403


def test_an_answer_holds_what_fits_and_the_rest_is_asked_for_again(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.media.ANSWER_BYTES", 3 * len(png()))
    pictures = [png(seed=n) for n in range(8)]
    job = client.submit([{"photo": one, "note": ""} for one in pictures], TASKS)
    order, asked = order_of(house, job.id), []
    worker = HttpMedia(house.url, house.tokens["worker"])
    some = worker.some

    def counting(sha256s: Any, lease: str) -> Any:
        found = some(sha256s, lease_of(house, job.id))
        asked.append(len(found))
        return found

    monkeypatch.setattr(worker, "some", counting)
    found = Media(worker).of(order, lambda: True)
    assert sorted(found.values()) == sorted(pictures)
    assert max(asked) <= 3


def test_uploads_and_removals_of_the_same_pictures_at_once_end_with_true_counts(house: House) -> None:
    """Several uploads of a tenant share pictures while their jobs are removed: nothing is lost, or kept for nobody."""
    pictures = [{"photo": png(seed=n), "note": ""} for n in range(20)]
    failed: list[BaseException] = []

    def go(n: int) -> None:
        try:
            with Client(house.url, house.tokens["user"], timeout=20) as client:
                for _ in range(4):
                    job = client.submit(pictures[n:] + pictures[:n], TASKS)
                    assert job.rows == 20
                    job.delete()
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=go, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert all(refs == 0 for refs, _ in kept(house)), (
        "what another upload had asked for waits for the sweeper"
    )
    with house.database.transaction() as connection:
        media.sweep_media(connection, unused_s=0)
    assert kept(house) == []
