"""Grouped attention for inference: query heads that share keys and values are one head with more queries.

The `sdpa` of transformers copies the keys and values for every query head, in every layer, whenever there is a mask.

Axes: b texts, h query heads, g heads of keys and values, m query positions, w key positions, d head size, r rows of a
mask.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from diffusify.models.sdpa_kernel import is_causal_call, is_plain_call, replace_sdpa

NAME = "grouped"


def use_grouped_attention(network: PreTrainedModel) -> None:
    """Make a network compute attention without copies of its keys and values; it keeps another kernel than sdpa."""
    replace_sdpa(network, NAME)


def grouped_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "b h m d"],
    key: Float[Tensor, "b g w d"],
    value: Float[Tensor, "b g w e"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same output as transformers' `sdpa`, which is called for all that groups do not support.

    Groups need fewer heads of keys than of queries, one mask for all heads or none, and no dropout or other extension.
    """
    (b, h, m, d), g = query.shape, key.shape[1]
    supported = g < h and is_plain_call(attention_mask, dropout, kwargs)
    if attention_mask is None:  # kernels of GPUs group by themselves
        supported &= not is_causal_call(module, is_causal) and query.device.type == "cpu"
    if not supported:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # fmt: skip
    mask = None if attention_mask is None else _repeated_mask(attention_mask, h // g)
    folded = query.reshape(b, g, -1, d)
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.view(b, h, m, -1).transpose(1, 2).contiguous(), None


_cache: Any = WeakTensorKeyDictionary()  # by mask, because all layers of a forward pass share one


def _repeated_mask(mask: Float[Tensor, "r 1 m w"], times: int) -> Float[Tensor, "r 1 tm w"]:
    cached = _cache.get(mask)
    if cached is None or cached.shape[2] != times * mask.shape[2]:
        cached = _cache[mask] = mask.repeat(1, 1, times, 1)
    return cached


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
