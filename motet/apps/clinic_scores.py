"""How well findings and diseases are found in synthetic notes, beside what is to be had without the parts that matter."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.apps.application import Score
from motet.apps.data.hpo import Ontology
from motet.apps.data.patients import Patient
from motet.apps.functions.diseases import rank, read
from motet.apps.functions.findings import find, lexicon, link
from motet.apps.scores import resampled, share
from motet.evaluation import Estimate
from motet.job import Job
from motet.results import Row


@dataclass(frozen=True, slots=True)
class Cohort:
    """Patients of one difficulty, and the job's rows about them."""

    name: str
    patients: Sequence[Patient]
    rows: Sequence[Row]

    def found(self, said: str) -> list[set[str]]:
        """Ids that the lexicon found ``present`` or ``absent``, of each patient."""
        return [{one["id"] for one in row["findings"].value[said]} for row in self.rows]


def extraction(cohort: Cohort, known: Ontology, *, floor: float) -> Score:
    """Findings that are there, by the lexicon; beside names without synonyms, and without the rule for negation."""
    truth = [patient.present for patient in cohort.patients]
    names = find([patient.text for patient in cohort.patients], artefact=lexicon(known, share=0.0))
    present, absent = cohort.found("present"), cohort.found("absent")
    return Score(
        name=f"findings, {cohort.name}",
        figure="F1",
        rows=len(truth),
        estimate=f1(truth, present),
        baselines={
            "names without synonyms": f1(truth, [{one["id"] for one in each["present"]} for each in names]),
            "negation ignored": f1(truth, [a | b for a, b in zip(present, absent, strict=True)]),
        },
        floor=floor,
    )


def found_by_model(cohort: Cohort, known: Ontology) -> Score:
    """The language model's findings, whose words are looked up in the whole lexicon, beside the lexicon's own."""
    truth = [patient.present for patient in cohort.patients]
    words = lexicon(known)
    said = [link((row["findings_llm"].value or {}).get("present", ()), words) for row in cohort.rows]
    return Score(
        name=f"findings, {cohort.name}, by the language model",
        figure="F1",
        rows=len(truth),
        estimate=f1(truth, said),
        baselines={"the lexicon, on the same notes": f1(truth, cohort.found("present"))},
    )


def ranking(cohort: Cohort, job: Job, known: Ontology, *, floor: float) -> Score:
    """How often the disease that a patient was made from is among ten candidates."""
    first = cohort.rows[0].index
    labels: list[dict[str, Any]] = [
        {"row": first + at, "disease": patient.disease} for at, patient in enumerate(cohort.patients)
    ]
    found = job.evaluate(labels, {"ranked.candidates": "disease"}, index="row", at=10)["ranked.candidates"]
    usual = sorted(known.diseases.values(), key=lambda one: -len(one.terms))[:10]
    common = {one.id for one in usual}
    return Score(
        name=f"disease among ten, {cohort.name}",
        figure="HR@10",
        rows=len(cohort.patients),
        estimate=found.figures["hit_rate_at_10"],
        baselines={
            "the ten with most terms": share([patient.disease in common for patient in cohort.patients])
        },
        floor=floor,
    )


def ranking_ms(fitted: Path, rows: Sequence[Row]) -> float:
    """Milliseconds that one patient's candidates take here, on one core, with the artefact at hand."""
    artefact, asked = read(fitted), [{"findings": row["findings"].value} for row in rows]
    started = time.perf_counter()
    rank(asked, artefact=artefact)
    return round(1000 * (time.perf_counter() - started) / len(asked), 2)


def f1(truth: Sequence[Collection[str]], said: Sequence[Collection[str]]) -> Estimate:
    """Micro F1 of sets of ids, with a bootstrap over patients."""
    right = [len(set(a) & set(b)) for a, b in zip(truth, said, strict=True)]
    both = [len(a) + len(b) for a, b in zip(truth, said, strict=True)]

    def of(rows: Sequence[int]) -> float:
        size = sum(both[i] for i in rows)
        return 2 * sum(right[i] for i in rows) / size if size else float("nan")

    return resampled(of, len(truth))
