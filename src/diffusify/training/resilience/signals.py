"""A callback that turns stop signals into a checkpoint and the signal's exit code."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusify.training.resilience.distributed import all_reduce_max, is_single_process

# Ctrl-C, the default of `kill`, and the signal that Slurm sends before preemption (--signal=USR1).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, when any of its processes receives a stop signal."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.notify = notify
        self.received = self._pid = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the stop signals, including those that the shell set to be ignored in a background job."""
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            yield
            return
        self._pid = os.getpid()
        previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data loader's worker, which stops when the training process does
            return
        if number == self.received == signal.SIGINT and is_single_process():
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            hint = "; press Ctrl-C again to stop at once" if number == signal.SIGINT and is_single_process() else ""
            with suppress(RuntimeError):  # the signal may interrupt another write to the same stream
                self.notify(f"{signal.Signals(number).name}: saving a checkpoint after this step{hint}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = int(all_reduce_max(self.received)[0])
        if self.received:
            control.should_save = control.should_training_stop = True

    def raise_received(self) -> None:
        """Raise KeyboardInterrupt after SIGINT, and SystemExit(128 + number) after another stop signal."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + self.received)
