"""Metrics of generated texts: perplexity under a base model, and diversity."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from diffusify.diffusion.objectives import cross_entropy
from diffusify.text.tokenizer import TextTokenizer


@torch.no_grad()
def perplexity(
    tokenizer: TextTokenizer, base: PreTrainedModel, prompts: Sequence[str], generated: Sequence[list[int]]
) -> float:
    """The perplexity of generated tokens after their prompts under an AR base model; nan if there are no tokens."""
    nll = []
    for prompt, ids in zip(prompts, generated, strict=True):
        head = tokenizer.add_start(tokenizer.encode(prompt))
        tokens = torch.tensor([head + ids], device=base.device)
        logits = base(input_ids=tokens).logits[0, len(head) - 1 : -1]
        nll.append(cross_entropy(logits, tokens[0, len(head) :]))
    return float(torch.cat(nll).mean().exp())


def distinct(generated: Sequence[list[int]], n: int) -> float:
    """Distinct-n: the number of different n-grams over the number of n-grams, in all texts together."""
    grams = [tuple(ids[i : i + n]) for ids in generated for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def entropy(ids: list[int]) -> float:
    """The entropy of a text's token frequencies in nats, which is low for repetitive text."""
    counts = Counter(ids)
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values()) if ids else 0.0
