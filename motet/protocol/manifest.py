"""What the registry knows of a model: everything a planner or a worker needs, and never a path of a user.

A manifest is immutable; files are named by sha256 and fetched as blobs. Heads name the trunk they sit on by
its digest, and that is what makes tasks fuse.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import ceil
from typing import Annotated, Any, Literal

from motet.messages.message import ApiMessage, Limit
from motet.protocol.columns import Kind

#: What a model can answer, and so which task kinds may use it (see ANSWERS). ``text``: it is a language model.
#: ``ranking``: it is a cross-encoder, which scores a query with each document.
#: ``models``: it trains others. ``artefact``: nothing by itself; it is data that a function reads. ``match``: how well a
#: picture and texts fit each other, from a vector of each.
Answer = Literal[
    "label", "labels", "number", "vector", "spans", "json", "ranking", "text", "models", "artefact", "match"
]

#: Task kind -> answers that satisfy it.
ANSWERS: Mapping[str, frozenset[str]] = {
    "classify": frozenset({"label", "labels"}),
    "number": frozenset({"number"}),
    "embed": frozenset({"vector", "match"}),
    "entities": frozenset({"spans"}),
    "function": frozenset({"json"}),
    "rank": frozenset({"ranking"}),
    "fit": frozenset({"models"}),
    "generate": frozenset({"text"}),
    "chat": frozenset({"text"}),
    "choose": frozenset({"text", "match"}),
    "extract": frozenset({"text"}),
}

#: Task kind -> kind of its column, where the model answers as text: labels that the task brings, or JSON values.
#: Of generate and chat that is ``{"text": …, "finish": "stop" | "length"}``, unless a schema says otherwise; of choose
#: with labels that each row brings, which have no codes, ``{"label": …, "score": …}``, with ``scores`` where asked for.
_OF_TEXT: Mapping[str, Kind] = {"generate": "json", "chat": "json", "choose": "label", "extract": "json"}
#: The same of a model that answers as match.
_OF_MATCH: Mapping[str, Kind] = {"choose": "label", "embed": "vector"}


def column_kind(task: Mapping[str, Any], answers: Answer) -> Kind:
    """Kind of the column that a task (``Task.to_json``) gets from a model that answers so."""
    if answers == "text":
        return "json" if isinstance(task.get("labels"), str) else _OF_TEXT[str(task.get("kind", ""))]
    if answers == "match":
        return _OF_MATCH[str(task.get("kind", ""))]
    match answers:
        case "models" | "artefact" | "ranking":
            return "json"
        case _:
            return answers


#: Names of the variables in which workers may hold the keys of other servers: a manifest can ask for no other secret.
KEY_ENV = re.compile(r"MOTET_KEY_[A-Z0-9_]{1,60}")

#: Pixels that count for one token: the patch of most vision transformers, 16 x 16.
PATCH_PIXELS = 256
#: Bytes of one parameter, by numeric format.
WIDTHS: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Memory of a loaded model beside its weights: code, caches, a small micro-batch.
OVERHEAD_MB = 64
#: Tokens whose keys and values a language model holds in memory at once, on every device: prompts and answers.
KV_TOKENS = 16_384
#: See ``decode_slots``: beyond it a CPU core gains nothing.
_DECODE_SLOTS: Mapping[str, int] = {"cpu": 32, "cuda": 256}
#: As many as vLLM's server runs at once on a CPU. With fewer each step reads all weights for a part of them.
_VLLM_CPU_SLOTS = 128


def decode_slots(device_kind: str, engine: str = "") -> int:
    """Answers that a language model writes at once on a device of this kind, by this engine."""
    if (device_kind, engine) == ("cpu", "vllm"):
        return _VLLM_CPU_SLOTS
    return _DECODE_SLOTS.get(device_kind, _DECODE_SLOTS["cuda"])


NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
VERSION = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"
_SHA256 = r"[0-9a-f]{64}"
#: What a model's folder may hold. Pickles (.bin, .pt, .pkl), archives and code are none of it.
#: Chat templates (.jinja) are filled in by transformers, in a sandbox.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
#: What an artefact is made of.
ARTEFACT_SUFFIXES = (".json", ".safetensors", ".parquet")
#: What either may hold: nothing that runs when it is read.
FILE_SUFFIXES = tuple(dict.fromkeys(SUFFIXES + ARTEFACT_SUFFIXES))
#: Bytes in memory of a byte of such a file, about: numbers and texts of JSON become objects, Parquet is compressed.
_ARTEFACT_WIDTHS: Mapping[str, int] = {".json": 4, ".safetensors": 1, ".parquet": 3}
#: An artefact's ``engine``, which is none: the function that reads it runs it.
ARTEFACT = "artefact"
_MOST_FILES = 1000
_MOST_LABELS = 32_000
#: A relative path of up to five plain names, none of dots alone.
_Path = Annotated[
    str,
    Limit(
        "",
        pattern=r"(?:(?!\.+/)[A-Za-z0-9_.-]{1,100}/){0,4}(?=[^/]{1,100}\Z)[A-Za-z0-9_.-]+"
        rf"(?:{'|'.join(map(re.escape, FILE_SUFFIXES))})",
    ),
]
_Count = Annotated[int, Limit("a whole number", least=0, most=2**53 - 1)]


class _Remembers:
    """Has room for a digest that was computed once: it is asked for at each step of a worker, and takes a hash of JSON."""

    __slots__ = ("_digest",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(_Remembers, ApiMessage):
    """One model of one version. ``engine`` names an entry point of the group ``motet.engines``."""

    #: Name of the model.
    name: Annotated[str, Limit("letters, digits, _ . -, up to 100", pattern=NAME)]
    #: Its version.
    version: Annotated[str, Limit("letters, digits, _ . -, up to 40", pattern=VERSION)]
    #: Entry point that runs it: ``encoder``, ``classifier``, or a user's own.
    engine: Annotated[str, Limit("the name of an entry point of motet.engines", pattern=NAME)]
    #: What it answers, and so which kinds of task may use it.
    answers: Answer
    #: What the input of its tasks holds: a text, or one field that is a medium. Of a head as of its trunk.
    reads: Literal["text", "image"] = "text"
    #: Relative path -> sha256 of every file of this model (a head's own files only).
    files: Annotated[
        Mapping[_Path, Annotated[str, Limit("", pattern=_SHA256)]],
        Limit(
            f"relative paths that end in {', '.join(SUFFIXES)} (of an artefact in {', '.join(ARTEFACT_SUFFIXES)}), "
            "each with its sha256",
            most=_MOST_FILES,
        ),
    ] = field(default_factory=dict)
    #: Relative path -> bytes, for memory estimates and caches.
    sizes: Annotated[Mapping[_Path, _Count], Limit("paths with their bytes", most=_MOST_FILES)] = field(
        default_factory=dict
    )
    #: Digest of the trunk: an encoder's own, the one a head sits on, or "" where nothing can be shared.
    trunk: Annotated[str, Limit("a digest, or nothing", pattern=f"({_SHA256})?")] = ""
    #: The trunk model's ``name@version``, for heads; "" otherwise.
    trunk_model: Annotated[
        str, Limit("name@version of the trunk, or nothing", pattern=f"({NAME}@{VERSION})?")
    ] = ""
    #: Tokens read at most, special ones included; 0 where tokens mean nothing. Of a model that reads pictures: what each
    #: counts for, a token for PATCH_PIXELS of the pixels that it is brought to.
    max_tokens: _Count = 0
    #: Vector length of the trunk's pooled output; 0 where there is none.
    dim: Annotated[int, Limit("a whole number up to 65,536", least=0, most=65_536)] = 0
    #: The same with the features of its stages before it (``Features``), of trunks of pictures; 0 where it has none.
    stage_dim: Annotated[int, Limit("a whole number up to 65,536", least=0, most=65_536)] = 0
    #: How the trunk's output becomes one vector; "" where it does not. ``stages``: of a head that reads those features.
    pooling: Literal["mean", "cls", "stages", ""] = ""
    #: Names of what it can answer, by code.
    labels: Annotated[
        tuple[Annotated[str, Limit("", least=1, most=200)], ...],
        Limit(f"a list of up to {_MOST_LABELS:,} different labels", most=_MOST_LABELS, unique=True),
    ] = ()
    #: Multi-label heads: a label is given when its score reaches its threshold.
    thresholds: Annotated[tuple[float, ...], Limit("a list of numbers", most=_MOST_LABELS)] = ()
    #: Heads on several texts, or on numbers beside one: the template of each text, in the order of the head's features.
    #: (): it reads one text, whichever the task names.
    inputs: Annotated[
        tuple[Annotated[str, Limit("", least=1, most=2000)], ...],
        Limit("a list of up to 8 templates", most=8),
    ] = ()
    #: The names of the numbers that a head reads beside its texts, without braces, in the order of its features.
    numbers: Annotated[
        tuple[Annotated[str, Limit("", least=1, most=200)], ...],
        Limit("a list of up to 64 different names", most=64, unique=True),
    ] = ()
    #: Parameters of the trunk (or whole model), for predictions of memory and cost.
    parameters: _Count = 0
    #: Bytes that each of them takes in memory in any format (1: packed to eight bits); 0: as many as the format's.
    packed_width: Annotated[int, Limit("a whole number up to 8", least=0, most=8)] = 0
    #: Language models: numbers that attention keeps of each token, keys and values of all layers; 0 elsewhere.
    kv_width: Annotated[int, Limit("a whole number below 2^31", least=0, most=2**31 - 1)] = 0
    #: Formats beside fp32 whose accuracy check passed at registration, such as ("bf16",).
    formats: Annotated[
        tuple[Annotated[str, Limit("", pattern="bf16|fp16|fp8|int8")], ...],
        Limit("a list of bf16, fp16, fp8, int8", most=8),
    ] = ()
    #: Functions: the keyword arguments that a task may give -> whether it must; ``artefact`` is among them.
    keywords: Annotated[
        Mapping[Annotated[str, Limit("", pattern=r"[A-Za-z_][A-Za-z0-9_]{0,99}")], bool],
        Limit("an object of names, each true or false", most=100),
    ] = field(default_factory=dict)
    #: The same input gives the same answer, so columns may be reused.
    deterministic: bool = True
    #: Under which it may be used.
    licence: Annotated[str, Limit("text", most=2000)] = ""
    #: Where it came from: {"package": …} | {"folder": …} | {"hub": …}; told to people, never loaded from.
    #: Of a model on another server: {"url": …, "model": …, "in_flight": …, "key_env": …}, and that is asked.
    source: Annotated[
        Mapping[Annotated[str, Limit("", most=100)], Annotated[str, Limit("", most=2000)]],
        Limit("an object of text", most=20),
    ] = field(default_factory=dict)
    #: Measured scores and how they were measured.
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """``name@version``, the way a job records exactly what it used."""
        return f"{self.name}@{self.version}"

    def vector_dim(self, spec: Mapping[str, Any]) -> int:
        """Length of the vectors that a task of this spec gets from it; 0 where it gives none."""
        return self.stage_dim if spec.get("features") == "stages" else self.dim

    @property
    def digest(self) -> str:
        """Sha256 of all that decides the answers: files, engine, labels, thresholds, pooling, trunk."""
        known: str | None = getattr(self, "_digest", None)
        if known is None:
            known = self._computed_digest()
            object.__setattr__(self, "_digest", known)
        return known

    def _computed_digest(self) -> str:
        decisive: dict[str, Any] = {
            "engine": self.engine,
            "answers": self.answers,
            "files": dict(sorted(self.files.items())),
            "trunk": self.trunk,
            "max_tokens": self.max_tokens,
            "pooling": self.pooling,
            "labels": list(self.labels),
            "thresholds": list(self.thresholds),
            "function": self.source.get("function", ""),
        }
        if self.reads != "text":
            decisive["reads"] = self.reads
        if self.keywords:
            decisive["keywords"] = dict(sorted(self.keywords.items()))
        if self.inputs or self.numbers:
            decisive["several"] = [list(self.inputs), list(self.numbers)]
        if "url" in self.source:
            # Of a model that another server runs, nothing is known but where it is asked for, and by which name.
            decisive["served"] = [self.source["url"], self.source.get("model", "")]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def is_beside(self) -> bool:
        """It is attached to a loaded model: a head or an adapter to its trunk, an artefact to a function."""
        return bool(self.trunk_model) or self.answers == "artefact"

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(self.sizes.values())

    def weights_bytes(self, in_format: str = "fp32") -> int:
        """Bytes of its weights once they are loaded in a numeric format."""
        return self.parameters * (self.packed_width or WIDTHS[in_format]) if self.parameters else self.bytes

    def memory_mb(self, in_format: str = "fp32") -> int:
        """Predicted memory of its weights in a numeric format, and of what comes with them; of an artefact that of its data."""
        if self.answers == "artefact":
            read = sum(
                _ARTEFACT_WIDTHS[f".{name.rpartition('.')[2]}"] * size for name, size in self.sizes.items()
            )
            return ceil(read / (1 << 20))
        kept = self.kv_width * KV_TOKENS * WIDTHS[in_format]
        return int((1.1 * self.weights_bytes(in_format) + kept) / (1 << 20)) + OVERHEAD_MB

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> Manifest:
        """Build from JSON written by ``to_json``; unknown keys are ignored, so that old readers read new files."""
        values = {k: v for k, v in spec.items() if k in _FIELDS}
        for key in ("labels", "thresholds", "formats", "inputs", "numbers"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


#: Once and not for each message, of which most hold several manifests.
_FIELDS = dict.fromkeys(f.name for f in fields(Manifest))


def trainer_name(trunk: str) -> str:
    """Name of the model that trains on a trunk of this name: registered with it, of the same version."""
    return f"{trunk}-trainer"


def trunk_digest(*, weights_sha256: str, tokenizer_sha256: str, config_sha256: str) -> str:
    """The digest two models must share for their tasks to fuse: weights, tokenizer and shape.

    ``tokenizer_sha256`` is that of ``tokenizer.json``, ``config_sha256`` that of ``config.json``.
    """
    return hashlib.sha256(f"{weights_sha256}\n{tokenizer_sha256}\n{config_sha256}".encode()).hexdigest()
