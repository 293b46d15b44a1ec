"""The curves of a training run as one SVG: loss above, scores below, epochs to the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from motet.markup import PALETTE, Html, tag
from motet.training.epochs import Epoch

_WIDTH, _PLOT, _LEFT, _TOP, _GAP = 640, 170, 56, 40, 46
_STYLE = (
    PALETTE
    + "svg{background:var(--paper)}text{fill:var(--soft);font:12px system-ui,sans-serif;"
    + "font-variant-numeric:tabular-nums}.title{fill:var(--ink);font-size:14px;font-weight:600}"
    + "path{fill:none;stroke-width:2}.grid{stroke:var(--line);stroke-width:1}"
)


def draw(epochs: Sequence[Epoch], *, title: str) -> str:
    """A picture for a file or a notebook. Scores are those of the test rows, or else of the validation rows."""
    losses = {"loss": [epoch.loss for epoch in epochs]}
    told = [epoch.test or epoch.validation for epoch in epochs]
    tasks = list(dict.fromkeys(task for one in told for task in one))
    scores = {task: [one.get(task, {}).get("score") for one in told] for task in tasks}
    stages = [
        (at, epoch.stage) for at, epoch in enumerate(epochs) if at == 0 or epochs[at - 1].stage != epoch.stage
    ]
    height = _TOP + 2 * _PLOT + 2 * _GAP
    picture = tag(
        "svg",
        tag("style", Html(_STYLE)),
        tag("text", title, x=_LEFT, y=22, class_="title"),
        _panel(losses, _TOP, "loss", stages),
        _panel(scores, _TOP + _PLOT + _GAP, "score on held-out rows", stages),
        xmlns="http://www.w3.org/2000/svg",
        width=_WIDTH,
        height=height,
        view_box=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_label=f"Loss and scores of {title} by epoch",
    )
    return f"{picture}\n"


def _panel(
    lines: Mapping[str, Sequence[float | None]], top: float, name: str, stages: Sequence[tuple[int, str]]
) -> list[Html]:
    values = [value for line in lines.values() for value in line if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1.0
    n = max((len(line) for line in lines.values()), default=0)
    right = _WIDTH - 150

    def x(at: int) -> float:
        return round(_LEFT + (right - _LEFT) * (at / (n - 1) if n > 1 else 0.0), 1)

    def y(value: float) -> float:
        return round(top + (_PLOT - 24) * (1 - (value - low) / (high - low)) + 14, 1)

    parts = [tag("text", name, x=_LEFT, y=top + 4)]
    for value in (low, (low + high) / 2, high):
        parts.append(tag("line", x1=_LEFT, x2=right, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:.3g}", x=_LEFT - 8, y=y(value) + 4, text_anchor="end"))
    for at, stage in stages:
        parts.append(tag("line", x1=x(at), x2=x(at), y1=top + 10, y2=top + _PLOT, class_="grid"))
        parts.append(tag("text", stage, x=x(at) + 4, y=top + _PLOT + 4))
    for number, (label, line) in enumerate(lines.items()):
        points = [(x(at), y(value)) for at, value in enumerate(line) if value is not None]
        if not points:
            continue
        colour = f"stroke:var(--p{number % 6})"
        parts.append(tag("path", d="M" + " L".join(f"{a} {b}" for a, b in points), style=colour))
        last = next(value for value in reversed(line) if value is not None)
        words = f"{label} {last:.3g}"
        # Names of lines that end close together stand under each other.
        parts.append(
            tag("text", words, x=right + 10, y=top + 18 + 16 * number, style=f"fill:var(--p{number % 6})")
        )
    return parts
