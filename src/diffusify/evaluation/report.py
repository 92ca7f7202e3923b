"""A whole evaluation: a model and the one it came from on the same items, and what else there is to see."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

from diffusify.config import to_plain
from diffusify.evaluation.evaluate import difference, evaluate, row
from diffusify.evaluation.html_report import Report, calibration, coloured, lines_picture
from diffusify.evaluation.likelihood import LeftToRight, Measure, MonteCarlo, OneByOne, best_measure, bits_per_byte
from diffusify.evaluation.open_model import suited
from diffusify.evaluation.tasks import Choice, Item
from diffusify.evaluation.text_metrics import distinct, entropy, perplexity
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.packing import pack
from diffusify.training.validation import validate

MEASURES: dict[str, Measure] = {"bound": MonteCarlo(), "left-to-right": LeftToRight(), "one-by-one": OneByOne()}
SOME = 20  # items, texts and rows that pictures are drawn from

Told = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to evaluate, and how: the same for all models.

    `steps` are budgets at which writing tasks are tried, too, on some of their items. `texts` are measured in bits per
    byte, and by noise level. So many texts are written from nothing, `free`, and judged by the baseline.
    """

    tasks: Mapping[str, Sequence[Item]]
    measure: Measure | None = None
    sampling: SamplingConfig = SamplingConfig()
    tries: int = 1
    steps: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    free: int = 0
    prompts: tuple[str, ...] = ("The",)


def report(
    plan: Plan,
    folder: Path,
    model: tuple[str, DiffusionLM],
    baseline: tuple[str, DiffusionLM] | None = None,
    *,
    told: Told = lambda model, task, done, count: None,
) -> Report:
    """Evaluate, or go on where an evaluation in this folder stopped. `told` hears of every item."""

    def run(who: str, lm: DiffusionLM, part: str, tasks: Mapping[str, Sequence[Item]], how: SamplingConfig) -> Any:
        def heard(task: str, done: int) -> None:
            told(who, task, done, len(tasks[task]))

        measure = best_measure(lm.denoiser) if part == "baseline" else plan.measure
        return evaluate(lm, tasks, folder / part, measure=measure, sampling=how, tries=plan.tries, told=heard)

    name, lm = model
    ours = run(name, lm, "model", plan.tasks, plan.sampling)
    theirs = run(*baseline, "baseline", plan.tasks, plan.sampling) if baseline else {}
    writing = {task: items[:SOME] for task, items in plan.tasks.items() if not isinstance(items[0], Choice)}
    tried: dict[str, dict[float, float]] = {task: {} for task in writing}
    for steps in plan.steps:
        how = replace(plan.sampling, steps=steps, threshold=None, tolerance=None, policy=None)
        for task, scored in run(f"{name}, {steps} steps", lm, f"steps-{steps}", writing, how).items():
            tried[task][float(steps)] = row(task, scored).score
    sure = {task: calibration(plan.tasks[task], scored) for task, scored in ours.items() if task not in writing}
    settings: dict[str, Any] = {"card": to_plain(lm.config), "sampling": to_plain(plan.sampling)}
    settings["measure"] = to_plain(plan.measure or best_measure(lm.denoiser))
    if plan.texts:
        settings["bits_per_byte"] = _bits(plan, lm, baseline)
    if plan.free and baseline:
        both = {"model": lm, "baseline": baseline[1]}
        settings["from_nothing"] = {who: _free(plan, one, baseline[1]) for who, one in both.items()}
    return Report(
        model=name,
        baseline=baseline[0] if baseline else None,
        rows=[row(task, scored) for task, scored in ours.items()],
        baseline_rows=[row(task, scored) for task, scored in theirs.items()],
        differences=[difference(task, ours[task], scored) for task, scored in theirs.items()],
        settings=settings,
        pictures=_pictures(tried if plan.steps else {}, sure, _levels(lm, plan.texts) if plan.texts else {}),
        texts={f"“{prompt}…”, the later the redder": _sample(lm, prompt, plan) for prompt in plan.prompts},
    )


def _pictures(
    tried: dict[str, dict[float, float]], sure: dict[str, dict[float, float]], levels: dict[str, dict[float, float]]
) -> dict[str, str]:
    found = {}
    if tried:
        found["Quality against steps"] = lines_picture(tried, "denoising steps", "score (percent)")
    if sure:
        line = {"as sure as right": {0.0: 0.0, 100.0: 100.0}}
        found["Calibration of choices"] = lines_picture(line | sure, "confidence (percent)", "right (percent)")
    if levels:
        found["Cross-entropy by noise level"] = lines_picture(levels, "share of open tokens", "nats per token")
    return found


def _bits(plan: Plan, lm: DiffusionLM, baseline: tuple[str, DiffusionLM] | None) -> dict[str, Any]:
    """Bits per byte of some texts, by the model and by the baseline."""
    texts, found = plan.texts[:SOME], {}
    measure = plan.measure or best_measure(lm.denoiser)
    found["model"] = bits_per_byte(lm.denoiser, texts, lm.tokenizer, measure)
    if baseline:
        other = baseline[1]
        found["baseline"] = bits_per_byte(other.denoiser, texts, other.tokenizer, best_measure(other.denoiser))
    return {who: {"bits_per_byte": round(mean, 4), "se": round(se, 4)} for who, (mean, se) in found.items()}


def _free(plan: Plan, lm: DiffusionLM, judge: DiffusionLM) -> dict[str, float]:
    """Texts from nothing, drawn (temperature 1 if unset): how likely the judge finds them, and how varied they are."""
    how = suited(replace(plan.sampling, temperature=plan.sampling.temperature or 1.0), lm)
    writing = lm.prepare_generation([""] * plan.free, min(64, (lm.denoiser.context or 128) // 2), how)
    writing.results()
    rows = zip(writing.canvas.tokens, writing.canvas.written, strict=True)
    written = [tokens[here].tolist() for tokens, here in rows]
    likely = perplexity(judge.tokenizer, judge.denoiser.network, [""] * plan.free, written)
    told = {"perplexity": likely, "distinct_1": distinct(written, 1), "distinct_2": distinct(written, 2)}
    return {name: round(value, 4) for name, value in (told | {"entropy": fmean(map(entropy, written))}).items()}


def _levels(lm: DiffusionLM, texts: Sequence[str]) -> dict[str, dict[float, float]]:
    """The plain cross-entropy of open tokens, by how many are open."""
    if lm.config.recipe == "as_is" and lm.config.shift:
        return {}
    length = min(256, lm.denoiser.context or 256)
    rows = pack(Dataset.from_dict({"text": list(texts)}), lm.tokenizer, length, keep_tail=True)
    assert isinstance(rows, Dataset)
    told = validate(lm.denoiser, rows.select(range(min(SOME, len(rows)))), batch_size=4)
    prefix = "nll_at_"
    return {"model": {float(k.removeprefix(prefix)): v for k, v in told.items() if k.startswith(prefix)}}


def _sample(lm: DiffusionLM, prompt: str, plan: Plan) -> str:
    room = min(64, (lm.denoiser.context or 128) // 2)
    return coloured(lm.tokenizer, lm.prepare_generation([prompt], room, suited(plan.sampling, lm)))
