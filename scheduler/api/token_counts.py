"""Token counts of a sample, by the tokenizer that the worker will use."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

from cachetools import LRUCache

from motet.protocol.manifest import Manifest
from scheduler.api.blob_folder import BlobFolder
from scheduler.policy.cost import PRIOR_BYTES_PER_TOKEN

#: A tokenizer takes a few megabytes once loaded.
_KEPT = 8


class TokenCounter:
    """Loads each ``tokenizer.json`` once, from its blob. Safe between threads."""

    def __init__(self, blobs: BlobFolder) -> None:
        self._blobs = blobs
        self._loaded: LRUCache[str, Any] = LRUCache(_KEPT)
        self._lock = Lock()

    def lengths(self, model: Manifest, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included, before any truncation.

        1 each for a model to which tokens mean nothing, what a picture counts for where it reads those; from bytes
        where its tokenizer is not at hand.
        """
        if not model.max_tokens:
            return [1] * len(texts)
        if model.reads != "text":
            # Each is brought to one size.
            return [model.max_tokens] * len(texts)
        tokenizer = self._tokenizer(model.files.get("tokenizer.json", ""))
        if tokenizer is None:
            return [2 + round(len(text.encode()) / PRIOR_BYTES_PER_TOKEN) for text in texts]
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]

    def text(self, model: Manifest, ids: Sequence[int]) -> str | None:
        """What these ids say; None where they are none of the model's, or its tokenizer is not at hand."""
        tokenizer = self._tokenizer(model.files.get("tokenizer.json", ""))
        if tokenizer is None or not all(0 <= one < tokenizer.get_vocab_size() for one in ids):
            return None
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tokenizer(self, sha256: str) -> Any:
        with self._lock:
            if sha256 not in self._loaded:
                self._loaded[sha256] = self._load(sha256)
            return self._loaded[sha256]

    def _load(self, sha256: str) -> Any:
        path = self._blobs.find(sha256)
        if path is None:
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception:  # noqa: BLE001 - the library raises bare Exception for any file it cannot read
            return None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
