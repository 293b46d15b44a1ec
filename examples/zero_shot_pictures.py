"""Name what a picture shows in words of your own, without CLIP: ConSE (Norouzi et al., ICLR 2014). It is weak.

The names of the ten likeliest classes of ImageNet are mixed, as vectors, by how likely each is; the nearest label wins.
Of 24 pictures and 33 labels it got 12 right, and had the right one among its first five for 20. What ImageNet has no
class near to (the moon, a retina, coins) it misses. So take CLIP where you have its weights, or train a head on pictures
of your own (docs/media.md).

Start a server and register a trunk with its head first: `motet up`, and in another shell
`motet models add --efficientnet lite0`. Then name your own pictures behind this command, or see some of scikit-image's.
"""

import sys
from pathlib import Path

import numpy as np

from motet import Classify, Client, Embed, datasets

LABELS = (
    "a cat",
    "a cup of coffee",
    "a rocket",
    "a photographer",
    "a motorcycle",
    "a brick wall",
    "a birthday cake",
)
#: Classes that are mixed. More bring in those that the model does not mean; fewer leave out what it cannot tell apart.
CLASSES = 10


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read() -> dict[str, bytes]:
    if len(sys.argv) > 1:
        return {Path(path).name: Path(path).read_bytes() for path in sys.argv[1:]}
    known = datasets.photographs()
    return {
        name: known[name] for name in ("chelsea", "coffee", "rocket", "camera", "motorcycle_left", "brick")
    }


pictures = read()
with Client() as client:
    seen = client.submit(
        [{"photo": data} for data in pictures.values()],
        {"object": Classify("imagenet", input="{photo}", scores=True)},
    )
    scores = [row["object"].scores or {} for row in seen.results()]
    classes = list(scores[0])
    named = client.submit([*classes, *LABELS], {"vector": Embed("all-MiniLM-L6-v2")})
    vectors = np.array([row["vector"].vector for row in named.results()])

# What all names have in common says nothing of a picture: with it, everything is near to everything.
vectors = vectors - vectors[: len(classes)].mean(axis=0)
of_classes, of_labels = vectors[: len(classes)], unit(vectors[len(classes) :])
chances = np.array([[one[name] for name in classes] for one in scores])
likeliest = np.argsort(-chances, axis=1)[:, :CLASSES]
mixed = np.stack([chances[i, best] @ of_classes[best] for i, best in enumerate(likeliest)])
near = unit(mixed) @ of_labels.T
for name, of_one in zip(pictures, near, strict=True):
    first, second = np.argsort(-of_one)[:2]
    print(f"{name:<18} {LABELS[first]} {of_one[first]:.2f}, or else {LABELS[second]} {of_one[second]:.2f}")
