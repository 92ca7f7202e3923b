"""Networks that are only read: the same outputs with packed weights, fused layers and grouped attention."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from diffusify.canvas import Canvas
from diffusify.models import prepacking
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.fused_layers import FusedForward, fuse_layers
from diffusify.models.grouped_attention import use_grouped_attention
from diffusify.models.memory import _whole_pages
from diffusify.models.prepacking import PrepackedPart, can_prepack, prepack
from tests.families import FAMILIES, tiny_denoiser, tiny_network

needs_packing = pytest.mark.skipif(not can_prepack(torch.float32), reason="this processor gains nothing from packing")
IDS = torch.tensor([[5, 9, 11, 3, 17, 20], [7, 8, 2, 30, 31, 12]])
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
DTYPES = [dtype for dtype in TOLERANCE if can_prepack(dtype)]


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_layer_gives_the_plain_product(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    module: Any = nn.Module()
    module.first, module.second, module.conv = nn.Linear(24, 40, bias), nn.Linear(24, 8), Conv1D(16, 24)
    module = module.to(dtype)
    x = torch.randn(2, rows, 24, dtype=dtype)
    expected = [module.first(x), module.second(x), module.conv(x)]
    weights = copy.deepcopy(module).state_dict()
    joint = prepacking.PrepackedLinear.join(module, ("first", "second"))
    prepack(module)
    for layer, plain in zip((module.first, module.second, module.conv), expected, strict=True):
        torch.testing.assert_close(layer(x), plain, atol=TOLERANCE[dtype] / 3, rtol=TOLERANCE[dtype] / 3)
    assert torch.equal(joint(x), torch.cat([module.first(x), module.second(x)], -1))
    packed = module.state_dict()
    assert torch.equal(packed["first.weight"], weights["first.weight"])
    assert torch.equal(packed["second.bias"], weights["second.bias"])
    assert torch.equal(packed["conv.weight"], weights["conv.weight"].t())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_keeps_its_outputs(family: str, dtype: torch.dtype) -> None:
    network: Any = tiny_network(family, "eager" if family == "gemma2" else "sdpa").eval()
    network.to(dtype)
    with torch.no_grad():
        expected = network(input_ids=IDS).logits
        optimize_for_inference(network)
        logits = network(input_ids=IDS).logits
    scale = expected.float().abs().max()
    assert (logits - expected).float().abs().max() <= TOLERANCE[dtype] * scale
    assert not any(weight.requires_grad for weight in network.parameters())


@needs_packing
@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True),
                                               ("gemma3_text", False), ("gpt2", False), ("bert", False)])  # fmt: skip
def test_layers_of_the_llama_family_are_fused_and_others_are_kept(family: str, fused: bool) -> None:
    network = tiny_network(family).eval()
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    fuse_layers(network)
    replaced = [isinstance(vars(module).get("forward"), FusedForward) for module in network.modules()]
    assert any(replaced) == fused
    assert any(isinstance(module, PrepackedPart) for module in network.modules()) == fused
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())


@needs_packing
@torch.no_grad()
def test_a_layer_that_computes_something_else_is_kept() -> None:
    network: Any = tiny_network("llama").eval()
    layer = network.base_model.layers[0]
    stock = type(layer).forward
    layer.forward = lambda hidden_states, **kwargs: 2 * stock(layer, hidden_states, **kwargs)
    expected = network(input_ids=IDS).logits
    fuse_layers(network)
    assert not isinstance(layer.forward, FusedForward) and type(layer.mlp.up_proj) is nn.Linear
    torch.testing.assert_close(network(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_grouped_attention_is_that_of_transformers() -> None:
    """With a mask for every row, with causal attention, and with full attention without a mask."""
    denoiser = tiny_denoiser("qwen3")
    network: Any = denoiser.network
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.rand(2, 1, 6, 6) < 0.4, torch.finfo(torch.float32).min)
    mask.diagonal(dim1=2, dim2=3).zero_()

    def outputs() -> list[Tensor]:
        masked, causal = network(input_ids=IDS, attention_mask=mask).logits, network(input_ids=IDS).logits
        return [masked, causal, denoiser(Canvas.clean(IDS)).logits[:, 1:]]

    with torch.no_grad():
        expected = outputs()
        use_grouped_attention(network)
        assert network.config._attn_implementation == "grouped"
        found = outputs()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_packing
def test_packed_weights_can_be_saved_but_not_moved_or_trained(tmp_path: Path) -> None:
    network: Any = tiny_network("llama", tie_word_embeddings=True).eval()
    plain = tiny_network("llama", tie_word_embeddings=True).eval()
    plain.load_state_dict(network.state_dict())
    optimize_for_inference(network)
    network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in loaded.state_dict().items())
    network.tie_weights()
    assert network.to("cpu", torch.float32) is network
    with pytest.raises(
        ValueError, match="prepacked weights stay on the CPU in torch.float32; for cpu and torch.float64"
    ):
        network.double()
    with pytest.raises(RuntimeError, match="prepacked weights have no gradients"):
        network(inputs_embeds=torch.zeros(1, 2, network.config.hidden_size, requires_grad=True))


def test_other_processors_keep_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    network = tiny_network("llama").eval()
    expected = network(input_ids=IDS).logits
    optimize_for_inference(network)
    assert not any(isinstance(module, PrepackedPart) for module in network.modules())
    assert torch.equal(network(input_ids=IDS).logits, expected)


def test_memory_ranges_become_whole_huge_pages() -> None:
    page = 2 << 20
    ranges = [(page + 5, 10), (page * 3 - 1, 2), (page * 9, page)]
    assert _whole_pages(ranges) == [(page, page * 4), (page * 9, page * 10)]
