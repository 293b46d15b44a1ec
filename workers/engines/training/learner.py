"""One step of an optimiser on a trunk and its heads: on one device, or on each device of a group at once.

In a group every device has the whole model and takes its share of each batch; gradients are averaged by torch's
DistributedDataParallel, so that all of them take the same step (Li et al., PyTorch Distributed, VLDB 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motet.training.recipe import Recipe
from workers.engine import Prepared
from workers.engines.training.heads import Heads
from workers.engines.training.lora import put_in
from workers.engines.trunk import padded, pool

RATES = {"all": 5e-5, "lora": 5e-4}
#: Of a trunk that learns: decay, the share of all steps in which the rate rises, the largest norm of a gradient.
DECAY, WARM_UP, CLIP = 0.01, 0.06, 1.0
#: Heads learn so much faster than the trunk below them.
HEADS_FASTER = 10.0


class Hopeless(Exception):
    """The run cannot succeed, however often it is tried. The message is for its owner."""


#: Token ids (n, longest) and their mask.
Padded = tuple[Tensor, Tensor | None]


class Both(nn.Module):
    """A trunk and its heads."""

    def __init__(self, trunk: nn.Module, heads: Heads, pooling: str) -> None:
        super().__init__()
        self.trunk, self.heads, self.pooling = trunk, heads, pooling

    def pooled(self, ids: Tensor, mask: Tensor | None, *, fast: bool) -> Tensor:
        """(n, dim) fp32. ``fast``: matrix products in bf16."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=fast):
            hidden = self.trunk(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(hidden, mask, self.pooling)

    def features(self, texts: Sequence[Padded], rows: Tensor, *, fast: bool) -> Tensor:
        """(n, features) fp32 of these rows, each of whose texts is padded by itself."""
        vectors = [self.pooled(ids, mask, fast=fast) for ids, mask in texts]
        return self.heads.with_numbers(vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1), rows)

    def forward(self, texts: Sequence[Padded], rows: Tensor, fast: bool) -> Tensor:
        """The loss of these rows."""
        loss, _ = self.heads.loss(self.heads(self.features(texts, rows, fast=fast)), rows)
        # Whatever labels these rows lack, all that learns has a gradient: other devices wait for it.
        return loss + 0 * self.heads.noise.sum()


class Learner:
    """What learns, and its optimiser. Everything in it is on one device."""

    def __init__(
        self,
        recipe: Recipe,
        trunk: nn.Module,
        heads: Heads,
        *,
        pooling: str,
        pad: int,
        device: str,
        fast: bool,
    ) -> None:
        """``fast``: matrix products in bf16, while weights and their changes stay fp32."""
        self.recipe, self.pad, self.device, self.fast = recipe, pad, device, fast
        self.both = Both(trunk, heads, pooling)
        #: Every text; of a row that has several, one behind the other.
        self.texts: list[Prepared] = []
        rate = recipe.rate or RATES[recipe.tune]
        learning = [p for p in trunk.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for p in learning if p.ndim > 1], "weight_decay": DECAY, "top": rate},
                {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0, "top": rate},
                {"params": list(heads.parameters()), "weight_decay": 0.0, "top": HEADS_FASTER * rate},
            ],
            lr=rate,
            fused=True,
        )
        self._among: Any = None
        self._rank, self._devices = 0, 1

    def features(self, rows: Tensor, *, fast: bool) -> Tensor:
        """(n, features) fp32."""
        return self.both.features(self._padded(rows), rows, fast=fast)

    def length(self, row: int) -> int:
        """Tokens of a row's texts."""
        n = self.recipe.texts
        return sum(text.length for text in self.texts[row * n : (row + 1) * n])

    def join(self, rank: int, devices: int) -> None:
        """From now on take every ``devices``-th row of each batch, and step with the others of the process group."""
        from torch.nn.parallel import DistributedDataParallel

        on = None if self.device == "cpu" else [torch.device(self.device)]
        self._among = DistributedDataParallel(self.both, device_ids=on, forward_sync_buffers=False)
        self._rank, self._devices = rank, devices

    def leave(self) -> None:
        """Learn alone."""
        self._among = None
        self._rank, self._devices = 0, 1

    def learn(self, rows: Tensor, epoch: int, step: int, steps: int) -> float:
        """One step of the optimiser, in a group with its share of these rows. The loss. Raises Hopeless."""
        # Whatever ran before, in this process or another: chance of this step, on this device, is this step's.
        where = [self._rank] if self._rank else []
        torch.manual_seed(seed_of(self.recipe.seed, epoch, step, *where))
        done = ((epoch - 1) * steps + step + 1) / (self.recipe.epochs * steps)
        slope = min(done / WARM_UP, (1 - done) / (1 - WARM_UP) + 1e-3)
        for group in self.adam.param_groups:
            group["lr"] = group["top"] * min(1.0, slope)
        if not any(bool(truth.known(rows).any()) for truth in self.both.heads.truths):
            return 0.0
        # A device without a row takes part all the same: the others wait for its gradients.
        share = rows[self._rank :: self._devices]
        mine = share if len(share) else rows[:1]
        loss: Tensor = (self._among or self.both)(self._padded(mine), mine, self.fast)
        # The mean over devices is the mean over rows.
        loss = loss * (len(share) * self._devices / len(rows)) if self._devices > 1 else loss
        self.adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([p for group in self.adam.param_groups for p in group["params"]], CLIP)
        self.adam.step()
        return finite(loss, self.recipe.tune, epoch)

    def _padded(self, rows: Tensor) -> list[Padded]:
        n = self.recipe.texts
        return [
            padded([self.texts[row * n + place] for row in rows.tolist()], self.pad, self.device)
            for place in range(n)
        ]


def let_learn(trunk: Any, recipe: Recipe) -> None:
    """Make that of a trunk trainable which is to learn: changes of low rank beside it, or all of it but the pooler."""
    if recipe.tune == "lora":
        put_in(trunk, recipe.rank, recipe.seed)
        return
    trunk.requires_grad_(True)
    if getattr(trunk, "pooler", None) is not None:
        trunk.pooler.requires_grad_(False)


def adam_tensors(adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``adam.<number>.<name>``."""
    return {
        f"adam.{number}.{name}": value
        for number, state in adam.state_dict()["state"].items()
        for name, value in state.items()
    }


def adam_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state by parameter again, out of what ``adam_tensors`` named."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".", 2)
            found.setdefault(int(number), {})[key] = tensor
    return found


def finite(loss: Tensor, stage: str, epoch: int) -> float:
    """The loss as a number. Raises Hopeless where it is none: then nothing that was learned is worth anything."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Hopeless(
            f"the loss became {value} in epoch {epoch} of {stage}; choose a lower rate, or look at the rows"
        )
    return value


def seed_of(*numbers: int) -> int:
    """One number of several, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
