"""Attention patterns: which token attends to which, and which network output predicts each canvas position.

Axes: b texts, c canvases (b, or v times b where each text is noised v times), n canvas positions, m input positions (n,
or (v + 1) n where a clean copy follows v canvases), w key positions (m, unless the inputs are a selection of columns).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention_inputs import AttentionInputs, MaskMod, unmasked_mod


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
        is_mask=canvas.open,
        unmasked=unmasked and one_document,
    )


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
        return _single_stream(canvas, shift, unmasked_mod, unmasked=True)


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

    With `noisy="causal"`, positions of a noisy block attend to the earlier ones of their block only. What a mask
    predicts then does not depend on the number of masks after it, which suits drafts for lossless decoding.

    With `sides="both"`, a masked span is filled with the text on both sides in sight. The text is then read in another
    order: first what stands after the span, then what stands before it, and the span last (as fill-in-the-middle models
    are trained, but no token is moved). Attention and position ids follow this order, and blocks are counted from the
    start of the span. Spans are filled one after the other; open positions of later ones are not seen. Without text
    after the span, both `sides` are the same but for where blocks start.

    Raises ValueError if `size` is below 1.
    """

    size: int
    clean: Literal["token", "block"] = "token"
    noisy: Literal["full", "causal"] = "full"
    sides: Literal["left", "both"] = "left"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block size {self.size} must be at least 1; 4 is a good start")

    def block_starts(self, canvas: Canvas) -> Bool[Tensor, "b n"]:
        """Where blocks start."""
        return canvas.block_starts(self.size, of_spans=self.sides == "both")

    def _blocks(
        self, canvas: Canvas, block_start: Bool[Tensor, "b n"]
    ) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """The block of each position and its position id, both in the order in which the text is read."""
        block = block_start.cumsum(1) - 1
        if self.sides == "left":
            return block, canvas.position_ids
        position_ids, is_behind = canvas.reading_order()
        return block.masked_fill(is_behind, -1), position_ids

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        block_start = self.block_starts(canvas)
        block, position_ids = self._blocks(canvas, block_start)
        full_clean_blocks, full_noisy_blocks = self.clean == "block", self.noisy == "full"
        if clean is None:
            index, open = block.clamp_min(0), canvas.open & (block >= 0)
            noisy = torch.zeros_like(block).scatter_add(1, index, open.long()).gather(1, index) > 0

            def sampling_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                full = (noisy[b, q] & full_noisy_blocks) | (~noisy[b, q] & full_clean_blocks)
                same, earlier = block[b, k] == block[b, q], block[b, k] < block[b, q]
                is_later_span = canvas.open[b, k] & (block[b, k] < 0)
                return (earlier | (same & ((k <= q) | full))) & ~is_later_span

            return replace(_single_stream(canvas, shift, sampling_mask, per_row=True), position_ids=position_ids)

        b, n = clean.shape
        views = len(block_start) // b
        noisy_length, document, block = views * n, canvas.document[::views], block[::views]

        def training_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at_q, at_k, noisy_q, noisy_k = q % n, k % n, q < noisy_length, k < noisy_length
            same, earlier = block[b, at_q] == block[b, at_k], block[b, at_k] < block[b, at_q]
            history = earlier | (~noisy_q & same & ((at_k <= at_q) | full_clean_blocks))
            own_block = noisy_q & noisy_k & same & (q // n == k // n) & ((at_k <= at_q) | full_noisy_blocks)
            return (own_block | (~noisy_k & history)) & (document[b, at_q] == document[b, at_k])

        index = (torch.arange(n, device=clean.device) - shift).clamp_min(0).expand(len(block_start), n)
        view = torch.arange(len(block_start), device=clean.device)[:, None] % views
        noisy_index, clean_index = index + view * n, index + noisy_length
        return AttentionInputs(
            tokens=torch.cat([canvas.tokens.view(b, noisy_length), clean], 1),
            position_ids=torch.cat([position_ids.view(b, noisy_length), position_ids[::views]], 1),
            output_index=torch.where(block_start, clean_index, noisy_index) if shift else noisy_index,
            ar_output_index=clean_index,
            mask_mod=training_mask,
            per_row=self.sides == "both" or not bool((document == document[:1]).all()),
            is_mask=torch.cat([canvas.open.view(b, noisy_length), torch.zeros_like(clean, dtype=torch.bool)], 1),
            clean_start=noisy_length,
        )

    def crop(self, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> tuple[Canvas, Bool[Tensor, "b m"]]:
        """The canvas and `positions` up to the end of the last block of these, which attends to nothing later."""
        if self.sides == "both":
            return canvas, positions
        at = torch.arange(positions.shape[1], device=positions.device)
        ends = torch.where(positions, at - canvas.position_ids % self.size + self.size, 0)
        end = min(int(ends.max()), positions.shape[1])
        return canvas[:, :end], positions[:, :end]

    def needed_inputs(
        self, canvas: Canvas, positions: Bool[Tensor, "c n"], *, views: int = 1, shift: int = 0
    ) -> Bool[Tensor, "b m"]:
        """Which positions of the training inputs are needed to predict `positions`; for `AttentionInputs.keep_only`.

        They are all clean positions except padding, and every noisy block with one of `positions`. With a shift, clean
        text predicts the first position of a block, so a block in which only that one is predicted is not needed. Of
        causal noisy blocks, positions after the last one that predicts are not needed.
        """
        block_start = self.block_starts(canvas)
        block = block_start.cumsum(1) - 1
        predicted = positions & ~block_start if shift else positions
        at = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        last = torch.full_like(block, -1).scatter_reduce(1, block, torch.where(predicted, at, -1), "amax")
        last = last.gather(1, block)
        noisy = (last >= 0) if self.noisy == "full" else (at <= last - shift)
        return torch.cat([noisy.view(len(positions) // views, -1), canvas.real[::views]], 1)

    def common_prefixes(
        self, canvas: Canvas, clean: Int[Tensor, "b n"], group: int, *, views: int = 1
    ) -> Int[Tensor, " groups"]:
        """The number of first positions, in whole blocks, that every `group` texts have in common."""
        rows = torch.stack([clean, canvas.document[::views]], -1).unflatten(0, (-1, group))
        common = (rows == rows[:, :1]).all(-1).all(1).cumprod(1).sum(1)
        return common - common % self.size


# (canvas, clean, shift) -> AttentionInputs: which token attends to which. `clean` is given in training only.
AttentionPattern = Causal | Bidirectional | Annealed | Prefix | BlockCausal


def training_inputs(
    pattern: AttentionPattern,
    canvas: Canvas,
    clean: Int[Tensor, "texts n"] | None,
    positions: Bool[Tensor, "c n"] | None,
    *,
    shift: int = 0,
    group: int = 1,
) -> AttentionInputs:
    """The inputs of a pattern; in training with blocks, only those that are needed to predict `positions`.

    What every `group` consecutive texts begin with, such as their prompt, is then needed once.
    """
    inputs = pattern(canvas, clean, shift=shift)
    if positions is None or clean is None or not isinstance(pattern, BlockCausal):
        return inputs
    views = len(positions) // len(clean)
    needed = pattern.needed_inputs(canvas, positions, views=views, shift=shift)
    if group == 1:
        return inputs.keep_only(needed)
    return inputs.share_prefixes(needed, pattern.common_prefixes(canvas, clean, group, views=views), group)
