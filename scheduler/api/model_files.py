"""Files of a model: what they hold is checked before the model can be named. Pure but for reading them.

A model is data: safetensors, JSON and text. What could make a worker run code that nobody installed is
refused here (reference: reliability 6.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Largest safetensors header that its own library reads.
MAX_HEADER_BYTES = 100_000_000
#: Largest JSON file of a model: tokenizers of big vocabularies have some twenty megabytes.
MAX_JSON_BYTES = 64 * 1024 * 1024
#: Largest chat template: those of many tools have some tens of kilobytes.
MAX_TEMPLATE_BYTES = 256 * 1024


def file_flaw(path: Path | None, name: str) -> str | None:
    """Why a file may not be part of a model, or None. Weights are looked at by their header only."""
    if path is None:
        return "no such blob"
    size = path.stat().st_size
    if name.endswith(".safetensors"):
        with path.open("rb") as file:
            n = header_bytes(file.read(8), size)
            return "bytes that are not safetensors" if n is None else safetensors_flaw(file.read(n), size)
    if name.endswith(".json"):
        return f"{size:,} bytes of JSON" if size > MAX_JSON_BYTES else json_flaw(path.read_bytes())
    if name.endswith(".parquet"):
        with path.open("rb") as file:
            return parquet_flaw(file.read(4), size)
    if name.endswith(".jinja"):
        with path.open("rb") as file:
            return template_flaw(file.read(MAX_TEMPLATE_BYTES + 1))
    return None


def json_flaw(raw: bytes) -> str | None:
    """Why a model's JSON file may not be stored with it, in words, or None."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return "bytes that are not JSON"
    return "auto_map, which names code to run" if _names_code(content) else None


def parquet_flaw(head: bytes, size: int) -> str | None:
    """Why a file that begins so is no Parquet, in words, or None."""
    return None if head == b"PAR1" and size >= 12 else "bytes that are not Parquet"


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
    if bits is None or not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > 16:
        return None
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        return None
    lo, hi = span
    return (lo, hi) if (hi - lo) * 8 == math.prod(shape) * bits else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
