"""Text metrics compared with their definitions."""

import math

import pytest
import torch

from diffusify.evaluation.text_metrics import distinct, entropy, perplexity
from tests.families import tiny_network
from tests.text import makers


@torch.no_grad()
def test_perplexity_is_that_of_the_network() -> None:
    network, tokenizer = tiny_network("llama", vocab_size=320), makers.byte_level()
    prompts, generated = ["The cat", ""], [[5, 9, 7], [11]]
    total, count = 0.0, 0
    for prompt, ids in zip(prompts, generated, strict=True):
        head = [tokenizer.start_token_id, *tokenizer.encode(prompt)]
        logits = network(input_ids=torch.tensor([head + ids])).logits[0].log_softmax(-1)
        total -= sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(ids))
        count += len(ids)
    assert perplexity(tokenizer, network, prompts, generated) == pytest.approx(math.exp(total / count), rel=1e-4)
    assert math.isnan(perplexity(tokenizer, network, ["It"], [[]]))


def test_distinct_counts_ngrams_over_all_texts() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1]], 2) == 0.0


def test_entropy_is_that_of_a_text_s_tokens() -> None:
    assert entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert entropy([3, 3, 3]) == 0.0 == entropy([])
