"""A run that is asked to stop finishes its step, saves, and says by its exit code who asked."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusify.training.resilience.distributed import agreed, alone

# Ctrl-C, the polite kill, and what Slurm is told to send before it takes a machine away.
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals(TrainerCallback):
    """Ends a run after the step at hand, with a checkpoint, when any of its processes is asked to stop."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.caught = self._watcher = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Signals are waited for, also those that a background job's shell had it ignore."""
        if threading.current_thread() is not threading.main_thread():  # where Python forbids handlers
            yield
            return
        self._watcher = os.getpid()
        before = {number: signal.signal(number, self._note) for number in NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._watcher:  # a reader of data, which goes on as long as it is asked
            return
        if number == self.caught == signal.SIGINT and alone():
            raise KeyboardInterrupt
        if not self.caught:
            self.caught = number
            hint = "; again to stop at once" if number == signal.SIGINT and alone() else ""
            with suppress(RuntimeError):  # it came in the middle of printing
                self.tell(f"{signal.Signals(number).name}: saving after this step{hint}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.caught = int(agreed(self.caught)[0])
        if self.caught:
            control.should_save = control.should_training_stop = True

    def leave(self) -> None:
        """Raise what ends the process as the signal would have: exit code 128 and the signal's number."""
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught:
            raise SystemExit(128 + self.caught)
