"""GGUF files, turned once into a folder of safetensors that every worker can load; a worker never reads GGUF.

A GGUF file is one binary for everything: a parser walks what a stranger wrote, and it brings a chat template along.
So it is read here alone, by an administrator who allows it, and the folder that comes out of it is checked like any
other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

from motet.errors import SetupError
from workers.engines.converted import keep_converted

#: In the name of a folder: another way of converting is another folder.
_METHOD = "bf16-1"
#: The folder is whole: its last file.
_WHOLE = "config.json"


def folder_of_gguf(path: Path, cache: Path) -> Path:
    """The folder of safetensors for a GGUF file: converted once, which takes a minute, and kept in ``cache``.

    The weights are dequantised and kept as bf16. Several processes may convert at once. Raises SetupError.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}; name a GGUF file") from None
    if magic != b"GGUF":
        raise SetupError(f"{path}: it begins with {magic!r}; expected a GGUF file; fetch it again")
    if kept := kept_folder(sha256, cache):
        return kept
    if absent := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise SetupError(
            f"{path.name}: reading GGUF needs {' and '.join(absent)}; install what motet[demo] names: "
            "pip install 'gguf>=0.17' 'accelerate>=1.1'"
        )
    place = _place(sha256, cache)
    keep_converted(place, partial(_convert, path), _is_whole)
    return place


def kept_folder(sha256: str, cache: Path) -> Path | None:
    """The folder that a GGUF file with this digest was converted to; None where it was not yet."""
    place = _place(sha256, cache)
    return place if _is_whole(place) else None


def _is_whole(place: Path) -> bool:
    return (place / _WHOLE).is_file()


def _place(sha256: str, cache: Path) -> Path:
    return cache / "gguf" / f"{sha256[:32]}-{_METHOD}"


def _convert(path: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        source: dict[str, Any] = {
            "gguf_file": path.name,
            "local_files_only": True,
            "trust_remote_code": False,
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
        read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **source)
        config = read.config
        # What was read from GGUF counts as quantised and refuses to be saved; a model of the same shape does not.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        shape: Any = transformers.AutoModelForCausalLM
        model = shape.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.generation_config.eos_token_id = _ends(tokenizer, config)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise SetupError(
            f"{path.name}: it cannot be converted: {type(error).__name__}: {reason}; "
            "choose an architecture whose GGUF transformers reads, or a safetensors folder"
        ) from error


def _ends(tokenizer: Any, config: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's own, the configuration's, and the usual marks of a message's end."""
    configured = config.eos_token_id
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    known = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    ends += [
        t["id"]
        for t in known
        if t["content"] in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
    ]
    return sorted({end for end in ends if isinstance(end, int) and end < config.vocab_size})
