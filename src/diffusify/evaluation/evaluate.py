"""Evaluation of a model on tasks, saved item by item and resumable, and paired comparison of two models."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from diffusify.config import DiffusionConfig, to_current, to_plain
from diffusify.evaluation.likelihood import Measure, best_measure
from diffusify.evaluation.scoring import BATCH_SIZE, ItemScore, SpanLength, score
from diffusify.evaluation.tasks import Item, item_checksum
from diffusify.models.saving import checksum
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig


@dataclass(frozen=True)
class ScoreRow:
    """A model's mean score on a task in percent, with its standard error over items.

    `cut` is the number of items that were truncated to fit the model's context.
    """

    task: str
    metric: str
    score: float
    se: float
    items: int
    cut: int = 0


@dataclass(frozen=True)
class Difference:
    """The difference between two models on the same items in percentage points, with its 95% confidence interval."""

    task: str
    metric: str
    ahead: float
    low: float
    high: float


def evaluate(
    lm: DiffusionLM,
    tasks: Mapping[str, Sequence[Item]],
    folder: Path,
    *,
    measure: Measure | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    tries: int = 1,
    span_length: SpanLength = "told",
    batch_size: int = BATCH_SIZE,
    progress: Callable[[str, int], None] = lambda task, done: None,
) -> dict[str, list[ItemScore]]:
    """Score every item. Scores are saved in a file per task in `folder`, and saved ones are not computed again.

    `tries`, `span_length` and `batch_size` are those of `score`. `progress` is called after each item with the task and
    the number of scored items. ValueError if the folder holds an evaluation with other settings or items.
    """
    measure, sampling = measure or best_measure(lm.denoiser), lm.with_defaults(sampling)
    settings = {"card": lm.config, "measure": measure, "sampling": sampling, "tries": tries}
    plain = {name: to_plain(value) for name, value in settings.items()}
    if span_length != "told":  # earlier versions saved nothing
        plain["span_length"] = span_length
    _check_settings(folder, plain | {"weights": checksum(lm.denoiser)})
    results = {}
    for name, items in tasks.items():
        file = folder / f"{name}.jsonl"
        done, checksums = _read_scores(file)[: len(items)], [item_checksum(item) for item in items]
        if [one.item for one in done] != checksums[: len(done)]:
            raise ValueError(f"{file} holds the scores of other items; give another folder, or delete it")
        progress(name, len(done))
        with file.open("a", encoding="utf-8") as lines:
            todo = items[len(done) :]
            for scored in score(
                lm, todo, measure, sampling, tries=tries, span_length=span_length, batch_size=batch_size
            ):
                line = json.dumps(asdict(replace(scored, item=checksums[len(done)])))
                done.append(ItemScore(**json.loads(line)))  # as a resumed evaluation reads it
                lines.write(line + "\n")
                lines.flush()
                progress(name, len(done))
        results[name] = done
    return results


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Save the settings of an evaluation, or compare them with the saved ones. ValueError if they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "evaluation.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved |= {name: to_current(saved.get(name), hint) for name, hint in _HINTS.items()}
    if saved != settings:
        differing = ", ".join(key for key in settings | saved if saved.get(key) != settings.get(key))
        raise ValueError(f"{folder} holds an evaluation with another {differing}; give another folder, or delete it")


_HINTS = {"card": DiffusionConfig, "measure": Measure, "sampling": SamplingConfig}


def _read_scores(file: Path) -> list[ItemScore]:
    """Read the saved scores, and remove a last line that was cut off when the process was killed."""
    if not file.exists():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    file.write_text("".join(whole), encoding="utf-8")
    return [ItemScore(**json.loads(line)) for line in whole]


def read_scores(folder: Path) -> dict[str, list[ItemScore]]:
    """Read all scores of the evaluation in a folder, by task. ValueError if there is none."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no evaluation; `diffusify eval` makes one")
    return {file.stem: _read_scores(file) for file in files}


def score_row(task: str, scored: Sequence[ItemScore], metric: str | None = None) -> ScoreRow:
    """The mean of a task's scores, by default of its main metric."""
    metric = metric or next(iter(scored[0].scores))
    values = [100 * one.scores[metric] for one in scored]
    se = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return ScoreRow(task, metric, fmean(values), se, len(values), sum(one.said.get("cut", 0) > 0 for one in scored))


def difference(
    task: str, ours: Sequence[ItemScore], theirs: Sequence[ItemScore], metric: str | None = None, *, samples: int = 2000
) -> Difference:
    """Compare two models by a paired bootstrap over items, with a fixed seed. ValueError if the items differ."""
    if [one.item for one in ours] != [one.item for one in theirs]:
        raise ValueError(f"{task}: {len(ours)} items cannot be paired with {len(theirs)}; evaluate both on the same")
    metric = metric or next(iter(ours[0].scores))
    differences = [100 * (a.scores[metric] - b.scores[metric]) for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(differences, k=len(differences))) for _ in range(samples))
    return Difference(task, metric, fmean(differences), means[int(0.025 * samples)], means[int(0.975 * samples) - 1])
