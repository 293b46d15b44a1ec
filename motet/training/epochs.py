"""What a training run measured in each epoch, and its scores in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One time through the training rows."""

    #: ``heads`` on the frozen trunk, then ``lora`` or ``all`` where the trunk learns too.
    stage: str
    epoch: int
    of: int
    loss: float | None
    #: Task -> scores of rows that were not learned from: those that training stops by, and those of the test.
    validation: Mapping[str, Mapping[str, float]]
    test: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        loss = "–" if self.loss is None else f"{self.loss:.4f}"
        told = "  ".join(
            f"{task} {score_words(scores)}" for task, scores in (self.test or self.validation).items()
        )
        return f"{self.stage:>5} {self.epoch:>3} of {self.of}  loss {loss}  {told}"


def score_words(scores: Mapping[str, float]) -> str:
    if "mae" in scores:
        return f"MAE {scores['mae']:.3g} (R² {scores['r2']:.2f})"
    return f"{scores['accuracy']:.1%} (F1 {scores['macro_f1']:.2f})"
