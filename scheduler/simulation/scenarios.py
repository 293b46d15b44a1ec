"""Scenario files: counts and distributions in TOML, drawn by a seed into a `Scenario`.

A number may be a distribution: ``{ uniform = [5, 20] }`` (between), ``{ lognormal = [1.0, 0.5] }`` (median, sigma)
or ``{ cycle = [0.5, 1, 2, 4] }`` (each in turn). ``count`` makes many of a device, a model or a job.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from motet.errors import SetupError
from scheduler.simulation.cluster import Model, Scenario, SimulatedDevice, SimulatedJob, UncarvedRows

Made = TypeVar("Made")

#: What a scenario file may say of the world as a whole; the rest of it is tables.
_WORLD = frozenset(f.name for f in fields(Scenario)) - {"devices", "models", "jobs", "measured", "begun"}
_DEVICE = frozenset(f.name for f in fields(SimulatedDevice)) | {"count"}
_MODEL = frozenset(f.name for f in fields(Model)) | {"count"}
#: ``share``: rows for this part of all work of the scenario, in place of ``rows``.
_JOB = frozenset(f.name for f in fields(SimulatedJob)) | {"count", "share"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioFile:
    """One file: what it is for, and the scenario that a seed makes of it."""

    name: str
    about: str
    spec: Mapping[str, Any]

    def scenario(self, seed: int) -> Scenario:
        """The same one for the same seed. Raises SetupError."""
        return drawn(self.spec, Random(f"{self.name}:{seed}"), self.name)


def read(path: Path) -> ScenarioFile:
    """Raises SetupError."""
    try:
        spec = tomllib.loads(path.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"{path}: cannot be read: {error}") from None
    found = ScenarioFile(name=path.stem, about=str(spec.pop("about", "")), spec=spec)
    found.scenario(0)
    return found


def drawn(spec: Mapping[str, Any], rng: Random, where: str) -> Scenario:
    """A scenario as its TOML tells it. Raises SetupError."""
    _known(
        {k: v for k, v in spec.items() if k not in ("devices", "models", "jobs")},
        _WORLD | {"seconds_a_device"},
        where,
    )
    world = {k: v for k, v in spec.items() if k in _WORLD}
    devices = tuple(
        _make(SimulatedDevice, {"true_speed": s.get("speed"), **s}, at)
        for s, at in _each(spec, "devices", rng, where)
    )
    models = {
        s["name"]: _make(Model, s, at) for s, at in _each(spec, "models", rng, where, default_name="model")
    }
    told = list(_each(spec, "jobs", rng, where, default_name="job"))
    work_s = float(spec.get("seconds_a_device", 0.0)) * sum(d.true_speed for d in devices)
    shares = sum(s.get("share", 0.0) for s, _ in told)
    jobs = tuple(_job(s, at, models, work_s, shares, number) for number, (s, at) in enumerate(told))
    if not (devices and models and jobs):
        raise SetupError(f"{where}: expected at least one of each of [[devices]], [[models]] and [[jobs]]")
    return Scenario(devices=devices, models=models, jobs=jobs, **world)


def _job(
    spec: dict[str, Any],
    where: str,
    models: Mapping[str, Model],
    work_s: float,
    shares: float,
    number: int,
) -> SimulatedJob:
    share = spec.pop("share", None)
    # A job that names no model takes the next one in turn.
    spec.setdefault("model", list(models)[number % len(models)])
    if spec["model"] not in models:
        raise SetupError(f"{where}.model: got {spec['model']!r}; expected one of {', '.join(models)}")
    if share is None:
        job = _make(SimulatedJob, spec, where)
    elif work_s <= 0:
        raise SetupError(f"{where}.share: it needs seconds_a_device at the head of the file")
    else:
        job = _make(
            SimulatedJob, {**spec, "rows": _rows(spec, models[spec["model"]], work_s * share / shares)}, where
        )
    if job.rows < 1:
        raise SetupError(f"{where}.rows: got {job.rows}; expected at least 1")
    return job


def _rows(spec: Mapping[str, Any], model: Model, seconds: float) -> int:
    """Rows that take so many seconds on a device of speed 1."""
    block = UncarvedRows(SimulatedJob(**{**spec, "rows": 1 << 30}))
    a_block_s = model.seconds(block.work(0, block.block_rows))
    return max(1, round(seconds / a_block_s * block.block_rows))


def _each(
    spec: Mapping[str, Any], kind: str, rng: Random, where: str, default_name: str = ""
) -> Iterator[tuple[dict[str, Any], str]]:
    """Every device, model or job that the tables tell of, its numbers drawn, with where it stands."""
    known = {"devices": _DEVICE, "models": _MODEL, "jobs": _JOB}[kind]
    numbers = count()
    for i, table in enumerate(spec.get(kind, ())):
        at = f"{where}, {kind}[{i}]"
        _known(table, known, at)
        many = table.get("count")
        for n in range(1 if many is None else many):
            one = {k: _drawn(v, rng, n, f"{at}.{k}") for k, v in table.items() if k != "count"}
            name = one.get("name") or one.get("kind") or default_name
            number = next(numbers)
            one["name"] = name if many is None and name != default_name else f"{name}-{number}"
            yield one, at


def _drawn(value: object, rng: Random, number: int, where: str) -> object:
    """A number or text as it stands; a distribution's next number; a list as what cannot change."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    match value:
        case {"uniform": [low, high], **rest} if not rest:
            return rng.uniform(low, high)
        case {"lognormal": [median, sigma], **rest} if not rest:
            return median * rng.lognormvariate(0.0, sigma)
        case {"cycle": [*values], **rest} if values and not rest:
            return values[number % len(values)]
    raise SetupError(
        f"{where}: got {value}; expected a number, {{ uniform = [low, high] }}, {{ lognormal = [median, sigma] }} "
        "or { cycle = [...] }"
    )


def _known(table: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    strange = sorted(table.keys() - known)
    if strange:
        raise SetupError(f"{where}: {', '.join(strange)}: not known; expected of {', '.join(sorted(known))}")


def _make(kind: Callable[..., Made], spec: Mapping[str, Any], where: str) -> Made:
    try:
        return kind(**spec)
    except TypeError as error:
        raise SetupError(f"{where}: {error}") from None
