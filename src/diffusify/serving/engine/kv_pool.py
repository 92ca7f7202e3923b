"""The keys and values of all texts that are being generated, in one KV cache.

Axes: b rows of a pass, h heads, m query positions, w key columns, d head size.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import ColumnCache, ColumnCacheLayer


class KVPool(ColumnCache):
    """A KV cache whose rows are allocated to texts and freed when they are finished.

    `height` is the number of rows up to the last allocated one, and `n` the largest number of columns of a text. The
    stored states get this shape when one of the two has outgrown them, and are released when no row is allocated.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, 0)
        self.layers = [_KVPoolLayer(self) for _ in self.layers]
        self._allocated: dict[int, int] = {}  # the number of columns of each allocated row
        self.height = 0
        self.rows = torch.empty(0, dtype=torch.long)

    def allocate(self, count: int, n: int) -> list[int]:
        """Reserve the first `count` free rows for texts of `n` columns."""
        free = (row for row in range(len(self._allocated) + count) if row not in self._allocated)
        rows = [next(free) for _ in range(count)]
        self._allocated |= dict.fromkeys(rows, n)
        self._measure()
        return rows

    def free(self, rows: list[int]) -> None:
        """Give rows back."""
        for row in rows:
            del self._allocated[row]
        self._measure()
        if not self._allocated:
            for layer in self.layers:
                layer.keys = layer.values = None
                layer.is_initialized = False

    def _measure(self) -> None:
        self.height = max(self._allocated, default=-1) + 1
        self.n = max(self._allocated.values(), default=0)

    def prepare(self, rows: list[list[int]], caches: list[ColumnCache]) -> int:
        """Select the rows of the next pass, the first ones of each cache, and the columns that `caches` write to.

        Returns the number of key columns.
        """

        def joined(columns: list[Tensor]) -> Tensor:
            """The columns of all caches, with the pool's unused column in the place of theirs and as padding."""
            width = max(each.shape[-1] for each in columns)
            parts = zip(columns, rows, caches, strict=True)
            own = [
                first.masked_fill(first == cache.n, self.n)
                for each, mine, cache in parts
                for first in [each[..., : len(mine), :]]
            ]
            return torch.cat([functional.pad(each, (0, width - each.shape[-1]), value=self.n) for each in own], -2)

        moves = joined([cache.moves for cache in caches])
        self.set_columns(joined([cache.columns for cache in caches]), max(cache.width for cache in caches), moves)
        of_pass = [row for mine in rows for row in mine]
        self.rows = torch.tensor(of_pass, device=self.columns.device)
        self.contiguous = of_pass == list(range(len(of_pass)))
        return self.width

    def copy_first(self, rows: list[int]) -> None:
        """Copy the keys and values of the first of some rows to the others."""
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            for states in (layer.keys, layer.values):
                states[rows[1:]] = states[rows[0]].clone()


class _KVPoolLayer(ColumnCacheLayer):
    """The keys and values of one layer."""

    store: KVPool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.store.height, key_states.shape[1], self.store.n + 1)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Float[Tensor, "b h m d"], value_states: Float[Tensor, "b h m e"], *args: object, **_: object
    ) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w e"]]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._write(self.keys, key_states), self._write(self.values, value_states)
        rows = slice(len(self.store.rows)) if self.store.contiguous else self.store.rows.to(self.keys.device)
        return self.keys[rows, :, : self.store.width], self.values[rows, :, : self.store.width]

    def _write(self, stored: Tensor, new: Float[Tensor, "b h m d"]) -> Tensor:
        """The stored states with the new ones written to their rows and columns.

        If they are too small, they get the shape of the pool, which may be smaller in the other dimension.
        """
        store = self.store
        taller, wider = store.height - stored.shape[0], store.n + 1 - stored.shape[2]
        if taller > 0 or wider > 0:
            stored = functional.pad(stored, (0, 0, 0, wider, 0, 0, 0, taller))
        rows, columns = (index.to(stored.device) for index in (store.rows, store.columns))
        if store.moves.numel():
            source, target = store.moves.to(stored.device)
            stored[rows[:, None], :, target] = stored[rows[:, None], :, source]
        stored[rows[:, None], :, columns] = new.transpose(1, 2)
        return stored
