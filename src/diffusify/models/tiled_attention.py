"""Tiled attention for training on a CPU: scores are computed tile by tile, and fully masked tiles are skipped.

Axes: b texts, h heads, g heads of keys and values, n query positions, w key positions, d head size, r rows of a mask.
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

from diffusify.models.sdpa_kernel import is_causal_call, is_plain_call, replace_sdpa

NAME = "tiles"
TILE_SIZE = 64  # positions; a tile's scores fit into the processor's cache


@dataclass(frozen=True)
class QueryTile:
    """A range of query positions, the ranges of key positions that any of them attends to, and the mask's bias there.

    `bias` is None if nothing in these ranges is masked.
    """

    queries: slice
    key_ranges: tuple[slice, ...]
    bias: Float[Tensor, "r 1 1 n w"] | None

    def select(self, keys: Float[Tensor, "bg w d"]) -> Tensor:
        """The keys (or values) that this tile attends to."""
        chunks = [keys[:, key_range] for key_range in self.key_ranges]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)


def use_tiled_attention(network: PreTrainedModel) -> None:
    """Make a network compute attention in tiles where it is trained on a CPU; elsewhere it still uses sdpa.

    A network that was loaded with another kernel than sdpa keeps it.
    """
    replace_sdpa(network, NAME)


@torch.compiler.disable  # it depends on the mask's values, and its shapes change
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
    """The same output as transformers' `sdpa`, which is called for all that tiles do not support.

    Tiles need a CPU, a gradient, one mask for all heads, and no dropout or other extension of the scores.
    """
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    on_cpu, plain = query.device.type == "cpu", is_plain_call(attention_mask, dropout, kwargs)
    if not (plain and needs_grad and on_cpu and key.shape[-1] == value.shape[-1]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # fmt: skip
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    n, w = query.shape[2], key.shape[2]
    if attention_mask is not None:
        tiles = _cached_tiles(attention_mask, dtype)
    elif is_causal_call(module, is_causal) and n > 1:
        masked = torch.ones(n, w, dtype=torch.bool).triu(w - n + 1)
        tiles = _tiles(torch.zeros(1, 1, n, w, dtype=dtype).masked_fill(masked, torch.finfo(dtype).min))
    else:
        starts = range(0, n, TILE_SIZE)
        tiles = [QueryTile(slice(start, min(start + TILE_SIZE, n)), (slice(0, w),), None) for start in starts]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Any = _TiledAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), tiles, scale)
    return out.transpose(1, 2).contiguous(), None


_cache: Any = WeakTensorKeyDictionary()  # by mask, because all layers of a forward pass share one


def _cached_tiles(mask: Tensor, dtype: torch.dtype) -> list[QueryTile]:
    cached = _cache.get(mask)
    if cached is None or cached[0] is not dtype:
        bias = mask.clamp_min(torch.finfo(dtype).min).to(dtype)
        cached = _cache[mask] = (dtype, _tiles(bias))
    return cached[1]


def _tiles(bias: Float[Tensor, "r 1 n w"]) -> list[QueryTile]:
    """A mask's tiles of TILE_SIZE queries; tiles of keys that are masked for all queries of all rows are left out."""
    n, w = bias.shape[2:]
    threshold = torch.finfo(bias.dtype).min / 2
    tiles = []
    for top in range(0, n, TILE_SIZE):
        rows = bias[:, 0, top : top + TILE_SIZE]
        visible = (rows > threshold).flatten(0, 1).any(0)
        starts = range(0, w, TILE_SIZE)
        kept = [bool(any_visible) for any_visible in torch.stack([visible[i : i + TILE_SIZE].any() for i in starts])]
        edges = [i for i, now, before in zip(starts, kept, [False, *kept], strict=False) if now != before]
        edges += [w] if kept[-1] else []
        key_ranges = tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)) or (slice(0, w),)
        part = torch.cat([rows[..., key_range] for key_range in key_ranges], -1)
        tile_bias = part[:, None, None] if bool((part != 0).any()) else None
        tiles.append(QueryTile(slice(top, top + rows.shape[1]), key_ranges, tile_bias))
    return tiles


class _TiledAttention(torch.autograd.Function):
    """Attention whose probabilities exist for one tile at a time and are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[QueryTile], scale: float) -> Tensor:
        b, h, n, d = query.shape
        g = key.shape[1]
        grouped = query.reshape(b, g, h // g, n, d)
        keys, values = key.reshape(b * g, -1, d), value.reshape(b * g, -1, d)
        out = torch.empty_like(grouped)
        for tile in tiles:
            _, _, probs = _attention_probs(grouped, keys, tile, scale)
            out[:, :, :, tile.queries] = torch.bmm(probs, tile.select(values)).view(b, g, h // g, -1, d)
        ctx.save_for_backward(grouped, keys, values)
        ctx.tiles, ctx.scale = tiles, scale
        return out.view(b, h, n, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grouped, keys, values = ctx.saved_tensors
        b, g, heads, n, d = grouped.shape
        grad = grad.reshape(grouped.shape)
        grad_query = torch.empty_like(grouped)
        grad_keys, grad_values = torch.zeros(keys.shape), torch.zeros(values.shape)  # float32: sums over all tiles
        for tile in ctx.tiles:
            tile_queries, tile_keys, probs = _attention_probs(grouped, keys, tile, ctx.scale)
            grad_out = grad[:, :, :, tile.queries].reshape(b * g, -1, d)
            grad_probs = torch.bmm(grad_out, tile.select(values).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)  # pyright: ignore
            grad_query[:, :, :, tile.queries] = _scaled_bmm(grad_scores, tile_keys, ctx.scale).view(b, g, heads, -1, d)
            grad_tile_keys = _scaled_bmm(grad_scores.transpose(1, 2), tile_queries, ctx.scale)
            grad_tile_values = torch.bmm(probs.transpose(1, 2), grad_out)
            start = 0
            for key_range in tile.key_ranges:
                end = start + key_range.stop - key_range.start
                grad_keys[:, key_range] += grad_tile_keys[:, start:end]
                grad_values[:, key_range] += grad_tile_values[:, start:end]
                start = end
        shape = (b, g, -1, d)
        return (
            grad_query.view(b, g * heads, n, d),
            grad_keys.to(keys.dtype).view(shape),
            grad_values.to(values.dtype).view(shape),
            None,
            None,
        )


def _attention_probs(grouped: Tensor, keys: Tensor, tile: QueryTile, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's queries, the keys that it attends to, and its attention probabilities."""
    b, g, heads, _, d = grouped.shape
    tile_queries, tile_keys = grouped[:, :, :, tile.queries].reshape(b * g, -1, d), tile.select(keys)
    scores = _scaled_bmm(tile_queries, tile_keys.transpose(1, 2), scale)
    if tile.bias is not None:
        scores.view(b, g, heads, -1, scores.shape[-1]).add_(tile.bias)
    return tile_queries, tile_keys, scores.softmax(-1)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """A scaled batch matrix product in one kernel."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


AttentionInterface.register(NAME, tiled_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
