"""An ontology of a few findings and diseases, in the formats of HPO's files. Made up: nothing in it is medicine."""

from __future__ import annotations

from motet.apps.data.hpo import ABNORMALITY

_TERMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (ABNORMALITY, "Phenotypic abnormality", "HP:0000001", ()),
    ("HP:0000005", "Mode of inheritance", "HP:0000001", ()),
    ("HP:0000707", "Abnormality of the nervous system", ABNORMALITY, ()),
    ("HP:0000478", "Abnormality of the eye", ABNORMALITY, ()),
    ("HP:0001250", "Seizure", "HP:0000707", ("Fits", "Epileptic seizure")),
    ("HP:0002069", "Bilateral tonic-clonic seizure", "HP:0001250", ("Generalised tonic-clonic seizures",)),
    ("HP:0001251", "Ataxia", "HP:0000707", ("Unsteady gait",)),
    ("HP:0001263", "Global developmental delay", "HP:0000707", ("Slow development",)),
    ("HP:0002315", "Headache", "HP:0000707", ("Sore head",)),
    ("HP:0001337", "Tremor", "HP:0000707", ("Shaking hands",)),
    ("HP:0002376", "Developmental regression", "HP:0001263", ("Loss of skills",)),
    ("HP:0000518", "Cataract", "HP:0000478", ("Clouded lens",)),
    ("HP:0000541", "Retinal detachment", "HP:0000478", ("Detached retina",)),
    ("HP:0000545", "Myopia", "HP:0000478", ("Short sight",)),
    ("HP:0000501", "Glaucoma", "HP:0000478", ()),
    ("HP:0000613", "Photophobia", "HP:0000478", ("Fear of light",)),
    ("HP:0000639", "Nystagmus", "HP:0000478", ("Dancing eyes",)),
    ("HP:0000486", "Strabismus", "HP:0000478", ("Squint",)),
    ("HP:0000505", "Visual impairment", "HP:0000478", ("Poor sight",)),
)
_NERVES = ("HP:0001250", "HP:0001251", "HP:0002069", "HP:0002315", "HP:0001337", "HP:0002376")
_EYES = (
    "HP:0000518", "HP:0000541", "HP:0000545", "HP:0000501", "HP:0000613", "HP:0000639", "HP:0000486", "HP:0000505",
)  # fmt: skip


def _stanza(term: str, name: str, parent: str, synonyms: tuple[str, ...]) -> str:
    lines = ["[Term]", f"id: {term}", f"name: {name}"]
    lines += [f'synonym: "{one}" EXACT layperson [ORCID:0]' for one in synonyms]
    lines += [f'synonym: "{name} of sorts" RELATED []', f"is_a: {parent} ! above"]
    if term == "HP:0001250":
        lines.insert(2, "alt_id: HP:0002391")
    return "\n".join(lines)


OBO = "\n\n".join(
    (
        "format-version: 1.2\ndata-version: hp/releases/2025-01-16",
        "[Term]\nid: HP:0000001\nname: All",
        *(_stanza(*term) for term in _TERMS),
        "[Term]\nid: HP:0000999\nname: gone\nis_obsolete: true",
        "[Typedef]\nid: part_of\nname: part of",
    )
)


def _line(disease: str, term: str, frequency: str = "", *, negated: str = "", aspect: str = "P") -> str:
    return "\t".join(
        (disease, f"Disease {disease[-1]}", negated, term, "PMID:1", "TAS", "", frequency, "", "", aspect, "")
    )


ANNOTATIONS = "\n".join(
    (
        "#version: 2025-01-16",
        "database_id\tdisease_name",
        *(_line("OMIM:1", term) for term in _NERVES[3:]),
        _line("OMIM:1", "HP:0002391", "3/3"),
        _line("OMIM:1", "HP:0001251", "HP:0040282"),
        _line("OMIM:1", "HP:0002069", "25%"),
        _line("OMIM:1", "HP:0001263", negated="NOT"),
        _line("OMIM:1", "HP:0000005", aspect="I"),
        *(_line("OMIM:2", term, "1/2") for term in _EYES),
        *(_line("OMIM:3", term) for term in (*_NERVES, *_EYES[2:5])),
        _line("ORPHA:4", "HP:0001250"),
    )
)
