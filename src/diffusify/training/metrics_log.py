"""What a run leaves to be read while it goes on: `metrics.jsonl` and `curve.png`."""

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusify.training.curve import draw_curve


class MetricsLog(TrainerCallback):
    """Adds every log and evaluation to `metrics.jsonl` in a run's folder, and draws `curve.png` anew with each bound.

    A resumed run's file has what its checkpoint knows and what comes after. A full disk ends nothing: what could not
    be written is written next time.
    """

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.folder, self.tokens_per_step = folder, tokens_per_step
        self._written = -1  # entries in the file; -1 is a file that is not known to be right

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._written = -1
        self.on_log(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        again, self._written = self._written < 0, -1
        done = 0 if again else len(state.log_history) - 1
        try:
            with open(self.folder / "metrics.jsonl", "w" if again else "a", encoding="utf-8") as file:
                for entry in state.log_history[done:]:
                    file.write(json.dumps(_plain(entry), allow_nan=False) + "\n")
            self._written = len(state.log_history)
        except OSError:
            pass

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        draft = self.folder / ".saving-curve.png"
        try:
            draw_curve(state.log_history, self.tokens_per_step, draft)
            os.replace(draft, self.folder / "curve.png")
        except OSError:
            draft.unlink(missing_ok=True)


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: what is not finite is null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}
