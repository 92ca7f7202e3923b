"""The length of a run in steps or in minutes of training, and its schedule of evaluations and checkpoints."""

from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from diffusify.training.resilience.distributed import all_reduce_max


class Budget(TrainerCallback, ExportableState):
    """Ends a run after a number of steps, or of minutes spent in training steps; evaluates `evaluations` times.

    A checkpoint is saved about every `save_minutes`. The time spent is stored in checkpoints, so that a resumed run
    ends when an uninterrupted one would have. Raises ValueError unless exactly one of `steps` and `minutes` is given.
    """

    def __init__(
        self,
        steps: int | None = None,
        minutes: float | None = None,
        *,
        evaluations: int = 5,
        save_minutes: float = 10.0,
    ) -> None:
        if (steps is None) == (minutes is None):
            raise ValueError(f"steps={steps} and minutes={minutes}: give exactly one of the two")
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes={minutes} must be above 0")
        self.steps, self.minutes, self.evaluations, self.save_minutes = steps, minutes, evaluations, save_minutes
        self.seconds = 0.0
        self.progress = 0.0
        self._step_start = self._last_save = 0.0

    @property
    def max_steps(self) -> int:
        """A value for `TrainingArguments.max_steps`; practically unlimited under a budget of minutes."""
        return self.steps or 1_000_000

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved: Any = state.stateful_callbacks or {}
        own = saved.get(type(self).__name__)
        if isinstance(own, dict):
            self.seconds = self._last_save = own["attributes"]["seconds"]
        self._update_progress(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_start = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The slowest process's clock counts for all, so that they decide alike.
        [self.seconds] = all_reduce_max(self.seconds + perf_counter() - self._step_start)
        evaluated = int(self.progress * self.evaluations)
        self._update_progress(state)
        if int(self.progress * self.evaluations) > evaluated:
            control.should_evaluate = True
        if self.progress >= 1:
            control.should_training_stop = True
        elif self.seconds - self._last_save >= self.save_minutes * 60:
            control.should_save, self._last_save = True, self.seconds

    def _update_progress(self, state: TrainerState) -> None:
        spent = state.global_step / self.steps if self.steps else self.seconds / (60 * (self.minutes or 1))
        self.progress = min(1.0, spent)

    @property
    def seconds_left(self) -> float:
        """The estimated seconds until the end of the run; 0 before the first step."""
        return self.seconds / self.progress - self.seconds if self.progress else 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {"steps": self.steps, "minutes": self.minutes}, "attributes": {"seconds": self.seconds}}
