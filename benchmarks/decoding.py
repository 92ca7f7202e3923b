"""Decoding speed: tokens per forward pass and tokens/s, compared with AR decoding by `transformers.generate`.

    python benchmarks/decoding.py MODEL [MODEL ...]

MODELs are block models. Batch 1, 128 new tokens, 32 prompts of four kinds (`prompts.py`), half of them for the rates,
in float32 and bfloat16; `transformers.generate` with its key-value cache on the same weights in the same rounds, as
`transformers` opens them and with packed weights. For adapters that act on masks only, these are the weights of
the unadapted base. The lossless texts of the first model are compared with greedy ones, token for token.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from machine import save
from prompts import PROMPTS

import diffusify
from diffusify.canvas import Canvas
from diffusify.evaluation.bench import bench, cut_prompts, generate_ids, greedy_ar
from diffusify.models.loading import load_base
from diffusify.models.saving import load_ar_half
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.sampling.speculative import Speculative
from diffusify.text.sources import load_texts

PRESETS = ("quality", "balanced")
DTYPES = ("float32", "bfloat16")


def equal_texts(model: str, texts: list[str], prompts: int, dtype: str) -> int:
    """The number of lossless texts that equal the greedy ones of `transformers` token for token."""
    lm = diffusify.load(model, dtype=dtype, device="cpu")
    ar_half = load_ar_half(model, dtype=getattr(torch, dtype))
    same = 0
    for prompt in cut_prompts(lm, texts, prompts):
        ours, _ = generate_ids(lm, prompt, 64, SamplingConfig())
        theirs = greedy_ar(lm, ar_half, prompt, 64)
        same += ours[: len(theirs)] == theirs
    return same


def ways(model: str, prompts: list[str], dtype: str) -> list[dict]:
    """The rows of the benchmark for one model in one data type."""
    lm = diffusify.load(model, dtype=dtype, device="cpu")
    base = load_base(lm.config.base_model, dtype=getattr(torch, dtype)).network.eval()
    ar_half = load_ar_half(model, dtype=getattr(torch, dtype))
    settings = {name: SamplingConfig.preset(name, lm.config) for name in PRESETS}
    return [
        asdict(row) for row in bench(lm, base, prompts, settings, ar_half=ar_half, max_new_tokens=128, progress=print)
    ]


def tokens_per_forward(
    model: str | Path, copies: int, *, prompts: int = 8, tokens: int = 128, dtype: str = "bfloat16"
) -> dict[str, float]:
    """The tokens per forward pass of lossless decoding by kind of prompt, past any end token."""
    lm, passes = diffusify.load(model, dtype=dtype, device="cpu"), dict.fromkeys(PROMPTS, 0)
    for kind, texts in PROMPTS.items():
        for prompt in texts[:prompts]:
            ids = lm.tokenizer.add_start(lm.tokenizer.encode(prompt))
            canvas = Canvas.from_tokens([[*ids, *[None] * tokens]], noise=lm.config.mask_token_id, pad=0)
            decoder = Speculative(lm.denoiser, copies=copies)
            passes[kind] += sum(1 for _ in decoder(canvas, noise=lm.config.mask_token_id))
    found = {kind: tokens * prompts / count for kind, count in passes.items()}
    found["all"] = tokens * prompts * len(PROMPTS) / sum(passes.values())
    return {kind: round(value, 2) for kind, value in found.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("models", nargs="+")
    options.add_argument("--data", default="builtin:pydoc")
    options.add_argument("--equal", type=int, default=50)
    chosen = options.parse_args()
    texts = [dict(row)["text"] for row in load_texts(chosen.data)]
    prompts = [text for kind in PROMPTS.values() for text in kind[:4]]
    result: dict = {"prompts": len(prompts), "new_tokens": 128, "models": []}
    for name in chosen.models:
        by_dtype = {dtype: ways(name, prompts, dtype) for dtype in DTYPES}
        names = [row["way"] for row in by_dtype[DTYPES[0]]]
        by_name = {way: {dtype: rows[i] for dtype, rows in by_dtype.items()} for i, way in enumerate(names)}
        counts = {dtype: tokens_per_forward(name, 12, dtype=dtype) for dtype in DTYPES}
        counts["bfloat16, without copies"] = tokens_per_forward(name, 0)
        model = {"model": Path(name).name, "ways": by_name, "tokens_per_forward": counts}
        print(json.dumps(model, indent=2), flush=True)
        result["models"].append(model)
    result["equal_texts"] = {"model": Path(chosen.models[0]).name, "of": chosen.equal} | {
        dtype: equal_texts(chosen.models[0], texts, chosen.equal, dtype) for dtype in DTYPES[:1]
    }
    print("wrote", save("decoding", "python benchmarks/decoding.py MODELS", 0, result))


if __name__ == "__main__":
    main()
