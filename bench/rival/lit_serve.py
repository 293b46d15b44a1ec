"""LitServe with the same trunk and heads in bf16, all heads in one product: a server that keeps nothing.

python bench/rival/lit_serve.py PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from bare import Bare  # noqa: E402

#: As many rows in a batch as motet lands together, and how long a batch waits for them, in seconds.
BATCH, WAIT_S = 16, 0.005


class Heads(litserve.LitAPI):
    """A text in, the three answers out."""

    def setup(self, device: str) -> None:
        self._bare = Bare(dtype=torch.bfloat16 if bf16() else torch.float32)

    # LitServe makes a query parameter of an argument with a type.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return str(request["text"])

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        found = self._bare.answer(self._bare.read(texts))
        return [
            {name: int(found.labels[name][i]) for name in found.labels}
            | {f"{name}_score": float(found.scores[name][i]) for name in found.labels}
            | {"tone": [round(float(score), 4) for score in found.scores["tone"][i]]}
            for i in range(len(texts))
        ]

    def encode_response(self, output: Any) -> Any:
        return output


def bf16() -> bool:
    """Whether motet computes in bf16 on this processor."""
    from workers.run.device import fast_formats

    return "bf16" in fast_formats("cpu")


if __name__ == "__main__":
    litserve.LitServer(
        Heads(max_batch_size=BATCH, batch_timeout=WAIT_S), accelerator="cpu", workers_per_device=2
    ).run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
