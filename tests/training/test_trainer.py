"""The trainer (law 8): how a batch is split does not change the loss, and a resumed run equals an undisturbed one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from diffusify.canvas import Canvas
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import load_denoiser
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts
from diffusify.training.budget import Budget
from diffusify.training.progress import TrainingProgress
from diffusify.training.trainer import DiffusionTrainer
from diffusify.training.validation import validate
from tests.pretend_accelerator import accelerator


def trainer_for(
    base: str, corpus: str, out: Path, recipe: Recipe, *, lora: Lora | None = None, **options: object
) -> DiffusionTrainer:
    source = load_base(base)
    torch.manual_seed(0)
    denoiser, tokenizer = make_denoiser(source, recipe, lora=lora)
    texts = load_texts(corpus)
    assert isinstance(texts, Dataset)
    rows = pack(texts, tokenizer, 32)
    settings = {
        "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "seed": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(out), **(settings | options))  # type: ignore[arg-type]
    held_out = rows.select(range(32))
    return DiffusionTrainer(
        denoiser, recipe, args, train_dataset=rows, eval_dataset=held_out, tokenizer=source.tokenizer
    )


def weights(trainer: DiffusionTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.denoiser.network.state_dict().items()}


@pytest.mark.parametrize(
    "recipe",
    [
        block(4),
        block(4, distill=0.5),
        block(4, distill=0.0),
        block(4, complement=True, tilt=0.2),
        ar(annealing_steps=2),
    ],
    ids=["block", "half", "data", "complement", "ar"],
)
def test_accumulation_changes_nothing(causal_base: str, corpus: str, tmp_path: Path, recipe: Recipe) -> None:
    # Adam and clipping would hide a wrong scale, and Adam amplifies the rounding errors of small gradients.
    plain = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
    at_once = trainer_for(causal_base, corpus, tmp_path, recipe, **plain)
    split: dict[str, Any] = plain | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = trainer_for(causal_base, corpus, tmp_path, recipe, **split)
    at_once.train()
    accumulated.train()
    for name, tensor in weights(at_once).items():
        torch.testing.assert_close(tensor, weights(accumulated)[name], atol=2e-5, rtol=1e-4)


def test_block_sizes_follow_the_curriculum(causal_base: str, corpus: str, tmp_path: Path) -> None:
    trainer = trainer_for(causal_base, corpus, tmp_path, block(8, curriculum=(1, 2)), max_steps=10)
    sizes, real = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        sizes.append(inputs["recipe"].attention.size)
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert sizes == [1, 1, 2, 2] + [8] * 6
    assert trainer.denoiser.diffusion_config.block_size == 8


@pytest.mark.parametrize("any_order", [False, True])
def test_one_network_learns_blocks_and_infilling(
    causal_base: str, corpus: str, tmp_path: Path, any_order: bool
) -> None:
    recipe = block(4, infilling=0.5, any_order=any_order)
    trainer = trainer_for(causal_base, corpus, tmp_path, recipe, max_steps=25, learning_rate=1e-2)
    rows = trainer.eval_dataset
    assert isinstance(rows, Dataset)
    models = (trainer.denoiser, trainer.denoiser.infiller)
    before = [validate(model, rows, batch_size=32)["bound"] for model in models]
    trainer.train()
    after = [validate(model, rows, batch_size=32)["bound"] for model in models]
    assert after[0] < 0.75 * before[0] and after[1] < 0.8 * before[1]


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_the_teacher_is_the_base_as_it_was_when_the_run_began(
    causal_base: str, corpus: str, tmp_path: Path, lora: Lora | None, complement: bool
) -> None:
    """In the first step the network's own AR half still equals the base, so the two teachers agree."""
    recipes = [block(4, teacher=teacher, complement=complement) for teacher in ("own", "base")]
    own, base = (trainer_for(causal_base, corpus, tmp_path, recipe, lora=lora, max_steps=2) for recipe in recipes)
    assert own.teacher is None and base.teacher is not None
    losses: list[list[float]] = [[], []]
    for trainer, recorded in zip((own, base), losses, strict=True):
        real = trainer.compute_loss
        trainer.compute_loss = lambda *a, real=real, to=recorded, **k: to.append(loss := real(*a, **k)) or loss
    canvas = Canvas.clean(torch.arange(5, 15)[None])
    first = base.teacher.denoiser(canvas).logits
    own.train()
    base.train()
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert losses[0][1] != losses[1][1]
    assert torch.equal(base.teacher.denoiser(canvas).logits, first)
    weights = dict(base.denoiser.named_parameters())
    shared = [weights[name] is weight for name, weight in base.teacher.denoiser.named_parameters()]
    assert sum(shared) == (0 if lora is None else len([w for w in weights.values() if not w.requires_grad]))


def test_the_teacher_reads_clean_text(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Adapters for masks would take its open positions for masks; the AR half that they keep is the base."""
    losses = []
    for teacher in ("own", "base"):
        recipe = block(4, adapters="masks", teacher=teacher)
        trainer = trainer_for(causal_base, corpus, tmp_path, recipe, max_steps=1, logging_steps=1)
        trainer.train()
        losses += [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("recipe", [block(4, teacher="base"), ar(alignment=1.0)], ids=["teacher", "alignment"])
def test_frozen_copies_are_on_the_device_before_the_network_is(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """As with FSDP and DeepSpeed, which place the network themselves."""
    monkeypatch.setattr(TrainingArguments, "place_model_on_device", False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    with accelerator():
        trainer = trainer_for(causal_base, corpus, tmp_path, recipe, use_cpu=False)
        copy = trainer.teacher.denoiser if trainer.teacher else trainer.alignment.base  # pyright: ignore
        assert (trainer.denoiser.device.type, copy.device.type) == ("cpu", "cuda")


def test_checkpointing_of_activations_changes_nothing(causal_base: str, corpus: str, tmp_path: Path) -> None:
    plain = trainer_for(causal_base, corpus, tmp_path, block(4))
    checkpointed = trainer_for(causal_base, corpus, tmp_path, block(4), activation_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.denoiser.network.is_activation_checkpointing
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(checkpointed)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [block(4), block(4, ar_weight=0.0), block(4, distill=0.0), ar(annealing_steps=20)],
    ids=["ar-loss", "no-ar-loss", "distilled", "ar"],
)
def test_training_lowers_the_bound(causal_base: str, corpus: str, tmp_path: Path, recipe: Recipe) -> None:
    trainer = trainer_for(causal_base, corpus, tmp_path, recipe, max_steps=25, learning_rate=1e-2)
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert after["eval_bound"] < 0.75 * before["eval_bound"]
    assert after["eval_bits"] == pytest.approx(after["eval_bound"] / 0.693147, rel=1e-4)
    assert trainer.evaluate()["eval_bound"] == after["eval_bound"]  # the same noise every time


def test_training_lowers_the_bound_of_masked_networks(masked_base: str, corpus: str, tmp_path: Path) -> None:
    for recipe in (mlm(), block(4, masked=True)):
        trainer = trainer_for(masked_base, corpus, tmp_path, recipe, max_steps=25, learning_rate=1e-2)
        before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
        assert after["eval_bound"] < 0.75 * before["eval_bound"]
        assert "eval_ar_nll" not in after


def test_the_bound_is_a_mean_over_positions_in_the_block(causal_base: str, corpus: str, tmp_path: Path) -> None:
    trainer = trainer_for(causal_base, corpus, tmp_path, block(4))
    report = trainer.evaluate()
    places = [report[f"eval_bound_at_{place}"] for place in range(4)]
    # Position 0 counts a little less, since the first position of a document has no prediction under shift.
    assert min(places) <= report["eval_bound"] <= max(places)
    assert {"eval_nll_at_0.4", "eval_nll_at_1.0", "eval_bound_se", "eval_ar_nll"} <= report.keys()


def test_at_block_size_one_the_bound_is_the_ar_loss(causal_base: str, corpus: str, tmp_path: Path) -> None:
    report = trainer_for(causal_base, corpus, tmp_path, block(1)).evaluate()
    assert report["eval_bound"] == pytest.approx(report["eval_ar_nll"], rel=1e-4)


def test_the_bound_does_not_depend_on_how_rows_are_batched(causal_base: str, corpus: str, tmp_path: Path) -> None:
    trainer = trainer_for(causal_base, corpus, tmp_path, block(1))
    rows = trainer.eval_dataset
    assert isinstance(rows, Dataset)
    one, many = (validate(trainer.denoiser, rows, batch_size=size) for size in (1, 16))
    assert one["bound"] == pytest.approx(many["bound"], rel=1e-4)
    assert one["ar_nll"] == pytest.approx(many["ar_nll"], rel=1e-4)


def test_a_resumed_run_repeats_an_uninterrupted_one(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 5}
    undisturbed = trainer_for(causal_base, corpus, tmp_path / "a", block(4), **options)
    undisturbed.train()
    resumed = trainer_for(causal_base, corpus, tmp_path / "b", block(4), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_progress_counts_the_seconds_from_the_checkpoint(causal_base: str, corpus: str, tmp_path: Path) -> None:
    other = trainer_for(causal_base, corpus, tmp_path, block(4))
    progress = TrainingProgress(budget := Budget(9), 8, Console(quiet=True))
    trainer = DiffusionTrainer(other.denoiser, block(4), other.args, callbacks=[progress], budget=budget)
    trainer.state.stateful_callbacks = {"Budget": {"attributes": {"seconds": 100.0}}}  # pyright: ignore
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    progress.bar.stop()
    assert progress.first_second == budget.seconds == 100.0
    assert progress.bar.tasks[0].fields["note"] == "first steps"  # nothing is evaluated before them


def test_checkpoints_open_in_plain_transformers_and_as_denoisers(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Law 10."""
    trainer = trainer_for(causal_base, corpus, tmp_path, block(4), save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    loaded, tokenizer = load_denoiser(folder)
    assert loaded.diffusion_config == trainer.denoiser.diffusion_config and tokenizer.mask_token == "<|mask|>"
    row = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(row).logits, trainer.denoiser.network.eval()(row).logits)
        torch.testing.assert_close(loaded(Canvas.clean(row)).logits, trainer.denoiser(Canvas.clean(row)).logits)


def test_an_interrupted_save_leaves_the_previous_checkpoint(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(
        causal_base, corpus, tmp_path, block(4), save_strategy="steps", save_steps=1, save_total_limit=2
    )
    real = trainer._save_optimizer_and_scheduler

    def interrupted(folder: str) -> None:
        if trainer.state.global_step == 2:
            raise SystemExit("killed")
        real(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(SystemExit, match="killed"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    load_denoiser(tmp_path / "checkpoint-1")
    resumed = trainer_for(
        causal_base, corpus, tmp_path, block(4), save_strategy="steps", save_steps=1, save_total_limit=2
    )
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and load_file(tmp_path / "checkpoint-3" / "model.safetensors")


def test_torch_compile_compiles_layer_by_layer(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    name = "diffusify.training.trainer.optimize_for_training"
    monkeypatch.setattr(name, lambda network, compiled, **_: calls.append(compiled))
    for torch_compile in (False, True):
        trainer = trainer_for(causal_base, corpus, tmp_path, block(4), torch_compile=torch_compile)
        assert trainer.args.torch_compile is False  # the parent class would compile the whole model
    assert calls == [False, True]
