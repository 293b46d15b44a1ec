"""What the transformer engines share: load a folder safely, tokenise, pad, and name torch's errors.

A folder is loaded from safetensors only and never runs code of its own: no ``auto_map``, no pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from motet.protocol.columns import CellError
from motet.protocol.manifest import Manifest
from workers.engine import CannotLoad, DeviceBroken, OutOfMemory, Prepared
from workers.engines.packed import load_packed, packed_kind
from workers.engines.proved import check_encoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: A text is cut to so many characters per token read before it is tokenised; English has four to five.
CHARS_PER_TOKEN = 16
#: Limits of tokens read for which a tokenizer is kept: a task may ask for any, and each takes megabytes.
LIMITS = 16


#: What the folder of a model that reads text holds beside its weights.
NEEDED = ("config.json", "tokenizer.json")


def folder_of(files: Mapping[str, Path], needed: Sequence[str] = NEEDED) -> Path:
    """The folder that holds a model's files. Raises CannotLoad where it names code to run, or has no weights."""
    for name in needed:
        if name not in files:
            raise CannotLoad(f"the model has no {name}")
    if not any(name.endswith(".safetensors") for name in files):
        raise CannotLoad("the model has no .safetensors weights")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if name in files and "auto_map" in json.loads(files[name].read_text("utf-8")):
            raise CannotLoad(f"{name} names code to run (auto_map), which is never done")
    return files["config.json"].parent


def preload() -> None:
    """Import what loading any model will need."""
    import transformers.models.bert.modeling_bert  # noqa: F401


def load_transformer(
    auto_class: str,
    files: Mapping[str, Path],
    *,
    device: str,
    in_format: str,
    may_miss: tuple[str, ...] = (),
    attention: str | None = None,
    admit: Callable[[Any], None] = lambda _: None,
    needed: Sequence[str] = NEEDED,
) -> Any:
    """``transformers.<auto_class>`` from a folder, in evaluation mode on the device.

    ``admit`` sees the configuration before any weight is read, and raises CannotLoad where the model is not wanted.
    Weights may be absent only where their name starts with one of ``may_miss``: others would be random.
    ``attention``: None is the fastest that its kind has; MPNet and DeBERTa have none of torch's own. ``needed``: files
    that its folder must hold. Raises CannotLoad, OutOfMemory, DeviceBroken.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = folder_of(files, needed)
    try:
        with torch_errors():
            admit(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
            if kind := packed_kind(files):
                model, missing = load_packed(
                    auto_class, files, kind, device=device, in_format=DTYPES[in_format], attention=attention
                )
            else:
                model, told = getattr(transformers, auto_class).from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation=attention,
                    dtype=DTYPES[in_format],
                    output_loading_info=True,
                    # One tensor after the other onto the device: all of them may not fit into the host's memory.
                    device_map=None if device == "cpu" or find_spec("accelerate") is None else device,
                )
                missing = told["missing_keys"]
            absent = sorted(k for k in missing if not k.startswith(may_miss))
            if absent:
                raise CannotLoad(f"the weights lack {', '.join(absent[:3])}")
            model = model.eval().requires_grad_(False).to(device)
            return model if device != "cpu" or cpu_computes(in_format) else imitated(model)
    except (OutOfMemory, DeviceBroken, CannotLoad):
        raise
    except Exception as error:
        raise CannotLoad(f"{auto_class} cannot be loaded from this folder: {type(error).__name__}") from error


def load_reader(
    auto_class: str,
    model: Manifest,
    files: Mapping[str, Path],
    *,
    device: str,
    in_format: str,
    may_miss: tuple[str, ...] = (),
) -> tuple[Any, Tokens]:
    """An encoder or a classifier whose rows stay apart, and its tokenizer. Raises what ``load_transformer`` raises."""
    loaded = load_transformer(
        auto_class,
        files,
        device=device,
        in_format=in_format,
        may_miss=may_miss,
        admit=lambda config: check_encoder(model, config),
    )
    return loaded, Tokens(files["tokenizer.json"], model.max_tokens, embedding_rows(loaded))


def cpu_computes(in_format: str) -> bool:
    """Whether this CPU has instructions for a format; without them each product takes some forty times as long."""
    return in_format == "fp32" or bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{in_format}_supported")())


def imitated(model: Any) -> Any:
    """A model in half precision that computes in fp32 and rounds: its weights, and what every layer hands on.

    So a format is tried also where it is slow (workers/registrar/accuracy.py); nothing runs in it there.
    """

    dtype = next(model.parameters()).dtype

    def rounded(_: Any, __: Any, answer: Any) -> Any:
        return (
            answer.to(dtype).float()
            if isinstance(answer, torch.Tensor) and answer.is_floating_point()
            else answer
        )

    model = model.float()
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(rounded)
    return model


def read_config(files: Mapping[str, Path]) -> Any:
    """The configuration as transformers reads it, without any weight. Raises CannotLoad."""
    import transformers

    folder = folder_of(files)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CannotLoad(f"config.json cannot be read: {type(error).__name__}") from error


def embedding_rows(model: Any) -> int:
    """Token ids that a model has embeddings for, counted from 0."""
    embedding = model.get_input_embeddings()
    # Packed, only the rows that are asked for are ever made wide.
    stored = getattr(embedding, "stored", None)
    return len(embedding.weight if stored is None else stored)


def check_ids(tokenizer: Any, rows: int) -> bool:
    """Whether some row may hold an id without an embedding, so that each must be looked at.

    Raises CannotLoad where ordinary texts may: an id that is out of range poisons a GPU for all rows. Control tokens
    that no text needs are often in the tokenizer alone, such as those for pictures.
    """
    control = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    usual = {*tokenizer.get_vocab(with_added_tokens=True).values()} - control | {*tokenizer.encode("").ids}
    if (largest := max(usual, default=0)) >= rows:
        raise CannotLoad(
            f"its tokenizer gives ids up to {largest:,}, and it has embeddings for {rows:,} (0 to {rows - 1:,}); take "
            "the tokenizer that it was trained with, or give it the embeddings: "
            f"model.resize_token_embeddings({largest + 1}), train it on them, save it, and register that"
        )
    return max(control, default=0) >= rows


class Tokens:
    """A fast tokenizer that reads at most so many tokens. Any number of threads may call it."""

    def __init__(self, path: Path, most: int, rows: int) -> None:
        """``most``: tokens that the model can read. ``rows``: ids that it has embeddings for. Raises CannotLoad."""
        try:
            self._json = path.read_text("utf-8")
            #: A tokenizer of its own for each limit: its limit is state that threads would share.
            self._reader = lru_cache(LIMITS)(self._cut)
            self._most, self._rows = most, rows
            self._looks = check_ids(self._reader(most), rows)
            pad = _pad_id(json.loads(self._json))
            # Masked, any id does that has an embedding.
            self.pad = pad if pad < rows else 0
        except CannotLoad:
            raise
        except Exception as error:
            raise CannotLoad(f"tokenizer.json cannot be read: {type(error).__name__}") from error

    def prepare(self, texts: Sequence[str], max_tokens: int) -> list[Prepared | CellError]:
        """Tokenise in one call; a text with more than ``max_tokens`` (0: the model's own limit) is cut and marked."""
        most = min(max_tokens or self._most, self._most)
        reader = self._reader(most)
        openings = [_opening(text, most * CHARS_PER_TOKEN) for text in texts]
        read = reader.encode_batch_fast(openings)
        # An opening that did not fill the model after all: only the whole text can tell.
        short = [
            i
            for i, (text, opening) in enumerate(zip(texts, openings, strict=True))
            if len(opening) < len(text) and not read[i].overflowing
        ]
        for i, again in zip(short, reader.encode_batch_fast([texts[i] for i in short]), strict=True):
            read[i] = again
        rows = [
            Prepared(row, len(one.ids), bool(one.overflowing), np.asarray(one.ids, np.int32))
            for row, one in enumerate(read)
        ]
        return [self._checked(row) for row in rows] if self._looks else [*rows]

    def pairs(
        self, query: str, documents: Sequence[str], max_tokens: int
    ) -> list[tuple[Prepared, NDArray[np.int32]] | CellError]:
        """The query with each document, and of each token whether it is of the query (0) or the document (1).

        Of a pair with more than ``max_tokens`` the longer text is cut.
        """
        most = min(max_tokens or self._most, self._most)
        longest = most * CHARS_PER_TOKEN
        asked = [(_opening(query, longest), _opening(text, longest)) for text in documents]
        found: list[tuple[Prepared, NDArray[np.int32]] | CellError] = []
        for number, one in enumerate(self._reader(most).encode_batch(asked)):
            cut = bool(one.overflowing) or any(
                len(part) < len(whole)
                for part, whole in zip(asked[number], (query, documents[number]), strict=True)
            )
            row = Prepared(number, len(one.ids), cut, np.asarray(one.ids, np.int32))
            checked = self._checked(row) if self._looks else row
            kinds = np.asarray(one.type_ids, np.int32)
            found.append(checked if isinstance(checked, CellError) else (checked, kinds))
        return found

    def _checked(self, row: Prepared) -> Prepared | CellError:
        """The row, or its error where the model has no embedding for one of its ids."""
        largest = int(row.inputs.max(initial=0))
        if largest < self._rows:
            return row
        return CellError(
            "unknown_token",
            f"a control token of id {largest:,}; the model has embeddings for {self._rows:,} ids; take it out of the text",
        )

    def _cut(self, most: int) -> Any:
        from tokenizers import Tokenizer

        reader = Tokenizer.from_str(self._json)
        reader.no_padding()
        reader.enable_truncation(most)
        return reader


def padded(batch: Sequence[Prepared], pad: int, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids (n, longest) and their mask on the device; None for a mask where nothing is padding."""
    longest = max(row.length for row in batch)
    ids = np.full((len(batch), longest), pad, np.int64)
    lengths = np.array([row.length for row in batch])
    for i, row in enumerate(batch):
        ids[i, : row.length] = row.inputs
    mask = None if int(lengths.min()) == longest else (np.arange(longest) < lengths[:, None])
    return onto(ids, device), None if mask is None else onto(mask.astype(np.int64), device)


def pool(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector of each row's token vectors (n, longest, dim): the first, or their mean. (n, dim) fp32."""
    if pooling == "cls":
        first: torch.Tensor = hidden[:, 0].float()
        return first
    if mask is None:
        mean: torch.Tensor = hidden.mean(1, dtype=torch.float32)
        return mean
    kept = mask.unsqueeze(-1)
    total: torch.Tensor = (hidden * kept.to(hidden.dtype)).sum(1, dtype=torch.float32)
    return total / kept.sum(1)


def free_cache(device: str) -> None:
    """Give back to the device what a model held: torch would keep it. Every engine's unload ends with this."""
    if device != "cpu":
        torch.cuda.empty_cache()


def settle(device: str) -> None:
    """Wait until the device has done all that it was given: a step that returned before would count as a fast one."""
    if device != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def torch_errors() -> Iterator[None]:
    """Turn what torch raises into what the executor knows: OutOfMemory, DeviceBroken; the rest passes."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise OutOfMemory from None
    except MemoryError:
        raise OutOfMemory from None
    except RuntimeError as error:
        known = _meaning(error)
        if known is OutOfMemory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if known is None:
            raise
        raise known from None


def _meaning(error: RuntimeError) -> type[Exception] | None:
    """torch tells these apart by their words only."""
    words = str(error)
    if "can't allocate memory" in words or "out of memory" in words or "CUBLAS_STATUS_ALLOC_FAILED" in words:
        return OutOfMemory
    sticky = type(error).__name__ == "AcceleratorError" or any(
        sign in words for sign in ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL error")
    )
    return DeviceBroken if sticky else None


def onto(values: NDArray[Any], device: str) -> torch.Tensor:
    """These values on the device. Onto a GPU from pinned memory: the host goes on while they travel."""
    tensor = torch.from_numpy(values)
    if device == "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _opening(text: str, chars: int) -> str:
    """The beginning of a long text, up to a space: all that can matter of a document that will be cut anyway."""
    if len(text) <= chars:
        return text
    space = text.rfind(" ", chars // 2, chars)
    return text[:space] if space > 0 else text


def _pad_id(tokenizer: Mapping[str, Any]) -> int:
    """The id that fills a batch; it is masked, but some models count positions by it."""
    padding = tokenizer.get("padding")
    if padding:
        return int(padding["pad_id"])
    for token in tokenizer.get("added_tokens") or ():
        if token["content"] in ("[PAD]", "<pad>", "<|pad|>"):
            return int(token["id"])
    return 0
