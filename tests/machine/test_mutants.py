"""Test the tests: each seeded fault of the protocol is caught, by a play that sound code survives."""

from __future__ import annotations

import os

import pytest

from tests.machine.machine import perform, search
from tests.machine.mutants import MUTANTS, Mutant
from tests.machine.open_mutants import OPEN_MUTANTS
from tests.machine.stage import Stage
from tests.machine.upload_mutants import UPLOAD_MUTANTS

#: `make mutants` sets it: the machine then has so many plays to find each mutant anew.
PLAYS = int(os.environ.get("MACHINE_MUTANTS", "0"))
each_mutant = pytest.mark.parametrize(
    "mutant", [*MUTANTS, *OPEN_MUTANTS, *UPLOAD_MUTANTS], ids=lambda m: m.name.replace(" ", "-")
)


@each_mutant
def test_sound_code_survives_the_play_and_the_mutant_does_not(
    stage: Stage, mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert perform(stage, mutant.play) is None
    mutant.seed(monkeypatch)
    why = perform(stage, mutant.play)
    assert why is not None, "the mutant lives"
    assert why.startswith(f"Broken: {mutant.breaks}:"), why


@pytest.mark.skipif(not PLAYS, reason="a search of minutes: make mutants")
@pytest.mark.timeout(0)
@each_mutant
def test_the_machine_finds_the_mutant(stage: Stage, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.seed(monkeypatch)
    found, moves = search(stage, plays=PLAYS)
    assert found is not None, f"{PLAYS} plays of {moves.total()} moves do not kill it"
    print(f"\n{mutant.name}: found after {moves.total()} moves: {found.why}\n  {list(found.play)}")
