"""The prefix cache of a language model: keys and values of what prompts begin with, for one tenant each.

A prompt finds the prefix that has most tokens in common with it: its own, or the system message of another group of rows,
or the text that another sub-task asked about.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import torch

from motet.protocol.beginnings import common_prefix
from workers.engines.newest import Newest

#: A prefix: the adapter that computes it, and its tokens.
PrefixKey = tuple[str, tuple[int, ...]]
#: Of each layer, keys and values of a prefix's tokens.
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
#: Tokens of the shortest prefix that is kept, and of the shortest beginning that is found: fewer are computed faster than
#: they are copied.
LEAST_CACHED = 8


class PrefixCache:
    """The prefixes that were used last. It counts tokens."""

    def __init__(self) -> None:
        self._held: Newest[tuple[str, PrefixKey], KeysValues] = Newest(
            size=lambda key: len(key[1][1]), gone=self._gone
        )
        #: Tenant, adapter -> the tokens of its prefixes, ascending: those that begin alike are neighbours.
        self._sorted: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: tuple[str, PrefixKey]) -> bool:
        return key in self._held

    @property
    def size(self) -> int:
        """Tokens of all prefixes in it."""
        return self._held.size

    def put(self, tenant: str, prefix: PrefixKey, computed: KeysValues) -> None:
        """Keep a tenant's prefix."""
        if (tenant, prefix) not in self._held:
            insort(self._sorted.setdefault((tenant, prefix[0]), []), prefix[1])
        self._held.put((tenant, prefix), computed)

    def beginning(self, tenant: str, prompt: PrefixKey) -> tuple[int, KeysValues]:
        """(tokens at the beginning of a tenant's prompt, their keys and values): as many as some prefix has; (0, [])."""
        adapter, tokens = prompt
        known = self._sorted.get((tenant, adapter), [])
        at = bisect_left(known, tokens)
        near = known[max(0, at - 1) : at + 1]
        if not near:
            return 0, []
        count, prefix = max((common_prefix(prefix, tokens), prefix) for prefix in near)
        if count < LEAST_CACHED:
            return 0, []
        held = self._held.get((tenant, (adapter, prefix)))
        assert held is not None
        return count, [(keys[:count], values[:count]) for keys, values in held]

    def shrink(self, most: float) -> None:
        """Let go of the prefixes that were used longest ago until no more than so many tokens are left, or one prefix."""
        self._held.shrink(most)

    def clear(self) -> None:
        self._held.clear()
        self._sorted.clear()

    def _gone(self, key: tuple[str, PrefixKey]) -> None:
        tenant, (adapter, tokens) = key
        known = self._sorted[tenant, adapter]
        del known[bisect_left(known, tokens)]
        if not known:
            del self._sorted[tenant, adapter]
