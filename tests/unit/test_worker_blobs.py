"""The cache of model files: verified, bounded, shared by the workers of a host."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad
from workers.run import blobs
from workers.run.blobs import BlobCache, CannotFetch, FileRefused, check_name


class Shelf:
    """A source of files that may tear them, or refuse."""

    def __init__(self, *bodies: bytes) -> None:
        self.files = {hashlib.sha256(body).hexdigest(): body for body in bodies}
        self.torn = 0
        self.asked: list[str] = []

    def chunks(self, sha256: str) -> Iterator[bytes]:
        self.asked.append(sha256)
        if sha256 not in self.files:
            raise FileRefused("the API answered 404")
        if self.torn:
            self.torn -= 1
            yield self.files[sha256][:1]
            raise CannotFetch("the connection was lost")
        for byte in self.files[sha256]:
            yield bytes([byte])


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def a_model(**files: bytes) -> Manifest:
    return Manifest(
        name="m",
        version="1",
        engine="encoder",
        answers="vector",
        files={name.replace("__", "."): digest(body) for name, body in files.items()},
    )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs.time, "sleep", lambda _: None)


def test_a_model_is_fetched_once_and_laid_out_under_its_own_names(tmp_path: Path) -> None:
    shelf = Shelf(b"weights", b"config")
    cache = BlobCache(tmp_path, shelf, limit_mb=1)
    model = a_model(model__safetensors=b"weights", config__json=b"config")
    cache.fetch(model)
    cache.fetch(model)
    assert len(shelf.asked) == 2
    with cache.folder(model) as files:
        assert files["model.safetensors"].read_bytes() == b"weights"
        assert files["config.json"].parent == files["model.safetensors"].parent
        kept = files["config.json"]
    assert not kept.exists()
    assert len(shelf.asked) == 2


def test_a_model_that_is_loaded_again_lies_in_the_same_place_and_beside_another_load_in_its_own(
    tmp_path: Path,
) -> None:
    shelf = Shelf(b"x")
    cache = BlobCache(tmp_path, shelf, limit_mb=1)
    model = a_model(config__json=b"x")
    with cache.folder(model) as files:
        first = files["config.json"]
        with BlobCache(tmp_path, shelf, limit_mb=1).folder(model) as beside:
            assert beside["config.json"] != first
            assert beside["config.json"].read_bytes() == b"x"
        assert first.read_bytes() == b"x"
    with cache.folder(model) as files:
        assert files["config.json"] == first
    assert not list((tmp_path / "folders").iterdir())


def test_files_in_folders_keep_their_relative_paths(tmp_path: Path) -> None:
    model = Manifest(
        name="m", version="1", engine="e", answers="vector", files={"1_Pooling/config.json": digest(b"x")}
    )
    with BlobCache(tmp_path, Shelf(b"x"), limit_mb=1).folder(model) as files:
        assert files["1_Pooling/config.json"].read_bytes() == b"x"


def test_a_torn_download_is_tried_again_and_wrong_bytes_never_enter_the_cache(tmp_path: Path) -> None:
    shelf = Shelf(b"good")
    shelf.torn = 2
    cache = BlobCache(tmp_path, shelf, limit_mb=1)
    assert cache.ensure(digest(b"good")).read_bytes() == b"good"
    shelf.files[digest(b"wanted")] = b"forged"
    with pytest.raises(CannotFetch, match="another digest"):
        cache.ensure(digest(b"wanted"))
    assert not (tmp_path / "blobs" / digest(b"wanted")).exists()


def test_a_file_the_api_refuses_is_not_asked_for_again_and_again(tmp_path: Path) -> None:
    shelf = Shelf()
    with pytest.raises(CannotFetch, match="404"):
        BlobCache(tmp_path, shelf, limit_mb=1).ensure(digest(b"x"))
    assert len(shelf.asked) == 1


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "G" * 64, "a" * 63])
def test_a_name_that_is_no_digest_is_refused(tmp_path: Path, sha256: str) -> None:
    with pytest.raises(CannotFetch, match="64 hexadecimal digits"):
        BlobCache(tmp_path, Shelf(), limit_mb=1).ensure(sha256)


@pytest.mark.parametrize(
    "name",
    [
        "model.bin",
        "x.pt",
        "x.pkl",
        "run.py",
        "x",
        "../x.json",
        "/etc/x.json",
        "a/../../x.json",
        "a\\b.json",
        "x.json\0",
    ],
)
def test_names_that_run_code_or_escape_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotLoad, match="refused"):
        check_name(name)
    model = Manifest(name="m", version="1", engine="e", answers="vector", files={name: digest(b"x")})
    cache = BlobCache(tmp_path, Shelf(b"x"), limit_mb=1)
    with pytest.raises(CannotLoad):
        cache.fetch(model)
    with pytest.raises(CannotLoad), cache.folder(model):
        pass


def test_the_least_recently_used_files_go_first_and_readers_keep_theirs(tmp_path: Path) -> None:
    bodies = [bytes([n]) * (400 << 10) for n in range(4)]
    cache = BlobCache(tmp_path, Shelf(*bodies), limit_mb=1)
    models = [a_model(**{f"m{n}__json": body}) for n, body in enumerate(bodies)]
    for n, model in enumerate(models[:2]):
        cache.fetch(model)
        os.utime(tmp_path / "blobs" / digest(bodies[n]), (n, n))
    with cache.folder(models[0]) as files:
        os.utime(tmp_path / "blobs" / digest(bodies[0]), (0, 0))
        cache.fetch(models[2])
        assert {p.name for p in (tmp_path / "blobs").iterdir()} == {digest(bodies[1]), digest(bodies[2])}
        assert files["m0.json"].read_bytes() == bodies[0]
        cache.ensure(digest(bodies[1]))
        cache.fetch(models[3])
        assert digest(bodies[3]) in {p.name for p in (tmp_path / "blobs").iterdir()}


def test_several_workers_of_a_host_fetch_a_file_once_between_them(tmp_path: Path) -> None:
    shelf = Shelf(b"weights" * 500)
    wanted = digest(b"weights" * 500)
    threads = [
        threading.Thread(target=BlobCache(tmp_path, shelf, limit_mb=1).ensure, args=(wanted,))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shelf.asked) == 1
    assert (tmp_path / "blobs" / wanted).read_bytes() == b"weights" * 500


def test_folders_left_by_a_dead_process_are_cleared(tmp_path: Path) -> None:
    left = tmp_path / "folders" / "left"
    left.mkdir(parents=True)
    (left / "x.json").write_text("x")
    os.utime(left, (0, 0))
    BlobCache(tmp_path, Shelf(), limit_mb=1)
    assert not left.exists()
