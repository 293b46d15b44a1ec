"""What a run learns from, as tensors: texts and vectors of one job, labels of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from motet.training.recipe import MISSING, MISSING_BIT, Recipe, Target


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of each row for one task."""

    target: Target
    #: Single: (rows,) int64, MISSING where unknown. Multi: (rows, labels) fp32, NaN where unknown. Number: (rows,) fp32.
    values: torch.Tensor

    @classmethod
    def of(cls, target: Target) -> Truth:
        if target.kind == "single":
            return cls(target, torch.from_numpy(np.frombuffer(target.truth, "<i2").astype(np.int64)))
        if target.kind == "number":
            return cls(target, torch.from_numpy(np.frombuffer(target.truth, "<f4").astype(np.float32)))
        bits = np.frombuffer(target.truth, np.uint8).reshape(-1, target.width).astype(np.float32)
        bits[bits == MISSING_BIT] = np.nan
        return cls(target, torch.from_numpy(bits))

    def known(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows,) bool: whether there is a label."""
        values = self.values[rows]
        if self.target.kind == "single":
            return values != MISSING
        return ~torch.isnan(values if self.target.kind == "number" else values[:, 0])


def numbers_of(recipe: Recipe) -> torch.Tensor:
    """(rows, numbers) fp64 of the numbers that heads read, NaN where they are missing."""
    columns = [np.frombuffer(one.values, "<f8").astype(np.float64) for one in recipe.numbers]
    return torch.from_numpy(np.stack(columns, 1)) if columns else torch.empty(0, 0, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Parts:
    """Row numbers of training, validation and test."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor

    @classmethod
    def of(cls, recipe: Recipe) -> Parts:
        """The same for the same recipe. Validation rows are drawn from the training rows, by the recipe's seed."""
        dice = torch.Generator().manual_seed(recipe.seed)
        drawn = torch.randperm(recipe.train_rows, generator=dice)
        kept = int(recipe.validation * recipe.train_rows)
        return cls(
            train=drawn[kept:].sort().values,
            validation=drawn[:kept].sort().values,
            test=torch.arange(recipe.train_rows, recipe.train_rows + recipe.test_rows),
        )
