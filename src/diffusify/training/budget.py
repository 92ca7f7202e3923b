"""How long a run lasts, in steps or in minutes of training, and what happens on the way."""

from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from diffusify.training.resilience.distributed import agreed


class Budget(TrainerCallback, ExportableState):
    """Ends a run after so many steps, or minutes spent in training steps; evaluates `parts` times on the way.

    A checkpoint is saved about every `save_minutes`. The time spent is kept in checkpoints, so a resumed run ends
    when an uninterrupted one would have.
    """

    def __init__(
        self, steps: int | None = None, minutes: float | None = None, *, parts: int = 5, save_minutes: float = 10.0
    ) -> None:
        if (steps is None) == (minutes is None):
            raise ValueError(f"steps={steps} and minutes={minutes}: give one of the two")
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes={minutes} must be above 0")
        self.steps, self.minutes, self.parts, self.save_minutes = steps, minutes, parts, save_minutes
        self.seconds = 0.0
        self.progress = 0.0
        self._begun = self._saved = 0.0

    @property
    def max_steps(self) -> int:
        """For `TrainingArguments`, which know no time."""
        return self.steps or 1_000_000

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved: Any = state.stateful_callbacks or {}
        kept = saved.get(type(self).__name__)
        if isinstance(kept, dict):
            self.seconds = self._saved = kept["attributes"]["seconds"]
        self._advance(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        [self.seconds] = agreed(self.seconds + perf_counter() - self._begun)  # processes decide alike
        before = int(self.progress * self.parts)
        self._advance(state)
        if int(self.progress * self.parts) > before:
            control.should_evaluate = True
        if self.progress >= 1:
            control.should_training_stop = True
        elif self.seconds - self._saved >= self.save_minutes * 60:
            control.should_save, self._saved = True, self.seconds

    def _advance(self, state: TrainerState) -> None:
        spent = state.global_step / self.steps if self.steps else self.seconds / (60 * (self.minutes or 1))
        self.progress = min(1.0, spent)

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.progress - self.seconds if self.progress else 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {"steps": self.steps, "minutes": self.minutes}, "attributes": {"seconds": self.seconds}}
