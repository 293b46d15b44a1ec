"""MovieLens latest-small (2016): what 671 people thought of 9,066 films. Under GroupLens' terms: fetched, never shipped.

Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. The trial made of it is the usual one: the last film that
somebody liked is hidden, and looked for among films that they have not seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet import datasets
from motet.apps.data.frames import plain, table

#: Stars from which on a film was liked.
LIKED = 4.0
#: Liked films that a viewer needs, so that one of them can be hidden.
FEWEST = 5
#: Films beside the hidden one, drawn at random from those that the viewer has not seen.
OTHERS = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """A film as its list tells it."""

    id: int
    title: str
    year: int | None = None
    #: Words such as ``Comedy|Drama``; "" where nobody said.
    genres: str = ""

    def row(self) -> dict[str, str]:
        """What an encoder reads of it."""
        return {
            "title": self.title,
            "year": "" if self.year is None else f"({self.year})",
            "genres": self.genres.replace("|", ", "),
        }


def as_said(title: str) -> str:
    """``Remains of the Day, The`` as one says it."""
    return re.sub(r"^(.*), (The|An|A)\b", r"\2 \1", title)


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewer:
    """Somebody's films, oldest first."""

    liked: Sequence[int]
    #: Every film that they rated, liked or not.
    seen: Sequence[int]
    #: The liked film that is hidden from the recommender; None where there are too few.
    hidden: int | None = None
    #: The hidden film among others that this viewer has not seen, in no order.
    among: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratings:
    """Films by id, and their viewers."""

    films: Mapping[int, Film]
    viewers: Sequence[Viewer]

    def liked_once(self) -> frozenset[int]:
        """Films that a viewer is known to like; every other one is cold."""
        return frozenset(film for viewer in self.viewers for film in viewer.liked)


def ratings(cache: Path | None = None, *, download: datasets.Download | None = None) -> Ratings:
    """The data set as a trial. Raises SetupError where it is not to be had."""
    frame = table("dslabs/movielens", cache, download=download)
    films: dict[int, Film] = {}
    rated: dict[int, list[tuple[int, int, float]]] = {}
    for each in frame.to_dict("records"):
        row = plain(each)
        films.setdefault(
            row["movieId"],
            Film(
                id=row["movieId"],
                title=row["title"] or "untitled",
                year=row["year"],
                genres="" if row["genres"] in (None, "(no genres listed)") else row["genres"],
            ),
        )
        rated.setdefault(row["userId"], []).append((row["timestamp"], row["movieId"], float(row["rating"])))
    return trial(films, [[one[1:] for one in sorted(rated[user])] for user in sorted(rated)])


def trial(
    films: Mapping[int, Film], rated: Sequence[Sequence[tuple[int, float]]], *, seed: int = 0
) -> Ratings:
    """Hide each viewer's last liked film. ``rated``: (film, stars) of each viewer, oldest first."""
    dice = random.Random(seed)
    every = sorted(films)
    return Ratings(films=films, viewers=[_viewer(one, every, dice) for one in rated])


def _viewer(rated: Sequence[tuple[int, float]], every: Sequence[int], dice: random.Random) -> Viewer:
    liked = [film for film, stars in rated if stars >= LIKED]
    seen = [film for film, _ in rated]
    if len(liked) < FEWEST:
        return Viewer(liked=liked, seen=seen)
    *liked, hidden = liked
    known = set(seen)
    unseen = [film for film in every if film not in known]
    among = [hidden, *dice.sample(unseen, min(OTHERS, len(unseen)))]
    dice.shuffle(among)
    return Viewer(liked=liked, seen=[film for film in seen if film != hidden], hidden=hidden, among=among)
