"""A plot of a run: the bound on held-out text over the number of training tokens."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure


def draw_curve(log: list[dict[str, Any]], tokens_per_step: int, path: Path) -> None:
    """Plot a run's log: the bound, the bound by position in the block, and the AR loss, in nats per token.

    Does nothing if the log has no evaluation yet.
    """
    points = [entry for entry in log if "eval_bound" in entry]
    if not points:
        return
    tokens = [entry["step"] * tokens_per_step / 1000 for entry in points]
    by_position = sorted(key for key in points[-1] if key.startswith("eval_bound_at_"))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, key in enumerate(by_position):
        shade = colormaps["viridis"](0.15 + 0.7 * i / max(1, len(by_position) - 1))
        number = int(key.removeprefix("eval_bound_at_")) + 1
        axes.plot(
            tokens, [p[key] for p in points], color=shade, marker="o", ms=3, lw=1.2, label=f"token {number} of a block"
        )
    axes.plot(
        tokens, [p["eval_bound"] for p in points], color="black", lw=2.2, marker="o", ms=4, label="bound, all tokens"
    )
    if "eval_ar_nll" in points[-1]:
        axes.plot(
            tokens, [p["eval_ar_nll"] for p in points], color="tab:red", lw=1.6, ls="--", label="AR loss, same weights"
        )
    for key, color in (("eval_bound", "black"), ("eval_ar_nll", "tab:red")):
        if key in points[-1]:
            axes.annotate(
                f"{points[-1][key]:.2f}", (tokens[-1], points[-1][key]), xytext=(6, 0), textcoords="offset points",
                color=color, va="center",
            )  # fmt: skip
    axes.set(xlabel="thousand training tokens", ylabel="nats per token, held-out text", ylim=(0, None))
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
