"""Progress and curve of a run that learns from rewards."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffusify.training.progress import TrainingProgress


class RewardProgress(TrainingProgress):
    """The progress bar of a run that learns from rewards, and a line for every evaluation."""

    title = "learning"

    def describe_step(self, logs: dict[str, float], steps_per_second: float) -> str:
        if "reward" not in logs:  # another update with the same texts
            return f"loss {logs['loss']:.3f}"
        kl = f"  KL {logs['kl']:.3f}" if "kl" in logs else ""
        bad = f"  {logs['bad_rewards']:,} bad rewards" if "bad_rewards" in logs else ""
        return (
            f"reward {logs['reward']:.3f}  {logs['answer_tokens']:.0f} tokens  {logs['equal_groups']:.0%} equal"
            f"{kl}{bad}  {60 * steps_per_second:.1f} steps/min"
        )

    def describe_evaluation(self, metrics: dict[str, float], step: int) -> str:
        return (
            f"step {step:>6,}   held out: reward {metrics['eval_reward']:.3f}, "
            f"{metrics['eval_answer_tokens']:.0f} tokens, {metrics['eval_tokens_per_forward']:.2f} per forward pass"
        )


def draw_rewards(log: list[dict[str, Any]], tokens_per_step: int, path: Path) -> None:
    """Plot a run's log: the reward of sampled texts, and of greedy answers to held-out prompts, over steps."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    sampled = [entry for entry in log if "reward" in entry]
    held_out = [entry for entry in log if "eval_reward" in entry]
    axes.plot([p["step"] for p in sampled], [p["reward"] for p in sampled], color="tab:gray", lw=1.0, label="sampled")
    axes.plot(
        [p["step"] for p in held_out], [p["eval_reward"] for p in held_out], color="black", marker="o", ms=4, lw=2.2,
        label="held out, greedy",
    )  # fmt: skip
    axes.set(xlabel="optimizer steps", ylabel="mean reward")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
