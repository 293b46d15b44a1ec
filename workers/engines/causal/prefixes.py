"""The prefix cache: keys and values of what all rows of a task begin with, for one tenant each."""

from __future__ import annotations

from collections import OrderedDict

import torch

from workers.engines.causal.row_prompts import PrefixKey

#: Tokens of the shortest prefix that is cached: a shorter one is computed faster than it is copied.
LEAST_CACHED = 8
#: Tokens of the prefix cache, as a share of the tokens in flight, which it takes beside them. More holds more prefixes,
#: and leaves fewer rows room.
CACHE_SHARE = 1 / 8

#: Of each layer, keys and values of a prefix's tokens.
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class PrefixCache:
    """Prefixes by tenant; the least recently used one goes first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, PrefixKey], KeysValues] = OrderedDict()
        #: Tokens of all prefixes in it.
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: tuple[str, PrefixKey]) -> bool:
        return key in self._held

    def get(self, tenant: str, prefix: PrefixKey) -> KeysValues | None:
        if (found := self._held.get((tenant, prefix))) is not None:
            self._held.move_to_end((tenant, prefix))
        return found

    def put(self, tenant: str, prefix: PrefixKey, computed: KeysValues) -> None:
        """``computed``: of each token of the prefix, in order."""
        if (tenant, prefix) not in self._held:
            self.tokens += len(prefix[1])
        self._held[tenant, prefix] = computed

    def shrink(self, most_tokens: float) -> None:
        """Let prefixes go until no more than these tokens are left, or one prefix."""
        while len(self._held) > 1 and self.tokens > most_tokens:
            (_, (_, ids)), _ = self._held.popitem(last=False)
            self.tokens -= len(ids)

    def clear(self) -> None:
        self._held.clear()
        self.tokens = 0
