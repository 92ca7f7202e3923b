"""Exported models in llama.cpp beside ours: logits, greedy texts, sizes and rates.

    python benchmarks/export.py

`smollm2-masked` becomes GGUF files for llama.cpp's diffusion program, in float32, float16 and q8_0. The float32 file
has to give our logits of texts with masks to 1e-3, and the same tokens when masks are filled one by one, the surest
first. The AR half of `smollm2-block` has to give the greedy text of `transformers`. Rates are those of filling 16 masks
among 64 tokens in 16 forward passes, with as many threads, in one run. Needs llama-cpp-python.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llamacpp import GgufModel, greedy_infill
from machine import save
from prompts import PROMPTS

import diffusify
from diffusify.canvas import Canvas
from diffusify.models.attention_masks import without_mask
from diffusify.models.saving import load_ar_half, load_denoiser
from diffusify.sampling.sampler import Sampler

TOKENS, MASKS = 64, 16


def masked_texts(lm: diffusify.DiffusionLM, count: int) -> list[list[int]]:
    """Texts of `TOKENS` tokens, of which `MASKS` in the middle are masks."""
    prompts = [text for kind in PROMPTS.values() for text in kind]
    ids = [
        lm.tokenizer.add_start(lm.tokenizer.encode(" ".join(prompts[i:] + prompts[:i])))[:TOKENS] for i in range(count)
    ]
    start = (TOKENS - MASKS) // 2
    return [[*text[:start], *[lm.config.mask_token_id] * MASKS, *text[start + MASKS :]] for text in ids]


@torch.inference_mode()
def fill(lm: diffusify.DiffusionLM, text: list[int]) -> list[int]:
    """Our greedy infill, one mask in each forward pass, the surest first."""
    mask = lm.config.mask_token_id
    canvas = Canvas.from_tokens([[None if i == mask else i for i in text]], noise=mask, pad=0)
    *_, last = Sampler()(lm.denoiser.predict, canvas, noise=mask)
    return last.canvas.tokens[0].tolist()


def timed(run: Callable[[list[int]], list[int]], texts: list[list[int]]) -> tuple[list[list[int]], float]:
    """The filled texts, and the masks filled per second, after one text that is not measured."""
    run(texts[0])
    start = time.perf_counter()
    filled = [run(text) for text in texts]
    rate = round(MASKS * len(texts) / (time.perf_counter() - start), 2)
    print(rate, flush=True)
    return filled, rate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-masked")
    options.add_argument("--block", default="smollm2-block")
    options.add_argument("--texts", type=int, default=4)
    chosen = options.parse_args()
    lm = diffusify.load(chosen.model, dtype="float32", device="cpu")
    texts, shift, threads = masked_texts(lm, chosen.texts), lm.config.shift, torch.get_num_threads()
    rates, files = {}, {}
    ours, rates["float32"] = timed(partial(fill, lm), texts)
    lm = diffusify.load(chosen.model, dtype="bfloat16", device="cpu")
    _, rates["bfloat16"] = timed(partial(fill, lm), texts)
    network = load_denoiser(chosen.model)[0].network
    with torch.no_grad(), without_mask(network):
        logits = [network(torch.tensor([text])).logits[0].numpy() for text in texts]
    with TemporaryDirectory() as folder:
        for dtype in ("float32", "float16", "q8_0"):
            file = diffusify.export(chosen.model, Path(folder) / dtype, to="gguf", dtype=dtype) / f"{dtype}.gguf"
            model = GgufModel(file, length=128, threads=threads)
            differences = [abs(model.logits(text) - each).max() for text, each in zip(texts, logits, strict=True)]
            filled, rate = timed(partial(greedy_infill, model, shift=shift), texts)
            files[dtype] = {
                "mebibytes": round(file.stat().st_size / 2**20, 1),
                "largest_logit_difference": float(f"{max(differences):.2g}"),
                "equal_infills": sum(a == b for a, b in zip(filled, ours, strict=True)),
                "tokens_per_second": rate,
            }
            model.close()
        half = diffusify.export(chosen.block, Path(folder) / "half", to="gguf", dtype="float32")
        model = GgufModel(half / "half.gguf", length=128, threads=threads)
        half_result = ar_half(chosen.block, model, texts)
        model.close()
    result = {
        "tokens": TOKENS, "masks": MASKS, "texts": len(texts),
        "versions": {name: version(name) for name in ("gguf", "llama-cpp-python")},
        "diffusify_tokens_per_second": rates, "files": files, "ar_half": half_result,
    }  # fmt: skip
    print(result)
    save("export", "python benchmarks/export.py", 0, result)


def ar_half(name: str, model: GgufModel, texts: list[list[int]]) -> dict:
    """How an AR half in llama.cpp differs from the one in transformers: its logits, and its likeliest next tokens."""
    network, largest, equal = load_ar_half(name), 0.0, 0
    for text in texts:
        tokens = text[: (TOKENS - MASKS) // 2]
        with torch.no_grad():
            expected = network(torch.tensor([tokens])).logits[0].numpy()
        found = model.logits(tokens, causal=True)
        largest = max(largest, float(abs(found - expected).max()))
        equal += int((found.argmax(axis=1) == expected.argmax(axis=1)).all())
    return {"largest_logit_difference": float(f"{largest:.2g}"), "texts_with_equal_greedy_tokens": equal}


if __name__ == "__main__":
    main()
