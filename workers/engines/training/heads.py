"""Heads of several tasks on one vector: what they answer, what they lose, how well they do.

Features are standardised; a run's tasks share one hidden layer, if there is one. ``export`` folds the standardisation
in, so that a head takes the trunk's pooled vector as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from motet.evaluation import measures
from motet.evaluation.measures import LabelCounts
from motet.training.recipe import Recipe
from workers.engines.heads import NUMBERS_CENTER, NUMBERS_SCALE, standardised
from workers.engines.training.truth import Truth, numbers_of

#: A feature that moves less than this never moved: divided by almost nothing, its noise would become answers.
_STILL = 1e-3
#: A deviation of a number beside the texts that is this share of its mean is rounding.
_ROUNDING = 1e-12
#: Share of features, and of hidden units, left out at chance while heads learn.
_DROP_IN, _DROP_HIDDEN = 0.1, 0.3


class Heads(nn.Module):
    """All tasks' outputs side by side, from features (n, dim): a row's pooled vectors, and its numbers behind them."""

    center: Tensor
    scale: Tensor
    #: Of each task that is a number: its mean and standard deviation; 0 and 1 of the others.
    shift: Tensor
    stretch: Tensor

    def __init__(self, recipe: Recipe, truths: Sequence[Truth], features: Tensor, train: Tensor) -> None:
        """``features``: (rows, dim) of all rows, without numbers, which are the recipe's; what is standard is learned from
        the rows of ``train``."""
        super().__init__()
        self.truths = truths
        self.beside: Tensor | None
        self.numbers: tuple[Tensor, Tensor] | None = None
        self.register_buffer("beside", None, persistent=False)
        if recipe.numbers:
            said = numbers_of(recipe)
            self.numbers = standard_numbers(said[train])
            self.beside = standardised(said, *self.numbers)
        features = self.with_numbers(features, torch.arange(len(features)))
        center, scale = standard(features[train])
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)
        dim, width = features.shape[1], sum(t.target.width for t in truths)
        dice = torch.Generator().manual_seed(recipe.seed)
        self.hidden = nn.Linear(dim, recipe.hidden) if recipe.hidden else None
        if self.hidden is not None:
            nn.init.normal_(self.hidden.weight, std=dim**-0.5, generator=dice)
            nn.init.zeros_(self.hidden.bias)
        self.out = nn.Linear(recipe.hidden or dim, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        #: Log-variance of each task's noise: what weighs the losses against each other (Kendall et al., CVPR 2018).
        self.noise = nn.Parameter(torch.zeros(len(truths)))
        self.learned_noise = recipe.loss == "uncertainty" and len(truths) > 1
        # A number is learned as so many standard deviations from its mean.
        numbers = [t.values[train][t.known(train)] if t.target.kind == "number" else None for t in truths]
        self.register_buffer("shift", torch.tensor([0.0 if n is None else float(n.mean()) for n in numbers]))
        self.register_buffer(
            "stretch",
            torch.tensor([1.0 if n is None else max(1e-6, float(n.std(correction=0))) for n in numbers]),
        )
        self.weights = [_weights(t, train) if t.target.balance else None for t in truths]

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, all outputs)"""
        x = (pooled - self.center) * self.scale
        x = f.dropout(x, _DROP_IN, self.training)
        if self.hidden is not None:
            x = f.dropout(f.gelu(self.hidden(x)), _DROP_HIDDEN, self.training)
        return self.out(x)  # type: ignore[no-any-return]

    def with_numbers(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Features of these rows, of which these are the vectors."""
        return vectors if self.beside is None else torch.cat([vectors, self.beside[rows]], 1)

    def split(self, answers: Tensor) -> list[Tensor]:
        return list(torch.split(answers, [t.target.width for t in self.truths], dim=1))

    def loss(self, answers: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of these rows, and each task's own. A row without a label of a task adds nothing to that one."""
        total = answers.new_zeros(())
        told = {}
        for number, (truth, mine) in enumerate(zip(self.truths, self.split(answers), strict=True)):
            known = truth.known(rows)
            if not known.any():
                continue
            one = self._loss_of(number, truth, mine[known], truth.values[rows][known].to(mine.device))
            told[truth.target.name] = float(one.detach())
            s = self.noise[number]
            total = total + (one * torch.exp(-s) + s / 2 if self.learned_noise else one)
        return total, told

    def _loss_of(self, number: int, truth: Truth, mine: Tensor, values: Tensor) -> Tensor:
        weight = self.weights[number]
        weight = None if weight is None else weight.to(mine.device)
        match truth.target.kind:
            case "single":
                return f.cross_entropy(mine, values, weight=weight)
            case "multi":
                return f.binary_cross_entropy_with_logits(mine, values, pos_weight=weight)
            case _:
                wanted = (values - self.shift[number]) / self.stretch[number]
                return f.mse_loss(mine[:, 0], wanted)

    def answers_of(self, number: int, mine: Tensor) -> Tensor:
        """A task's outputs as its model will give them: logits, or the number itself."""
        if self.truths[number].target.kind != "number":
            return mine
        return mine * self.stretch[number] + self.shift[number]

    @torch.no_grad()
    def export(self, number: int) -> dict[str, Tensor]:
        """``weight``, ``bias`` and, with a hidden layer, ``hidden.weight``, ``hidden.bias``: of this task's head alone."""
        lo = sum(t.target.width for t in self.truths[:number])
        hi = lo + self.truths[number].target.width
        weight, bias = self.out.weight[lo:hi].float(), self.out.bias[lo:hi].float()
        if self.truths[number].target.kind == "number":
            weight, bias = weight * self.stretch[number], bias * self.stretch[number] + self.shift[number]
        if self.hidden is None:
            weight, bias = folded(weight, bias, self.center, self.scale)
            tensors = {"weight": weight, "bias": bias}
        else:
            first = folded(self.hidden.weight.float(), self.hidden.bias.float(), self.center, self.scale)
            tensors = {"weight": weight, "bias": bias, "hidden.weight": first[0], "hidden.bias": first[1]}
        if self.numbers is not None:
            tensors |= dict(zip((NUMBERS_CENTER, NUMBERS_SCALE), self.numbers, strict=True))
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """What to subtract from features (rows, dim), and then to multiply them by, for mean 0 and deviation 1."""
    # One row has no deviation: torch says NaN, which would become the head's weights.
    center = features.mean(0)
    spread = features.std(0) if len(features) > 1 else torch.zeros_like(center)
    return center, torch.where(spread > _STILL, 1 / spread, 0.0)


def standard_numbers(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The same of numbers (rows, numbers) in fp64, of those that are there."""
    center = numbers.nanmean(0).nan_to_num()
    spread = (numbers - center).square().nanmean(0).sqrt().nan_to_num()
    # Of a number that never moved nothing is learned; what is left of it is rounding.
    return center, torch.where(spread > _ROUNDING * center.abs(), 1 / spread, 0.0)


def folded(weight: Tensor, bias: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A layer on standard features as a layer on features as they come."""
    weight = weight * scale
    return weight, bias - weight @ center


def even_thresholds(scores: Tensor, truth: Tensor) -> tuple[float, ...]:
    """Of each label the threshold at which it is given about as often as it is true of these rows.

    ``scores``, ``truth``: (rows, labels), 0 to 1. The threshold of the best F1 would give more labels than people did,
    above all where the head is unsure.
    """
    grid = [step / 100 for step in range(5, 96)]
    return tuple(
        min(grid, key=lambda at: abs(float((said >= at).float().mean() - true.mean())))
        for said, true in zip(scores.T, truth.T, strict=True)
    )


def _weights(truth: Truth, train: Tensor) -> Tensor | None:
    """Of each label: sqrt(mean share / its share) for one label a row; sqrt(no / yes) for several."""
    values = truth.values[train][truth.known(train)]
    if truth.target.kind == "single":
        counts = torch.bincount(values, minlength=truth.target.width).clamp(min=1).float()
        return (counts.mean() / counts).sqrt()
    if truth.target.kind == "multi":
        yes = values.sum(0).clamp(min=1)
        return ((len(values) - yes).clamp(min=1) / yes).sqrt()
    return None


def scores(heads: Heads, answers: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
    """Task -> what its answers (n, all outputs) for these rows are worth. Rows without a label do not count.

    ``score`` is what early stopping looks at, 1 at best: accuracy, the mean of macro F1 and accuracy for several
    labels a row, and for a number the share of its variance that is explained.
    """
    found = {}
    for number, (truth, mine) in enumerate(zip(heads.truths, heads.split(answers), strict=True)):
        known = truth.known(rows)
        if known.any():
            given = heads.answers_of(number, mine)[known].float().cpu()
            found[truth.target.name] = _score(truth, given, truth.values[rows][known])
    return found


def _score(truth: Truth, given: Tensor, values: Tensor) -> dict[str, float]:
    match truth.target.kind:
        case "single":
            said, true = given.argmax(1), values
            yes, wanted = (f.one_hot(side, truth.target.width).numpy() for side in (said, true))
            accuracy, f1 = (
                measures.accuracy(true.tolist(), said.tolist()),
                LabelCounts.of(wanted, yes).macro_f1(),
            )
            return {"score": accuracy, "accuracy": accuracy, "macro_f1": f1}
        case "multi":
            counts = LabelCounts.of(values.numpy(), (given > 0).numpy())
            accuracy, f1 = counts.accuracy(len(values)), counts.macro_f1()
            return {"score": (accuracy + f1) / 2, "accuracy": accuracy, "macro_f1": f1}
        case _:
            numbers, answers = values.numpy(), given[:, 0].numpy()
            explained = measures.r_squared(numbers, answers)
            return {
                "score": explained,
                "mae": measures.mean_absolute_error(numbers, answers),
                "r2": explained,
            }


def mean_score(told: Mapping[str, Mapping[str, float]]) -> float:
    """Over tasks."""
    return sum(one["score"] for one in told.values()) / len(told) if told else float("nan")
