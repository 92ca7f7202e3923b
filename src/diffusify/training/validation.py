"""How good a denoiser is on held-out text: the bound, by noise level and by position in the block."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.bounds import bound
from diffusify.models.denoiser import Denoiser
from diffusify.text.packing import collate

NOISE_LEVELS = 5


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    rows: Dataset,
    *,
    batch_size: int = 8,
    draws: int = 4,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Nats per token on packed rows.

    `bound` is the bound on the negative log-likelihood, with `bound_se` its standard error over rows, `bits` the same
    in bits; `bound_at_3` is the part of position 3 of the blocks; `nll_at_0.4` the plain cross-entropy where a share
    of 0.2 to 0.4 of the unit is open; `ar_nll` the network's own next-token loss where it is still trained.
    """
    size = denoiser.diffusion.block_size
    pattern = denoiser.diffusion.attention
    causal_copy = isinstance(pattern, BlockCausal) and pattern.clean == "token" and denoiser.diffusion.shift == 1
    generator = torch.Generator().manual_seed(seed)
    training = denoiser.training
    denoiser.eval()
    nll, masked, where, ar = [], [], [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        clean = denoiser.answerable(Canvas.clean(batch["tokens"], batch["document"]).to(denoiser.device))

        def answer(canvas: Canvas, text: Tensor) -> Tensor:
            with autocast():
                return denoiser(canvas, text, ask=canvas.open).logits

        unit = clean.document * clean.tokens.shape[1] + (clean.positions // size if size else 0)
        estimate = bound(answer, clean, unit, noise=denoiser.diffusion.mask_token_id, draws=draws, generator=generator)
        nll.append(torch.stack([estimate.nll.sum(1), clean.editable.sum(1)], 1).cpu())
        masked.append(estimate.masked.cpu())
        where.append(
            torch.stack([estimate.nll[clean.editable], (clean.positions % (size or 1))[clean.editable]], 1).cpu()
        )
        if causal_copy:
            with autocast():
                nothing = torch.zeros_like(clean.open)
                logits = denoiser(clean, clean.tokens, ask=nothing, ar=clean.editable).ar_logits
            ar.append(F.cross_entropy(logits.float(), clean.tokens[clean.editable], reduction="none").cpu())
    denoiser.train(training)
    return _report(torch.cat(nll), torch.cat(masked), torch.cat(where), torch.cat(ar) if ar else None, size)


def _report(nll: Tensor, masked: Tensor, where: Tensor, ar: Tensor | None, size: int | None) -> dict[str, float]:
    total, count = nll.sum(0)
    mean = total / count
    spread = (nll[:, 0] - mean * nll[:, 1]).square().sum().sqrt() / count  # of a ratio of sums over rows
    report = {"bound": float(mean), "bound_se": float(spread), "bits": float(mean) / math.log(2)}
    for level in range(1, NOISE_LEVELS + 1):
        inside = (masked[:, 1] * NOISE_LEVELS).ceil() == level
        if inside.any():
            report[f"nll_at_{level / NOISE_LEVELS:.1f}"] = float(masked[inside, 0].mean())
    for place in range(size or 0):
        report[f"bound_at_{place}"] = float(where[where[:, 1] == place, 0].mean())
    if ar is not None:
        report["ar_nll"] = float(ar.mean())
    return report
