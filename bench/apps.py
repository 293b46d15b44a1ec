"""What the applications score, each figure with its 95 % interval and beside honest rivals (`motet app all`).

Each application's list of scores, as `motet app NAME --json` prints it (docs/apps/README.md says what they mean), and under
details all that it measured. They need the packages of `pip install 'motet[apps]'`. A score below its floor is named, and
the exit code is 1 then. The smallest run measures mood alone, on a few texts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import Size, cluster_folder, finish, options

from motet.apps.data.customers import felt_texts
from motet.apps.run import play
from motet.apps.support_scores import mood_score
from motet.demo.stage import Story, staged

#: Texts of the smallest run.
FEW = 40


def main() -> None:
    arguments = options(__doc__).parse_args()
    with cluster_folder() as folder:
        told = (
            few(folder) if arguments.size is Size.SMOKE else every(folder, quick=arguments.size is Size.QUICK)
        )
    if arguments.size is not Size.SMOKE and (low := below(told)):
        sys.exit("below its floor: " + "; ".join(low))
    finish("apps", {name: one["scores"] for name, one in told.items()}, arguments, details=told)


def below(told: Mapping[str, Any]) -> list[str]:
    """The scores that are worse than a test may demand, in words."""
    return [
        f"{name}, {score['name']}: {score['figure']} {score['value']}, at least {score['floor']}"
        for name, one in told.items()
        for score in one["scores"]
        if score["floor"] is not None and not (score["value"] or 0) >= score["floor"]
    ]


def every(folder: Path, *, quick: bool) -> dict[str, Any]:
    return play("all", data=folder, cpus=2, quick=quick)


def few(folder: Path) -> dict[str, Any]:
    with staged(folder, Story(quiet=True), cpus=1, keep=False, name="bench apps") as stage:
        return {"support": {"scores": [mood_score(stage, felt_texts()[:FEW]).to_json()]}}


if __name__ == "__main__":
    main()
