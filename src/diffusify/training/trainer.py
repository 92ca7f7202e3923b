"""A `transformers.Trainer` that trains denoisers with a masked-diffusion loss."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from math import nan
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import RowShard, noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.recipe import Recipe
from diffusify.text.packing import collate
from diffusify.text.stream import RowStream
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.alignment import Alignment
from diffusify.training.budget import Budget
from diffusify.training.resilience.distributed import ShuffledRows, all_gather_rows, row_order
from diffusify.training.resilience.resilient import ResilientTrainer
from diffusify.training.stream_loader import StreamLoader
from diffusify.training.teacher import Teacher
from diffusify.training.validation import validate


class DiffusionTrainer(ResilientTrainer):
    """`transformers.Trainer` for denoisers: the usual `TrainingArguments`, a diffusion loss, and the NELBO as a metric.

    Rows and noise are sampled for a whole optimizer step, from the seed and the step: time is stratified over its
    micro-batches on all processes, and the loss is a sum divided by the global count. So the result does not depend on
    gradient accumulation, the number of processes or a resume. Packed rows have equal length, so processes have equal
    work.

    Dataset rows have `tokens`, `document` and optionally `editable`, as `diffusify.text.packing` makes them. `budget`
    ends the run and sets its progress; without it the run lasts for `args.max_steps`. For `max_skipped` and `notify`
    see `ResilientTrainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        budget: Budget | None = None,
        max_skipped: int = 10,
        notify: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        args.remove_unused_columns = False
        args.label_names = []
        compiled = args.torch_compile  # `optimize_for_training` compiles layer by layer; Trainer would compile it all
        args.torch_compile, args.torch_compile_backend = False, None
        super().__init__(
            denoiser,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*([budget] if budget else []), *(callbacks or [])],  # which may read a restored budget
            max_skipped=max_skipped,
            notify=notify,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.recipe, self.budget = recipe, budget
        self.teacher = Teacher(denoiser, args.device) if recipe.objective.distills_from("base") else None
        self.alignment = Alignment(denoiser, args.device) if recipe.alignment else None
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        optimize_for_training(denoiser.network, autocast_dtype=half, compiled=compiled)
        self.stream: StreamLoader | None = None
        config = denoiser.diffusion_config
        self._span_tokenizer: TextTokenizer | None = None
        if recipe.spans is not None and tokenizer is not None:
            self._span_tokenizer = TextTokenizer(tokenizer, config.mask_token_id, config.frame)
        self._nll: list[Tensor] = []
        self._ar_nll: list[Tensor] = []

    @property
    def _progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        return self.state.global_step / self.state.max_steps if self.budget is None else self.budget.progress

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True  # a stream resumes from its own state instead of reading all earlier batches
        self.stream = StreamLoader(self.train_dataset, self.args)
        return self.stream

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not has_length(rows) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows_per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ShuffledRows(len(rows), rows_per_step, seed, lambda: self.state.global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(output_dir, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.stream is not None and checkpoint is not None:
            self.stream.load(checkpoint, self.state.global_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        if self._is_finished():
            return [], None
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 65_536
        recipe = self.recipe.at(self.state.global_step, self._progress)
        objective, schedule = recipe.objective, recipe.schedule
        sizes = [len(batch["tokens"]) for batch in batches]
        text = Canvas.clean(**{name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]})
        order = row_order(sizes, self.args.world_size)
        shard = RowShard(all_gather_rows(text.document)[order.flatten().argsort()], order[self.args.process_index])
        config, generator = self.denoiser.diffusion_config, torch.Generator().manual_seed(seed % 2**63)
        text = self.denoiser.predictable(text)
        if recipe.spans is not None:
            assert self._span_tokenizer is not None, "spans end with the tokenizer's end token"
            text = recipe.spans(text, self._span_tokenizer, generator=generator, shard=shard)
        step = noised(
            text,
            recipe.time,
            schedule,
            config.mask_token_id,
            ar_share=objective.ar_share if objective.ar_weight else 0.0,
            generator=generator,
            shard=shard,
        )
        if recipe.length_noise is not None:
            assert config.length_tokens is not None, "make_denoiser adds the tokens"
            step = recipe.length_noise(
                step, config.length_tokens, schedule, config.mask_token_id, generator=generator, shard=shard
            )
        step = replace(step, weight=step.weight * recipe.position_weight(step.canvas))
        starts = [sum(sizes[:i]) * step.views for i in range(len(sizes) + 1)]
        aligned = 0 if self.alignment is None else int(self.alignment.positions(step).sum())
        counts = [objective.count(step.canvas), (step.canvas.sizes > 0).sum(), torch.tensor(aligned)]
        all_counts: Any = self.accelerator.gather(torch.stack(counts).to(device))
        totals = all_counts.view(-1, len(counts)).sum(0).clamp_min(1)
        inputs = {"recipe": recipe} | dict(zip(("count", "texts", "aligned"), totals, strict=True))
        return [inputs | {"noised": step[a:b]} for a, b in zip(starts, starts[1:], strict=False)], totals[0]

    def _is_finished(self) -> bool:
        """Whether the budget is spent, as that of a finished run's checkpoint; training stops then."""
        if self.state.global_step >= self.state.max_steps or (self.budget and self.budget.progress >= 1):
            self.control.should_training_stop = True
            return True
        return False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, recipe = inputs["noised"].to(self.args.device), inputs["recipe"]
        objective, length_head = recipe.objective, self.denoiser.length_head
        teacher_logits = self.teacher(batch) if self.teacher and objective.distills_from("base") else None
        prediction = model(
            batch.canvas,
            batch.text,
            positions=batch.targets,
            ar_positions=objective.ar_targets(batch),
            attention=recipe.attention,
            return_lengths=length_head is not None and length_head.outer.weight.requires_grad,
            return_layers=recipe.alignment > 0,
            loss=lambda logits, ar_logits: objective(logits, ar_logits, batch, recipe.schedule, teacher_logits),
        )
        loss = prediction.loss
        self._nll.append(torch.stack([loss.nll.sum(), loss.nll.new_tensor(len(loss.nll))]))
        self._ar_nll.append(torch.stack([loss.ar_nll.sum(), loss.ar_nll.new_tensor(len(loss.ar_nll))]))
        share = loss.total / inputs["count"]
        if prediction.length_logits is not None:
            sizes = batch.canvas.sizes
            targets = (sizes[sizes > 0] - 1).clamp_max(prediction.length_logits.shape[1] - 1)
            error = nn.functional.cross_entropy(prediction.length_logits, targets, reduction="sum")
            share = share + objective.length_weight * error / inputs["texts"]
        if self.alignment and recipe.alignment:
            share = share + recipe.alignment * self.alignment(batch, prediction.layers) / inputs["aligned"]
        loss_on_rank = share * self.accelerator.num_processes
        return (loss_on_rank, prediction) if return_outputs else loss_on_rank

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss over all processes, its plain cross-entropies (`nll`, `ar_nll`, nats) and `skipped` steps."""
        if "loss" in logs:
            pairs = {"loss": self.guard.losses, "nll": self._nll, "ar_nll": self._ar_nll}
            local_sums = torch.stack([_finite_sum(values, self.args.device) for values in pairs.values()])
            sums: Any = self.accelerator.reduce(local_sums, "sum")
            means = zip(pairs, sums.tolist(), strict=True)
            logs |= {"loss": nan} | {name: total / count for name, (total, count) in means if count}
            if self.guard.skipped:
                logs["skipped"] = self.guard.skipped
            for values in pairs.values():
                values.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of `validate` on held-out rows, with the final attention pattern and the same noise every time."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(rows, Dataset), "the bound is measured on a dataset of packed rows, not on a stream"
        if not len(rows):  # nothing is held out
            return {}
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
        """Create the learning rate schedule of `args`; with a budget of minutes, a linear one over time."""
        if self.budget is None or self.budget.minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        budget, warmup = self.budget, self.args.warmup_steps
        scheduled: Any = optimizer or self.optimizer

        def factor(step: int) -> float:
            """A `warmup` below 1 is a share of the time, else a number of steps."""
            warmed = budget.progress / warmup if 0 < warmup < 1 else (step + 1) / max(1, warmup)
            return min(1.0, warmed) * max(0.0, 1 - budget.progress)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, factor)
        return self.lr_scheduler


def _finite_sum(pairs: list[Tensor], device: torch.device) -> Tensor:
    """The sum of (sum, count) pairs, without those that are not finite."""
    if not pairs:
        return torch.zeros(2, device=device)
    stacked = torch.stack(pairs)
    return torch.where(stacked.isfinite().all(1, keepdim=True), stacked, 0.0).sum(0)
