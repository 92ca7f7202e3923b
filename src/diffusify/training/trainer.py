"""The training loop: a `transformers.Trainer` that noises texts and asks a denoiser to repair them."""

from collections.abc import Callable, Iterator
from itertools import islice
from math import nan
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Share, noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.recipes import Recipe
from diffusify.text.packing import collate
from diffusify.text.stream import RowStream
from diffusify.training.budget import Budget
from diffusify.training.resilience.distributed import Shuffled, gathered, places
from diffusify.training.resilience.resilient import ResilientTrainer
from diffusify.training.stream_loader import StreamLoader
from diffusify.training.teacher import Teacher
from diffusify.training.validation import validate


class DiffusionTrainer(ResilientTrainer):
    """`transformers.Trainer` for denoisers: the usual `TrainingArguments`, diffusion's loss, bounds as metrics.

    Rows and noise are drawn for a whole optimizer step, from the seed and the step: time is stratified over all its
    micro-batches on all processes, the loss is a sum divided by the global count, and neither accumulation nor the
    number of processes nor a resume changes anything. Packed rows have one length, so every process has the same work.

    Datasets have rows `{"tokens", "document"}` and perhaps `"editable"`, as `diffusify.text.packing` makes them.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        budget: Budget | None = None,
        max_skipped: int = 10,
        tell: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        args.remove_unused_columns = False
        args.label_names = []
        compiled = args.torch_compile  # by us: layer after layer, where shapes are few
        args.torch_compile, args.torch_compile_backend = False, None
        super().__init__(
            denoiser,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), *([budget] if budget else [])],
            max_skipped=max_skipped,
            tell=tell,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.recipe, self.budget = recipe, budget
        self.teacher = Teacher(denoiser) if recipe.objective.taught_by("base") else None
        optimize_for_training(denoiser.network, compiled=compiled)
        self.stream: StreamLoader | None = None
        self._nll: list[Tensor] = []
        self._ar_nll: list[Tensor] = []

    @property
    def _progress(self) -> float:
        """The share of the run that is done."""
        return self.state.global_step / self.state.max_steps if self.budget is None else self.budget.progress

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True  # a stream goes on by its own state, without reading everything again
        self.stream = StreamLoader(self.train_dataset, self.args)
        return self.stream

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(rows) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return Shuffled(len(rows), step, seed, lambda: self.state.global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(output_dir, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.stream is not None and checkpoint is not None:
            self.stream.load(checkpoint)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        if self.state.global_step >= self.state.max_steps or (self.budget and self.budget.progress >= 1):
            self.control.should_training_stop = True  # it was stopped at its end
            return [], None
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 65_536
        recipe = self.recipe.at(self.state.global_step, self._progress)
        objective, schedule = recipe.objective, recipe.schedule
        rows = [len(batch["tokens"]) for batch in batches]
        text = Canvas.clean(**{name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]})
        place = places(rows, self.args.world_size)
        share = Share(gathered(text.document)[place.flatten().argsort()], place[self.args.process_index])
        whole = noised(
            self.denoiser.predictable(text),
            recipe.time,
            schedule,
            self.denoiser.diffusion_config.mask_token_id,
            ar_share=objective.ar_share if objective.ar_weight else 0.0,
            generator=torch.Generator().manual_seed(seed % 2**63),
            share=share,
        )
        starts = [sum(rows[:i]) * whole.views for i in range(len(rows) + 1)]
        here = torch.stack([objective.count(whole.canvas), (whole.canvas.sizes > 0).sum()]).to(device)
        everywhere: Any = self.accelerator.gather(here)
        count, texts = everywhere.view(-1, 2).sum(0).clamp_min(1)
        cuts = zip(starts, starts[1:], strict=False)
        return [{"recipe": recipe, "noised": whole[a:b], "count": count, "texts": texts} for a, b in cuts], count

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, recipe = inputs["noised"].to(self.args.device), inputs["recipe"]
        objective = recipe.objective
        taught = self.teacher(batch) if self.teacher and objective.distill else None
        prediction = model(
            batch.canvas,
            batch.text,
            ask=batch.canvas.open,
            ar=objective.ar_targets(batch),
            attention=recipe.attention,
            lengths=self.denoiser.length_head is not None,
            loss=lambda answers, ar_output_index: objective(answers, ar_output_index, batch, recipe.schedule, taught),
        )
        loss = prediction.loss
        self._nll.append(torch.stack([loss.nll.sum(), loss.nll.new_tensor(len(loss.nll))]))
        self._ar_nll.append(torch.stack([loss.ar_nll.sum(), loss.ar_nll.new_tensor(len(loss.ar_nll))]))
        share = loss.total / inputs["count"]
        if prediction.lengths is not None:
            sizes = batch.canvas.sizes
            wanted = (sizes[sizes > 0] - 1).clamp_max(prediction.lengths.shape[1] - 1)
            error = nn.functional.cross_entropy(prediction.lengths, wanted, reduction="sum")
            share = share + objective.length_weight * error / inputs["texts"]
        loss_on_rank = share * self.accelerator.num_processes
        return (loss_on_rank, prediction) if return_outputs else loss_on_rank

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The loss over all processes, the plain cross-entropies (nats) inside it, and how many steps were skipped."""
        if "loss" in logs:
            parts = {"loss": self.guard.made, "nll": self._nll, "ar_nll": self._ar_nll}
            sums = torch.stack([_finite_sum(part, self.args.device) for part in parts.values()])
            everywhere: Any = self.accelerator.reduce(sums, "sum")
            means = zip(parts, everywhere.tolist(), strict=True)
            logs |= {"loss": nan} | {name: total / count for name, (total, count) in means if count}
            if self.guard.skipped:
                logs["skipped"] = self.guard.skipped
            for part in parts.values():
                part.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The bound on held-out text, at the model's final attention pattern, on the same noise every time."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(rows, Dataset), "the bound is measured on packed rows that can be read again"
        report = validate(
            self.denoiser,
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.compute_loss_context_manager,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in report.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The arguments' own schedule; under a budget of minutes, a linear one over the time instead of the steps."""
        if self.budget is None or self.budget.minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        budget, warmup = self.budget, max(1, self.args.get_warmup_steps(num_training_steps))
        made: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            made, lambda step: min(1.0, (step + 1) / warmup) * max(0.0, 1 - budget.progress)
        )
        return self.lr_scheduler


def _finite_sum(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of those pairs of a sum and a count that are finite."""
    if not parts:
        return torch.zeros(2, device=device)
    pairs = torch.stack(parts)
    return torch.where(pairs.isfinite().all(1, keepdim=True), pairs, 0.0).sum(0)
