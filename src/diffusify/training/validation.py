"""Validation on held-out text: the NELBO, by noise level and by position in the block."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from diffusify.canvas import Canvas, offsets
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.bounds import Bound, estimate_bound
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
    samples: int = 1,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Metrics of a denoiser on packed rows, in nats per token.

    `bound` is the NELBO (negative evidence lower bound), `bound_se` its standard error over rows, and `bits` the bound
    in bits. `bound_at_3` is the mean over position 3 of all blocks. `nll_at_0.4` is the plain cross-entropy where a
    share of 0.2 to 0.4 of the unit (block or document) is open. `ar_nll` is the next-token loss of the AR half, for
    models that keep one. `samples` is the number of noise samples per row.
    """
    size = denoiser.diffusion_config.block_size
    generator = torch.Generator().manual_seed(seed)
    training = denoiser.training
    denoiser.eval()
    nll, by_level, by_position, ar_nll = [], [], [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        clean = denoiser.predictable(Canvas.clean(**batch).to(denoiser.device))
        estimate, batch_ar_nll = _estimate(denoiser, clean, samples, generator, autocast)
        nll.append(torch.stack([estimate.nll.sum(1), clean.editable.sum(1)], 1).cpu())
        by_level.append(estimate.masked.cpu())
        position = offsets(_unit_starts(denoiser, clean))[clean.editable] % (size or 1)
        by_position.append(torch.stack([estimate.nll[clean.editable], position], 1).cpu())
        ar_nll += [losses.cpu() for losses in batch_ar_nll]
    denoiser.train(training)
    return _report(
        torch.cat(nll), torch.cat(by_level), torch.cat(by_position), torch.cat(ar_nll) if ar_nll else None, size
    )


def _estimate(
    denoiser: Denoiser,
    clean: Canvas,
    samples: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Bound, list[Tensor]]:
    """The bound of a batch, and from the same forward passes the next-token losses of its AR half, if it has one."""
    has_ar = denoiser.diffusion_config.keeps_ar_model
    ar_nll: list[Tensor] = []

    def logits(canvas: Canvas, text: Tensor) -> Tensor:
        ar_positions = canvas.editable if has_ar and not ar_nll else None  # the same for every sample
        with autocast():
            prediction = denoiser(canvas, text, positions=canvas.open, ar_positions=ar_positions)
        if ar_positions is not None:
            ar_nll.append(cross_entropy(prediction.ar_logits, text[ar_positions]))
        return prediction.logits

    unit = _unit_starts(denoiser, clean).cumsum(1)
    noise = denoiser.diffusion_config.mask_token_id
    return estimate_bound(logits, clean, unit, noise=noise, samples=samples, generator=generator), ar_nll


def _unit_starts(denoiser: Denoiser, clean: Canvas) -> Tensor:
    """Where the units of noise start: blocks, or whole documents."""
    pattern = denoiser.diffusion_config.attention
    return pattern.block_starts(clean) if isinstance(pattern, BlockCausal) else clean.position_ids == 0


def _report(
    nll: Tensor, by_level: Tensor, by_position: Tensor, ar_nll: Tensor | None, size: int | None
) -> dict[str, float]:
    """The metrics of `validate` from (nll, count) per row, (nll, share open) and (nll, position in the block)."""
    total, count = nll.sum(0)
    mean = total / count
    spread = (nll[:, 0] - mean * nll[:, 1]).square().sum().sqrt() / count  # for a ratio of sums over rows
    report = {"bound": float(mean), "bound_se": float(spread), "bits": float(mean) / math.log(2)}
    for level in range(1, NOISE_LEVELS + 1):
        inside = (by_level[:, 1] * NOISE_LEVELS).ceil() == level
        if inside.any():
            report[f"nll_at_{level / NOISE_LEVELS:.1f}"] = float(by_level[inside, 0].mean())
    for position in range(size or 0):
        report[f"bound_at_{position}"] = float(by_position[by_position[:, 1] == position, 0].mean())
    if ar_nll is not None:
        report["ar_nll"] = float(ar_nll.mean())
    return report
