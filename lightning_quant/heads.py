# SPDX-License-Identifier: Apache-2.0
"""Owns attention with fewer heads: as wide outside as before, narrower inside, which torch's own module cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.cuts import Cuts
from lightning_quant.group import Made, made_class

_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class FewerHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` without some of its heads; averaged attention weights are those of the heads that are left.

    `kept`: the places of its heads among those before, of which there were `heads_before`.
    """

    kept: list[int]
    heads_before: int

    def forward(  # noqa: D102  (torch's own)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  (a hint: the mask comes with it)
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        given = [query, key, value]
        if not batched:
            given = [one.unsqueeze(0) for one in given]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            given = [one.transpose(0, 1) for one in given]
        packed = self.in_proj_weight
        weights = [getattr(self, part) for part in _PARTS] if packed is None else packed.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip(given, weights, biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        attention: Tensor | None = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            mixed = attention @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if not batched:
            return out.squeeze(0), None if attention is None else attention.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), attention

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, to broadcast against (N, heads, L, S)."""
        masks = []
        if attn_mask is not None:
            one = _added(attn_mask, q)
            if one.dim() == 3:  # for each head
                one = one.unflatten(0, (-1, self.heads_before))[:, self.kept]
            masks.append(one)
        if key_padding_mask is not None:
            masks.append(_added(key_padding_mask, q)[:, None, None, :])
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _added(mask: Tensor, q: Tensor) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(q.dtype)
    )


def add_heads(model: nn.Module, masks: Mapping[str, Tensor], names: Mapping[str, str], cuts: Cuts) -> None:
    """Add to `cuts` the attention heads that are masked: the rows of their values, or their columns of the last projection.

    `model`: float; `masks`: by first names, True is what stays; `names`: every name of a parameter -> its first.
    """
    for name, module in model.named_modules():
        if type(module) is not nn.MultiheadAttention:
            continue
        prefix = f"{name}." if name else ""
        for key in [key for key in cuts.kept if key[0].startswith(prefix) and key[0] not in cuts.names()]:
            cuts.kept[key] = f"{name or 'the attention'} is cut by whole heads only: by rows of values, or columns of out_proj"
        if module.add_zero_attn or module.bias_k is not None:
            continue
        gone = _masked_heads(module, prefix, masks, names)
        if bool(gone.any()):
            _add(module, prefix, gone, names, cuts)


def _masked_heads(module: nn.MultiheadAttention, prefix: str, masks: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
    """Which heads are masked, bool (heads,); one of them stays in any case."""
    packed = module.in_proj_weight is not None
    weight = module.in_proj_weight if packed else module.v_proj_weight
    stays = masks.get(
        names[prefix + ("in_proj_weight" if packed else "v_proj_weight")], torch.ones(weight.shape, dtype=torch.bool)
    )
    values = (stays.chunk(3)[2] if packed else stays).any(1).view(module.num_heads, -1).any(1)
    last = masks.get(names[f"{prefix}out_proj.weight"], torch.ones(module.out_proj.weight.shape, dtype=torch.bool))
    columns = last.any(0).view(module.num_heads, -1).any(1)
    gone = ~(values & columns)
    if bool(gone.all()):
        gone[0] = False
    return gone


def _add(module: nn.MultiheadAttention, prefix: str, gone: Tensor, names: Mapping[str, str], cuts: Cuts) -> None:
    rows = gone.repeat_interleave(module.head_dim)
    packed = module.in_proj_weight is not None
    added = [(("in_proj_weight", 0), rows.repeat(3))] if packed else [((part, 0), rows) for part in _PARTS]
    added.append((("out_proj.weight", 1), rows))
    if module.in_proj_bias is not None:
        added.append((("in_proj_bias", 0), rows.repeat(3)))
        value = module.in_proj_bias.detach().chunk(3)[2].double()
        constant = module.out_proj.weight.detach().double()[:, rows] @ value[rows]  # attention weights sum to 1
        if bool(constant.any()):
            cuts.biases[names[f"{prefix}out_proj.weight"]] = names[f"{prefix}out_proj.bias"], constant
    for (own, dim), which in added:
        name = names[prefix + own]
        cuts.gone[name, dim] = which
        for key in [key for key in cuts.kept if key[:2] == (name, dim) and bool(which[key[2]])]:
            del cuts.kept[key]
    cuts.heads[prefix.removesuffix(".")] = gone


def cut_heads(module: Any, gone: Tensor) -> None:
    """Have an attention, whose parameters are cut already, know its heads; prepared ones stay prepared."""
    module.heads_before, module.kept = module.num_heads, (~gone).nonzero().flatten().tolist()
    module.num_heads = len(module.kept)
    module._qkv_same_embed_dim = False  # torch's fused encoder kernel reads the weights itself, as wide as they were
    made = type(module).__dict__.get("_made_from") if isinstance(module, Made) else None
    module.__class__ = FewerHeads if made is None else made_class(made[0], FewerHeads)
