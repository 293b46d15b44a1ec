"""What a run goes on from: named tensors, stored as safetensors without ever being in one piece.

A checkpoint of a trunk that learns is several times its size. Its bytes leave in slices, so that the thread which
sends them never holds up the one that computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Bytes of a slice.
SLICE = 1 << 20
_NAMES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True, slots=True)
class RunState:
    """Tensors on the CPU, contiguous, which nobody changes any more; and a few plain values beside them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def slices(self) -> Iterator[memoryview]:
        """The file, from its beginning, each time that it is asked for."""
        header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(self.facts)}}
        at = 0
        for name, tensor in self.tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        yield memoryview(len(raw).to_bytes(8, "little") + raw)
        for tensor in self.tensors.values():
            whole = tensor.reshape(-1).view(torch.uint8).numpy().data
            for lo in range(0, len(whole), SLICE):
                yield whole[lo : lo + SLICE]

    @classmethod
    def read(cls, raw: bytes) -> RunState:
        """Raises ValueError where it is none."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            length = int.from_bytes(raw[:8], "little")
            facts = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["facts"])
            return cls(load(raw), facts)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"no checkpoint: {type(error).__name__}") from None
