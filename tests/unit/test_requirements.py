"""What pyproject.toml promises to run with is what these tests run with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CLIENT, CLUSTER = PROJECTS = tuple(
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
    for folder in (".", "deploy/cluster")
)


def lines(project: dict[str, Any]) -> Iterator[str]:
    yield from project["dependencies"]
    for extra in project["optional-dependencies"].values():
        yield from extra


def requirements() -> Iterator[Requirement]:
    for line in (line for project in PROJECTS for line in lines(project)):
        wanted = Requirement(line)
        if not wanted.name.startswith("motet") and (
            wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        ):
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


def test_both_distributions_are_of_one_version_and_ask_for_each_other_in_it() -> None:
    version = CLIENT["version"]
    assert CLUSTER["version"] == version
    assert CLUSTER["dependencies"] == [f"motet=={version}"]
    own = [Requirement(line) for line in lines(CLIENT) if line.startswith("motet-cluster")]
    assert {str(wanted.specifier) for wanted in own} == {f"=={version}"}
    assert {extra for wanted in own for extra in wanted.extras} == CLUSTER["optional-dependencies"].keys()


def test_torch_is_the_one_minor_version_whose_options_training_uses() -> None:
    """DistributedDataParallel's forward_sync_buffers is new in 2.13 (workers/engines/training/team.py)."""
    for wanted in requirements():
        if wanted.name == "torch":
            assert wanted.specifier.contains("2.13.0")
            assert not wanted.specifier.contains("2.12.1")
            assert not wanted.specifier.contains("2.14.0")
