"""A callback that writes `metrics.jsonl` and `curve.png` during training."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusify.training.curve import draw_curve

Draw = Callable[[list[dict[str, Any]], int, Path], None]


class MetricsLog(TrainerCallback):
    """Appends every log entry and evaluation to `metrics.jsonl` in a run's folder; redraws `curve.png` with each bound.

    A resumed run first rewrites the file with its checkpoint's entries. A full disk does not end the run: entries that
    could not be written are written the next time.
    """

    def __init__(self, folder: Path, tokens_per_step: int, draw: Draw | None = None) -> None:
        """`draw` plots a run's log as `draw_curve`, the default, does."""
        self.folder, self.tokens_per_step, self.draw = folder, tokens_per_step, draw or draw_curve
        self._file_is_valid = False  # whether the file has all earlier entries, so that it is enough to append

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._file_is_valid = False
        self.on_log(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        append, self._file_is_valid = self._file_is_valid, False
        first = len(state.log_history) - 1 if append else 0
        try:
            with open(self.folder / "metrics.jsonl", "a" if append else "w", encoding="utf-8") as file:
                for entry in state.log_history[first:]:
                    file.write(json.dumps(_json_safe(entry), allow_nan=False) + "\n")
            self._file_is_valid = True
        except OSError:
            pass

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        partial = self.folder / ".saving-curve.png"
        try:
            self.draw(state.log_history, self.tokens_per_step, partial)
            os.replace(partial, self.folder / "curve.png")
        except OSError:
            partial.unlink(missing_ok=True)


def _json_safe(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with None in place of numbers that JSON does not have (NaN and infinities)."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}
