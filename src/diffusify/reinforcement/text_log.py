"""A file of all sampled texts of a run, with their rewards."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class TextLog:
    """Appends texts to a file of JSON lines, each with its step, split, prompt, completion and rewards.

    The first texts of a process replace those of the same or later steps, which an interrupted run has left. A full
    disk does not end the run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._started = path, False

    def add(
        self, step: int, split: str, prompts: Sequence[Any], texts: Sequence[str], names: Sequence[str], rewards: Tensor
    ) -> None:
        """Append the texts of a step with their rewards [texts, names]; `split` is "train" or "held_out"."""
        lines = []
        for prompt, text, values in zip(prompts, texts, rewards.tolist(), strict=True):
            numbers = {name: None if value != value else value for name, value in zip(names, values, strict=True)}
            line = {"step": step, "split": split, "prompt": prompt, "completion": text, "rewards": numbers}
            lines.append(json.dumps(line, ensure_ascii=True) + "\n")
        try:
            if not self._started:
                self._remove_from(step, split)
                self._started = True
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError:
            pass

    def _remove_from(self, step: int, split: str) -> None:
        """Remove what comes after an earlier step; the held-out texts of a step precede those it trains on."""
        if not self.path.is_file():
            return
        kept = []
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):  # cut off by a kill
                    break
                saved = json.loads(line)
                if (saved["step"], saved["split"] == "train") < (step, split == "train"):
                    kept.append(line)
        partial = self.path.with_name(f".saving-{self.path.name}")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)
