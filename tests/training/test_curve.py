"""The plot of a run, which `MetricsLog` redraws after every evaluation."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from transformers import TrainerControl, TrainerState, TrainingArguments

from diffusify.training import metrics_log
from diffusify.training.curve import draw_curve

LOG: list[dict[str, Any]] = [
    {"step": 0, "eval_bound": 5.0, "eval_bound_at_0": 4.0, "eval_bound_at_1": 6.0, "eval_ar_nll": 4.0},
    {"step": 1, "loss": 4.5},
    {"step": 2, "eval_bound": 4.0, "eval_bound_at_0": 3.0, "eval_bound_at_1": 5.0, "eval_ar_nll": 3.5},
]


def test_nothing_is_drawn_without_an_evaluation(tmp_path: Path) -> None:
    draw_curve(LOG[1:2], 64, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_the_bound_is_drawn_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log, "draw_curve", draw_curve)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    log = metrics_log.MetricsLog(tmp_path, 64)
    log.on_evaluate(args, TrainerState(log_history=LOG), TrainerControl())
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert (width, height) == (1080, 630)
