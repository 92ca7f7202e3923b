"""Shared code of the finetuning comparisons: an AR baseline on the same rows, and completions in batches."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.corruption import PerText
from diffusify.diffusion.objectives import Objective, cross_entropy
from diffusify.diffusion.policies import Unmask
from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipe import Recipe
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.text.examples import Template, make_examples
from diffusify.text.packing import collate, pack_examples
from diffusify.text.sources import load_records
from diffusify.training.run_folder import fast_bfloat16
from diffusify.training.tune import split_off_prompts

# With blocks of one token this is AR decoding, with the exact cache of blocks.
AUTOREGRESSIVE = Recipe("left-to-right", 1, BlockCausal(1), PerText(), Objective(), policy=Unmask())


def read_records(path: str) -> list[dict[str, str]]:
    return [json.loads(record) for record in load_records(path)["record"]]


def finetune_autoregressive(
    base: str, data: str, template: Template | None, *, steps: int, rows: int, rate: float, length: int, seed: int
) -> DiffusionLM:
    """Finetune the base as an AR model: the same packed examples, the loss on the same tokens."""
    source = load_base(base)
    denoiser, tokenizer = make_denoiser(source, AUTOREGRESSIVE)
    examples, _ = make_examples(
        load_records(data, seed=seed), tokenizer, template=template, each_turn=True, length=length
    )
    packed = pack_examples(split_off_prompts(examples, 100, seed=seed)[0], length, pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * max(0.0, 1 - step / steps)
    )
    use_bfloat16 = fast_bfloat16()
    denoiser.train()
    for step, batch in zip(range(steps), _batches(packed, rows, seed), strict=False):
        clean = denoiser.predictable(Canvas.clean(**collate(batch)))
        with torch.autocast("cpu", torch.bfloat16) if use_bfloat16 else nullcontext():
            logits = denoiser(clean, positions=clean.editable).logits
        loss = cross_entropy(logits, clean.tokens[clean.editable]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"AR step {step} loss {loss.item():.3f}", flush=True)
    denoiser.eval()
    return DiffusionLM(denoiser, tokenizer)


def _batches(rows: Dataset, size: int, seed: int) -> Iterator[list[Any]]:
    """Rows in a new order in every epoch, without end."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=rng).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [rows[i] for i in order[start : start + size]]


def completions(
    lm: DiffusionLM, prompts: list[str], max_new_tokens: int | list[int] | None, *, batch: int = 16, **sampling: Any
) -> list[str]:
    """The completion of each prompt; prompts of similar length are batched."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [""] * len(prompts)
    for start in range(0, len(order), batch):
        mine = order[start : start + batch]
        lengths = [max_new_tokens[i] for i in mine] if isinstance(max_new_tokens, list) else max_new_tokens
        for i, result in zip(mine, lm.generate([prompts[i] for i in mine], lengths, **sampling), strict=True):
            out[i] = (result.completion or "").strip()
    return out
