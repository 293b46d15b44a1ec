"""Figures with 95 % intervals for what no job answered: baselines, rivals, rules. A job's own are ``Job.evaluate``'s."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from motet.evaluation import Estimate, bootstrap, macro_f1, wilson
from motet.evaluation.intervals import percentiles
from motet.evaluation.measures import Float64s

_WORD = re.compile(r"\w+")


def share(right: Sequence[bool]) -> Estimate:
    """The share of rows that are right, with Wilson's interval."""
    if not right:
        return Estimate(None)
    return Estimate(sum(right) / len(right), *wilson(sum(right), len(right)))


def accuracy(truth: Sequence[Hashable], said: Sequence[Hashable | None]) -> Estimate:
    """The share of rows whose answer is the truth. None is wrong."""
    return share([a == b for a, b in zip(truth, said, strict=True)])


def label_f1(truth: Sequence[str], said: Sequence[str | None]) -> Estimate:
    """Macro F1, as `motet evaluate` has it, with a bootstrap over rows."""
    return resampled(lambda rows: macro_f1([truth[i] for i in rows], [said[i] for i in rows]), len(truth))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value a row, such as a hit or NDCG, with a bootstrap over rows."""
    at = np.asarray(values, np.float64)
    if not len(at):
        return Estimate(None)
    drawn = bootstrap(lambda weights: np.array([weights @ at / len(at)]), np.ones(len(at), np.int64))
    return Estimate(float(at.mean()), *percentiles(drawn)[0])


def resampled(figure: Callable[[Sequence[int]], float], rows: int, *, resamples: int = 500) -> Estimate:
    """A figure of some rows, given by their numbers (with repetition), with a bootstrap over rows.

    ``figure`` is called once with all rows in order and ``resamples`` times with drawn ones; NaN where it is not defined.
    """
    if not rows:
        return Estimate(None)

    def of(weights: Float64s) -> Float64s:
        return np.array([figure(np.repeat(np.arange(rows), weights.astype(int)).tolist())])

    drawn = bootstrap(of, np.ones(rows, np.int64), resamples=resamples)
    return Estimate(figure(range(rows)), *percentiles(drawn)[0])


def commonest(train: Sequence[str]) -> str:
    """The label that a model which knows nothing would always say."""
    return Counter(train).most_common(1)[0][0]


def words_alone(
    train: Sequence[str | Sequence[str]], labels: Sequence[str], test: Sequence[str | Sequence[str]]
) -> list[str]:
    """The labels of ``test`` by words alone: TF-IDF, and the nearest mean of a label by cosine (Rocchio, 1971).

    A row is a text, or several: then a word of one is another word than the same one of another.
    """
    taught = [_words(row) for row in train]
    places = {word: at for at, word in enumerate(sorted({word for text in taught for word in text}))}
    seen_in = np.ones(len(places))
    for text in taught:
        seen_in[[places[word] for word in text]] += 1
    rarity = np.log((1 + len(train)) / seen_in) + 1

    def vectors(texts: Sequence[Counter[tuple[int, str]]]) -> Float64s:
        found = np.zeros((len(texts), len(places)))
        for line, text in zip(found, texts, strict=True):
            for word, times in text.items():
                if word in places:
                    line[places[word]] = (1 + np.log(times)) * rarity[places[word]]
        length = np.linalg.norm(found, axis=1, keepdims=True)
        unit: Float64s = found / np.where(length > 0, length, 1)
        return unit

    kinds = sorted(set(labels))
    learned, given = vectors(taught), np.array(labels)
    means = np.stack([learned[given == kind].mean(0) for kind in kinds])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    nearest = (vectors([_words(row) for row in test]) @ means.T).argmax(1)
    return [kinds[at] for at in nearest]


def _words(row: str | Sequence[str]) -> Counter[tuple[int, str]]:
    texts = (row,) if isinstance(row, str) else row
    return Counter((at, word) for at, text in enumerate(texts) for word in _WORD.findall(text.lower()))


def chrf(right: str, said: str, *, most: int = 6, beta: float = 2.0) -> float:
    """How alike two texts are, 0 to 1: the F score of their n-grams of 1 to ``most`` letters (Popović, chrF, WMT 2015)."""
    a, b = ("".join(text.split()) for text in (right, said))
    precisions, recalls = [], []
    for n in range(1, most + 1):
        there, got = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, b))
        if there and got:
            common = (there & got).total()
            precisions.append(common / got.total())
            recalls.append(common / there.total())
    if not precisions:
        return float(a == b)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
