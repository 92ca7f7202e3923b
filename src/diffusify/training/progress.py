"""A callback that shows training progress on a console."""

from math import inf
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusify.training.budget import Budget

LINE_SECONDS = 60.0


class TrainingProgress(TrainerCallback):
    """A progress bar with loss, rate and time left, and a printed line for every evaluation.

    If the console is no terminal (a log file), a line takes the bar's place every `LINE_SECONDS`.
    """

    title = "adapting"

    def __init__(self, budget: Budget, tokens_per_step: int, console: Console) -> None:
        self.budget, self.tokens_per_step, self.console = budget, tokens_per_step, console
        self.first_step, self.first_second, self.last_line = 0, 0.0, -inf
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn(self.title),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task(self.title, total=1.0, note="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step, self.first_second = state.global_step, self.budget.seconds
        self.bar.update(self.task, note="first evaluation" if args.eval_on_start else "first steps")
        self.bar.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        seconds, steps = self.budget.seconds - self.first_second, state.global_step - self.first_step
        minutes, rest = divmod(round(self.budget.seconds_left), 60)
        skipped = f"  {logs['skipped']} skipped" if "skipped" in logs else ""
        metrics = self.describe_step(logs, steps / seconds if seconds else 0.0)
        note = f"step {state.global_step}  {metrics}{skipped}  {minutes}:{rest:02} left"
        self.bar.update(self.task, completed=self.budget.progress, note=note)
        if not self.console.is_terminal and monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = monotonic()
            self.console.print(f"{self.budget.progress:>6.1%}  {note}", soft_wrap=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        self.bar.console.print(self.describe_evaluation(metrics, state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.stop()

    def describe_step(self, logs: dict[str, float], steps_per_second: float) -> str:
        """The metrics of a step, as the bar shows them."""
        ar = f"  AR {logs['ar_nll']:.2f}" if "ar_nll" in logs else ""
        return f"loss {logs['loss']:.2f}{ar}  {self.tokens_per_step * steps_per_second:,.0f} tok/s"

    def describe_evaluation(self, metrics: dict[str, float], step: int) -> str:
        """The line of an evaluation."""
        ar = f"   AR loss {metrics['eval_ar_nll']:.2f}" if "eval_ar_nll" in metrics else ""
        bound = f"bound {metrics['eval_bound']:.2f} nats/token ({metrics['eval_bits']:.2f} bits)"
        return f"{step * self.tokens_per_step:>12,} tokens   {bound}{ar}"
