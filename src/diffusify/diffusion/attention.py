"""Who may look at whom, and where in the network's output each answer stands.

Axes: b texts, c canvases (b, or v times b where each text is noised v times), n canvas positions, m scene positions (n,
or (v + 1) n where a clean copy stands beside v canvases), w positions that are looked at (m, but for a part).
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
    """What the network is shown, and which of its outputs is about which canvas position."""

    tokens: Int[Tensor, "b m"]
    position_ids: Int[Tensor, "b m"]
    output_index: Int[Tensor, "c n"]  # the scene position whose output is about each canvas position
    ar_output_index: Int[Tensor, "c n"]  # the same, read from text that is clean and seen causally
    mask_mod: MaskMod
    per_row: bool  # whether the rule differs between rows
    unmasked: bool = False  # whether everything sees everything
    columns: Int[Tensor, "b m"] | None = None  # of a part: which of the columns that it looks at are its own tokens
    key_position_ids: Int[Tensor, "rows w"] | None = None  # of a part: the positions of the columns that it looks at

    def flat_index(self, output_index: Int[Tensor, "c n"], positions: Bool[Tensor, "c n"]) -> Int[Tensor, " k"]:
        """Where the answers about the asked positions stand among all outputs, counted through the rows (b * m)."""
        b, m = self.tokens.shape
        row = torch.arange(len(output_index), device=output_index.device) // (len(output_index) // b)
        return (output_index + m * row[:, None])[positions]

    def select_columns(self, columns: Int[Tensor, "b m"], width: int) -> "AttentionInputs":
        """Some positions alone, looking at the first `width` of all, which are remembered."""
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
        """The wanted positions, which look at no others, and a few more that fill the rows up to a `multiple`."""
        m = keep.shape[1]
        width = min(m, -(-int(keep.sum(1).max()) // multiple) * multiple)
        if width == m:
            return self
        kept = (~keep).int().argsort(dim=1, stable=True)[:, :width].sort(1).values
        place = torch.zeros_like(keep, dtype=torch.long).scatter(
            1, kept, torch.arange(width, device=kept.device).expand_as(kept)
        )
        mask_mod, views = self.mask_mod, len(self.output_index) // len(kept)
        return replace(
            self,
            tokens=self.tokens.gather(1, kept),
            position_ids=self.position_ids.gather(1, kept),
            output_index=place.repeat_interleave(views, 0).gather(1, self.output_index),
            ar_output_index=place.repeat_interleave(views, 0).gather(1, self.ar_output_index),
            mask_mod=lambda b, h, q, k: mask_mod(b, h, kept[b, q], kept[b, k]),
            per_row=True,
        )

    def visible(self, window: int | None = None) -> Bool[Tensor, "rows m w"]:
        """The rule as a matrix, one for all rows unless they differ; `window` hides what is that far away."""
        b, m = self.tokens.shape
        device = self.tokens.device
        key_position_ids = self.position_ids if self.key_position_ids is None else self.key_position_ids
        at = torch.arange(key_position_ids.shape[1], device=device)
        alike = self.columns is None and not self.per_row and window is None
        row = torch.arange(1 if alike else b, device=device)[:, None, None]
        looking = at[:, None] if self.columns is None else self.columns[:, :, None]
        seen = self.mask_mod(row, torch.zeros_like(row), looking, at).expand(len(row), m, len(at))
        if window is not None:
            seen = seen & ((self.position_ids[:, :, None] - key_position_ids[:, None, :]).abs() < window)
        return seen

    def bias(self, dtype: torch.dtype, window: int | None = None) -> Float[Tensor, "rows 1 m w"]:
        """The rule as an additive bias, which `sdpa` and `eager` both obey (`eager` adds a boolean one as 0/1)."""
        seen = self.visible(window)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The rule as flex attention takes it, which leaves out what nobody looks at."""
        if window is not None or self.columns is not None:
            return _looked_up(self.visible(window))
        (b, m), mask_mod = self.tokens.shape, self.mask_mod
        looks: MaskMod = lambda b, h, q, k: mask_mod(b, h, q, k)  # noqa: E731  (arguments are counted; a rule may hide them)
        return create_block_mask(looks, b if self.per_row else 1, None, m, m, device=self.tokens.device)


def _looked_up(seen: Bool[Tensor, "rows m w"]) -> BlockMask:
    """A matrix as flex attention takes it."""
    rows, m, w = seen.shape
    return create_block_mask(lambda b, h, q, k: seen[b, q, k], rows, None, m, w, device=seen.device)


@dataclass(frozen=True)
class BatchedInputs(AttentionInputs):
    """Scenes that are shown to the network together, each as if it were alone; short rows are padded on the right."""

    parts: tuple[AttentionInputs, ...] = ()

    @classmethod
    def of(cls, parts: tuple[AttentionInputs, ...], width: int | None = None) -> "BatchedInputs":
        """Whole scenes, or parts of some of which none looks at more than `width` columns."""
        m = max(part.tokens.shape[1] for part in parts)
        tokens, position_ids = (
            torch.cat([functional.pad(values, (0, m - values.shape[1])) for values in column])
            for column in zip(*((part.tokens, part.position_ids) for part in parts), strict=True)
        )
        unmasked = width is None and all(part.unmasked and part.tokens.shape[1] == m for part in parts)
        key_position_ids = None if width is None else tokens.new_zeros(1, width)
        return cls(
            tokens,
            position_ids,
            tokens,
            tokens,
            _everything,
            per_row=True,
            unmasked=unmasked,
            key_position_ids=key_position_ids,
            parts=parts,
        )

    def visible(self, window: int | None = None) -> Bool[Tensor, "rows m w"]:
        m = self.tokens.shape[1]
        w = m if self.key_position_ids is None else self.key_position_ids.shape[1]
        seen = [part.visible(window).expand(len(part.tokens), -1, -1) for part in self.parts]
        return torch.cat([functional.pad(rows, (0, w - rows.shape[2], 0, m - rows.shape[1])) for rows in seen])

    def block_mask(self, window: int | None = None) -> BlockMask:
        return _looked_up(self.visible(window))


def _alone(
    canvas: Canvas, shift: int, mask_mod: MaskMod, *, per_row: bool = False, unmasked: bool = False
) -> AttentionInputs:
    """The canvas by itself under a rule, every document apart from the others."""
    document = canvas.document
    one = bool((document == document[:, :1]).all())
    alike = one or bool((document == document[:1]).all())
    output_index = (torch.arange(document.shape[1], device=document.device) - shift).clamp_min(0).expand(document.shape)

    def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(b, h, q, k) & (document[b, q] == document[b, k])

    return AttentionInputs(
        canvas.tokens,
        canvas.position_ids,
        output_index,
        output_index,
        within,
        per_row=per_row or not alike,
        unmasked=unmasked and one,
    )


def _everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= 0) & (k >= 0)


@dataclass(frozen=True)
class Causal:
    """Every token sees itself and what stands before it."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        return _alone(canvas, shift, lambda b, h, q, k: k <= q)


@dataclass(frozen=True)
class Bidirectional:
    """Every token sees its whole document."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        return _alone(canvas, shift, _everything, unmasked=True)


@dataclass(frozen=True)
class Annealed:
    """Causal, and every look ahead is allowed with chance `share`: one matrix for the whole batch (DiffuLLaMA).

    The matrix depends on `seed` alone, so it is the same on every rank and after a resume.
    """

    share: float
    seed: int = 0

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        n = canvas.tokens.shape[1]
        ahead = torch.rand(n, n, generator=torch.Generator().manual_seed(self.seed)) < self.share
        ahead = ahead.to(canvas.tokens.device)
        return _alone(canvas, shift, lambda b, h, q, k: (k <= q) | ahead[q, k])


@dataclass(frozen=True)
class Prefix:
    """The prompt (all that is not editable) sees the prompt; what is written sees everything (prefix LM)."""

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        editable = canvas.editable
        return _alone(canvas, shift, lambda b, h, q, k: editable[b, q] | ~editable[b, k], per_row=True)


@dataclass(frozen=True)
class BlockCausal:
    """A block sees itself in full and earlier blocks when they are clean (BD3-LM).

    Blocks are counted from their document's start. Inside a clean block sight is causal (`clean="token"`, exactly
    the AR model's, so its KV cache too) or full (`clean="block"`). While training, the canvas stands beside its clean
    self, and one pass denoises every block against clean history; while sampling, a block without open positions is
    clean. The two agree. Under shift a block's first position is answered by its left neighbour in the *clean* text.
    Several canvases of one text, one below the other, share its clean self.
    """

    size: int
    clean: Literal["token", "block"] = "token"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block size {self.size} must be at least 1; 4 is a good start")

    def __call__(
        self, canvas: Canvas, clean: Int[Tensor, "texts n"] | None = None, *, shift: int = 0
    ) -> AttentionInputs:
        first = canvas.position_ids % self.size == 0
        block = first.cumsum(1) - 1
        by_block = self.clean == "block"
        if clean is None:
            noisy = torch.zeros_like(block).scatter_add(1, block, canvas.open.long()).gather(1, block) > 0

            def written(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                full = noisy[b, q] | by_block
                return (k <= q) | (full & (block[b, k] == block[b, q]))

            return _alone(canvas, shift, written, per_row=True)

        b, n = clean.shape
        views = len(first) // b
        edge, document, block = views * n, canvas.document[::views], block[::views]

        def beside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at_q, at_k, noisy_q, noisy_k = q % n, k % n, q < edge, k < edge
            same, earlier = block[b, at_q] == block[b, at_k], block[b, at_k] < block[b, at_q]
            history = earlier | (~noisy_q & same & ((at_k <= at_q) | by_block))
            beside = noisy_q & noisy_k & same & (q // n == k // n)
            return (beside | (~noisy_k & history)) & (document[b, at_q] == document[b, at_k])

        left = (torch.arange(n, device=clean.device) - shift).clamp_min(0).expand(len(first), n)
        view = torch.arange(len(first), device=clean.device)[:, None] % views
        return AttentionInputs(
            tokens=torch.cat([canvas.tokens.view(b, edge), clean], 1),
            position_ids=torch.cat([canvas.position_ids.view(b, edge), canvas.position_ids[::views]], 1),
            output_index=torch.where(first, left + edge, left + view * n) if shift else left + view * n,
            ar_output_index=left + edge,
            mask_mod=beside,
            per_row=not bool((document == document[:1]).all()),
        )

    def read(
        self, canvas: Canvas, positions: Bool[Tensor, "c n"], *, views: int = 1, shift: int = 0
    ) -> Bool[Tensor, "b m"]:
        """Which positions of a training scene matter: all clean ones, and noisy blocks of which something is asked.

        Under shift a block's first position is answered by clean text, so a block with no other one asked is not read.
        """
        first = canvas.position_ids % self.size == 0
        block = first.cumsum(1) - 1
        asked = (positions & ~first if shift else positions).long()
        noisy = torch.zeros_like(block).scatter_add(1, block, asked).gather(1, block) > 0
        return torch.cat([noisy.view(len(positions) // views, -1), torch.ones_like(noisy[::views])], 1)


# Who may look at whom: (canvas, clean, shift) -> Scene; `clean` is there while training and absent while sampling.
AttentionPattern = Causal | Bidirectional | Annealed | Prefix | BlockCausal
