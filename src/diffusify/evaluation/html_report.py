"""The HTML page of an evaluation: a table of scores, figures, and samples coloured by decoding step."""

import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from diffusify.evaluation.evaluate import Difference, ScoreRow
from diffusify.evaluation.scoring import ItemScore
from diffusify.evaluation.tasks import Item, MultipleChoice
from diffusify.sampling.generation import GenerationRun
from diffusify.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Report:
    """The results of an evaluation; `figures` are SVG and `samples` HTML, by title."""

    model: str
    baseline: str | None
    rows: list[ScoreRow]
    baseline_rows: list[ScoreRow]
    differences: list[Difference]
    settings: dict[str, Any]
    figures: dict[str, str]
    samples: dict[str, str]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write results.json and index.html, and return their paths."""
        plain = asdict(self)
        del plain["figures"], plain["samples"]
        results, page = folder / "results.json", folder / "index.html"
        results.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        page.write_text(self.page(), encoding="utf-8")
        return results, page

    def page(self) -> str:
        """The report as one HTML file, which loads nothing from elsewhere."""
        models = " and ".join(html.escape(name) for name in (self.model, self.baseline) if name)
        parts = [
            f"<h1>Evaluation</h1><p>{models}</p>",
            f'<div class="first">{_table(*scores_table(self.rows, self.baseline_rows, self.differences))}</div>',
            f"<p>{NOTE}</p>",
        ]
        for key, title in (("bits_per_byte", "Bits per byte"), ("from_nothing", "Unconditional samples")):
            if key in self.settings:
                by_model = self.settings[key]
                names = list(next(iter(by_model.values())))
                lines = [[who, *(str(values[name]) for name in names)] for who, values in by_model.items()]
                parts += [f"<h2>{title}</h2>", _table(["", *(name.replace("_", " ") for name in names)], lines)]
        parts += [f"<h2>{html.escape(name)}</h2><figure>{svg}</figure>" for name, svg in self.figures.items()]
        parts += [f"<h2>{html.escape(name)}</h2>{text}" for name, text in self.samples.items()]
        parts.append(
            f"<details><summary>Settings</summary><pre>{html.escape(json.dumps(self.settings, indent=2))}</pre>"
        )
        return PAGE.format(title=html.escape(self.model), body="\n".join(parts) + "</details>")


NOTE = (
    "Scores in percent, with standard errors over items. Differences are paired by item, with bootstrap intervals. "
    "Items longer than the model's context are truncated where they are farthest from the choices, answer or span."
)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1, p {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
@media (max-width: 40rem) {{
  table {{ font-size: .8rem; }}
  th, td {{ padding: .25rem; white-space: normal; }}
  .first th:nth-child(2), .first td:nth-child(2), .first th:nth-child(3), .first td:nth-child(3) {{ display: none; }}
}}
figure {{ margin: 0; background: #fff; border-radius: .5rem; }}
svg {{ max-width: 100%; height: auto; display: block; }}
.text {{ white-space: pre-wrap; font-family: ui-monospace, monospace; padding: .5rem; }}
.text span {{ color: #000; border-radius: .2rem; }}
pre {{ overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def scores_table(
    rows: Sequence[ScoreRow],
    others: Sequence[ScoreRow] = (),
    differences: Sequence[Difference] = (),
    names: tuple[str, str] = ("model", "baseline"),
) -> tuple[list[str], list[list[str]]]:
    """A table of scores as text: its column heads and its lines. `others` and `differences` add two columns."""

    def score(one: ScoreRow) -> str:
        return f"{one.score:.1f} ± {one.se:.1f}"

    heads = ["task", "metric", "items", names[0]]
    lines = [[r.task, r.metric, f"{r.items} ({r.cut} cut)" if r.cut else str(r.items), score(r)] for r in rows]
    if others:
        heads += [names[1], "difference (95%)"]
        for line, other, by in zip(lines, others, differences, strict=True):
            line += [score(other), f"{by.ahead:+.1f} ({by.low:+.1f} to {by.high:+.1f})"]
    return heads, lines


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def line_plot(lines: dict[str, dict[float, float]], x: str, y: str) -> str:
    """A plot of named curves, as SVG."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.legend()
    return _svg(figure)


def calibration_curve(items: Sequence[Item], scored: Sequence[ItemScore], bins: int = 5) -> dict[float, float]:
    """The accuracy of choices in percent, by the model's mean confidence in percent, in bins of equal size."""
    pairs: list[tuple[float, float]] = []
    for item, one in zip(items, scored, strict=True):
        if isinstance(item, MultipleChoice):
            logits = [a * b for a, b in zip(one.said["log_prob"], one.said["worth"], strict=True)]
            top = max(logits)
            weights = [math.exp(value - top) for value in logits]
            pairs.append((100 / sum(weights), 100 * one.scores["accuracy"]))
    pairs.sort()
    groups = [pairs[len(pairs) * i // bins : len(pairs) * (i + 1) // bins] for i in range(bins)]
    return {fmean(p for p, _ in group): fmean(accuracy for _, accuracy in group) for group in groups if group}


def step_colored(tokenizer: TextTokenizer, run: GenerationRun) -> str:
    """The first text of a generation run as HTML; tokens decoded later are redder."""
    editable = run.canvas.editable[0].tolist()
    decoded_at = [0] * len(editable)
    steps = 0
    for frame in run:
        steps += 1
        for i, is_open in enumerate(frame.canvas.open[0].tolist()):
            decoded_at[i] = steps + 1 if is_open else (decoded_at[i] or steps)
    run.results()
    parts = []
    for i, (token, is_editable) in enumerate(zip(run.canvas.tokens[0].tolist(), editable, strict=True)):
        text = html.escape(tokenizer.decode([token], continues=i > 0))
        if not is_editable:
            parts.append(text)
        elif not run.canvas.open[0, i]:
            hue = 220 - round(220 * (decoded_at[i] - 1) / max(1, steps - 1))
            parts.append(f'<span style="background:hsl({hue} 80% 80%)" title="step {decoded_at[i]}">{text}</span>')
    return f'<p class="text">{"".join(parts)}</p>'
