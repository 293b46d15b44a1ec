"""The curves of a training run as one SVG: loss above, scores below, epochs to the right (motet/pages/curves.svg)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.pages import COLOURS, environment
from motet.training.epochs import Epoch

#: Pixels: the picture, one of its two plots, and the room left of, right of, above and between them.
_WIDTH, _PLOT, _LEFT, _RIGHT, _TOP, _GAP = 640, 170, 56, 150, 40, 46


def draw(epochs: Sequence[Epoch], *, title: str) -> str:
    """A picture for a file or a notebook. Scores are those of the test rows, or else of the validation rows."""
    told = [epoch.test or epoch.validation for epoch in epochs]
    tasks = list(dict.fromkeys(task for one in told for task in one))
    scores = {task: [one.get(task, {}).get("score") for one in told] for task in tasks}
    stages = [
        (at, epoch.stage) for at, epoch in enumerate(epochs) if at == 0 or epochs[at - 1].stage != epoch.stage
    ]
    return (
        environment()
        .get_template("curves.svg")
        .render(
            title=title,
            width=_WIDTH,
            height=_TOP + 2 * _PLOT + 2 * _GAP,
            left=_LEFT,
            right=_WIDTH - _RIGHT,
            panels=[
                _panel({"loss": [epoch.loss for epoch in epochs]}, _TOP, "loss", stages),
                _panel(scores, _TOP + _PLOT + _GAP, "score on held-out rows", stages),
            ],
        )
    )


def _panel(
    lines: Mapping[str, Sequence[float | None]], top: int, name: str, stages: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """A plot's levels, stages and lines in pixels."""
    values = [value for line in lines.values() for value in line if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1.0
    n = max((len(line) for line in lines.values()), default=0)

    def x(at: int) -> float:
        return round(_LEFT + (_WIDTH - _RIGHT - _LEFT) * (at / (n - 1) if n > 1 else 0.0), 1)

    def y(value: float) -> float:
        return round(top + (_PLOT - 24) * (1 - (value - low) / (high - low)) + 14, 1)

    drawn = []
    for number, (label, line) in enumerate(lines.items()):
        told = [(at, value) for at, value in enumerate(line) if value is not None]
        if told:
            points = [(x(at), y(value)) for at, value in told]
            drawn.append({"name": label, "colour": number % COLOURS, "points": points, "last": told[-1][1]})
    return {
        "name": name,
        "top": top,
        "foot": top + _PLOT,
        "levels": [(value, y(value)) for value in (low, (low + high) / 2, high)],
        "stages": [(x(at), stage) for at, stage in stages],
        "lines": drawn,
    }
