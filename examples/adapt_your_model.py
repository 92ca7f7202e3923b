"""Adapt your own autoregressive (AR) model to block diffusion and generate text with all sampling presets.

python examples/adapt_your_model.py BASE TEXT runs/mine

BASE is a transformers folder (`network.save_pretrained`, `tokenizer.save_pretrained`), a Hub id or a .gguf file.
TEXT is a file, a folder, or a weighted mixture: 0.7*a.jsonl,0.3*b.txt.
"""

import json
import sys
from typing import Any

import diffusify

PROMPT = "The with statement"


def main(base: str, text: str, out: str, **settings: Any) -> None:
    folder = diffusify.adapt(base, text, out, recipe=diffusify.block(4), **(settings or {"minutes": 10}))

    # On held-out text: the NELBO (negative evidence lower bound), and the loss of the AR half, in nats per token.
    log = json.loads((folder / "training.json").read_text())["log"]
    evaluations = [entry for entry in log if "eval_bound" in entry]
    for name in ("eval_bound", "eval_ar_nll"):
        print(f"{name}: {evaluations[0][name]:.2f} before training, {evaluations[-1][name]:.2f} after")

    model = diffusify.load(folder)
    for preset in ("quality", "balanced", "fast"):
        settings = diffusify.SamplingConfig.preset(preset, model.config)
        (result,) = model.prepare_generation([PROMPT], 32, settings).results()
        print(f"{preset}, {result.tokens_per_forward:.2f} tokens per forward pass: {result.text}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
