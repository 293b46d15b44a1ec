"""Plays applications: one cluster for all that were asked for, their scores as a table, and everything stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from motet.apps import SENTENCES, find
from motet.apps.application import AppOutcome, RunOptions, Score
from motet.apps.data.files import fetched
from motet.cli.show import table
from motet.demo.stage import Story, staged
from motet.errors import SetupError
from motet.evaluation.intervals import Estimate

#: `motet app all` runs every one.
ALL = "all"


def play(
    name: str,
    *,
    data: Path,
    cpus: int,
    quick: bool,
    keep: bool = False,
    live: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run an application, or ``all``, on a cluster in ``data``; return its outcome as JSON, by application for ``all``.

    With ``live`` it plays on until it is told to stop. Raises SetupError where the name is unknown, has nothing live, or
    data or packages are missing; JobFailed.
    """
    names = tuple(SENTENCES) if name == ALL else (name,)
    applications = {one: find(one) for one in names}
    if live and (name == ALL or applications[name].live is None):
        has = ", ".join(one for one in SENTENCES if find(one).live)
        raise SetupError(
            f"--live: {name} has nothing live; leave it out" + (f", or run {has}" if has else "")
        )
    missing = {p for one in applications.values() for m, p in one.needs.items() if find_spec(m) is None}
    if missing:
        raise SetupError(
            f"{name} needs packages that are not installed here; pip install {' '.join(sorted(missing))}"
        )
    story = Story(quiet)
    if data_files := list(dict.fromkeys(file for one in applications.values() for file in one.data)):
        with story.phase("looking for the data, or fetching it") as note:
            note(f"{sum(fetched(file).stat().st_size for file in data_files) >> 20:,} MB")
    registers = dict.fromkeys(line for one in applications.values() for line in one.registers)
    settings = {key: value for one in applications.values() for key, value in one.settings.items()}
    told: dict[str, Any] = {}
    with staged(
        data,
        story,
        cpus=cpus,
        keep=keep,
        models=tuple(registers),
        name=f"motet app {name}",
        settings=settings,
    ) as stage:
        for one, application in applications.items():
            folder = data / "apps" / one
            folder.mkdir(parents=True, exist_ok=True)
            asked = RunOptions(folder=folder, quick=quick)
            story.say(f"\n{one}: {SENTENCES[one]}\n")
            started = time.monotonic()
            outcome = application.run(stage, asked)
            told[one] = {**outcome.to_json(), "seconds": round(time.monotonic() - started, 1), "quick": quick}
            show(story, outcome)
            if live and application.live is not None:
                application.live(stage, asked)
    return told if name == ALL else told[name]


def show(story: Story, outcome: AppOutcome) -> None:
    """Print the scores beside their baselines, what has none, and the files."""
    if outcome.scores:
        story.say("")
        lines = [line for score in outcome.scores for line in _lines(score)]
        story.show(table(("!score", "figure", "#value", "95 % interval", "#rows"), lines))
    for what, why in outcome.unmeasured.items():
        story.say(f"unmeasured: {what}, for {why}")
    for path in outcome.files:
        story.say(f"wrote {path}")


def _lines(score: Score) -> list[Sequence[str]]:
    own = (score.name, score.figure, *_words(score.estimate), f"{score.rows:,}")
    return [own, *((f"  {name}", "", *_words(one), "") for name, one in score.baselines.items())]


def _words(estimate: Estimate) -> tuple[str, str]:
    value = "–" if estimate.value is None else f"{estimate.value:.3f}"
    known = estimate.low is not None and estimate.high is not None
    return value, f"[{estimate.low:.3f}, {estimate.high:.3f}]" if known else "–"
