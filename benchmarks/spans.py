"""Masked spans of unknown length: ended or resized by the model, of a told length, and the best of eight lengths.

    python benchmarks/spans.py MODEL EVAL [--limit 100] [--rerank 8] [--out runs/spans]

MODEL is a block model that infills, or an infiller with length tokens (`-o variable_length=true`); EVAL is a folder of
benchmark files, as for `diffusify eval --data`, of which those with spans are used. All ways fill the same items, one
after the other. `forwards` are the forward passes of an item and `rows` the candidates that start in them. With a model
that keeps its AR half, the likeliest of several fillings is measured as well. Every item is kept in OUT, so a second
call resumes.
"""

import argparse
import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from machine import save
from models import protocol

import diffusify
from diffusify.evaluation.benchmark_data import items, tasks_in
from diffusify.evaluation.evaluate import evaluate, score_row
from diffusify.evaluation.scoring import SpanLength
from diffusify.evaluation.tasks import Infill
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.prompts import UNKNOWN_LENGTH, count_length_candidates


def without_resizing(lm: DiffusionLM) -> DiffusionLM:
    """The same model without its length tokens, which tries several lengths."""
    denoiser = copy(lm.denoiser)
    denoiser.diffusion_config = replace(lm.config, length_tokens=None)
    return DiffusionLM(denoiser, lm.tokenizer)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("data", type=Path)
    options.add_argument("--limit", type=int, default=100)
    options.add_argument("--rerank", type=int, default=8)
    options.add_argument("--out", type=Path, default=Path("runs/spans"))
    chosen = options.parse_args()
    lm = diffusify.load(chosen.model, dtype=torch.bfloat16)
    eight = count_length_candidates([[UNKNOWN_LENGTH]])
    plain, lengths, found_by = SamplingConfig(), f"best of {eight} lengths", "resized"
    ways: dict[str, tuple[DiffusionLM, SamplingConfig, SpanLength, int]] = {"told": (lm, plain, "told", 1)}
    if lm.config.infiller.reads_as_ar_model:
        found_by = "ended by the model"
        ways[found_by] = (lm, plain, "unknown", 1)
        ways[f"{found_by}, tolerance 0.7"] = (lm, SamplingConfig(tolerance=0.7), "unknown", 1)
        ways[lengths] = (lm, SamplingConfig(regex=r"[\s\S]*"), "unknown", eight)  # its length has to be fixed
    elif lm.config.length_tokens is not None:
        suppressed = SamplingConfig(suppress_tokens=tuple(lm.config.length_tokens.ids))
        ways[found_by] = (lm, plain, "unknown", 1)
        ways[lengths] = (without_resizing(lm), suppressed, "unknown", eight)
    else:
        options.error(
            f"{chosen.model} does not find the length of spans; adapt it with --recipe block -o infilling=0.5"
        )
    if lm.config.keeps_ar_model:
        reranked = SamplingConfig(rerank=chosen.rerank)
        ways["told, reranked"] = (lm, reranked, "told", chosen.rerank)
        ways[f"{found_by}, reranked"] = (lm, reranked, "unknown", chosen.rerank)
    result: dict = {"model": chosen.model, "unknown": [*UNKNOWN_LENGTH][:: len(UNKNOWN_LENGTH) - 1]}
    for task in tasks_in(chosen.data):
        task_items = items(task, data=chosen.data, limit=chosen.limit, protocol=protocol(task))
        if not isinstance(task_items[0], Infill):
            continue
        result[task.name] = {"items": len(task_items), "candidates": chosen.rerank}
        for name, (model, sampling, span_length, rows) in ways.items():
            folder = chosen.out / name.replace(",", "").replace(" ", "-")
            (scored,) = evaluate(
                model, {task.name: task_items}, folder, sampling=sampling, span_length=span_length, batch_size=1
            ).values()
            found = {metric: round(score_row(task.name, scored, metric).score, 1) for metric in scored[0].scores}
            found |= {
                "se": round(score_row(task.name, scored).se, 1),
                "forwards": round(fmean(one.said["forwards"] for one in scored), 1),
                "rows": rows,
            }
            result[task.name][name] = found
            print(task.name, name, found, flush=True)
    print(json.dumps(result, indent=2))
    print("wrote", save("spans", "python benchmarks/spans.py MODEL EVAL", 0, result))


if __name__ == "__main__":
    main()
