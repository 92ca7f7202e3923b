"""The inputs of a forward pass: token ids, position ids, and the rule of which token attends to which.

Axes: b texts, c canvases (b, or v times b where each text is noised v times), n canvas positions, m input positions (n,
or (v + 1) n where a clean copy follows v canvases), w key positions (m, unless the inputs are a selection of columns).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (b, h, q, k) -> bool: a flex_attention mask_mod


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one forward pass, their attention mask, and the output index of each canvas position."""

    tokens: Int[Tensor, "b m"]
    position_ids: Int[Tensor, "b m"]
    output_index: Int[Tensor, "c n"]  # the input position whose output predicts each canvas position
    ar_output_index: Int[Tensor, "c n"]  # the same for next-token prediction from clean, causally masked text
    mask_mod: MaskMod
    per_row: bool  # whether the mask differs between rows
    is_mask: Bool[Tensor, "b m"] | None = None  # which inputs are open positions; None if none is
    clean_start: int | None = None  # in training: the position where the clean copy of the text begins
    unmasked: bool = False  # whether every position attends to every position, so that no mask is needed
    columns: Int[Tensor, "b m"] | None = None  # of a selection: the key column of each of its own tokens
    key_position_ids: Int[Tensor, "rows w"] | None = None  # of a selection: the position ids of all key columns

    def flat_index(self, output_index: Int[Tensor, "c n"], positions: Bool[Tensor, "c n"]) -> Int[Tensor, " k"]:
        """The indices of the selected positions' outputs among all outputs, flattened over rows (b * m)."""
        b, m = self.tokens.shape
        row = torch.arange(len(output_index), device=output_index.device) // (len(output_index) // b)
        return (output_index + m * row[:, None])[positions]

    def select_columns(self, columns: Int[Tensor, "b m"], width: int) -> "AttentionInputs":
        """The selected positions as queries over the first `width` positions, whose keys are cached."""
        tokens, position_ids = (values.gather(1, columns) for values in (self.tokens, self.position_ids))
        key_position_ids = torch.arange(width, device=columns.device)[None]
        return replace(
            self,
            tokens=tokens,
            position_ids=position_ids,
            is_mask=None if self.is_mask is None else self.is_mask.gather(1, columns),
            columns=columns,
            key_position_ids=key_position_ids,
            unmasked=False,
        )

    def keep_only(self, keep: Bool[Tensor, "b m"], *, multiple: int = 64) -> "AttentionInputs":
        """The inputs without the positions outside `keep`; some of those remain as padding up to a `multiple`.

        No kept position may attend to one that is left out.
        """
        m = keep.shape[1]
        width = min(m, -(-int(keep.sum(1).max()) // multiple) * multiple)
        if width == m:
            return self
        kept = (~keep).int().argsort(dim=1, stable=True)[:, :width].sort(1).values
        new_index = torch.zeros_like(keep, dtype=torch.long).scatter(
            1, kept, torch.arange(width, device=kept.device).expand_as(kept)
        )
        mask_mod, views = self.mask_mod, len(self.output_index) // len(kept)
        return replace(
            self,
            tokens=self.tokens.gather(1, kept),
            position_ids=self.position_ids.gather(1, kept),
            is_mask=None if self.is_mask is None else self.is_mask.gather(1, kept),
            clean_start=None if self.clean_start is None else self.clean_start - (m - width),
            output_index=new_index.repeat_interleave(views, 0).gather(1, self.output_index),
            ar_output_index=new_index.repeat_interleave(views, 0).gather(1, self.ar_output_index),
            mask_mod=lambda b, h, q, k: mask_mod(b, h, kept[b, q], kept[b, k]),
            per_row=True,
        )

    def run_equal_rows_once(self, index: Int[Tensor, " k"]) -> tuple["AttentionInputs", Int[Tensor, " k"]]:
        """The inputs with one row if all rows are equal, and the index of the same outputs.

        Rows are equal if they have the same tokens, positions and mask, as the prompts of several samples have.
        """
        if len(self.tokens) == 1 or (self.tokens != self.tokens[:1]).any():
            return self, index
        rows = (self.position_ids, self.is_mask, self.columns, self.key_position_ids, self.visible())
        if not all(bool((values == values[:1]).all()) for values in rows if values is not None):
            return self, index
        return self._first_row(), index % self.tokens.shape[1]

    def _first_row(self) -> "AttentionInputs":
        """The inputs of the first row only."""

        def first(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:1]

        return replace(
            self,
            tokens=self.tokens[:1],
            position_ids=self.position_ids[:1],
            output_index=self.output_index[:1],
            ar_output_index=self.ar_output_index[:1],
            is_mask=first(self.is_mask),
            columns=first(self.columns),
            key_position_ids=first(self.key_position_ids),
        )

    def share_prefixes(
        self, keep: Bool[Tensor, "b m"], prefix: Int[Tensor, " groups"], group: int
    ) -> "AttentionInputs":
        """The positions in `keep`, with every `group` rows in one, in which a common prefix is computed once.

        The first `prefix` positions of the clean copies of a group are equal, and only attend to each other.
        """
        assert self.clean_start is not None, "the rows have a clean copy"
        (b, m), mask_mod, device = keep.shape, self.mask_mod, keep.device
        column, row = torch.arange(m, device=device) - self.clean_start, torch.arange(b, device=device)
        shared = (column >= 0) & (column < prefix[:, None])
        is_copy = shared[row // group] & (row % group > 0)[:, None]

        def mask_of_group(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            is_seen = torch.where(shared[b, k % m], k < m, q // m == k // m)
            return is_seen & mask_mod(b * group + q // m, h, q % m, k % m)

        def in_group(index: Int[Tensor, "c n"]) -> Int[Tensor, "c n"]:
            row = torch.arange(len(index), device=device) // (len(index) // b)
            is_shared = shared[row // group].gather(1, index)
            return index + torch.where(is_shared, 0, m * (row % group)[:, None])

        grouped = replace(
            self,
            tokens=self.tokens.view(-1, group * m),
            position_ids=self.position_ids.view(-1, group * m),
            is_mask=None if self.is_mask is None else self.is_mask.view(-1, group * m),
            clean_start=None,
            output_index=in_group(self.output_index),
            ar_output_index=in_group(self.ar_output_index),
            mask_mod=mask_of_group,
            per_row=True,
        )
        return grouped.keep_only((keep & ~is_copy).view(-1, group * m), multiple=16)

    def split(self, start: int) -> tuple["AttentionInputs", "AttentionInputs"]:
        """The inputs from position `start` on, and the earlier ones as a chunk over the keys of both, those first.

        No position from `start` on may be a mask or attend to an earlier one.
        """
        (b, m), mask_mod, is_mask = self.tokens.shape, self.mask_mod, self.is_mask
        later = replace(
            self,
            tokens=self.tokens[:, start:],
            position_ids=self.position_ids[:, start:],
            is_mask=None,
            mask_mod=lambda b, h, q, k: mask_mod(b, h, q + start, k + start),
        )
        earlier = replace(
            self,
            tokens=self.tokens[:, :start],
            position_ids=self.position_ids[:, :start],
            is_mask=None if is_mask is None else is_mask[:, :start],
            mask_mod=lambda b, h, q, k: mask_mod(b, h, (q + start) % m, (k + start) % m),
            columns=torch.arange(m - start, m, device=self.tokens.device).expand(b, -1),
            key_position_ids=self.position_ids.roll(m - start, 1),
        )
        return later, earlier

    def visible(self, window: int | None = None) -> Bool[Tensor, "rows m w"]:
        """The mask as a boolean matrix, True where a query attends to a key; one row if all rows share it.

        `window` also masks keys at that distance or farther (sliding-window attention).
        """
        b, m = self.tokens.shape
        device = self.tokens.device
        key_position_ids = self.position_ids if self.key_position_ids is None else self.key_position_ids
        keys = torch.arange(key_position_ids.shape[1], device=device)
        shared = self.columns is None and not self.per_row and window is None
        row = torch.arange(1 if shared else b, device=device)[:, None, None]
        queries = keys[:, None] if self.columns is None else self.columns[:, :, None]
        mask = self.mask_mod(row, torch.zeros_like(row), queries, keys).expand(len(row), m, len(keys))
        if window is not None:
            mask = mask & ((self.position_ids[:, :, None] - key_position_ids[:, None, :]).abs() < window)
        return mask

    def bias(self, dtype: torch.dtype, window: int | None = None) -> Float[Tensor, "rows 1 m w"]:
        """The mask as an additive bias for `sdpa` and `eager` (`eager` would add a boolean mask as 0 and 1)."""
        mask = self.visible(window)[:, None]
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The mask for flex attention, which skips blocks that are fully masked."""
        if window is not None or self.columns is not None:
            return _block_mask_of(self.visible(window))
        (b, m), mask_mod = self.tokens.shape, self.mask_mod
        # flex attention counts the arguments of a mask_mod, and `self.mask_mod` may hide them behind *args
        with_four_arguments: MaskMod = lambda b, h, q, k: mask_mod(b, h, q, k)  # noqa: E731
        return create_block_mask(with_four_arguments, b if self.per_row else 1, None, m, m, device=self.tokens.device)


def _block_mask_of(mask: Bool[Tensor, "rows m w"]) -> BlockMask:
    """A boolean mask as a flex attention BlockMask."""
    rows, m, w = mask.shape
    return create_block_mask(lambda b, h, q, k: mask[b, q, k], rows, None, m, w, device=mask.device)


@dataclass(frozen=True)
class BatchedInputs(AttentionInputs):
    """Several attention inputs in one forward pass, each with its own mask; short rows are padded on the right."""

    inputs: tuple[AttentionInputs, ...] = ()

    @classmethod
    def from_inputs(cls, inputs: tuple[AttentionInputs, ...], width: int | None = None) -> "BatchedInputs":
        """A batch of whole inputs, or, with `width`, of selections over at most `width` key columns."""
        m = max(each.tokens.shape[1] for each in inputs)
        tokens, position_ids = (
            torch.cat([functional.pad(values, (0, m - values.shape[1])) for values in column])
            for column in zip(*((each.tokens, each.position_ids) for each in inputs), strict=True)
        )
        unmasked = width is None and all(each.unmasked and each.tokens.shape[1] == m for each in inputs)
        key_position_ids = None if width is None else tokens.new_zeros(1, width)
        nothing = [torch.zeros_like(each.tokens, dtype=torch.bool) for each in inputs]
        masks = [none if each.is_mask is None else each.is_mask for none, each in zip(nothing, inputs, strict=True)]
        return cls(
            tokens,
            position_ids,
            tokens,
            tokens,
            unmasked_mod,
            per_row=True,
            is_mask=torch.cat([functional.pad(each, (0, m - each.shape[1])) for each in masks]),
            unmasked=unmasked,
            key_position_ids=key_position_ids,
            inputs=inputs,
        )

    def visible(self, window: int | None = None) -> Bool[Tensor, "rows m w"]:
        m = self.tokens.shape[1]
        w = m if self.key_position_ids is None else self.key_position_ids.shape[1]
        masks = [each.visible(window).expand(len(each.tokens), -1, -1) for each in self.inputs]
        return torch.cat([functional.pad(mask, (0, w - mask.shape[2], 0, m - mask.shape[1])) for mask in masks])

    def block_mask(self, window: int | None = None) -> BlockMask:
        return _block_mask_of(self.visible(window))


def unmasked_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The `MaskMod` of full attention."""
    return (q >= 0) & (k >= 0)
