"""Recipes are the rows of the design's table, and refuse what does not fit together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusify.diffusion.attention import Annealed, Bidirectional, BlockCausal, Prefix
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText
from diffusify.diffusion.objectives import Elbo, Flat, Objective, RdmWeight
from diffusify.diffusion.schedules import Cosine
from diffusify.models.recipes import Recipe, ar, as_is, block, mlm, of_model
from tests.families import tiny_denoiser


def test_rows() -> None:
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


def test_annealing_opens_the_future_linearly_and_repeats_itself() -> None:
    recipe = ar(annealing_steps=10)
    patterns = [recipe.at(step, 0.0).attention for step in range(12)]
    shares = [pattern.share if isinstance(pattern, Annealed) else 1.0 for pattern in patterns]
    assert shares == pytest.approx([min(1, (step + 1) / 10) for step in range(12)])
    assert recipe.at(4, 0.0) == recipe.at(4, 0.5) != recipe.at(5, 0.0)
    assert ar(annealing_steps=0).at(0, 0.0).attention == Bidirectional()


def test_the_annealed_share_of_looks_ahead_is_allowed() -> None:
    from diffusify.canvas import Canvas

    seen = Annealed(0.3, seed=1)(Canvas.clean(torch.zeros(1, 200, dtype=torch.long))).visible()[0]
    ahead = torch.ones(200, 200).triu(1).bool()
    assert seen[~ahead].all()
    assert abs(float(seen[ahead].float().mean()) - 0.3) < 0.01


def test_an_ar_loss_without_a_causal_clean_half_is_refused() -> None:
    with pytest.raises(ValueError, match="ar_weight"):
        Recipe("x", 1, Bidirectional(), PerText(), Objective(ar_weight=0.5))
    with pytest.raises(ValueError, match=r"distill=0.5 need shift=1"):
        block(4, masked=True, distill=0.5)
    with pytest.raises(ValueError, match="token-causal clean half"):  # its answers would be read from noisy text
        replace(as_is(), objective=Objective(ar_weight=0.5))


@pytest.mark.parametrize("size", [0, -1])
def test_empty_blocks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="block size"):
        block(size)


def test_the_card_says_what_the_recipe_decided() -> None:
    card = block(8).diffusion_config("LlamaForCausalLM", 7, "some/base")
    assert (card.block_size, card.shift, card.mask_token_id, card.sees_right_context) == (8, 1, 7, False)
    assert tiny_denoiser("llama").diffusion_config.sees_right_context


def test_masked_networks_have_a_prefix_and_a_plain_form() -> None:
    assert mlm(prefix=True).attention == Prefix()
    plain = mlm(mask_ratio=0.15, label_smoothing=0.1)
    assert (plain.time, plain.objective) == (Fixed(0.15), Objective(Flat(), per="open", label_smoothing=0.1))
    assert mlm(label_smoothing=0.1).objective.label_smoothing == 0.1


@pytest.mark.parametrize(
    "recipe", [ar(annealing_steps=0), mlm(20), block(8), block(2, masked=True), block(4, infilling=0.25)]
)
def test_a_card_is_enough_to_go_on(recipe: Recipe, tmp_path: Path) -> None:
    assert of_model(str(tmp_path)) is None
    recipe.diffusion_config("X", 7, "some/base").save(tmp_path)
    assert of_model(str(tmp_path)) == recipe


def test_a_curriculum_grows_and_ends_with_the_size_itself() -> None:
    recipe = block(8, curriculum=(1, 2, 4), complement=True)
    stages = [recipe.at(3, progress / 20) for progress in range(21)]
    sizes = [stage.attention.size for stage in stages if isinstance(stage.attention, BlockCausal)]
    assert sizes == [1, 1, 1, 2, 2, 2, 4, 4] + [8] * 13
    assert all(stage.time == PerBlock(size, complement=True) for stage, size in zip(stages, sizes, strict=True))
    assert block(8).at(0, 0.0) == block(8) and recipe.at(9, 1.0) is recipe


def test_steps_of_infilling_are_spread_evenly_and_like_those_of_ar() -> None:
    recipe = block(4, infilling=0.3, curriculum=(1,))
    steps = [recipe.at(step, 0.0) for step in range(100)]
    full = [step.attention == Bidirectional() for step in steps]
    assert [sum(full[start : start + 10]) for start in range(0, 100, 10)] == [3] * 10
    ours = next(step for step in steps if step.attention == Bidirectional())
    assert (ours.time, ours.objective) == (ar().time, ar().objective)
    assert {step.attention for step, whole in zip(steps, full, strict=True) if not whole} == {BlockCausal(1, "token")}
    card = recipe.diffusion_config("LlamaForCausalLM", 7, "some/base")
    assert card.sees_right_context and card.block_size == 4 and card.keeps_ar_model
    assert (card.infiller.attention, card.infiller.block_size) == (Bidirectional(), None)
    assert block().diffusion_config("X", 7, "b").infiller.attention == BlockCausal(4, "token")


def test_what_does_not_go_together_in_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"curriculum=\(2,\) is of block sizes"):
        replace(ar(), curriculum=(2,))
    with pytest.raises(ValueError, match="complement=True"):
        replace(block(4, complement=True), schedule=Cosine())
    with pytest.raises(ValueError, match="annealing_steps=5 lead to full attention"):
        replace(block(4), annealing_steps=5)
    for base, share in ((block(4), 1.0), (ar(), 0.2)):
        with pytest.raises(ValueError, match=f"infilling={share} is a share of block"):
            replace(base, infilling=share)
    with pytest.raises(ValueError, match=r"distill=0.5 is taught by a left-to-right network"):
        block(4, masked=True, distill=0.5, teacher="base")
    with pytest.raises(ValueError, match="tilt=0"):
        block(4, tilt=0.0)
