"""A left-to-right model of your own becomes a block-diffusion model, and writes in every way that suits it.

python examples/adapt_your_model.py BASE TEXT runs/mine

BASE is a transformers folder (`network.save_pretrained`, `tokenizer.save_pretrained`), a hub name or a .gguf file;
TEXT is a file, a folder, or several with weights: 0.7*a.jsonl,0.3*b.txt.
"""

import json
import sys
from typing import Any

import diffusify

PROMPT = "The with statement"


def main(base: str, text: str, out: str, **settings: Any) -> None:
    folder = diffusify.adapt(base, text, out, recipe=diffusify.block(4), **(settings or {"minutes": 10}))

    # The log of the run: the bound on held-out text, and the left-to-right half's own loss (nats per token).
    log = json.loads((folder / "training.json").read_text())["log"]
    points = [entry for entry in log if "eval_bound" in entry]
    for name in ("eval_bound", "eval_ar_nll"):
        print(f"{name}: {points[0][name]:.2f} at first, {points[-1][name]:.2f} in the end")

    model = diffusify.load(folder)
    for preset in ("quality", "balanced", "fast"):
        chosen = diffusify.SamplingConfig.preset(preset, model.config)
        (result,) = model.prepare_generation([PROMPT], 32, chosen).results()
        print(f"{preset}, {result.tokens_per_forward:.2f} tokens per forward: {result.text}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
