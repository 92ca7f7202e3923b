"""Recipes have the documented settings, and refuse settings that exclude each other."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Annealed, Bidirectional, BlockCausal, Prefix
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText
from diffusify.diffusion.masked_spans import MaskedSpans
from diffusify.diffusion.objectives import Elbo, Flat, Objective, RdmWeight
from diffusify.diffusion.schedules import Cosine
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, as_is, block, draft, mlm, saved_recipe
from tests.families import tiny_denoiser


def test_settings_of_the_recipes() -> None:
    assert (ar().shift, ar().attention, ar().time, ar().objective.weight) == (1, Bidirectional(), PerText(), Elbo())
    assert (mlm().shift, mlm().time, mlm().objective) == (
        0,
        PerText(grid=50, draws=2),
        Objective(RdmWeight(50), per="text"),
    )
    assert (block(8).shift, block(8).attention, block(8).time) == (1, BlockCausal(8, "token"), PerBlock(8))
    assert (block(8, masked=True).shift, block(8, masked=True).attention) == (0, BlockCausal(8, "block"))
    assert block().objective.ar_weight == 0.5 and block(masked=True).objective.ar_weight == 0
    assert block().objective.distill == 1.0 and block(distill=0.0).objective.distill == 0.0
    assert block(masked=True).objective.distill == block(ar_weight=0.0).objective.distill == 0.0


def test_annealing_is_linear_and_deterministic() -> None:
    recipe = ar(annealing_steps=10)
    patterns = [recipe.at(step, 0.0).attention for step in range(12)]
    shares = [pattern.share if isinstance(pattern, Annealed) else 1.0 for pattern in patterns]
    assert shares == pytest.approx([min(1, (step + 1) / 10) for step in range(12)])
    assert recipe.at(4, 0.0) == recipe.at(4, 0.5) != recipe.at(5, 0.0)
    assert ar(annealing_steps=0).at(0, 0.0).attention == Bidirectional()


def test_annealing_allows_a_share_of_attention_to_later_positions() -> None:
    visible = Annealed(0.3, seed=1)(Canvas.clean(torch.zeros(1, 200, dtype=torch.long))).visible()[0]
    ahead = torch.ones(200, 200).triu(1).bool()
    assert visible[~ahead].all()
    assert abs(float(visible[ahead].float().mean()) - 0.3) < 0.01


def test_an_ar_loss_without_a_causal_clean_half_is_refused() -> None:
    with pytest.raises(ValueError, match="ar_weight"):
        Recipe("x", 1, Bidirectional(), PerText(), Objective(ar_weight=0.5))
    with pytest.raises(ValueError, match=r"distill=0.5 need shift=1"):
        block(4, masked=True, distill=0.5)
    with pytest.raises(ValueError, match="token-causal clean half"):  # its AR logits would come from noisy text
        replace(as_is(), objective=Objective(ar_weight=0.5))


@pytest.mark.parametrize("size", [0, -1])
def test_empty_blocks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="block size"):
        block(size)


def test_the_diffusion_config_has_the_recipes_settings() -> None:
    config = block(8).diffusion_config("LlamaForCausalLM", 7, "some/base")
    assert (config.block_size, config.shift, config.mask_token_id, config.sees_right_context) == (8, 1, 7, False)
    assert tiny_denoiser("llama").diffusion_config.sees_right_context


def test_options_of_mlm() -> None:
    assert mlm(prefix=True).attention == Prefix()
    plain = mlm(mask_ratio=0.15, label_smoothing=0.1)
    assert (plain.time, plain.objective) == (Fixed(0.15), Objective(Flat(), per="open", label_smoothing=0.1))
    assert mlm(label_smoothing=0.1).objective.label_smoothing == 0.1


@pytest.mark.parametrize(
    "recipe",
    [
        ar(annealing_steps=0),
        ar(annealing_steps=0, spans=8.0),
        mlm(20, spans=4.0),
        block(8),
        block(2, masked=True),
        block(4, infilling=0.25),
        block(4, infilling=0.25, any_order=True),
        block(2, masked=True, infilling=0.25),
        block(4, adapters="masks"),
    ],
)
def test_training_continues_from_a_saved_config(recipe: Recipe, tmp_path: Path) -> None:
    assert saved_recipe(str(tmp_path)) is None
    recipe.diffusion_config("X", 7, "some/base").save(tmp_path)
    assert saved_recipe(str(tmp_path)) == recipe


def test_a_curriculum_ends_with_the_block_size() -> None:
    recipe = block(8, curriculum=(1, 2, 4), complement=True)
    stages = [recipe.at(3, progress / 20) for progress in range(21)]
    sizes = [stage.attention.size for stage in stages if isinstance(stage.attention, BlockCausal)]
    assert sizes == [1, 1, 1, 2, 2, 2, 4, 4] + [8] * 13
    assert all(stage.time == PerBlock(size, complement=True) for stage, size in zip(stages, sizes, strict=True))
    assert block(8).at(0, 0.0) == block(8) and recipe.at(9, 1.0) == recipe


def test_infilling_steps_fill_spans_in_blocks() -> None:
    recipe = block(4, infilling=0.3, curriculum=(1,))
    steps = [recipe.at(step, 0.0) for step in range(20)]
    spans = BlockCausal(4, sides="both")
    assert [step.attention == spans for step in steps].count(True) == 6
    filling = next(step for step in steps if step.attention == spans)
    assert (filling.time, filling.spans) == (PerBlock(4, of_spans=True), MaskedSpans())
    assert filling.objective == replace(recipe.objective, ar_share=1.0)
    assert block(4, infilling=0.5, teacher="base").at(1, 0.0).objective.teacher == "own"  # which sees both sides
    assert all(step.spans is None for step in steps if step.attention != spans)
    config = recipe.diffusion_config("LlamaForCausalLM", 7, "some/base")
    assert config.infilling == spans and config.sees_right_context and config.infiller.reads_as_ar_model
    for make in (partial(block, alignment=10.0), partial(block, variable_length=True)):
        with pytest.raises(ValueError, match="any_order=True"):
            make(4, infilling=0.25)
    with pytest.raises(ValueError, match="are filled in blocks"):
        replace(ar(), spans=MaskedSpans())


def test_infilling_steps_are_spread_evenly_and_equal_those_of_ar() -> None:
    options: dict[str, Any] = {"curriculum": (1,), "total_variation": 0.9, "position_decay": 2.0}
    recipe = block(4, infilling=0.3, any_order=True, **options)
    steps = [recipe.at(step, 0.0) for step in range(100)]
    infilling = [step.attention == Bidirectional() for step in steps]
    assert [sum(infilling[start : start + 10]) for start in range(0, 100, 10)] == [3] * 10
    first = next(step for step in steps if step.attention == Bidirectional())
    assert first == replace(ar(annealing_steps=0), name="block", policy=recipe.policy)
    assert {step.attention for step, fills in zip(steps, infilling, strict=True) if not fills} == {
        BlockCausal(1, "token")
    }
    config = recipe.diffusion_config("LlamaForCausalLM", 7, "some/base")
    assert config.sees_right_context and config.block_size == 4 and config.keeps_ar_model
    assert (config.infiller.attention, config.infiller.block_size) == (Bidirectional(), None)
    assert block().diffusion_config("X", 7, "b").infiller.attention == BlockCausal(4, "token")


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"curriculum=\(2,\) lists block sizes"):
        replace(ar(), curriculum=(2,))
    with pytest.raises(ValueError, match="complement=True"):
        replace(block(4, complement=True), schedule=Cosine())
    with pytest.raises(ValueError, match="annealing_steps=5 need attention=Bidirectional"):
        replace(block(4), annealing_steps=5)
    for base, share in ((block(4), 1.0), (ar(), 0.2)):
        with pytest.raises(ValueError, match=f"infilling={share} is a share of block"):
            replace(base, infilling=share)
    with pytest.raises(ValueError, match=r"distill=0.5 needs an autoregressive teacher"):
        block(4, masked=True, distill=0.5, teacher="base")
    with pytest.raises(ValueError, match="spans=0.5 is a mean length, at least 1 token"):
        ar(spans=0.5)
    with pytest.raises(ValueError, match="tilt=0"):
        block(4, tilt=0.0)
    for base, decay in ((block(4), 0.0), (ar(), 2.0)):
        with pytest.raises(ValueError, match=f"position_decay={decay} must be above 0 and is for block"):
            replace(base, position_decay=decay)


def test_a_position_weighs_what_its_prediction_is_worth() -> None:
    canvas = Canvas.from_tokens([[None] * 10], noise=9, pad=0)
    assert block(4).position_weight(canvas).tolist() == [[1.0] * 10]
    assert block(4, adapters="masks").position_weight(canvas).tolist() == [[0, 1, 1, 1, 0, 1, 1, 1, 0, 1]]
    expected = [0, 1, math.exp(-0.5), math.exp(-1.0)]
    decayed = block(4, adapters="masks", position_decay=2.0).position_weight(canvas)
    torch.testing.assert_close(decayed[0, :8], torch.tensor(expected * 2))
    closed = replace(canvas, open=torch.zeros_like(canvas.open))
    assert not ar().position_weight(closed).any() and not block(4).position_weight(closed).any()


def test_drafting_adapters_are_trained_on_masks_alone(tmp_path: Path) -> None:
    recipe = draft(6, position_decay=2.0)
    assert (recipe.name, recipe.adapters, recipe.attention) == ("draft", "masks", BlockCausal(6, "token", "causal"))
    assert (recipe.time, recipe.objective.distill) == (PerBlock(6, min_t=1.0), 1.0)
    assert recipe.objective.ar_weight == 0 and recipe.position_decay == 2.0
    draft().diffusion_config("X", 7, "some/base").save(tmp_path)
    assert saved_recipe(str(tmp_path)) == draft()
