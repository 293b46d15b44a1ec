"""Manifests from an administrator: form, files and weights are checked before a model can be named. Pure.

A model is data: safetensors, JSON and text. What could make a worker run code that nobody installed is
refused here (reference: reliability 6.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from motet.errors import InvalidJob, Problem
from motet.http import is_address
from motet.protocol.columns import LAYOUT
from motet.protocol.manifest import KEY_ENV, Manifest
from motet.tasks import short

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_.-]{1,100}")
#: What a model's folder may hold. Pickles (.bin, .pt, .pkl), archives and code are none of it.
#: Chat templates (.jinja) are filled in by transformers, in a sandbox.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_ANSWERS = (*LAYOUT, "text", "models")
_MAX_FILES = 1000
_MAX_LABELS = 32_000
#: Largest safetensors header that its own library reads.
MAX_HEADER_BYTES = 100_000_000
#: Largest JSON file of a model: tokenizers of big vocabularies have some twenty megabytes.
MAX_JSON_BYTES = 64 * 1024 * 1024
#: Largest chat template: those of many tools have some tens of kilobytes.
MAX_TEMPLATE_BYTES = 256 * 1024

Check = tuple[Callable[[Any], bool], str]


def read_manifest(spec: Mapping[str, Any]) -> Manifest:
    """Build a manifest from JSON that is already clean. Raises InvalidJob with every problem of its form."""
    problems = [
        Problem(
            key, short(spec.get(key, "nothing")), words, "see docs/http.md and motet/protocol/manifest.py"
        )
        for key, (fits, words) in _FIELDS.items()
        if (key in spec or key in _REQUIRED) and not fits(spec.get(key))
    ]
    problems += [
        Problem(short(key), "an unknown field", "a field of a manifest", "remove it")
        for key in spec
        if key not in _FIELDS and key not in _ECHOED
    ]
    if problems:
        raise InvalidJob(problems)
    manifest = Manifest.from_json(spec)
    problems = _disagreements(manifest)
    if problems:
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
    if "url" in m.source:
        wrong += _served_elsewhere(m.source)
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


def _is_text(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= limit


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(fits: Callable[[Any], bool], limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= limit and all(map(fits, value))


def _is_map_of(key: Callable[[Any], bool], fits: Callable[[Any], bool], limit: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= limit
        and all(map(key, value))
        and all(map(fits, value.values()))
    )


def _is_path(value: Any) -> bool:
    """A relative path of plain names, ending in a suffix that holds no code."""
    parts = value.split("/") if isinstance(value, str) else []
    plain = all(_FILE.fullmatch(part) and part.strip(".") for part in parts)
    return 0 < len(parts) <= 5 and plain and PurePosixPath(value).suffix in SUFFIXES


def _unique_labels(value: Any) -> bool:
    fits = _is_list_of(lambda label: isinstance(label, str) and 0 < len(label) <= 200, _MAX_LABELS)(value)
    return fits and len(set(value)) == len(value)


def _ref_or_nothing(value: Any) -> bool:
    if value == "":
        return True
    name, _, version = value.partition("@") if isinstance(value, str) else ("", "", "")
    return bool(NAME.fullmatch(name) and VERSION.fullmatch(version))


_REQUIRED = ("name", "version", "engine", "answers")
#: What GET adds to a manifest: a manifest that was fetched may be sent back.
_ECHOED = ("ref", "digest", "aliases")
_FIELDS: Mapping[str, Check] = {
    "name": (_matches(NAME), "letters, digits, _ . -, up to 100"),
    "version": (_matches(VERSION), "letters, digits, _ . -, up to 40"),
    "engine": (_matches(NAME), "the name of an entry point of motet.engines"),
    "answers": (lambda v: isinstance(v, str) and v in _ANSWERS, f"one of {', '.join(_ANSWERS)}"),
    "files": (
        _is_map_of(_is_path, _matches(_SHA256), _MAX_FILES),
        f"relative paths that end in {', '.join(SUFFIXES)}, each with its sha256",
    ),
    "sizes": (_is_map_of(_is_path, _is_count, _MAX_FILES), "paths with their bytes"),
    "trunk": (lambda v: v == "" or _matches(_SHA256)(v), "a digest, or nothing"),
    "trunk_model": (_ref_or_nothing, "name@version of the trunk, or nothing"),
    "max_tokens": (_is_count, "a whole number"),
    "dim": (lambda v: _is_count(v) and v <= 65_536, "a whole number up to 65,536"),
    "pooling": (lambda v: isinstance(v, str) and v in ("mean", "cls", ""), "mean, cls or nothing"),
    "labels": (_unique_labels, f"a list of up to {_MAX_LABELS:,} different labels"),
    "thresholds": (_is_list_of(_is_share, _MAX_LABELS), "a list of numbers"),
    "parameters": (_is_count, "a whole number"),
    "packed_width": (lambda v: _is_count(v) and v <= 8, "a whole number up to 8"),
    "kv_width": (lambda v: _is_count(v) and v < 2**31, "a whole number below 2^31"),
    "formats": (
        _is_list_of(lambda v: isinstance(v, str) and v in ("bf16", "fp16", "fp8", "int8"), 8),
        "a list of bf16, fp16, fp8, int8",
    ),
    "deterministic": (lambda v: isinstance(v, bool), "true or false"),
    "licence": (_is_text(2000), "text"),
    "source": (_is_map_of(_is_text(100), _is_text(2000), 20), "an object of text"),
    "scores": (lambda v: isinstance(v, dict), "an object"),
}


# -- what the files hold


def json_flaw(raw: bytes) -> str | None:
    """Why a model's JSON file may not be stored with it, in words, or None."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return "bytes that are not JSON"
    return "auto_map, which names code to run" if _names_code(content) else None


def template_flaw(raw: bytes) -> str | None:
    """Why a chat template may not be stored with a model, in words, or None. Nothing of it is run here."""
    if len(raw) > MAX_TEMPLATE_BYTES:
        return f"{len(raw):,} bytes of template"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes that are not text"
    return None


def _names_code(content: Any) -> bool:
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "auto_map" in one:
                return True
            waiting.extend(v for v in one.values() if isinstance(v, (dict, list)))
        elif isinstance(one, list):
            waiting.extend(v for v in one if isinstance(v, (dict, list)))
    return False


#: Bytes of one element, by safetensors' names; sub-byte types are counted in bits.
_DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip


def header_bytes(head: bytes, size: int) -> int | None:
    """Length of a safetensors file's header from its first eight bytes; None where it cannot be one."""
    if len(head) < 8:
        return None
    n = int.from_bytes(head[:8], "little")
    return n if 2 <= n <= min(size - 8, MAX_HEADER_BYTES) else None


def safetensors_flaw(header: bytes, size: int) -> str | None:
    """Why a file with this header and size is no safetensors, in words, or None.

    Its tensors must lie end to end and fill the file, each as long as its type and shape say.
    """
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        return "a header that is not JSON"
    if not isinstance(tensors, dict):
        return "a header that is no object"
    spans = []
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        span = _span(tensor)
        if span is None:
            return "a tensor whose type, shape and place do not agree"
        spans.append(span)
    end = 0
    for lo, hi in sorted(spans):
        if lo != end:
            return "tensors that do not lie end to end"
        end = hi
    return None if end == size - 8 - len(header) else "tensors that do not fill the file"


def _span(tensor: Any) -> tuple[int, int] | None:
    if not isinstance(tensor, dict):
        return None
    shape, span, bits = (
        tensor.get("shape"),
        tensor.get("data_offsets"),
        _DTYPE_BITS.get(str(tensor.get("dtype"))),
    )
    if bits is None or not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 16:
        return None
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)):
        return None
    lo, hi = span
    return (lo, hi) if (hi - lo) * 8 == math.prod(shape) * bits else None
