"""Rollouts: the sampled answers to prompts, generated through the engine of the server, many in each forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.policy_objectives import NEVER, SampledTexts
from diffusify.reinforcement.reward_prompts import RewardPrompt
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import Generation, GenerationRun
from diffusify.sampling.sampler import end_tokens, generated_ends
from diffusify.sampling.sampling_config import SamplingConfig

try:
    from diffusify.serving.engine.job import QueuedJob
    from diffusify.serving.engine.model_queue import ModelQueue
except ImportError as error:
    raise ImportError(f"reinforce needs `pip install 'diffusify[serve]'` ({error.name} is missing)") from error


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: its text, the row that the sampler left, and when each of its positions was written.

    `forwards` are the forward passes up to the answer's last token.
    """

    completion: str
    tokens: int
    forwards: int
    ended: bool
    canvas: Canvas
    scored: Tensor
    step: Tensor


class Trace:
    """Records the step at which each position was written last, and the forward passes of each row."""

    def __init__(self) -> None:
        self.count, self.canvas = 0, None
        self.step = self.forwards = torch.empty(0)

    def __call__(self, progress: Any) -> None:
        before, self.canvas = self.canvas, progress.canvas
        if before is None:
            self.step = torch.full_like(progress.canvas.tokens, NEVER)
            self.forwards = torch.zeros_like(self.step[:, 0])
            return
        changed = before.open | (before.tokens != progress.canvas.tokens)
        written = progress.canvas.written & changed
        self.step = self.step.masked_fill(written, self.count).masked_fill(progress.canvas.open, NEVER)
        self.forwards = torch.where(written.any(1), progress.forwards, self.forwards)
        self.count += 1


def generate_rollouts(
    lm: DiffusionLM,
    groups: Sequence[tuple[Sequence[RewardPrompt], Sequence[SamplingConfig]]],
    max_new_tokens: int | None,
    *,
    tokens: int = 16384,
) -> list[Rollout]:
    """The answers to groups of prompts, in order, with settings for each prompt.

    The prompts of a group are one batch. Groups join and leave between forward passes, which all running ones share;
    their rows have at most `tokens` positions, or those of the largest group. Raises what a generation raises.
    """
    queue = ModelQueue("rollouts", lm, tokens)
    jobs, traces = [], [Trace() for _ in groups]
    with torch.inference_mode():
        for (prompts, settings), trace in zip(groups, traces, strict=True):

            def prepare(lm: DiffusionLM, prompts: Any = prompts, settings: Any = settings) -> GenerationRun:
                ids = [prompt.ids for prompt in prompts]
                run = lm.prepare_chat if prompts[0].is_chat else lm.prepare_generation
                return run(ids, max_new_tokens, settings)

            longest = max(len(prompt.ids) for prompt in prompts) + (max_new_tokens or 0)
            queue.tokens = max(queue.tokens, len(prompts) * longest)
            jobs.append(QueuedJob("rollouts", prepare, trace))
            queue.receive(jobs[-1])
        while not all(job.ended for job in jobs):
            queue.admit()
            queue.step()
    for job in jobs:
        if job.error is not None:
            raise job.error
    return [each for job, trace in zip(jobs, traces, strict=True) for each in rollouts_of(job.work, trace)]


def rollouts_of(run: GenerationRun, trace: Trace) -> Iterator[Rollout]:
    """The rollouts of a finished generation that a trace has followed."""
    results: list[Generation] = run.results()
    ends = end_tokens([run.end_token_id] * len(run.canvas.tokens), run.canvas.tokens.device)
    is_end = generated_ends(run.canvas, ends).long()
    scored = run.canvas.written & (is_end.cumsum(1) - is_end == 0)
    for row, result in enumerate(results):
        yield Rollout(
            completion=result.completion or "",
            tokens=int(scored[row].sum()),
            forwards=int(trace.forwards[row]),
            ended=result.finish_reason == "stop",
            canvas=run.canvas[row : row + 1],
            scored=scored[row],
            step=trace.step[row],
        )


def longest_groups_first(rollouts: Sequence[Rollout], size: int) -> list[int]:
    """The order of rollouts in which groups of similar length are neighbours, the longest first."""
    tokens = torch.tensor([rollout.tokens for rollout in rollouts]).unflatten(0, (-1, size)).sum(1)
    groups = tokens.argsort(descending=True, stable=True).tolist()
    return [group * size + i for group in groups for i in range(size)]


def stack_rollouts(rollouts: Sequence[Rollout], advantages: Tensor, pad: int) -> SampledTexts:
    """The rollouts as one batch on the CPU, padded to the longest."""
    n = max(rollout.canvas.tokens.shape[1] for rollout in rollouts)

    def stacked(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
        out = torch.full((len(rows), n), fill)
        for target, row in zip(out, rows, strict=True):
            target[: len(row)] = row
        return out

    fills = {"tokens": pad, "open": False, "editable": False, "document": 0}
    canvas = Canvas(**{name: stacked([getattr(r.canvas, name)[0] for r in rollouts], fills[name]) for name in fills})
    scored = stacked([rollout.scored for rollout in rollouts], False)
    return SampledTexts(canvas, scored, stacked([rollout.step for rollout in rollouts], NEVER), advantages)
