"""From a folder to a manifest, by reading its JSON and the headers of its weights. Imports neither torch nor transformers.

Refused, with words that say what to do: weights as pickles, code named in a configuration, files that are torn.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from motet.artefacts import digests, sizes
from motet.errors import SetupError
from motet.protocol.manifest import Answer, Manifest, trainer_name, trunk_digest
from workers.engines.image.files import PROCESSORS
from workers.engines.proved import inherited, steady_tokens
from workers.registrar.describe_image import (
    architecture_of,
    described_image,
    needed_files,
    reads_pictures,
)

#: Weights that run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
#: Models that count positions from behind their padding id.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"})
#: A tokenizer without a limit of its own names one like 1e30.
NO_LIMIT = 1_000_000
DEFAULT_MAX_TOKENS = 512
#: Ends of the names of architectures that write.
LANGUAGE = ("ForCausalLM", "LMHeadModel")
NEEDED = ("config.json", "tokenizer.json")
#: What a worker reads beside configuration, tokenizer and weights, where it is there.
ENCODER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
LANGUAGE_FILES = (*ENCODER_FILES, "generation_config.json", "chat_template.jinja")
#: One field of a shape, by the names that architectures give to it.
SHAPE: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
}
#: Ends of the names of weights that are packed to eight bits (workers/engines/packed.py).
PACKED = (".weight_int8", ".weight_fp8")
MODULES = frozenset({"Transformer", "Pooling", "Normalize"})
#: What sentence-transformers writes into the configuration of a cross-encoder, newer and older releases.
CROSS_ENCODER = frozenset({"sentence_transformers", "sbert_ce_default_activation_function"})
HEAD_ANSWERS: Mapping[str, Answer] = {"single": "label", "multi": "labels", "number": "number"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A model that could be registered: its manifest, and its files on this machine by relative path."""

    manifest: Manifest
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFolder:
    """A head's folder as `examples/train_heads.py` writes it, before its trunk is known by digest."""

    folder: Path
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def trunk(self) -> str:
        """Name of the model it sits on."""
        return str(self.spec["trunk"])

    def on(self, trunk: Manifest, *, name: str = "", version: str = "", licence: str = "") -> Described:
        """The head on this trunk. Raises SetupError where it was trained for other weights."""
        weights = trunk.files.get("model.safetensors", "")
        if self.spec["trunk_weights_sha256"] != weights:
            raise SetupError(
                f"{self.folder.name}: it was trained on {self.trunk} with weights "
                f"{str(self.spec['trunk_weights_sha256'])[:12]}…; {trunk.ref} has {weights[:12] or 'none'}…; "
                "train it again on this trunk"
            )
        files = {"head.safetensors": self.folder / "head.safetensors"}
        tensor_sizes(files["head.safetensors"])
        return sitting_on(
            trunk,
            files,
            name=name or str(self.spec["name"]),
            version=version or str(self.spec["version"]),
            answers=HEAD_ANSWERS[self.spec["head"]],
            max_tokens=min(int(self.spec["max_tokens"]), trunk.max_tokens),
            labels=tuple(map(str, self.spec["labels"])),
            thresholds=tuple(map(float, self.spec.get("thresholds") or ())),
            licence=licence or str(self.spec.get("licence", "")),
            source={"folder": self.folder.name, "training": str(self.spec.get("training", ""))},
            scores={"data": self.spec.get("data", {}), **self.spec.get("scores", {})},
        )


def sitting_on(trunk: Manifest, files: Mapping[str, Path], **own: Any) -> Described:
    """A head or an adapter on a trunk, of the trunk's shape. ``own``: the fields of the manifest that are not the trunk's."""
    shared: dict[str, Any] = {
        "engine": trunk.engine,
        "reads": trunk.reads,
        "trunk": trunk.trunk,
        "trunk_model": trunk.ref,
        "max_tokens": trunk.max_tokens,
        "dim": trunk.dim,
        "stage_dim": trunk.stage_dim,
        "pooling": trunk.pooling,
        "parameters": trunk.parameters,
        "packed_width": trunk.packed_width,
        "kv_width": trunk.kv_width,
    }
    return Described(
        manifest=Manifest(**{**shared, "files": digests(files), "sizes": sizes(files), **own}), files=files
    )


def read_head(folder: Path) -> HeadFolder | None:
    """The head in a folder; None where it holds none. Raises SetupError where it is broken."""
    path = folder / "head.json"
    if not path.exists():
        return None
    spec = read_json(path)
    missing = {
        "name",
        "version",
        "head",
        "labels",
        "trunk",
        "trunk_weights_sha256",
        "pooling",
        "max_tokens",
    } - set(spec)
    if missing or spec["head"] not in HEAD_ANSWERS:
        raise SetupError(
            f"{path}: got a head without {', '.join(sorted(missing)) or 'a known kind'}; "
            "expected what examples/train_heads.py writes"
        )
    return HeadFolder(folder=folder, spec=spec)


def describe_folder(
    folder: Path,
    *,
    name: str,
    version: str,
    licence: str,
    source: Mapping[str, str],
    max_tokens: int | None = None,
    engine: str = "",
    ranks: bool = False,
) -> Described:
    """The manifest of a transformers or sentence-transformers folder. Raises SetupError.

    ``engine``: what runs a language model; "" is the engine ``causal``. ``ranks``: a classifier with one score is a
    cross-encoder, also where its configuration does not say so.
    """
    if not (folder / "config.json").is_file():
        raise SetupError(f"{folder}: got no config.json; expected a transformers folder; name another one")
    config = read_json(folder / "config.json")
    of_pictures = reads_pictures(folder, config)
    if of_pictures:
        files = _model_files(folder, (*ENCODER_FILES, *PROCESSORS), needed_files(config))
    else:
        files = _model_files(
            folder, LANGUAGE_FILES if architecture_of(config).endswith(LANGUAGE) else ENCODER_FILES
        )
    # Servers of their own, such as vLLM's, take the same positions for all rows.
    limit = _max_tokens(folder, config, steady=engine in ("", "causal"))
    if max_tokens is not None and of_pictures:
        raise SetupError(
            f"--max-tokens: got {max_tokens}; this model reads pictures, all of one size; leave it out"
        )
    if max_tokens is not None and max_tokens > limit:
        raise SetupError(f"--max-tokens: got {max_tokens}; this model reads at most {limit}")
    hashed = digests(files)
    shards = [path for name, path in files.items() if name.endswith(".safetensors")]
    tensors = {name: size for path in shards for name, size in tensor_sizes(path).items()}
    base = Manifest(
        name=name,
        version=version,
        engine="encoder",
        answers="vector",
        files=hashed,
        sizes=sizes(files),
        max_tokens=max_tokens or limit,
        dim=int(config.get("hidden_size") or config.get("dim") or config.get("d_model") or 0),
        parameters=sum(tensors.values()),
        packed_width=int(any(name.endswith(PACKED) for name in tensors)),
        licence=licence or _licence(folder),
        source=dict(source),
    )
    architecture = architecture_of(config)
    if of_pictures:
        manifest = described_image(base, files, config, _classes(config, False))
    elif architecture.endswith("ForSequenceClassification"):
        answers, labels = _classes(config, ranks)
        manifest = replace(base, engine="classifier", answers=answers, labels=labels)
    elif architecture.endswith(LANGUAGE):
        manifest = _language_model(base, config, tensors, engine or "causal")
    else:
        manifest = replace(base, pooling=_pooling(folder), trunk=encoder_digest(hashed))
    return Described(manifest=manifest, files=files)


def encoder_digest(files: Mapping[str, str]) -> str:
    """The trunk digest of an encoder with these files (relative path -> sha256)."""
    return trunk_digest(
        weights_sha256=_weights_digest(files),
        tokenizer_sha256=files["tokenizer.json"],
        config_sha256=files["config.json"],
    )


#: Of each parameter training keeps: the trunk as it was, the one that learns, its gradient, and two numbers of Adam.
TRAINING_COPIES = 5


def trainer_of(trunk: Described) -> Described:
    """What trains on this encoder: the same files, run by another engine. On a trunk of pictures only heads learn."""
    m = trunk.manifest
    copies = TRAINING_COPIES if m.reads == "text" else 1
    manifest = replace(
        m,
        name=trainer_name(m.name),
        engine="trainer",
        answers="models",
        trunk="",
        reads="text",  # its rows are recipes
        parameters=copies * m.parameters,
        deterministic=False,
        source={**m.source, "trains": m.ref, **({} if m.reads == "text" else {"reads": m.reads})},
        scores={},
    )
    return Described(manifest=inherited(manifest, m), files=trunk.files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SetupError where it is none, or where it names code to run, at any depth."""

    def checked(found: dict[str, Any]) -> dict[str, Any]:
        if "auto_map" in found:
            raise SetupError(
                f"{path}: it names code to run (auto_map), which motet never does; "
                "export the model to an architecture that transformers knows"
            )
        return found

    try:
        read = json.loads(path.read_text("utf-8"), object_hook=checked)
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(
            f"{path}: cannot be read as JSON ({type(error).__name__}); fetch the file again"
        ) from None
    if not isinstance(read, dict):
        raise SetupError(f"{path}: got {type(read).__name__}; expected a JSON object; fetch the file again")
    return read


def tensor_sizes(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds. Raises SetupError where it is torn or something else."""
    return {name: size for name, (_, size) in _tensors(path).items()}


def stored_format(files: Mapping[str, Path]) -> str:
    """The numeric format of all weights, so that running in it rounds none of them; "" where there are several."""
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    found = {dtype for path in weights for dtype, _ in _tensors(path).values()}
    return {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(found.pop(), "") if len(found) == 1 else ""


def _tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Of each tensor of a safetensors file its dtype and how many numbers it holds: the header alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: (one.get_dtype(), math.prod(one.get_shape())) for name, one in found.items()}
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"{path}: it is missing or no whole safetensors file ({type(error).__name__}); fetch it again"
        ) from None


def _language_model(
    base: Manifest, config: Mapping[str, Any], tensors: Mapping[str, int], engine: str
) -> Manifest:
    """The manifest of a model that writes: what attention keeps of a token, and how many numbers it really has."""
    tied = config.get("tie_word_embeddings") is True
    # What is tied may be stored twice and is loaded once.
    parameters = sum(size for name, size in tensors.items() if not (tied and name == "lm_head.weight"))
    beside = [base.files[name] for name in LANGUAGE_FILES if name in base.files]
    trunk = trunk_digest(
        weights_sha256=_weights_digest(base.files),
        # How a prompt is written and where an answer ends decide too: equal weights alone share nothing.
        tokenizer_sha256=_digest_of([base.files["tokenizer.json"], *beside]),
        config_sha256=base.files["config.json"],
    )
    return replace(
        base,
        engine=engine,
        answers="text",
        dim=0,
        trunk=trunk,
        parameters=parameters,
        kv_width=_kv_width(config),
    )


def _kv_width(config: Mapping[str, Any]) -> int:
    """Numbers that attention keeps of each token. Raises SetupError where the configuration does not tell."""
    config = config.get("text_config") or config
    shape = {
        field: next((config[name] for name in names if isinstance(config.get(name), int)), 0)
        for field, names in SHAPE.items()
    }
    if absent := [SHAPE[field][0] for field, value in shape.items() if value < 1]:
        raise SetupError(
            f"config.json: got no {', '.join(absent)}; expected the shape of a language model; "
            "export it with a transformers that knows it"
        )
    key_heads = config.get("num_key_value_heads") or shape["heads"]
    head = config.get("head_dim") or shape["width"] // shape["heads"]
    return 2 * int(shape["layers"]) * int(key_heads) * int(head)


def _model_files(folder: Path, beside: tuple[str, ...], needed: Sequence[str] = NEEDED) -> dict[str, Path]:
    """What a worker needs to load it: configuration, tokenizer, weights. Nothing else of the folder is taken."""
    if "tokenizer.json" in needed and not (folder / "tokenizer.json").is_file():
        raise SetupError(
            f"{folder}: got no tokenizer.json; expected a fast tokenizer; "
            "make one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    names = list(needed)
    names += [name for name in beside if (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names += [index.name, *sorted(set(map(str, read_json(index).get("weight_map", {}).values())))]
    else:
        names.append("model.safetensors")
    for name in names:
        if not (folder / name).is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
            raise SetupError(
                f"{folder}: got {', '.join(pickles[:3]) or 'no weights'}; expected {name}, because pickled weights "
                "run code when they are read; convert it: model.save_pretrained(folder, safe_serialization=True)"
            )
        if Path(name).name != name:
            raise SetupError(f"{folder}: its index names {name!r}; expected files of this folder")
        if name.endswith(".json"):
            read_json(folder / name)
    return {name: folder / name for name in names}


def _max_tokens(folder: Path, config: Mapping[str, Any], *, steady: bool) -> int:
    """Tokens it reads: what its makers say, never more than it has positions for.

    ``steady``: nor more than a row may have before its positions change those of the rows beside it.
    """
    said = []
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (folder / file).is_file():
            said.append(read_json(folder / file).get(key))
    shape = config.get("text_config") or config
    positions = shape.get("max_position_embeddings") or shape.get("n_positions")
    if isinstance(positions, int) and positions > 0:
        offset = (
            int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0
        )
        said.append(positions - offset)
    said.append(steady_tokens(config) if steady else None)
    limits = [int(n) for n in said if isinstance(n, int | float) and 0 < n < NO_LIMIT]
    return min(limits, default=DEFAULT_MAX_TOKENS)


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    """How token vectors become one: as its sentence-transformers modules say; the mean where there are none."""
    if not (folder / "modules.json").is_file():
        return "mean"
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        kinds = {str(m["type"]).rsplit(".", 1)[-1]: str(m["path"]) for m in modules}
    except (ValueError, KeyError, TypeError):
        raise SetupError(f"{folder / 'modules.json'}: cannot be read; fetch it again") from None
    if strange := set(kinds) - MODULES:
        raise SetupError(
            f"{folder}: got the modules {', '.join(sorted(strange))}; expected only {', '.join(sorted(MODULES))}"
        )
    pooling = read_json(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    modes = {k.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for k, on in pooling.items()
             if k.startswith("pooling_mode_") and on is True}  # fmt: skip
    modes |= {str(pooling["pooling_mode"])} if "pooling_mode" in pooling else set()
    if modes <= {"mean"}:
        return "mean"
    if modes == {"cls"}:
        return "cls"
    raise SetupError(f"{folder}: got the pooling {' and '.join(sorted(modes))}; expected mean or cls")


def _classes(config: Mapping[str, Any], ranks: bool) -> tuple[Answer, tuple[str, ...]]:
    """What a sequence classifier answers, and its labels in the order of its scores."""
    by_id = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = tuple(str(by_id[key]) for key in sorted(by_id, key=int))
    kind = config.get("problem_type")
    if kind == "multi_label_classification":
        return "labels", labels
    if len(labels) == 1 and (ranks or CROSS_ENCODER & config.keys()):
        return "ranking", ()
    if kind == "regression" or (kind is None and len(labels) == 1):
        return "number", ()
    return "label", labels


def _weights_digest(files: Mapping[str, str]) -> str:
    return _digest_of([files[name] for name in sorted(files) if name.endswith(".safetensors")])


def _digest_of(digests: Sequence[str]) -> str:
    """The digest of one file; of several, the digest of theirs."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _licence(folder: Path) -> str:
    """The licence that a model card names in its first lines."""
    try:
        card = (folder / "README.md").read_text("utf-8")[:5000]
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(r"^license:\s*([^\n]+)$", card, re.MULTILINE)
    return found.group(1).strip() if found else ""
