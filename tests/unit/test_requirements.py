"""What pyproject.toml promises to run with is what these tests run with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]


def requirements() -> Iterator[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    for line in (*PROJECT["dependencies"], *(line for extra in extras for line in extra)):
        wanted = Requirement(line)
        if wanted.name != "motet" and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            yield wanted


def floor(wanted: Requirement) -> Version:
    """The oldest version that it lets in."""
    return min(Version(one.version) for one in wanted.specifier if one.operator in (">=", "~=", "=="))


def test_every_requirement_has_a_floor_of_a_minor_version_and_is_met_here() -> None:
    for wanted in requirements():
        assert len(floor(wanted).release) >= 2, f"{wanted}: a floor such as >=1.2"
        try:
            here = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # vLLM lives apart
        assert wanted.specifier.contains(here), f"{wanted}, with {here} here"


def test_torch_is_the_one_minor_version_whose_options_training_uses() -> None:
    """DistributedDataParallel's forward_sync_buffers is new in 2.13 (workers/engines/training/team.py)."""
    for wanted in requirements():
        if wanted.name == "torch":
            assert wanted.specifier.contains("2.13.0")
            assert not wanted.specifier.contains("2.12.1")
            assert not wanted.specifier.contains("2.14.0")
