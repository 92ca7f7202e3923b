"""The keys and values of all texts that are being written, in one place.

Axes: b rows of a pass, m positions that are run, w columns that are looked at, d head size.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import ColumnCache, ColumnCacheLayer


class KVPool(ColumnCache):
    """Columns for texts that come and go: each has rows of its own, for as long as it is written.

    It grows with what it holds, and lets go of everything when nobody is left.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, 0)
        self.layers = [_KVPoolLayer(self) for _ in self.layers]
        self._taken: set[int] = set()
        self.height = 0
        self.rows = torch.empty(0, dtype=torch.long)

    def take(self, count: int, n: int) -> list[int]:
        """Rows of `n` columns for a newcomer, the first that are free."""
        free = (row for row in range(len(self._taken) + count) if row not in self._taken)
        rows = [next(free) for _ in range(count)]
        self._taken.update(rows)
        self.height, self.n = max(self.height, max(rows) + 1), max(self.n, n)
        return rows

    def free(self, rows: list[int]) -> None:
        self._taken.difference_update(rows)
        if not self._taken:
            self.height = self.n = 0
            for layer in self.layers:
                layer.keys = layer.values = None
                layer.is_initialized = False

    def turn(self, rows: list[int], parts: list[ColumnCache]) -> int:
        """The next pass is of these rows, each part as its own columns say. How many columns it looks at."""
        m = max(part.columns.shape[1] for part in parts)
        columns = [part.columns.masked_fill(part.columns == part.n, self.n) for part in parts]
        columns = [functional.pad(each, (0, m - each.shape[1]), value=self.n) for each in columns]
        self.write(torch.cat(columns), max(part.width for part in parts))
        self.rows = torch.tensor(rows, device=self.columns.device)
        self.whole = rows == list(range(len(rows)))
        return self.width


class _KVPoolLayer(ColumnCacheLayer):
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
        self.keys, self.values = (self._write(kept, new) for kept, new in self._both(key_states, value_states))
        rows = slice(len(self.store.rows)) if self.store.whole else self.store.rows
        return self.keys[rows, :, : self.store.width], self.values[rows, :, : self.store.width]

    def _both(self, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self.keys is not None and self.values is not None
        return [(self.keys, keys), (self.values, values)]

    def _write(self, kept: Tensor, new: Float[Tensor, "b h m d"]) -> Tensor:
        """What is kept, made larger where need be, with the new in its places."""
        store = self.store
        taller, wider = store.height - kept.shape[0], store.n + 1 - kept.shape[2]
        if taller > 0 or wider > 0:
            kept = functional.pad(kept, (0, 0, 0, max(0, wider), 0, 0, 0, max(0, taller)))
        kept[store.rows[:, None], :, store.columns] = new.transpose(1, 2)
        return kept
