"""Plans compared with real networks and real training steps."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import diffusify
from diffusify.diffusion.corruption import Noised
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.loading import load_config, network_class
from diffusify.models.lora import Lora, add_lora
from diffusify.models.make_denoiser import disable_dropout
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block, draft, mlm
from diffusify.planning.footprint import (
    Footprint,
    TrainingSetup,
    _MemoryTracker,
    count_parameters,
    flop_counter,
    footprint,
    sample_noise,
)
from diffusify.planning.paper_runs import RUNS
from diffusify.planning.plan import Plan, _counted_steps, memory, plan
from tests.families import FAMILIES, MASK, tiny_network

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
NETWORKS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
    "gpt2": {},
    "gpt2, untied": {"tie_word_embeddings": False, "n_layer": 1},
    "gemma2": {},
    "qwen3": {},
    "qwen3_moe": FAMILIES["llama"] | EXPERTS,
    "bert": {},
    "albert": {},
    "modernbert": {},
}
LENGTH, ROWS = 24, 3

cached_footprint = lru_cache(footprint)


def network(name: str) -> PreTrainedModel:
    family = name.partition(",")[0]
    if family in FAMILIES:
        return tiny_network(family, "eager" if family == "gemma2" else "sdpa", **NETWORKS[name])
    config = AutoConfig.for_model(family, vocab_size=48, **NETWORKS[name])
    loaded_class: Any = network_class(config, name)[0]
    return loaded_class._from_config(config, attn_implementation="sdpa")


@lru_cache
def setup(name: str, recipe: Recipe, lora: Lora | None = None) -> TrainingSetup:
    config = network(name).config
    return TrainingSetup(network_class(config, name)[0], config, recipe, LENGTH, "float32", lora)


def recipe_for(name: str) -> Recipe:
    return mlm() if name in ("bert", "albert", "modernbert") else ar(annealing_steps=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_a_real_network(name: str) -> None:
    real, found = network(name), count_parameters(setup(name, recipe_for(name)))
    assert found.total == found.trained == sum(weight.numel() for weight in real.parameters())
    embeddings = real.get_input_embeddings().get_parameter("weight").numel()
    head: Any = real.get_output_embeddings()
    if head.weight is not real.get_input_embeddings().get_parameter("weight"):
        embeddings += head.weight.numel()
    assert found.embeddings - embeddings in (0, 48)  # the output projection of a masked language model has a bias
    assert 0 < found.layer < found.body <= found.total and found.root < found.total


def test_only_adapters_are_trained() -> None:
    real = network("llama")
    add_lora(real, Lora(4), MASK, "")
    found = count_parameters(setup("llama", ar(), Lora(4)))
    assert found.trained == sum(weight.numel() for weight in real.parameters() if weight.requires_grad)
    assert found.total == sum(weight.numel() for weight in real.parameters())
    with_head, without = (count_parameters(setup("llama", draft(head=head))) for head in (8, None))
    size = real.config.hidden_size
    assert with_head.trained - without.trained == with_head.total - without.total == 3 * size * 8 + 8


def test_frozen_matrices_take_half_the_memory_in_half_precision() -> None:
    narrow = replace(setup("llama", ar(), Lora(4)), dtype="bfloat16")
    counts = count_parameters(narrow)
    assert count_parameters(setup("llama", ar(), Lora(4))).half == 0
    assert 0.5 * counts.total < counts.half < counts.total - counts.trained
    found = memory(narrow, counts, "single", 1, Footprint(0.0, 0.0, 0.0, 0.0))
    assert found.weights == 4 * (counts.total - counts.half) + 2 * counts.half


@pytest.mark.parametrize(
    ("recipe", "views", "open_share", "clean_share"),
    [
        (ar(), 1, 0.5, 0.0),
        (mlm(50), 2, 0.51, 0.0),
        (mlm(mask_ratio=0.15), 1, 0.15, 0.0),
        (block(4), 1, 0.5, 0.5 + 0.25 * 0.5),
        (block(4, distill=0.0), 1, 0.5, 0.25),
    ],
)
def test_recipes_predict_the_expected_share_of_positions(
    recipe: Recipe, views: int, open_share: float, clean_share: float
) -> None:
    noise = sample_noise(TrainingSetup(LlamaForCausalLM, LlamaConfig(), recipe, 256), 32)
    predictable = int(noise.canvas.editable.sum())
    assert len(noise.t) == 32 * views and predictable == 32 * views * (256 - 2 * recipe.shift)
    assert int(noise.canvas.open.sum()) / predictable == pytest.approx(open_share, abs=0.03)
    assert int(recipe.objective.ar_targets(noise).sum()) / predictable == pytest.approx(clean_share, abs=0.03)


def step(denoiser: Denoiser, recipe: Recipe, noise: Noised, *, half: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        prediction = denoiser(
            noise.canvas, noise.text, positions=noise.canvas.open, ar_positions=recipe.objective.ar_targets(noise),
            loss=lambda answers, ar_answers: recipe.objective(answers, ar_answers, noise, recipe.schedule),
        )  # fmt: skip
    assert prediction.loss is not None
    prediction.loss.total.backward()


def real_denoiser(name: str, recipe: Recipe) -> Denoiser:
    real = network(name)
    return Denoiser(real, recipe.diffusion_config(type(real).__name__, MASK, ""))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe_for(name)) for name in NETWORKS]
    + [("llama", block(4)), ("gpt2", block(4, distill=0.0)), ("qwen3", block(4, complement=True))],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_flops_are_those_of_a_real_step(name: str, recipe: Recipe) -> None:
    denoiser = real_denoiser(name, recipe)
    with flop_counter() as real:
        step(denoiser, recipe, sample_noise(setup(name, recipe), ROWS))
    assert cached_footprint(setup(name, recipe), ROWS).flops == real.get_total_flops() > 0


def test_grouped_experts_count_as_many_flops_as_separate_ones() -> None:
    noise = sample_noise(setup("qwen3_moe", ar()), ROWS)
    flops = []
    for implementation in ("grouped_mm", "eager"):
        denoiser = real_denoiser("qwen3_moe", ar())
        denoiser.network.set_experts_implementation(implementation)
        with flop_counter() as real:
            step(denoiser, ar(), noise)
        flops.append(real.get_total_flops())
    assert flops[0] == flops[1]


def test_fused_attention_recomputes_one_product() -> None:
    """Unfused attention has six products of queries and keys; the fused kernel's backward pass recomputes one."""
    recipe = recipe_for("llama")
    denoiser = real_denoiser("llama", recipe)
    noise = sample_noise(setup("llama", recipe), ROWS)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), flop_counter() as unfused:
        step(denoiser, recipe, noise)
    config = denoiser.config
    product = 2 * ROWS * config.num_attention_heads * LENGTH**2 * config.head_dim * config.num_hidden_layers
    assert cached_footprint(setup("llama", recipe), ROWS).flops == unfused.get_total_flops() + product


DEEP = {
    "llama": LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4
    ),
    "gpt2": GPT2Config(vocab_size=500, n_embd=128, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1),
    "bert": BertConfig(
        vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "recipe"), [("llama", ar()), ("gpt2", block(4)), ("bert", mlm())])
def test_memory_is_that_of_a_real_step(name: str, recipe: Recipe, checkpointing: bool, dtype: str) -> None:
    deep = TrainingSetup(network_class(DEEP[name], name)[0], DEEP[name], recipe, 64, dtype)
    loaded_class: Any = deep.network_class
    denoiser = Denoiser(loaded_class(deep.config), recipe.diffusion_config("", 0, "")).train()
    disable_dropout(denoiser.network)
    optimize_for_training(denoiser.network)
    denoiser.network.set_attn_implementation("sdpa")
    if checkpointing:
        denoiser.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for weight in denoiser.parameters():
        weight.grad = torch.zeros_like(weight)
    with _MemoryTracker(denoiser) as real:
        step(denoiser, recipe, sample_noise(deep, ROWS), half=dtype == "bfloat16")
    found = footprint(deep, ROWS, checkpointing=checkpointing)
    planned = found.copies + found.activations + found.logits
    # With checkpointing the plan is somewhat higher, because gradients of fake tensors are not summed in place.
    assert real.peak * 0.9 < planned < real.peak * (1.4 if checkpointing else 1.1)


def test_permanent_memory_is_that_of_a_real_model_and_its_optimizer() -> None:
    real = network("llama")
    optimizer = torch.optim.AdamW(real.parameters())
    real(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    small = setup("llama", recipe_for("llama"))
    found = memory(small, count_parameters(small), "single", 1, cached_footprint(small, ROWS))
    weights = list(real.parameters())
    assert found.weights == sum(weight.nbytes for weight in weights)
    assert found.gradients == sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found.optimizer == sum(value.nbytes for value in moments)
    assert found.total > found.weights + found.gradients + found.optimizer


def test_equal_setups_are_counted_once() -> None:
    first, second = (
        TrainingSetup(LlamaForCausalLM, LlamaConfig(hidden_size=64, num_hidden_layers=n), ar(), 8) for n in (1, 1)
    )
    assert first == second and hash(first) == hash(second)
    changed = LlamaConfig(hidden_size=64, num_hidden_layers=2)
    for other in (replace(first, config=changed), replace(first, length=9), replace(first, recipe=block())):
        assert other != first


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(network("llama").config, tokens=1e9, gpus="8xH100", length=32, recipe=ar())


def test_checkpointing_keeps_less_and_computes_more(small: Plan) -> None:
    for stored, recomputed in zip(*(_counted_steps(small.setup, False, c) for c in (False, True)), strict=True):
        assert recomputed.activations < stored.activations and stored.flops < recomputed.flops < 1.5 * stored.flops


@given(tokens=st.floats(1, 1e15), more=st.floats(1.01, 1e3))
def test_more_tokens_take_longer(small: Plan, tokens: float, more: float) -> None:
    first, second = (replace(small, tokens=count, price=2.0) for count in (tokens, tokens * more))
    assert first.hours < second.hours and first.flops < second.flops and first.steps <= second.steps
    assert first.cost is not None and second.cost is not None and first.cost < second.cost
    assert first.cost == pytest.approx(first.hours * 8 * 2)


@given(count=st.integers(1, 4096), more=st.integers(1, 4096), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_more_devices_do_not_need_more_memory_each(small: Plan, count: int, more: int, dtype: str) -> None:
    setup, step = replace(small.setup, dtype=dtype), Footprint(1e9, 0.0, 1e6, 1e6)
    for sharding in ("ZeRO-2", "ZeRO-3"):
        few, many = (memory(setup, small.parameters, sharding, c, step).total for c in (count, count + more))
        assert many <= few
    zero2, zero3 = (memory(setup, small.parameters, s, count, step).total for s in ("ZeRO-2", "ZeRO-3"))
    assert zero3 <= zero2


def test_the_fastest_layout_that_fits_is_chosen(small: Plan) -> None:
    assert small.sharding == "DDP" and not small.checkpointing and small.layout and small.rows == 64
    assert small.layout.rows >= small.rows and not small.suggestions
    single = plan(network("llama").config, tokens=1e9, gpus="H100", length=32, recipe=ar(), batch=7)
    assert single.sharding == "single" and single.rows == 7 and single.hours == pytest.approx(8 * small.hours, rel=0.02)


def wide() -> LlamaConfig:
    """A model of 7B parameters in only one layer, so that it is counted quickly."""
    return LlamaConfig(
        hidden_size=16384, intermediate_size=110_000, num_hidden_layers=1, num_attention_heads=128,
        num_key_value_heads=128, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip


@pytest.mark.slow
def test_what_does_not_fit_has_suggestions() -> None:
    """All plans are for one setup with short rows, so few steps of few operations are counted."""
    found = plan(wide(), tokens=1e9, gpus="RTX4090", length=32, recipe=ar())
    assert 6.5e9 < found.parameters.total < 8e9 and found.layout is None
    assert "--gpus" in {suggestion.option.split()[0] for suggestion in found.suggestions}
    larger = plan(wide(), tokens=1e9, gpus="A100-80GB", length=32, recipe=ar())
    assert larger.layout is None and "--lora 16" in [suggestion.option for suggestion in larger.suggestions]
    assert "--gpus H200" in [suggestion.option for suggestion in larger.suggestions]
    rows = plan(wide(), tokens=1e9, gpus="H200", length=32, batch=10**6, recipe=ar())
    fewer = next(option for suggestion in rows.suggestions if (option := suggestion.option).startswith("--batch"))
    assert rows.layout is None and 0 < int(fewer.split()[1]) < 10**6


def test_a_lone_config_is_enough(causal_base: str) -> None:
    alone = load_config(f"{causal_base}/config.json")
    assert alone.to_dict() == load_config(causal_base).to_dict()


def test_the_paper_s_runs() -> None:
    setups = [TrainingSetup(network_class(run.config(), "")[0], run.config(), ar(), 512) for run in RUNS]
    assert [round(count_parameters(setup).total / 1e6) for setup in setups] == [124, 355, 6738]
    assert [round(run.tokens / 1e9) for run in RUNS] == [131, 210, 65]


def test_plan_is_exported_by_the_package(causal_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Footprint(1e9, 0.0, 1e6, 1e6), Footprint(4e9, 0.0, 4e6, 4e6)  # as if counted for 4 and 16 rows
    monkeypatch.setattr("diffusify.planning.plan._counted_steps", lambda *arguments: steps)
    found = diffusify.plan(causal_base, tokens=1e6, gpus="L4", length=32)
    assert found.setup.recipe.name == "block" and found.to_dict()["fits"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": "0xH100"}, "0 x H100 must be 1 to"),
        ({"gpus": "1000000xH100"}, "1000000 x H100 must be 1 to 100,000"),
        ({"gpus": "-2xH100"}, "-2 x H100"),
        ({"gpus": "8xH1000"}, 'did you mean "H100"'),
        ({"gpus": "8xTPU"}, 'device "TPU" is not known; known: .*cpu'),
        ({"gpus": ""}, 'device "" is not known'),
        ({"tokens": -1.0}, "tokens=-1.0 must be above 0"),
        ({"tokens": float("nan")}, "tokens=nan"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"length": 4096}, "length=4096 is more than the 64 tokens"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"utilisation": 1.5}, r"utilisation=1.5 must be in \(0, 1\]"),
        ({"price": -1.0}, "price=-1.0"),
        ({"dtype": "bfloat"}, 'did you mean "bfloat16"'),
        ({"dtype": "bfloat16", "gpus": "V100"}, "V100 has no bfloat16"),
        ({"recipe": mlm()}, "is an autoregressive model"),
        ({"model": "./nowhere"}, "nowhere does not exist"),
    ],
)
def test_invalid_settings_are_refused(causal_base: str, change: dict[str, Any], message: str) -> None:
    given = {"model": causal_base, "tokens": 1e6, "gpus": "H100", "length": 32} | change
    with pytest.raises(ValueError, match=message):
        plan(given.pop("model"), **given)
