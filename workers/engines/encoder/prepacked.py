"""BERT's layers as a CPU computes them fastest: the same products in fewer and cheaper steps, over real tokens alone.

Torch lays the weight of a linear layer out for its kernels at each call, a fifth of what a short row's product takes. Here
that is done once, at load; queries, keys and values are one product; GELU and the residual sums are done where a product
ends; and padding is seen by attention alone (docs/decisions/0020). In this file a row's tokens lie behind those of the row before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

#: ``model_type`` of the encoders whose layers are BERT's.
LIKE_BERT = frozenset({"bert", "camembert", "roberta", "xlm-roberta"})
#: Tokens of a micro-batch for which weights are laid out: of one short row, in which all of a caller's wait is spent.
_TOKENS = 64


class PrepackedEncoder:
    """An encoder of transformers, laid out for the CPU. Its own layers are used up."""

    def __init__(self, model: Any) -> None:
        """``model``: one that ``can_prepack``."""
        self._embeddings = model.embeddings
        layers = model.encoder.layer
        self._layers: list[_Layer] = []
        for number, layer in enumerate(layers):
            self._layers.append(_Layer.of(layer))
            # One layer after the other, so that the weights are never all there twice.
            layers[number] = nn.Identity()
        model.pooler = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Token vectors (n, longest, dim) of token ids (n, longest). ``mask``: 0 where there is padding, whose vectors
        mean nothing; None: nowhere."""
        shown: torch.Tensor = self._embeddings(input_ids=ids)
        n, longest, dim = shown.shape
        if not longest:
            # Rows without a token, which some tokenizers make of an empty text.
            return shown
        places = _Places.of(n, longest, mask, shown.dtype)
        tokens = shown.view(-1, dim)
        if places.real is None or places.padded is None:
            return self._through(tokens, places).view(n, longest, dim)
        return self._through(tokens[places.real], places)[places.padded].view(n, longest, dim)

    def _through(self, tokens: torch.Tensor, places: _Places) -> torch.Tensor:
        for layer in self._layers:
            tokens = layer(tokens, places)
        return tokens


def can_prepack(model: Any) -> bool:
    """Whether an encoder on the CPU is one whose layers are all known here."""
    config = model.config
    return (
        config.model_type in LIKE_BERT
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and config._attn_implementation == "sdpa"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        # Weights of eight bits are layers of another type.
        and all(type(one) is nn.Linear for layer in model.encoder.layer for one in _linears(layer))
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Where tokens stand in (rows, longest)."""

    rows: int
    longest: int
    #: Place of each token, and token of each place; None: they are the same.
    real: torch.Tensor | None = None
    padded: torch.Tensor | None = None
    #: (rows, 1, 1, longest): what is added to the scores of attention; None: nothing.
    unseen: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: int, longest: int, mask: torch.Tensor | None, dtype: torch.dtype) -> _Places:
        """The real tokens, the first of them so often again that their number is one of `_rounded`."""
        if mask is None:
            count = rows * longest
            if _rounded(count) == count:
                return cls(rows, longest)
            places = torch.arange(count)
            return cls(rows, longest, _filled(places), places)
        real = mask.view(-1).nonzero().squeeze(1)
        # Padding repeats the token before it.
        padded = mask.view(-1).cumsum(0).sub_(1).clamp_(min=0)
        unseen = torch.zeros(rows, 1, 1, longest, dtype=dtype)
        unseen.masked_fill_(mask.view(rows, 1, 1, longest) == 0, float("-inf"))
        return cls(rows, longest, _filled(real), padded, unseen)


def _rounded(count: int) -> int:
    """The next number of tokens that products are made for: each takes its kernels a millisecond when it comes first."""
    step = 4 if count <= 64 else 16
    return -(-count // step) * step


def _filled(places: torch.Tensor) -> torch.Tensor:
    return torch.cat([places, places.new_zeros(_rounded(len(places)) - len(places))])


class _Linear:
    """A linear layer, its weight in the layout of the CPU's kernels."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return found

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "gelu", [], "none"
        )
        return found

    def plus(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, more, self._weight, self._bias, "add"
        )
        return found


class _Norm:
    """A layer normalisation."""

    def __init__(self, of: nn.LayerNorm) -> None:
        self._shape, self._weight, self._bias, self._eps = (
            list(of.normalized_shape),
            of.weight,
            of.bias,
            of.eps,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self._shape, self._weight, self._bias, self._eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: attention, then two products with GELU between them."""

    heads: int
    read: _Linear
    attended: _Linear
    attended_norm: _Norm
    up: _Linear
    down: _Linear
    norm: _Norm

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention = layer.attention
        mine = attention.self
        three = (mine.query, mine.key, mine.value)
        return cls(
            heads=mine.num_attention_heads,
            read=_Linear(torch.cat([one.weight for one in three]), torch.cat([one.bias for one in three])),
            attended=_as_linear(attention.output.dense),
            attended_norm=_Norm(attention.output.LayerNorm),
            up=_as_linear(layer.intermediate.dense),
            down=_as_linear(layer.output.dense),
            norm=_Norm(layer.output.LayerNorm),
        )

    def __call__(self, tokens: torch.Tensor, at: _Places) -> torch.Tensor:
        """(tokens, dim) to the same."""
        tokens = self.attended_norm(self.attended.plus(self._attention(tokens, at), tokens))
        return self.norm(self.down.plus(self.up.gelu(tokens), tokens))

    def _attention(self, tokens: torch.Tensor, at: _Places) -> torch.Tensor:
        read = self.read(tokens)
        if at.padded is not None:
            read = read.index_select(0, at.padded)
        # (queries, keys and values; rows; heads; longest; numbers of a head)
        q, k, v = read.view(at.rows, at.longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(q, k, v, at.unseen).transpose(1, 2)
        found = found.reshape(at.rows * at.longest, -1)
        return found if at.real is None else found.index_select(0, at.real)


def _as_linear(of: nn.Linear) -> _Linear:
    return _Linear(of.weight, of.bias)


def _linears(layer: Any) -> tuple[Any, ...]:
    mine = layer.attention.self
    return (
        mine.query, mine.key, mine.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense,
    )  # fmt: skip
