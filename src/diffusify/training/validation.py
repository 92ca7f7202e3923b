"""How good a denoiser is on held-out text: the bound, by noise level and by position in the block."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import Bound, bound
from diffusify.diffusion.objectives import cross_entropy
from diffusify.models.denoiser import Denoiser
from diffusify.text.packing import collate

NOISE_LEVELS = 5


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    rows: Dataset,
    *,
    batch_size: int = 8,
    draws: int = 1,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Nats per token on packed rows.

    `bound` is the bound on the negative log-likelihood, with `bound_se` its standard error over rows, `bits` the same
    in bits; `bound_at_3` is the part of position 3 of the blocks; `nll_at_0.4` the plain cross-entropy where a share
    of 0.2 to 0.4 of the unit is open; `ar_nll` the network's own next-token loss where it is still trained.
    """
    size = denoiser.diffusion_config.block_size
    generator = torch.Generator().manual_seed(seed)
    training = denoiser.training
    denoiser.eval()
    nll, masked, where, ar_positions = [], [], [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        clean = denoiser.predictable(Canvas.clean(**batch).to(denoiser.device))
        estimate, next_nll = _measure(denoiser, clean, draws, generator, autocast)
        nll.append(torch.stack([estimate.nll.sum(1), clean.editable.sum(1)], 1).cpu())
        masked.append(estimate.masked.cpu())
        place = (clean.position_ids % (size or 1))[clean.editable]
        where.append(torch.stack([estimate.nll[clean.editable], place], 1).cpu())
        ar_positions += [part.cpu() for part in next_nll]
    denoiser.train(training)
    return _report(
        torch.cat(nll), torch.cat(masked), torch.cat(where), torch.cat(ar_positions) if ar_positions else None, size
    )


def _measure(
    denoiser: Denoiser,
    clean: Canvas,
    draws: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Bound, list[Tensor]]:
    """The bound of a batch, and, from the same passes, the next-token losses of its clean half where there is one."""
    size, has_ar = denoiser.diffusion_config.block_size, denoiser.diffusion_config.keeps_ar_model
    next_nll: list[Tensor] = []

    def answer(canvas: Canvas, text: Tensor) -> Tensor:
        ar_positions = canvas.editable if has_ar and not next_nll else None  # the same at every draw
        with autocast():
            prediction = denoiser(canvas, text, positions=canvas.open, ar_positions=ar_positions)
        if ar_positions is not None:
            next_nll.append(cross_entropy(prediction.ar_logits, text[ar_positions]))
        return prediction.logits

    unit = clean.document * clean.tokens.shape[1] + (clean.position_ids // size if size else 0)
    noise = denoiser.diffusion_config.mask_token_id
    return bound(answer, clean, unit, noise=noise, draws=draws, generator=generator), next_nll


def _report(
    nll: Tensor, masked: Tensor, where: Tensor, ar_positions: Tensor | None, size: int | None
) -> dict[str, float]:
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
    if ar_positions is not None:
        report["ar_nll"] = float(ar_positions.mean())
    return report
