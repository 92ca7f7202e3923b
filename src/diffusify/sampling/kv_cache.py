"""KV caches: an exact one for block-causal models, and approximate ones for bidirectional models.

Axes: b texts, n canvas positions, m positions of a pass, w cached columns in use, k output positions, d hidden size,
h heads.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from diffusify.canvas import Canvas
from diffusify.config import sees_right_context
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.diffusion.logits import LazyLogits
from diffusify.models.denoiser import Denoiser


class ColumnCache(Cache):
    """A KV cache of fixed size in which each token has the column of its position.

    Call `set_columns` before each forward pass, which `hidden_states` runs. Column n is written by padding and never
    read.
    """

    def __init__(self, denoiser: Denoiser, n: int) -> None:
        layers = denoiser.config.get_text_config().num_hidden_layers
        super().__init__(layers=[ColumnCacheLayer(self) for _ in range(layers)])
        self.denoiser, self.n, self.is_new = denoiser, n, True
        self.columns = torch.empty(0, 0, dtype=torch.long)
        self.moves = torch.empty(2, 0, 0, dtype=torch.long)  # from and to
        self.width = 0
        self.kept: list[int] | None = None  # the rows of the first pass that are left; None if all are

    def set_columns(
        self, columns: Int[Tensor, "b m"], width: int, moves: Int[Tensor, "2 b moved"] | None = None
    ) -> None:
        """Set the column of each token of the next pass, and the number of columns that the pass attends to.

        Before that, `moves` copies what some columns hold to others.
        """
        self.columns, self.width = columns, width
        self.moves = columns.new_empty(2, len(columns), 0) if moves is None else moves
        first = torch.arange(len(columns), device=columns.device)[:, None] * (self.n + 1)
        # The columns counted through all rows.
        self.flat_columns, self.flat_moves = (first + columns).flatten(), (first + self.moves).flatten(1)

    def hidden_states(self, inputs: AttentionInputs, index: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        """The hidden states of a pass over this cache, see `Denoiser.hidden_states`.

        The first pass runs equal rows once.
        """
        if self.is_new:
            inputs, index = inputs.run_equal_rows_once(index)
        self.is_new = False
        return self.denoiser.hidden_states(inputs, index, past=self)

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Leave out all other rows from now on."""
        if self.is_new:  # the first pass is of these rows
            return
        kept = rows.tolist()
        self.kept = kept if self.kept is None else [self.kept[row] for row in kept]
        for layer in self.layers:
            assert isinstance(layer, ColumnCacheLayer)
            layer.keep(rows)


class ColumnCacheLayer(CacheLayerMixin):
    """The keys and values of one layer of a `ColumnCache`.

    They are stored as [heads, b * (n + 1), d], so that one write serves all rows.
    """

    def __init__(self, store: ColumnCache) -> None:
        super().__init__()
        self.store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, (_, heads, _, size) = len(self.store.columns), key_states.shape
        self.keys = key_states.new_zeros(heads, b * (self.store.n + 1), size)
        self.values = value_states.new_zeros(heads, b * (self.store.n + 1), value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Release all other rows."""
        if self.is_initialized:
            self.keys, self.values = (
                stored.unflatten(1, (-1, self.store.n + 1))[:, rows.to(stored.device)].flatten(1, 2)
                for stored in (self.keys, self.values)
                if stored is not None
            )

    def _write(self, stored: Float[Tensor, "h bn d"], new: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h w d"]:
        """Write the new states to their columns; the stored states of the columns in use.

        Those of a single row are written to all rows.
        """
        b = len(self.store.columns)
        columns = self.store.flat_columns.to(stored.device)  # the network may lie on several devices
        if self.store.flat_moves.numel():
            source, target = self.store.flat_moves.to(stored.device)
            stored.index_copy_(1, target, stored.index_select(1, source))
        stored.index_copy_(1, columns, new.expand(b, -1, -1, -1).transpose(0, 1).flatten(1, 2))
        return stored.unflatten(1, (b, -1)).transpose(0, 1)[: len(new), :, : self.store.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.width, 0

    def get_seq_length(self) -> int:
        return 0  # position ids are always passed to the network

    def get_max_length(self) -> int:
        return self.store.n


class BlockCache:
    """A block-causal denoiser with an exact KV cache: the same predictions as without it, up to rounding.

    Blocks without open positions are final, so their keys and values are cached. A call runs the positions that are not
    cached yet, up to the last requested block, so a finished block is cached by the first pass over the next block. If
    the model shifts its predictions, the last hidden state of a block predicts the first token of the next one and is
    cached, too. Rows advance independently. If tokens of cached blocks have changed since the last call, they are
    computed again.

    Raises ValueError if the attention is not block-causal or the network has no KV cache.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        pattern = denoiser.diffusion_config.attention
        if not isinstance(pattern, BlockCausal):
            raise ValueError(f"an exact KV cache needs block-causal attention, which {pattern} is not; use no cache")
        if not denoiser.supports_kv_cache:
            raise ValueError(f"{denoiser.diffusion_config.architecture} has no KV cache; use no cache")
        self.denoiser, self.pattern = denoiser, pattern
        self._canvas: Canvas | None = None

    def _reset(self, canvas: Canvas) -> None:
        """Empty the cache and resize it for this canvas."""
        b, n = canvas.tokens.shape
        self._past = ColumnCache(self.denoiser, n)
        self._canvas = canvas
        self._stored = torch.zeros(b, dtype=torch.long, device=canvas.tokens.device)  # number of final columns
        self._boundary_hidden: Tensor | None = None  # hidden states that predict position `_boundary` of each row
        self._boundary = torch.full_like(self._stored, -1)

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        if self._canvas is None or self._canvas.tokens.shape != canvas.tokens.shape:
            self._reset(canvas)
        assert self._canvas is not None
        size, shift, n = self.pattern.size, self.denoiser.diffusion_config.shift, canvas.tokens.shape[1]
        at = torch.arange(n, device=positions.device)
        changed = canvas.open | (canvas.tokens != self._canvas.tokens)
        stored = torch.minimum(self._stored, torch.where(changed, at, n).amin(1) // size * size)
        start = torch.where((self._boundary == stored) | (shift == 0), stored, (stored - size).clamp_min(0))
        last = torch.where(positions, at, -1).amax(1)
        end = torch.where(last < 0, start, (last // size * size + size).clamp_max(n))
        final = torch.minimum(torch.where(canvas.open, at, n).amin(1) // size * size, end)
        m, width = int((end - start).amax()), int(end.amax())
        columns = start[:, None] + torch.arange(m, device=positions.device)
        inputs = self.pattern(canvas, shift=shift).select_columns(columns.clamp_max(n - 1), width)
        self._past.set_columns(torch.where(columns < end[:, None], columns, n), width)
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
        """Hidden states that predict `positions`; those that predict the start of each row's next block are cached."""
        m, shift = inputs.tokens.shape[1], self.denoiser.diffusion_config.shift
        row, position = positions.nonzero(as_tuple=True)
        source = position - shift - start[row]
        index = row * m + source.clamp_min(0)
        if not shift:
            return self._past.hidden_states(inputs, index)
        rows = torch.arange(len(start), device=start.device)
        boundary_index = rows * m + (final - 1 - start).clamp(0, m - 1)
        states = self._past.hidden_states(inputs, torch.cat([index, boundary_index]))
        hidden, boundary_hidden = states.split([len(index), len(rows)])
        if self._boundary_hidden is not None:
            hidden = torch.where((source < 0)[:, None], self._boundary_hidden[row], hidden)
            boundary_hidden = torch.where((final > start)[:, None], boundary_hidden, self._boundary_hidden)
        self._boundary_hidden = boundary_hidden
        self._boundary = torch.where(final > start, final, self._boundary)
        return hidden


class WindowCache:
    """A bidirectional denoiser with an approximate KV cache (Fast-dLLM).

    A call runs only the current window of requested positions and attends to cached keys and values outside of it:
    those before the window (`prefix`) or on both sides (`dual`). The cache of a row is recomputed when its next window
    starts, when a masked span has changed its length, and after `refresh` passes; in between it is stale.

    Raises ValueError if the model is not bidirectional, the network has no KV cache, or `refresh` is below 1.
    """

    def __init__(self, denoiser: Denoiser, kind: Literal["prefix", "dual"], refresh: int = 32) -> None:
        if not sees_right_context(denoiser.diffusion_config.attention):
            raise ValueError(f"a {kind} cache is for bidirectional models; block models have an exact cache")
        if not denoiser.supports_kv_cache:
            raise ValueError(f"{denoiser.diffusion_config.architecture} has no KV cache; use no cache")
        if refresh < 1:
            raise ValueError(f"refresh={refresh} must be at least 1 pass, which caches nothing")
        self.denoiser, self.kind, self.refresh = denoiser, kind, refresh
        self._past: ColumnCache | None = None

    def __call__(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        shift, n = self.denoiser.diffusion_config.shift, canvas.tokens.shape[1]
        at = torch.arange(n, device=positions.device)
        active = positions.any(1)
        first = torch.where(positions, at, n).amin(1) - shift
        last = torch.where(positions, at, -1).amax(1) + 1
        if self._past is None or self._past.n < n or len(self._start) != len(positions):
            spare = 0 if self._past is None else self._past.n  # a canvas that grew once may grow again
            self._past = ColumnCache(self.denoiser, n + spare)
            self._start, self._end, self._document = first, last, canvas.document
            self._passes = torch.full_like(first, self.refresh)  # since the cache of each row was computed
        before = pad(self._document, (0, n - self._document.shape[1]))
        has_moved = (before != canvas.document).any(1) | (self._document.count_nonzero(1) != canvas.real.sum(1))
        is_inside = (first >= self._start) & (last <= self._end)
        stale = active & (has_moved | ~is_inside | (self._passes >= self.refresh))
        self._start = torch.where(stale, first.clamp_min(0), self._start)
        self._end = torch.where(stale, last, self._end)
        self._passes, self._document = torch.where(stale, 0, self._passes) + 1, canvas.document
        start = torch.where(stale, 0, torch.where(active, self._start, n))
        end = torch.where(stale | ~active, n, self._end if self.kind == "dual" else n)
        columns = start[:, None] + torch.arange(int((end - start).amax()), device=positions.device)
        inputs = self.denoiser.diffusion_config.attention(canvas, shift=shift).select_columns(
            columns.clamp_max(n - 1), n
        )
        self._past.set_columns(torch.where(columns < end[:, None], columns, self._past.n), n)
        row, position = positions.nonzero(as_tuple=True)
        index = row * columns.shape[1] + (position - shift - start[row]).clamp_min(0)
        return self.denoiser.lazy_logits(self._past.hidden_states(inputs, index))
