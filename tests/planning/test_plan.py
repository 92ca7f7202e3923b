"""A plan against networks that are really made, and steps that are really taken."""

from dataclasses import replace
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
from diffusify.models.recipes import Recipe, ar, block, mlm
from diffusify.planning.devices import DEVICES, Fleet, read_amount
from diffusify.planning.footprint import Footprint, Subject, _Watch, counter, draw, footprint, sizes
from diffusify.planning.paper_runs import RUNS
from diffusify.planning.plan import Plan, memory, plan
from diffusify.training.adapt import without_dropout
from tests.families import FAMILIES, MASK, tiny_network

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
NETWORKS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "gpt2, untied": {"tie_word_embeddings": False},
    "gemma2": {},
    "qwen3": {},
    "qwen3_moe": FAMILIES["llama"] | EXPERTS,
    "bert": {},
    "albert": {},
    "modernbert": {},
}
LENGTH, ROWS = 24, 3


def network(name: str) -> PreTrainedModel:
    family = name.partition(",")[0]
    if family in FAMILIES:
        return tiny_network(family, "eager" if family == "gemma2" else "sdpa", **NETWORKS[name])
    config = AutoConfig.for_model(family, vocab_size=48, **NETWORKS[name])
    made: Any = network_class(config, name)[0]
    return made._from_config(config, attn_implementation="sdpa")


def subject(name: str, recipe: Recipe, **settings: Any) -> Subject:
    config = network(name).config
    chosen: dict[str, Any] = {"dtype": "float32"}
    return Subject(network_class(config, name)[0], config, recipe, LENGTH, **chosen | settings)


def recipe_for(name: str) -> Recipe:
    return mlm() if name in ("bert", "albert", "modernbert") else ar(annealing_steps=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_a_real_network(name: str) -> None:
    real, found = network(name), sizes(subject(name, recipe_for(name)))
    assert found.total == found.trained == sum(weight.numel() for weight in real.parameters())
    embeddings = real.get_input_embeddings().get_parameter("weight").numel()
    head: Any = real.get_output_embeddings()
    if head.weight is not real.get_input_embeddings().get_parameter("weight"):
        embeddings += head.weight.numel()
    assert found.embeddings - embeddings in (0, 48)  # a masked network's projection has a bias
    assert 0 < found.layer < found.body <= found.total and found.root < found.total


def test_adapters_alone_are_trained() -> None:
    real = network("llama")
    add_lora(real, Lora(4), MASK, "")
    found = sizes(subject("llama", ar(), lora=Lora(4)))
    assert found.trained == sum(weight.numel() for weight in real.parameters() if weight.requires_grad)
    assert found.total == sum(weight.numel() for weight in real.parameters())


@pytest.mark.parametrize(
    ("recipe", "views", "open", "also"),
    [
        (ar(), 1, 0.5, 0.0),
        (mlm(50), 2, 0.51, 0.0),
        (mlm(mask_ratio=0.15), 1, 0.15, 0.0),
        (block(4), 1, 0.5, 0.5 + 0.25 * 0.5),
        (block(4, distill=0.0), 1, 0.5, 0.25),
    ],
)
def test_what_recipes_ask(recipe: Recipe, views: int, open: float, also: float) -> None:
    given = draw(Subject(LlamaForCausalLM, LlamaConfig(), recipe, 256), 32)
    predictable = int(given.canvas.editable.sum())
    assert len(given.t) == 32 * views and predictable == 32 * views * (256 - 2 * recipe.shift)
    assert int(given.canvas.open.sum()) / predictable == pytest.approx(open, abs=0.03)
    assert int(recipe.objective.ar_targets(given).sum()) / predictable == pytest.approx(also, abs=0.03)


def step(denoiser: Denoiser, recipe: Recipe, given: Noised, *, half: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        told = denoiser(
            given.canvas, given.text, positions=given.canvas.open, ar_positions=recipe.objective.ar_targets(given),
            loss=lambda answers, ar_output_index: recipe.objective(answers, ar_output_index, given, recipe.schedule),
        )  # fmt: skip
    assert told.loss is not None
    told.loss.total.backward()


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
    with counter() as real:
        step(denoiser, recipe, draw(subject(name, recipe), ROWS))
    assert footprint(subject(name, recipe), ROWS).flops == real.get_total_flops() > 0


def test_experts_count_as_one_by_one() -> None:
    given = draw(subject("qwen3_moe", ar()), ROWS)
    both = []
    for way in ("grouped_mm", "eager"):
        denoiser = real_denoiser("qwen3_moe", ar())
        denoiser.network.set_experts_implementation(way)
        with counter() as real:
            step(denoiser, ar(), given)
        both.append(real.get_total_flops())
    assert both[0] == both[1]


def test_attention_counts_as_in_plain_arithmetic() -> None:
    """Plain attention has six products of queries and keys, the fused one computes one of them again."""
    denoiser = real_denoiser("llama", ar())
    given = draw(subject("llama", ar()), ROWS)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter() as plain:
        step(denoiser, ar(), given)
    config = denoiser.config
    product = 2 * ROWS * config.num_attention_heads * LENGTH**2 * config.head_dim * config.num_hidden_layers
    assert footprint(subject("llama", ar()), ROWS).flops == plain.get_total_flops() + product


DEEP = {
    "llama": LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4
    ),
    "gpt2": GPT2Config(vocab_size=500, n_embd=128, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=1),
    "bert": BertConfig(
        vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "recipe"), [("llama", ar()), ("gpt2", block(4)), ("bert", mlm())])
def test_memory_is_that_of_a_real_step(name: str, recipe: Recipe, checkpointing: bool, dtype: str) -> None:
    it = Subject(network_class(DEEP[name], name)[0], DEEP[name], recipe, 64, dtype)
    made: Any = it.network_class
    denoiser = Denoiser(made(it.config), recipe.diffusion_config("", 0, "")).train()
    without_dropout(denoiser.network)
    optimize_for_training(denoiser.network)
    denoiser.network.set_attn_implementation("sdpa")
    if checkpointing:
        denoiser.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for weight in denoiser.parameters():
        weight.grad = torch.zeros_like(weight)
    with _Watch(denoiser) as real:
        step(denoiser, recipe, draw(it, ROWS), half=dtype == "bfloat16")
    found = footprint(it, ROWS, checkpointing=checkpointing)
    planned = found.copies + found.activations + found.logits
    # What is recomputed is told as somewhat more: without contents, gradients are not summed in place.
    assert real.peak * 0.9 < planned < real.peak * (1.4 if checkpointing else 1.1)


def test_what_stays_is_what_a_real_model_and_its_optimizer_hold() -> None:
    real = network("llama")
    optimizer = torch.optim.AdamW(real.parameters())
    real(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    it = subject("llama", ar())
    found = memory(it, sizes(it), "single", 1, footprint(it, 1))
    weights = list(real.parameters())
    assert found.weights == sum(weight.nbytes for weight in weights)
    assert found.gradients == sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found.optimizer == sum(value.nbytes for value in moments)
    assert found.total > found.weights + found.gradients + found.optimizer


def test_checkpointing_keeps_less_and_computes_more() -> None:
    long = replace(subject("llama", ar()), length=64)
    kept, again = (footprint(long, 8, checkpointing=checkpointing) for checkpointing in (False, True))
    assert again.activations < kept.activations and kept.flops < again.flops < 1.5 * kept.flops


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(network("llama").config, tokens=1e9, gpus="8xH100", length=32, recipe=ar())


@given(tokens=st.floats(1, 1e15), more=st.floats(1.01, 1e3))
def test_more_tokens_take_longer(small: Plan, tokens: float, more: float) -> None:
    first, second = (replace(small, tokens=count, price=2.0) for count in (tokens, tokens * more))
    assert first.hours < second.hours and first.flops < second.flops and first.steps <= second.steps
    assert first.cost is not None and second.cost is not None and first.cost < second.cost
    assert first.cost == pytest.approx(first.hours * 8 * 2)


@given(count=st.integers(1, 4096), more=st.integers(1, 4096), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_more_devices_do_not_need_more_memory_each(small: Plan, count: int, more: int, dtype: str) -> None:
    it, step = replace(small.subject, dtype=dtype), Footprint(1e9, 0.0, 1e6, 1e6)
    for sharding in ("ZeRO-2", "ZeRO-3"):
        few, many = (memory(it, small.sizes, sharding, c, step).total for c in (count, count + more))
        assert many <= few
    whole, half = (memory(it, small.sizes, s, count, step).total for s in ("ZeRO-2", "ZeRO-3"))
    assert half <= whole


def test_the_fastest_layout_that_fits_is_chosen(small: Plan) -> None:
    assert small.sharding == "DDP" and not small.checkpointing and small.layout and small.rows == 64
    assert small.layout.rows >= small.rows and not small.remedies
    alone = plan(network("llama").config, tokens=1e9, gpus="H100", length=32, recipe=ar(), batch=7)
    assert alone.sharding == "single" and alone.rows == 7 and alone.hours == pytest.approx(8 * small.hours, rel=0.02)


def wide(layers: int = 2) -> LlamaConfig:
    """As large as a 7B model, in two layers, so that it is counted in no time."""
    return LlamaConfig(
        hidden_size=16384, intermediate_size=45056, num_hidden_layers=layers, num_attention_heads=128,
        num_key_value_heads=128, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip


def test_what_does_not_fit_says_what_would() -> None:
    found = plan(wide(), tokens=1e9, gpus="RTX4090", length=1024)
    assert 6.5e9 < found.sizes.total < 8e9 and found.layout is None
    options = {remedy.option.split()[0] for remedy in found.remedies}
    assert "--gpus" in options
    larger = plan(wide(), tokens=1e9, gpus="A100-80GB", length=256)
    assert larger.layout is None and "--lora 16" in [remedy.option for remedy in larger.remedies]
    assert "--gpus H200" in [remedy.option for remedy in larger.remedies]
    rows = plan(wide(1), tokens=1e9, gpus="A100-80GB", length=2048, batch=64)
    told = next(remedy.option for remedy in rows.remedies if remedy.option.startswith("--batch")).split()[1]
    assert rows.layout is None and 0 < int(told) < 64


def test_a_lone_config_is_enough(causal_base: str) -> None:
    alone = load_config(f"{causal_base}/config.json")
    assert alone.to_dict() == load_config(causal_base).to_dict()


def test_the_paper_s_runs() -> None:
    parameters = [sizes(Subject(network_class(run.config(), "")[0], run.config(), ar(), 512)).total for run in RUNS]
    assert [round(count / 1e6) for count in parameters] == [124, 355, 6738]
    assert [round(run.tokens / 1e9) for run in RUNS] == [131, 210, 65]


def test_plan_is_a_word_of_the_package(causal_base: str) -> None:
    found = diffusify.plan(causal_base, tokens=1e6, gpus="L4", length=32)
    assert found.subject.recipe.name == "block" and found.to_dict()["fits"] is True


@given(number=st.floats(1e-3, 1e6), unit=st.sampled_from(["", "K", "M", "B", "T", "k", "m", "b", "t"]))
def test_amounts_are_read(number: float, unit: str) -> None:
    size = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit.upper()]
    assert read_amount(f"{number!r}{unit}") == pytest.approx(number * size)


def test_amounts_in_every_notation() -> None:
    assert [read_amount(text) for text in ("65B", "300M", "1e9", "2,000", "1_000", "1.5k")] == [
        65e9, 300e6, 1e9, 2000, 1000, 1500,
    ]  # fmt: skip
    for text in ("-1", "0", "65Q", "", "B", "1e999", "nan", "1.2.3", "1e9x"):
        with pytest.raises(ValueError, match="tokens="):
            read_amount(text)


def test_fleets_are_read() -> None:
    assert Fleet.parse("64xH100") == Fleet(DEVICES["H100"], 64) and Fleet.parse("rtx4090").count == 1
    assert str(Fleet.parse("8 x A100-80GB")) == "8xA100-80GB"
    here = Fleet.parse("cpu").device
    assert here.half > 0 and here.single > 0 and here.memory > 0.1


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
        ({"recipe": mlm()}, "left-to-right"),
        ({"model": "./nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused(causal_base: str, change: dict[str, Any], message: str) -> None:
    given = {"model": causal_base, "tokens": 1e6, "gpus": "H100", "length": 32} | change
    with pytest.raises(ValueError, match=message):
        plan(given.pop("model"), **given)
