"""What texts are like, whoever wrote them: how likely, how varied."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from diffusify.diffusion.objectives import cross_entropy
from diffusify.text.tokenizer import TextTokenizer


@torch.no_grad()
def perplexity(
    tokenizer: TextTokenizer, base: PreTrainedModel, prompts: Sequence[str], written: Sequence[list[int]]
) -> float:
    """Of what was written, behind its prompts, as a left-to-right base continues text; nan if nothing was."""
    nll = []
    for prompt, ids in zip(prompts, written, strict=True):
        head = [tokenizer.start_token_id, *tokenizer.encode(prompt)]
        tokens = torch.tensor([head + ids], device=base.device)
        logits = base(input_ids=tokens).logits[0, len(head) - 1 : -1]
        nll.append(cross_entropy(logits, tokens[0, len(head) :]))
    return float(torch.cat(nll).mean().exp())


def distinct(written: Sequence[list[int]], n: int) -> float:
    """The share of n-grams that are different ones, over all texts (distinct-n)."""
    grams = [tuple(ids[i : i + n]) for ids in written for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def entropy(ids: list[int]) -> float:
    """Of the tokens of a text, in nats: low where a text repeats itself."""
    counts = Counter(ids)
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values()) if ids else 0.0
