"""Work that need not be done twice: finished blocks are remembered exactly, the rest of a text for a while.

Axes: b texts, n canvas positions, m positions that are run, w cached columns in use, d hidden size.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from diffusify.canvas import Canvas
from diffusify.config import sees_right_context
from diffusify.diffusion.attention import AttentionInputs, BlockCausal
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser


class ColumnCache(Cache):
    """Keys and values of every layer, each token's in the column of its position, whatever pass wrote it.

    Before a pass, `write` says where each of its tokens goes (column n swallows padding) and how many columns it sees.
    """

    def __init__(self, denoiser: Denoiser, n: int) -> None:
        layers = denoiser.config.get_text_config().num_hidden_layers
        super().__init__(layers=[ColumnCacheLayer(self) for _ in range(layers)])
        self.n = n
        self.columns = torch.empty(0, 0, dtype=torch.long)
        self.width = 0

    def write(self, columns: Int[Tensor, "b m"], width: int) -> None:
        self.columns, self.width = columns, width


class ColumnCacheLayer(CacheLayerMixin):
    """Keys and values of one layer."""

    def __init__(self, store: ColumnCache) -> None:
        super().__init__()
        self.store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(b, heads, self.store.n + 1, size)
        self.values = value_states.new_zeros(b, heads, self.store.n + 1, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.scatter_(2, self.store.columns[:, None, :, None].expand_as(new), new)
        return self.keys[:, :, : self.store.width], self.values[:, :, : self.store.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.width, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self.store.n


class BlockCache:
    """A denoiser that runs only what is new: the same call and the same answers, up to rounding.

    Blocks of a block-causal model that have no open position are final, so their keys and values are kept. A call runs
    what is not kept yet, up to the asked block: the pass that stores a finished block is the pass that starts the next.
    Under shift a block's first position is answered by its left neighbour, whose answer is kept too. Every row is at
    its own place. A canvas that is changed behind the cache's back is noticed, and run again from there.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        pattern = denoiser.diffusion_config.attention
        if not isinstance(pattern, BlockCausal):
            raise ValueError(
                f"an exact cache needs block-causal attention, which {pattern} is not; leave the cache out"
            )
        if not denoiser.supports_kv_cache:
            raise ValueError(f"{denoiser.diffusion_config.architecture} keeps no keys and values; leave the cache out")
        self.denoiser, self.pattern = denoiser, pattern
        self._canvas: Canvas | None = None

    def _begin(self, canvas: Canvas) -> None:
        """An empty memory for texts of this shape."""
        b, n = canvas.tokens.shape
        self._past = ColumnCache(self.denoiser, n)
        self._canvas = canvas
        self._stored = torch.zeros(b, dtype=torch.long, device=canvas.tokens.device)  # columns that are final
        self._edge: Tensor | None = None  # said about the position `_edge_at`, by its left neighbour
        self._edge_at = torch.full_like(self._stored, -1)

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        if self._canvas is None or self._canvas.tokens.shape != canvas.tokens.shape:
            self._begin(canvas)
        assert self._canvas is not None
        size, shift, n = self.pattern.size, self.denoiser.diffusion_config.shift, canvas.tokens.shape[1]
        at = torch.arange(n, device=positions.device)
        changed = canvas.open | (canvas.tokens != self._canvas.tokens)
        stored = torch.minimum(self._stored, torch.where(changed, at, n).amin(1) // size * size)
        start = torch.where((self._edge_at == stored) | (shift == 0), stored, (stored - size).clamp_min(0))
        last = torch.where(positions, at, -1).amax(1)
        end = torch.where(last < 0, start, (last // size * size + size).clamp_max(n))
        final = torch.minimum(torch.where(canvas.open, at, n).amin(1) // size * size, end)
        m, width = int((end - start).amax()), int(end.amax())
        columns = start[:, None] + torch.arange(m, device=positions.device)
        inputs = self.pattern(canvas, shift=shift).select_columns(columns.clamp_max(n - 1), width)
        self._past.write(torch.where(columns < end[:, None], columns, n), width)
        hidden = self._hidden(inputs, positions, start, final)
        self._stored, self._canvas = torch.maximum(stored, final), canvas
        return self.denoiser.lazy_logits(hidden)

    def _hidden(
        self,
        inputs: AttentionInputs,
        positions: Bool[Tensor, "b n"],
        start: Int[Tensor, " b"],
        final: Int[Tensor, " b"],
    ) -> Float[Tensor, "k d"]:
        """What the body says about the asked positions; what it says about each row's next block is kept."""
        m, shift = inputs.tokens.shape[1], self.denoiser.diffusion_config.shift
        row, position = positions.nonzero(as_tuple=True)
        source = position - shift - start[row]
        index = row * m + source.clamp_min(0)
        if not shift:
            return self.denoiser.hidden_states(inputs, index, past=self._past)
        every = torch.arange(len(start), device=start.device)
        edges = every * m + (final - 1 - start).clamp(0, m - 1)
        hidden, edge = self.denoiser.hidden_states(inputs, torch.cat([index, edges]), past=self._past).split(
            [len(index), len(edges)]
        )
        if self._edge is not None:
            hidden = torch.where((source < 0)[:, None], self._edge[row], hidden)
            edge = torch.where((final > start)[:, None], edge, self._edge)
        self._edge, self._edge_at = edge, torch.where(final > start, final, self._edge_at)
        return hidden


class WindowCache:
    """A denoiser that sees both ways and runs only the window in work; what is around it is remembered as it was.

    Approximate: keys and values around the window go stale until the next window begins, or after `refresh` passes.
    `dual` remembers both sides, `prefix` only what stands before the window (Fast-dLLM).
    """

    def __init__(self, denoiser: Denoiser, kind: Literal["prefix", "dual"], refresh: int = 32) -> None:
        if not sees_right_context(denoiser.diffusion_config.attention):
            raise ValueError(f"a {kind} cache is for models that see both ways; block models have an exact one")
        if not denoiser.supports_kv_cache:
            raise ValueError(f"{denoiser.diffusion_config.architecture} keeps no keys and values; leave the cache out")
        if refresh < 1:
            raise ValueError(f"refresh={refresh} must be at least 1 pass, which remembers nothing")
        self.denoiser, self.kind, self.refresh = denoiser, kind, refresh
        self._past: ColumnCache | None = None
        self._passes = 0

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        shift, n = self.denoiser.diffusion_config.shift, canvas.tokens.shape[1]
        at = torch.arange(n, device=positions.device)
        index = positions.any(1)
        first = torch.where(positions, at, n).amin(1) - shift
        last = torch.where(positions, at, -1).amax(1) + 1
        if self._past is None or self._past.n != n or len(self._start) != len(positions):
            self._past, self._passes = ColumnCache(self.denoiser, n), self.refresh
            self._start, self._end = first, last
        inside = (first >= self._start) & (last <= self._end) | ~index
        if self._passes >= self.refresh or not inside.all():
            self._start, self._end, self._passes = first.clamp_min(0), last, 0
            start, end = torch.zeros_like(first), torch.full_like(first, n)
        else:
            start = torch.where(index, self._start, n)
            end = torch.where(index, self._end if self.kind == "dual" else n, n)
        self._passes += 1
        columns = start[:, None] + torch.arange(int((end - start).amax()), device=positions.device)
        inputs = self.denoiser.diffusion_config.attention(canvas, shift=shift).select_columns(
            columns.clamp_max(n - 1), n
        )
        self._past.write(torch.where(columns < end[:, None], columns, n), n)
        row, position = positions.nonzero(as_tuple=True)
        index = row * columns.shape[1] + (position - shift - start[row]).clamp_min(0)
        return self.denoiser.lazy_logits(self.denoiser.hidden_states(inputs, index, past=self._past))
