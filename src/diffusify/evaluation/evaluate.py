"""Models on tasks, item by item, each kept as soon as it is done; and what two models' items say of each other."""

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from diffusify.config import to_plain
from diffusify.evaluation.likelihood import Measure, best_measure
from diffusify.evaluation.open_model import suited
from diffusify.evaluation.scoring import Scored, score
from diffusify.evaluation.tasks import Item
from diffusify.models.saving import checksum
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig


@dataclass(frozen=True)
class Row:
    """A model's score on a task (its first score's mean, percent), with its standard error.

    `cut` of the items were too long for the model and lost what is farthest from the part in question.
    """

    task: str
    metric: str
    score: float
    se: float
    items: int
    cut: int = 0


@dataclass(frozen=True)
class Difference:
    """How much a model is ahead of another on the same items (percent points), and the interval that holds 95%."""

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
    told: Callable[[str, int], None] = lambda task, done: None,
) -> dict[str, list[Scored]]:
    """Every item's score; `folder` holds a file for each task, and items that stand there already are not repeated.

    `told` is called after each item. ValueError if the folder holds another evaluation.
    """
    measure, sampling = measure or best_measure(lm.denoiser), suited(sampling, lm)
    settings = {"card": lm.config, "measure": measure, "sampling": sampling, "tries": tries}
    _claim(folder, {name: to_plain(value) for name, value in settings.items()} | {"weights": checksum(lm.denoiser)})
    results = {}
    for name, items in tasks.items():
        file = folder / f"{name}.jsonl"
        done, marks = _read(file)[: len(items)], [zlib.crc32(repr(item).encode()) for item in items]
        if [one.item for one in done] != marks[: len(done)]:
            raise ValueError(f"{file} holds the scores of other items; give another folder, or delete it")
        told(name, len(done))
        with file.open("a", encoding="utf-8") as lines:
            for scored in score(lm, items[len(done) :], measure, sampling, tries=tries):
                line = json.dumps(asdict(replace(scored, item=marks[len(done)])))
                done.append(Scored(**json.loads(line)))  # as it will be read again
                lines.write(line + "\n")
                lines.flush()
                told(name, len(done))
        results[name] = done
    return results


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder this evaluation's. ValueError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "evaluation.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    elif (known := json.loads(file.read_text(encoding="utf-8"))) != settings:
        differs = ", ".join(key for key in settings if known.get(key) != settings[key])
        raise ValueError(f"{folder} holds an evaluation with another {differs}; give another folder, or delete it")


def _read(file: Path) -> list[Scored]:
    """What is done; a last line that was cut off by a kill is taken away."""
    if not file.exists():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    file.write_text("".join(whole), encoding="utf-8")
    return [Scored(**json.loads(line)) for line in whole]


def read_scores(folder: Path) -> dict[str, list[Scored]]:
    """All items that an evaluation in this folder has done. ValueError if there is none."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no evaluation; `diffusify eval` makes one")
    return {file.stem: _read(file) for file in files}


def row(task: str, scored: Sequence[Scored], metric: str | None = None) -> Row:
    """A task's score, by its first metric or another."""
    metric = metric or next(iter(scored[0].scores))
    values = [100 * one.scores[metric] for one in scored]
    se = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Row(task, metric, fmean(values), se, len(values), sum(one.said.get("cut", 0) > 0 for one in scored))


def difference(
    task: str, ours: Sequence[Scored], theirs: Sequence[Scored], metric: str | None = None, *, draws: int = 2000
) -> Difference:
    """By the paired bootstrap: items are drawn again with both models' scores, from a fixed seed."""
    if [one.item for one in ours] != [one.item for one in theirs]:
        raise ValueError(f"{task}: {len(ours)} items cannot be paired with {len(theirs)}; evaluate both on the same")
    metric = metric or next(iter(ours[0].scores))
    ahead = [100 * (a.scores[metric] - b.scores[metric]) for a, b in zip(ours, theirs, strict=True)]
    luck = random.Random(0)
    means = sorted(fmean(luck.choices(ahead, k=len(ahead))) for _ in range(draws))
    return Difference(task, metric, fmean(ahead), means[int(0.025 * draws)], means[int(0.975 * draws) - 1])
