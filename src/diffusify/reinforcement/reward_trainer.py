"""A trainer that samples texts, asks rewards for them, and learns from a policy objective."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from math import gcd
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import Loss, Objective
from diffusify.diffusion.policy_objectives import (
    Grpo,
    PolicyLoss,
    PolicyObjective,
    SampledTexts,
    group_advantages,
    token_log_probs,
)
from diffusify.models.accelerator import choose_dtype
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.lora import merge_lora
from diffusify.models.recipe import Recipe
from diffusify.reinforcement.reward_prompts import RewardPrompt, columns_of
from diffusify.reinforcement.rewards import Reward, RewardError
from diffusify.reinforcement.rollouts import Rollout, generate_rollouts, longest_groups_first, stack_rollouts
from diffusify.reinforcement.text_log import TextLog
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.resilience.distributed import ShuffledRows
from diffusify.training.teacher import Teacher
from diffusify.training.trainer import DiffusionTrainer

_SAVED = "rollouts.safetensors"  # in a checkpoint between the updates of one batch of rollouts
_TEXTS_PER_BATCH = 16  # of an evaluation


@dataclass(frozen=True)
class Reinforcement:
    """What a run learns from, and how its texts are sampled.

    A step samples `group` answers to each of `prompts` prompts, and makes `updates` optimizer steps with them.
    """

    policy: PolicyObjective
    rewards: tuple[Reward, ...]
    sampling: SamplingConfig
    group: int
    prompts: int
    updates: int
    max_new_tokens: int | None
    reward_seconds: float
    rollout_tokens: int


@dataclass
class _Batch:
    """The texts of one step, the canvases that score them, and the scores at the first update (0 elsewhere)."""

    number: int
    texts: SampledTexts
    noised: Noised
    old: Tensor
    reference: Tensor


class RewardTrainer(DiffusionTrainer):
    """A `DiffusionTrainer` whose steps learn from rewards; its rows are prompts.

    The rollouts of a step depend on the seed, the step and the weights. Between several updates with the same rollouts
    a checkpoint contains them. A reward that fails ends the run after a checkpoint, with a `RewardError`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        *args: Any,
        reinforcement: Reinforcement,
        text_tokenizer: TextTokenizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(denoiser, recipe, *args, **kwargs)
        self.reinforcement, self.text_tokenizer = reinforcement, text_tokenizer
        policy, length_tokens = reinforcement.policy, denoiser.diffusion_config.length_tokens
        if length_tokens is not None:  # answers are sampled without them, so they are scored without them
            denoiser.limit_vocabulary(text_tokenizer.token_ids - set(length_tokens.ids))
        self.reference = Teacher(denoiser, self.args.device).denoiser if policy.kl_weight else None
        self.drafts: Objective | None = recipe.objective if isinstance(policy, Grpo) and policy.drafts else None
        self.text_log = TextLog(self.folder / "texts.jsonl")
        self._batch: _Batch | None = None
        self._metrics: list[dict[str, float]] = []
        self._losses: list[PolicyLoss] = []
        self._bad_rewards = 0

    def get_train_dataloader(self) -> Any:
        self.args.ignore_data_skip = True
        return repeat({})  # the prompts of a step are a function of its number

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        if self._is_finished():
            return [], None
        start, number = perf_counter(), self.state.global_step // self.reinforcement.updates
        if self._batch is None or self._batch.number != number:
            with self._saving_if_rewards_fail():
                self._batch = self._roll_out(number)
        if self.budget is not None:
            self.budget.seconds += perf_counter() - start  # it counts from the first micro-batch
        count, size = self.reinforcement.policy.count(self._batch.texts).to(device), self._train_batch_size
        first = self.state.global_step % self.reinforcement.updates == 0
        rows = [slice(i * size, (i + 1) * size) for i in range(num_batches)]
        return [{"rows": each, "count": count, "first": first} for each in rows], count

    @contextmanager
    def _saving_if_rewards_fail(self) -> Iterator[None]:
        """Save a checkpoint before a `RewardError` ends the run."""
        try:
            yield
        except RewardError as error:
            if not self.state.global_step:
                raise
            self._save_checkpoint(self.denoiser, None)
            hint = f"{self.checkpoint_status}; the same command resumes from it when the reward works"
            raise RewardError(f"{error}; {hint}") from error

    def _roll_out(self, number: int) -> _Batch:
        """Sample the texts of a batch, get their rewards, and choose the canvases to score them on."""
        settings, start = self.reinforcement, perf_counter()
        order = ShuffledRows(len(self._train_prompts), settings.prompts, self.args.seed, lambda: number)
        start_row = number % order.steps * settings.prompts  # of the epoch
        prompts = [self._train_prompts[index] for index in islice(order, start_row, start_row + settings.prompts)]
        first = (self.args.seed * 1_000_003 + number) * 65_536
        seeds = [(first + index) % 2**63 for index in range(settings.prompts * settings.group)]
        samples = [replace(settings.sampling, seed=seed) for seed in seeds]
        size = settings.group
        groups = [([prompt] * size, samples[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]
        rollouts = self._generate(groups)
        seconds = perf_counter() - start
        repeated = [prompt for prompt in prompts for _ in range(size)]
        rewards = self._reward(repeated, rollouts, "train")
        total = rewards @ torch.tensor([reward.weight for reward in settings.rewards], dtype=torch.float64)
        if total.isnan().all():
            raise RewardError(
                f"no text of step {self.state.global_step} has a finite reward; return a finite number for each text"
            )
        self._bad_rewards += int(total.isnan().sum())
        advantages = group_advantages(total.unflatten(0, (-1, size)))
        self._metrics.append(
            _text_metrics(settings.rewards, rewards, rollouts)
            | {
                "equal_groups": float((advantages == 0).all(1).double().mean()),
                "rollouts_per_second": len(rollouts) / seconds,
            }
        )
        order, pad = longest_groups_first(rollouts, size), self.text_tokenizer.pad_token_id
        texts = stack_rollouts([rollouts[i] for i in order], advantages.flatten()[order].float(), pad)
        return self._make_batch(number, texts)

    def _make_batch(self, number: int, texts: SampledTexts) -> _Batch:
        """A batch without scores. Its canvases are a function of the texts, the seed and the number."""
        last = (self.args.seed * 1_000_003 + number) * 65_536 + 65_535  # the seed of no text
        generator, noise = torch.Generator().manual_seed(last % 2**63), self.denoiser.diffusion_config.mask_token_id
        noised = self.reinforcement.policy.canvases(texts, self.recipe.time, self.recipe.schedule, noise, generator)
        return _Batch(number, texts, noised, *torch.zeros(2, *noised.clean.shape))

    @property
    def _train_prompts(self) -> Sequence[RewardPrompt]:
        prompts: Any = self.train_dataset
        return prompts

    def _generate(self, groups: list[tuple[list[RewardPrompt], list[SamplingConfig]]]) -> list[Rollout]:
        """Sample from a copy of the model that is made faster for it."""
        denoiser = deepcopy(self.denoiser).eval()
        merge_lora(denoiser.network)
        denoiser.to(choose_dtype("auto", denoiser.device))
        optimize_for_inference(denoiser.network)
        settings = self.reinforcement
        lm = DiffusionLM(denoiser, self.text_tokenizer)
        return generate_rollouts(lm, groups, settings.max_new_tokens, tokens=settings.rollout_tokens)

    def _reward(self, prompts: list[RewardPrompt], rollouts: list[Rollout], split: str) -> Tensor:
        """The rewards [texts, rewards] of rollouts, which are logged with them."""
        texts: list[Any] = [rollout.completion for rollout in rollouts]
        if prompts[0].is_chat:
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        shown, columns = [prompt.shown for prompt in prompts], columns_of(prompts)
        seconds = self.reinforcement.reward_seconds
        found = [each(shown, texts, columns, seconds=seconds) for each in self.reinforcement.rewards]
        rewards = torch.stack(found, 1)
        names = [reward.name for reward in self.reinforcement.rewards]
        self.text_log.add(self.state.global_step, split, shown, [r.completion for r in rollouts], names, rewards)
        return rewards

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, policy, device = self._batch, self.reinforcement.policy, self.args.device
        assert batch is not None, "get_batch_samples has made it"
        rows, views = inputs["rows"], batch.noised.views
        canvases = slice(rows.start * views, rows.stop * views)
        noised, texts = batch.noised[canvases].to(device), batch.texts[rows].to(device)
        scored = policy.scored(noised)
        if inputs["first"] and self.reference is not None:
            with torch.no_grad():
                reference = self._score(self.reference, noised, None)[1]
            batch.reference[canvases] = _scattered(scored, reference)
        old, reference = (each[canvases].to(device)[scored] for each in (batch.old, batch.reference))

        def policy_loss(log_prob: Tensor) -> Tensor:
            before = log_prob.detach() if inputs["first"] else old
            found = policy(log_prob, before, reference if policy.kl_weight else None, noised, texts)
            self._losses.append(found)
            return found.total

        loss, log_prob = self._score(model, noised, policy_loss)
        if inputs["first"]:
            batch.old[canvases] = _scattered(scored, log_prob.detach())
        self._nll.append(torch.stack([loss.nll.sum(), loss.nll.new_tensor(len(loss.nll))]))
        share = loss.total / inputs["count"]
        return (share, loss) if return_outputs else share

    def _score(self, model: Any, noised: Noised, policy_loss: Any) -> tuple[Loss, Tensor]:
        """The loss of canvases, that of the drafts included, and the log-probabilities of the scored tokens.

        Without a `policy_loss` the loss is 0.
        """
        policy, drafts = self.reinforcement.policy, self.drafts if policy_loss else None
        ar_positions = noised.ar_positions if drafts is None else drafts.ar_targets(noised)
        log_prob = torch.empty(0)

        def loss(logits: LazyLogits, ar_logits: LazyLogits) -> Loss:
            nonlocal log_prob
            own = ar_logits[noised.ar_positions[ar_positions]] if policy.reads_ar_half else logits
            tokens = noised.clean[policy.scored(noised)]
            log_prob = token_log_probs(own, tokens, self.reinforcement.sampling.temperature)
            total, none = policy_loss(log_prob) if policy_loss else log_prob.new_zeros(()), log_prob.new_zeros(0)
            if drafts is None or not isinstance(policy, Grpo):
                return Loss(total, log_prob.new_ones(()), none, none)
            alone = replace(noised, ar_positions=torch.zeros_like(noised.ar_positions))
            taught = drafts(logits, ar_logits[drafts.ar_targets(alone)[ar_positions]], alone, self.recipe.schedule)
            return replace(taught, total=total + policy.drafts * taught.total)

        targets = noised.targets if drafts or not policy.reads_ar_half else torch.zeros_like(noised.targets)
        prediction = model(
            noised.canvas, noised.text, positions=targets, ar_positions=ar_positions,
            attention=self.recipe.attention, group=gcd(len(noised.text), self.reinforcement.group), loss=loss,
        )  # fmt: skip
        return prediction.loss, log_prob

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the rewards of the rollouts, and the policy's KL divergence and clipped share."""
        if "loss" in logs:
            names = dict.fromkeys(chain.from_iterable(self._metrics))
            logs |= {name: fmean(each[name] for each in self._metrics) for name in names}
            if count := sum(loss.count for loss in self._losses):
                if self.reference is not None:
                    logs["kl"] = sum(float(loss.kl) for loss in self._losses) / count
                logs["clipped"] = sum(float(loss.clipped) for loss in self._losses) / count
            if self._bad_rewards:
                logs["bad_rewards"] = self._bad_rewards
            self._metrics.clear()
            self._losses.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The rewards of greedy answers to held-out prompts; empty if nothing is held out."""
        prompts: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if not prompts:
            return {}
        greedy = replace(self.reinforcement.sampling, temperature=0.0)
        batches = [prompts[i : i + _TEXTS_PER_BATCH] for i in range(0, len(prompts), _TEXTS_PER_BATCH)]
        rollouts = self._generate([(batch, [greedy] * len(batch)) for batch in batches])
        with self._saving_if_rewards_fail():
            rewards = self._reward(prompts, rollouts, "held_out")
        report = _text_metrics(self.reinforcement.rewards, rewards, rollouts)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in report.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        batch = self._batch
        if batch is not None and self.state.global_step % self.reinforcement.updates:
            texts = {"scored": batch.texts.scored, "step": batch.texts.step, "advantage": batch.texts.advantage}
            scores = {"old": batch.old, "reference": batch.reference, "number": torch.tensor(batch.number)}
            tensors = vars(batch.texts.canvas) | texts | scores
            save_file({name: each.contiguous() for name, each in tensors.items()}, Path(output_dir) / _SAVED)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / _SAVED).is_file():
            saved = load_file(path)
            canvas = Canvas(**{name: saved.pop(name) for name in ("tokens", "open", "editable", "document")})
            old, reference, number = (saved.pop(name) for name in ("old", "reference", "number"))
            batch = self._make_batch(int(number), SampledTexts(canvas, **saved))
            self._batch = replace(batch, old=old, reference=reference)


def _scattered(mask: Tensor, values: Tensor) -> Tensor:
    """Values at the positions of a mask, 0 elsewhere, on the CPU."""
    return torch.zeros(mask.shape).masked_scatter(mask.cpu(), values.float().cpu())


def _text_metrics(rewards: tuple[Reward, ...], values: Tensor, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over texts: the reward and its parts, length in tokens, the share that ended, tokens per forward pass."""
    weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
    parts = {f"reward_{reward.name}": values[:, i] for i, reward in enumerate(rewards)} if len(rewards) > 1 else {}
    means = {name: float(each.nanmean()) for name, each in ({"reward": values @ weights} | parts).items()}
    return means | {
        "answer_tokens": fmean(rollout.tokens for rollout in rollouts),
        "ended": fmean(rollout.ended for rollout in rollouts),
        "tokens_per_forward": sum(r.tokens for r in rollouts) / sum(max(1, r.forwards) for r in rollouts),
    }
