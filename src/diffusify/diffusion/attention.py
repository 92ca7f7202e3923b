"""Attention patterns: which token attends to which, and which network output predicts each canvas position.

Axes: b texts, c canvases (b, or v times b where each text is noised v times), n canvas positions, m input positions (n,
or (v + 1) n where a clean copy follows v canvases), w key positions (m, unless the inputs are a selection of columns).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from diffusify.canvas import Canvas

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
            output_index=new_index.repeat_interleave(views, 0).gather(1, self.output_index),
            ar_output_index=new_index.repeat_interleave(views, 0).gather(1, self.ar_output_index),
            mask_mod=lambda b, h, q, k: mask_mod(b, h, kept[b, q], kept[b, k]),
            per_row=True,
        )

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
        return cls(
            tokens,
            position_ids,
            tokens,
            tokens,
            _unmasked,
            per_row=True,
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


def _single_stream(
    canvas: Canvas, shift: int, mask_mod: MaskMod, *, per_row: bool = False, unmasked: bool = False
) -> AttentionInputs:
    """The inputs of a canvas without a clean copy, with attention confined to each document."""
    document = canvas.document
    one_document = bool((document == document[:, :1]).all())
    same_layout = one_document or bool((document == document[:1]).all())
    output_index = (torch.arange(document.shape[1], device=document.device) - shift).clamp_min(0).expand(document.shape)

    def within_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(b, h, q, k) & (document[b, q] == document[b, k])

    return AttentionInputs(
        canvas.tokens,
        canvas.position_ids,
        output_index,
        output_index,
        within_document,
        per_row=per_row or not same_layout,
        unmasked=unmasked and one_document,
    )


def _unmasked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= 0) & (k >= 0)


@dataclass(frozen=True)
class Causal:
    """Causal attention: every token attends to itself and to earlier tokens."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        return _single_stream(canvas, shift, lambda b, h, q, k: k <= q)


@dataclass(frozen=True)
class Bidirectional:
    """Full attention: every token attends to its whole document."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        return _single_stream(canvas, shift, _unmasked, unmasked=True)


@dataclass(frozen=True)
class Annealed:
    """Causal attention in which each later token is also visible with probability `share` (DiffuLLaMA).

    The whole batch has one mask. It depends on `seed` alone, so it is the same on every rank and after a resume.
    """

    share: float
    seed: int = 0

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        n = canvas.tokens.shape[1]
        ahead = torch.rand(n, n, generator=torch.Generator().manual_seed(self.seed)) < self.share
        ahead = ahead.to(canvas.tokens.device)
        return _single_stream(canvas, shift, lambda b, h, q, k: (k <= q) | ahead[q, k])


@dataclass(frozen=True)
class Prefix:
    """Prefix LM attention: the prompt (everything not editable) attends to the prompt, the rest to everything."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        editable = canvas.editable
        return _single_stream(canvas, shift, lambda b, h, q, k: editable[b, q] | ~editable[b, k], per_row=True)


@dataclass(frozen=True)
class BlockCausal:
    """Block-causal attention: a noisy block attends to all of itself and to the clean blocks before it (BD3-LM).

    Blocks are counted from the start of their document. Inside a clean block attention is causal (`clean="token"`, so
    the AR model's outputs and KV cache stay exactly the same) or full (`clean="block"`). In training, the inputs are
    the canvas followed by its clean copy, and one forward pass denoises every block given clean history. In sampling,
    a block without open positions counts as clean. Both give the same logits. With a shift, the first position of a
    block is predicted by its left neighbour in the *clean* text. Several canvases of one text share one clean copy.

    Raises ValueError if `size` is below 1.
    """

    size: int
    clean: Literal["token", "block"] = "token"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block size {self.size} must be at least 1; 4 is a good start")

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        block_start = canvas.position_ids % self.size == 0
        block = block_start.cumsum(1) - 1
        full_clean_blocks = self.clean == "block"
        if clean is None:
            noisy = torch.zeros_like(block).scatter_add(1, block, canvas.open.long()).gather(1, block) > 0

            def sampling_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                full = noisy[b, q] | full_clean_blocks
                return (k <= q) | (full & (block[b, k] == block[b, q]))

            return _single_stream(canvas, shift, sampling_mask, per_row=True)

        b, n = clean.shape
        views = len(block_start) // b
        noisy_length, document, block = views * n, canvas.document[::views], block[::views]

        def training_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at_q, at_k, noisy_q, noisy_k = q % n, k % n, q < noisy_length, k < noisy_length
            same, earlier = block[b, at_q] == block[b, at_k], block[b, at_k] < block[b, at_q]
            history = earlier | (~noisy_q & same & ((at_k <= at_q) | full_clean_blocks))
            own_block = noisy_q & noisy_k & same & (q // n == k // n)
            return (own_block | (~noisy_k & history)) & (document[b, at_q] == document[b, at_k])

        index = (torch.arange(n, device=clean.device) - shift).clamp_min(0).expand(len(block_start), n)
        view = torch.arange(len(block_start), device=clean.device)[:, None] % views
        noisy_index, clean_index = index + view * n, index + noisy_length
        return AttentionInputs(
            tokens=torch.cat([canvas.tokens.view(b, noisy_length), clean], 1),
            position_ids=torch.cat([canvas.position_ids.view(b, noisy_length), canvas.position_ids[::views]], 1),
            output_index=torch.where(block_start, clean_index, noisy_index) if shift else noisy_index,
            ar_output_index=clean_index,
            mask_mod=training_mask,
            per_row=not bool((document == document[:1]).all()),
        )

    def needed_inputs(
        self, canvas: Canvas, positions: Bool[Tensor, "c n"], *, views: int = 1, shift: int = 0
    ) -> Bool[Tensor, "b m"]:
        """Which positions of the training inputs are needed to predict `positions`; for `AttentionInputs.keep_only`.

        They are all clean positions, and every noisy block with one of `positions`. With a shift, clean text predicts
        the first position of a block, so a block in which only that one is predicted is not needed.
        """
        block_start = canvas.position_ids % self.size == 0
        block = block_start.cumsum(1) - 1
        predicted = (positions & ~block_start if shift else positions).long()
        noisy = torch.zeros_like(block).scatter_add(1, block, predicted).gather(1, block) > 0
        return torch.cat([noisy.view(len(positions) // views, -1), torch.ones_like(noisy[::views])], 1)


# (canvas, clean, shift) -> AttentionInputs: which token attends to which. `clean` is given in training only.
AttentionPattern = Causal | Bidirectional | Annealed | Prefix | BlockCausal
