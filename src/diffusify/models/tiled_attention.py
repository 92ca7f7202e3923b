"""Attention for training on a CPU: tile by tile, and only the tiles that somebody looks at.

Axes: b texts, h heads, g heads of keys and values, n positions, w positions that are looked at, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tiles"
SIDE = 64  # positions; a tile's scores stay in the processor's cache


@dataclass(frozen=True)
class Strip:
    """Some positions next to each other, the stretches that any of them looks at, and the bias there, if any."""

    rows: slice
    stretches: tuple[slice, ...]
    bias: Float[Tensor, "r 1 1 n w"] | None

    def of(self, columns: Float[Tensor, "bg w d"]) -> Tensor:
        parts = [columns[:, stretch] for stretch in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def use_tiled_attention(network: PreTrainedModel) -> None:
    """From now on the network's attention is computed in tiles where it is trained on a CPU, else as before.

    A network that was loaded with another kernel than sdpa keeps it.
    """
    if network.config._attn_implementation == "sdpa" and network._can_set_attn_implementation():
        network.set_attn_implementation(NAME)


@torch.compiler.disable  # it looks at masks, and its shapes change
def tiled_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g w d"],
    value: Float[Tensor, "b g w d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` gives, with a gradient; what cannot be done in tiles is left to it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    biased = attention_mask is None or (attention_mask.is_floating_point() and attention_mask.shape[1] == 1)
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    if special or not biased or not learns or query.device.type != "cpu" or key.shape[-1] != value.shape[-1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # fmt: skip
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    n, w = query.shape[2], key.shape[2]
    if attention_mask is not None:
        strips = _strips_of(attention_mask, dtype)
    elif causal and n > 1:
        hidden = torch.ones(n, w, dtype=torch.bool).triu(w - n + 1)
        strips = _strips(torch.zeros(1, 1, n, w, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min))
    else:
        strips = [Strip(slice(at, min(at + SIDE, n)), (slice(0, w),), None) for at in range(0, n, SIDE)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Any = _Tiled.apply(query.to(dtype), key.to(dtype), value.to(dtype), strips, scale)
    return out.transpose(1, 2).contiguous(), None


_known: Any = WeakTensorKeyDictionary()  # the layers of a pass have their mask in common


def _strips_of(mask: Tensor, dtype: torch.dtype) -> list[Strip]:
    found = _known.get(mask)
    if found is None or found[0] is not dtype:
        bias = mask.clamp_min(torch.finfo(dtype).min).to(dtype)
        found = _known[mask] = (dtype, _strips(bias))
    return found[1]


def _strips(bias: Float[Tensor, "r 1 n w"]) -> list[Strip]:
    """A mask cut into strips of SIDE rows; of their columns only tiles that some row of some text sees are kept."""
    n, w = bias.shape[2:]
    low = torch.finfo(bias.dtype).min / 2
    strips = []
    for top in range(0, n, SIDE):
        part = bias[:, 0, top : top + SIDE]
        seen = (part > low).flatten(0, 1).any(0)
        starts = range(0, w, SIDE)
        wanted = [bool(some) for some in torch.stack([seen[at : at + SIDE].any() for at in starts])]
        edges = [at for at, now, before in zip(starts, wanted, [False, *wanted], strict=False) if now != before]
        edges += [w] if wanted[-1] else []
        stretches = tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)) or (slice(0, w),)
        there = torch.cat([part[..., stretch] for stretch in stretches], -1)
        strips.append(
            Strip(
                slice(top, top + part.shape[1]), stretches, there[:, None, None] if bool((there != 0).any()) else None
            )
        )
    return strips


class _Tiled(torch.autograd.Function):
    """Scores and probabilities exist for one strip at a time, and are made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, strips: list[Strip], scale: float) -> Tensor:
        b, h, n, d = query.shape
        g = key.shape[1]
        grouped = query.reshape(b, g, h // g, n, d)
        keys, values = key.reshape(b * g, -1, d), value.reshape(b * g, -1, d)
        out = torch.empty_like(grouped)
        for strip in strips:
            _, _, chance = _chances(grouped, keys, strip, scale)
            out[:, :, :, strip.rows] = torch.bmm(chance, strip.of(values)).view(b, g, h // g, -1, d)
        ctx.save_for_backward(grouped, keys, values)
        ctx.strips, ctx.scale = strips, scale
        return out.view(b, h, n, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grouped, keys, values = ctx.saved_tensors
        b, g, times, n, d = grouped.shape
        grad = grad.reshape(grouped.shape)
        of_query = torch.empty_like(grouped)
        of_keys, of_values = torch.zeros(keys.shape), torch.zeros(values.shape)  # float32: sums over all strips
        for strip in ctx.strips:
            rows, there, chance = _chances(grouped, keys, strip, ctx.scale)
            error = grad[:, :, :, strip.rows].reshape(b * g, -1, d)
            about = torch.bmm(error, strip.of(values).transpose(1, 2))
            score = torch._softmax_backward_data(about, chance, -1, chance.dtype)  # pyright: ignore
            of_query[:, :, :, strip.rows] = _scaled(score, there, ctx.scale).view(b, g, times, -1, d)
            to_keys = _scaled(score.transpose(1, 2), rows, ctx.scale)
            to_values = torch.bmm(chance.transpose(1, 2), error)
            at = 0
            for stretch in strip.stretches:
                size = stretch.stop - stretch.start
                of_keys[:, stretch] += to_keys[:, at : at + size]
                of_values[:, stretch] += to_values[:, at : at + size]
                at += size
        shape = (b, g, -1, d)
        return (
            of_query.view(b, g * times, n, d),
            of_keys.to(keys.dtype).view(shape),
            of_values.to(values.dtype).view(shape),
            None,
            None,
        )


def _chances(grouped: Tensor, keys: Tensor, strip: Strip, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A strip's queries, the keys it looks at, and how much it looks at each."""
    b, g, times, _, d = grouped.shape
    rows, there = grouped[:, :, :, strip.rows].reshape(b * g, -1, d), strip.of(keys)
    scores = _scaled(rows, there.transpose(1, 2), scale)
    if strip.bias is not None:
        scores.view(b, g, times, -1, scores.shape[-1]).add_(strip.bias)
    return rows, there, scores.softmax(-1)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """A product of matrices, and a number, in one go."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


AttentionInterface.register(NAME, tiled_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
