"""Manifests from an administrator: form and agreement of the fields are checked before a model can be named. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from motet.errors import InvalidJob, Problem
from motet.http import is_address
from motet.options import is_template
from motet.protocol.manifest import ARTEFACT_SUFFIXES, KEY_ENV, SUFFIXES, Manifest
from motet.tasks import short
from motet.templates import is_placeholder
from scheduler.api.bodies import taken

#: What GET adds to a manifest: a manifest that was fetched may be sent back.
_ECHOED = ("ref", "digest", "aliases")


def read_manifest(spec: Mapping[str, Any]) -> Manifest:
    """Build a manifest from JSON that is already clean. Raises InvalidJob with every problem of its form."""
    manifest = taken(Manifest, {key: value for key, value in spec.items() if key not in _ECHOED})
    if problems := _disagreements(manifest):
        raise InvalidJob(problems)
    return manifest


def _disagreements(m: Manifest) -> list[Problem]:
    """Fields that are well formed each, but not together."""
    wrong: list[tuple[str, str, str]] = []
    if m.answers in ("label", "labels", "spans") and not m.labels:
        wrong.append(("labels", "none", f"the labels of a model that answers {m.answers}"))
    if m.thresholds and len(m.thresholds) != len(m.labels):
        wrong.append(
            ("thresholds", f"{len(m.thresholds)}", f"one for each of {len(m.labels)} labels, or none")
        )
    if m.answers == "vector" and not m.dim:
        wrong.append(("dim", "0", "the length of the vector"))
    if m.answers == "text" and not m.max_tokens:
        wrong.append(("max_tokens", "0", "the tokens of the model's context"))
    is_artefact = m.answers == "artefact"
    if is_artefact and not m.files:
        wrong.append(("files", "none", "the files of an artefact"))
    if is_artefact and m.trunk_model:
        wrong.append(("trunk_model", m.trunk_model, "nothing, for any function may read an artefact"))
    suffixes = ARTEFACT_SUFFIXES if is_artefact else SUFFIXES
    wrong += [
        (f"files.{path}", "another file", f"one that ends in {', '.join(suffixes)}")
        for path in m.files
        if not path.endswith(suffixes)
    ]
    if "url" in m.source:
        wrong += _served_elsewhere(m.source)
    if (m.inputs or m.numbers) and not m.trunk_model:
        wrong.append(("inputs", "texts or numbers", "nothing, for only a head reads several"))
    if (m.inputs or m.numbers) and m.reads != "text":
        wrong.append(("inputs", "texts or numbers", "nothing, for a head on pictures reads one picture"))
    if m.numbers and not m.inputs:
        wrong.append(("inputs", "none", "the template of the text beside its numbers"))
    wrong += [("inputs", short(one), "templates such as {text}") for one in m.inputs if not is_template(one)]
    wrong += [("numbers", short(one), "names of fields") for one in m.numbers if not is_placeholder(one)]
    if m.trunk_model and not m.trunk:
        wrong.append(("trunk", "nothing", f"the digest of {m.trunk_model}"))
    return [Problem(field, got, expected, "mend the manifest") for field, got, expected in wrong]


def _served_elsewhere(source: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What is wrong with the address of a model that another server runs. A key is named, never told."""
    wrong = []
    if not is_address(source["url"]):
        wrong.append(("source.url", "another address", "http(s)://host[:port]/v1 without a user or a query"))
    if not source.get("model"):
        wrong.append(("source.model", "nothing", "the name by which its server knows the model"))
    if not re.fullmatch(r"[1-9][0-9]{0,2}", source.get("in_flight", "1")):
        wrong.append(("source.in_flight", "something else", "a number from 1 to 999"))
    if (named := source.get("key_env", "")) and not KEY_ENV.fullmatch(named):
        wrong.append(("source.key_env", "another name", "a variable of the workers called MOTET_KEY_…"))
    return wrong
