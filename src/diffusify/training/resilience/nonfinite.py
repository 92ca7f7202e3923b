"""A step whose loss or gradients are not finite changes nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from diffusify.training.resilience.distributed import agreed


class NonFiniteGuard(TrainerCallback, ExportableState):
    """Skips steps whose loss or gradient norm is not finite, and ends a run after `limit` of them in a row.

    All processes skip together. The accelerator is asked once a step. Where weights change before anybody can look
    (DeepSpeed), `can_skip` is off and the first such step ends the run, without a checkpoint.
    """

    def __init__(self, limit: int = 10, *, can_skip: bool = True) -> None:
        if limit < 1:
            raise ValueError(f"max_skipped={limit} must be at least 1: so many steps in a row end a run")
        self.limit, self.can_skip = limit, can_skip
        self.skipped = self.in_a_row = 0
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self.made: list[Tensor] = []  # (loss, 1) of every step that was not skipped, for whoever reports them

    def see_loss(self, loss: Tensor) -> None:
        """A micro-batch's share of the step's loss."""
        self._loss = loss if self._loss is None else self._loss + loss

    def see_norm(self, norm: Tensor | float | None) -> None:
        """The step's gradient norm, where there is one."""
        self._norm = norm

    @property
    def exhausted(self) -> bool:
        return self.in_a_row >= self.limit

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved: Any = state.stateful_callbacks or {}
        kept = saved.get(type(self).__name__)
        if isinstance(kept, dict):
            self.skipped, self.in_a_row = kept["attributes"]["skipped"], kept["attributes"]["in_a_row"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        assert self._loss is not None, "the trainer tells of every loss"
        seen = self._loss if self._norm is None else self._loss + self._norm
        if agreed(not seen.isfinite())[0]:
            optimizer.zero_grad()  # without gradients an optimizer does nothing
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if not self.can_skip:
                raise FloatingPointError(
                    f"the loss or its gradients were not finite at step {state.global_step + 1}, and DeepSpeed has put "
                    "them into the weights: the last checkpoint is sound"
                )
        else:
            self.made.append(torch.stack([self._loss, torch.ones_like(self._loss)]))
            self.in_a_row = 0
        self._loss = self._norm = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.exhausted:
            control.should_save = control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped, "in_a_row": self.in_a_row}}
