"""A complete evaluation: a model and its baseline on the same items, with additional figures and samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

from diffusify.config import to_plain
from diffusify.evaluation.bits_per_byte import bits_per_byte
from diffusify.evaluation.evaluate import difference, evaluate, score_row
from diffusify.evaluation.html_report import Report, calibration_curve, line_plot, step_colored
from diffusify.evaluation.likelihood import Autoregressive, Measure, MonteCarlo, TokenByToken, best_measure
from diffusify.evaluation.scoring import SpanLength
from diffusify.evaluation.tasks import Item, MultipleChoice
from diffusify.evaluation.text_metrics import distinct, entropy, perplexity
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.packing import pack
from diffusify.training.validation import validate

MEASURES: dict[str, Measure] = {"bound": MonteCarlo(), "left-to-right": Autoregressive(), "one-by-one": TokenByToken()}
FIGURE_ITEMS = 20  # items, texts and rows that figures are made from

ProgressCallback = Callable[[str, str, int, int], None]  # model, task, scored items, items


@dataclass(frozen=True)
class EvalPlan:
    """What to evaluate, and how; the same for all models.

    `steps` are numbers of denoising steps at which generation tasks are evaluated as well, on their first items.
    `texts` are measured in bits per byte and by noise level. `free` is the number of unconditional samples, whose
    perplexity is measured under the baseline. The `prompts` are continued in the report.
    """

    tasks: Mapping[str, Sequence[Item]]
    measure: Measure | None = None
    sampling: SamplingConfig = SamplingConfig()
    tries: int = 1
    span_length: SpanLength = "told"
    steps: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    free: int = 0
    prompts: tuple[str, ...] = ("The",)


def report(
    plan: EvalPlan,
    folder: Path,
    model: tuple[str, DiffusionLM],
    baseline: tuple[str, DiffusionLM] | None = None,
    *,
    progress: ProgressCallback = lambda model, task, done, count: None,
) -> Report:
    """Run an evaluation, or resume the one in `folder`. `progress` is called after every item.

    ValueError if the baseline has to score `free` texts but does not read as an AR model.
    """
    if plan.free and baseline and not baseline[1].config.reads_as_ar_model:
        raise ValueError(
            f"free={plan.free} texts are scored by an AR model, and the baseline {baseline[0]} is none; give another "
            "--baseline, or leave out --free"
        )

    def run(
        label: str, lm: DiffusionLM, subfolder: str, tasks: Mapping[str, Sequence[Item]], sampling: SamplingConfig
    ) -> Any:
        def task_progress(task: str, done: int) -> None:
            progress(label, task, done, len(tasks[task]))

        measure = best_measure(lm.denoiser) if subfolder == "baseline" else plan.measure
        return evaluate(
            lm,
            tasks,
            folder / subfolder,
            measure=measure,
            sampling=sampling,
            tries=plan.tries,
            span_length=plan.span_length,
            progress=task_progress,
        )

    name, lm = model
    ours = run(name, lm, "model", plan.tasks, plan.sampling)
    theirs = run(*baseline, "baseline", plan.tasks, plan.sampling) if baseline else {}
    generative = {
        task: items[:FIGURE_ITEMS] for task, items in plan.tasks.items() if not isinstance(items[0], MultipleChoice)
    }
    by_steps: dict[str, dict[float, float]] = {task: {} for task in generative}
    for steps in plan.steps:
        sampling = replace(plan.sampling, steps=steps, threshold=None, tolerance=None, policy=None)
        for task, scored in run(f"{name}, {steps} steps", lm, f"steps-{steps}", generative, sampling).items():
            by_steps[task][float(steps)] = score_row(task, scored).score
    calibration = {
        task: calibration_curve(plan.tasks[task], scored) for task, scored in ours.items() if task not in generative
    }
    settings: dict[str, Any] = {"card": to_plain(lm.config), "sampling": to_plain(plan.sampling)}
    settings["measure"] = to_plain(plan.measure or best_measure(lm.denoiser))
    if plan.texts:
        settings["bits_per_byte"] = _bits_per_byte(plan, lm, baseline)
    if plan.free and baseline:
        both = {"model": lm, "baseline": baseline[1]}
        settings["from_nothing"] = {who: _unconditional(plan, one, baseline[1]) for who, one in both.items()}
    return Report(
        model=name,
        baseline=baseline[0] if baseline else None,
        rows=[score_row(task, scored) for task, scored in ours.items()],
        baseline_rows=[score_row(task, scored) for task, scored in theirs.items()],
        differences=[difference(task, ours[task], scored) for task, scored in theirs.items()],
        settings=settings,
        figures=_figures(
            by_steps if plan.steps else {}, calibration, _loss_by_noise(lm, plan.texts) if plan.texts else {}
        ),
        samples={
            f"Continuation of “{prompt}”; tokens decoded later are redder": _sample(lm, prompt, plan)
            for prompt in plan.prompts
        },
    )


def _figures(
    by_steps: dict[str, dict[float, float]],
    calibration: dict[str, dict[float, float]],
    loss_by_noise: dict[str, dict[float, float]],
) -> dict[str, str]:
    figures = {}
    if by_steps:
        figures["Score by denoising steps"] = line_plot(by_steps, "denoising steps", "score (percent)")
    if calibration:
        diagonal = {"perfect calibration": {0.0: 0.0, 100.0: 100.0}}
        figures["Calibration of choices"] = line_plot(
            diagonal | calibration, "confidence (percent)", "accuracy (percent)"
        )
    if loss_by_noise:
        figures["Cross-entropy by noise level"] = line_plot(loss_by_noise, "share of masked tokens", "nats per token")
    return figures


def _bits_per_byte(plan: EvalPlan, lm: DiffusionLM, baseline: tuple[str, DiffusionLM] | None) -> dict[str, Any]:
    """Bits per byte of the first texts, under the model and the baseline."""
    texts, values = plan.texts[:FIGURE_ITEMS], {}
    measure = plan.measure or best_measure(lm.denoiser)
    values["model"] = bits_per_byte(lm.denoiser, texts, lm.tokenizer, measure)
    if baseline:
        other = baseline[1]
        values["baseline"] = bits_per_byte(other.denoiser, texts, other.tokenizer, best_measure(other.denoiser))
    return {who: {"bits_per_byte": round(mean, 4), "se": round(se, 4)} for who, (mean, se) in values.items()}


def _unconditional(plan: EvalPlan, lm: DiffusionLM, judge: DiffusionLM) -> dict[str, float]:
    """The perplexity under `judge` and the diversity of unconditional samples (at temperature 1 if unset)."""
    sampling = replace(plan.sampling, temperature=plan.sampling.temperature or 1.0)
    run = lm.prepare_generation([""] * plan.free, _sample_length(lm), sampling)
    texts = [result.completion or "" for result in run.results()]
    generated = [tokens[mask].tolist() for tokens, mask in zip(run.canvas.tokens, run.canvas.written, strict=True)]
    read = [judge.tokenizer.encode(text) for text in texts]
    values = {
        "perplexity": perplexity(judge.tokenizer, judge.denoiser.network, [""] * plan.free, read),
        "distinct_1": distinct(generated, 1),
        "distinct_2": distinct(generated, 2),
        "entropy": fmean(map(entropy, generated)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def _loss_by_noise(lm: DiffusionLM, texts: Sequence[str]) -> dict[str, dict[float, float]]:
    """The unweighted cross-entropy of masked tokens, by the share of masked tokens."""
    if lm.config.recipe == "as_is" and lm.config.shift:
        return {}
    length = min(256, lm.denoiser.context_length or 256)
    rows = pack(Dataset.from_dict({"text": list(texts)}), lm.tokenizer, length, keep_tail=True)
    assert isinstance(rows, Dataset)
    metrics = validate(lm.denoiser, rows.select(range(min(FIGURE_ITEMS, len(rows)))), batch_size=4)
    prefix = "nll_at_"
    return {"model": {float(k.removeprefix(prefix)): v for k, v in metrics.items() if k.startswith(prefix)}}


def _sample(lm: DiffusionLM, prompt: str, plan: EvalPlan) -> str:
    run = lm.prepare_generation([prompt], _sample_length(lm), plan.sampling)
    return step_colored(lm.tokenizer, run)


def _sample_length(lm: DiffusionLM) -> int:
    return min(64, (lm.denoiser.context_length or 128) // 2)
