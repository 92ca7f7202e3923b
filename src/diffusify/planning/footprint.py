"""The FLOPs and the peak memory of a training step, counted without weights and without arithmetic.

The stock network, the denoiser and the loss run on fake tensors, which have shapes but no contents. So the counts hold
for every family that can be trained, and include everything that its layers save for the backward pass.
"""

import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig, PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import training_inputs
from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.diffusion.corruption import Noised, noised
from diffusify.diffusion.objectives import cross_entropy, divergence
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.logging import quiet_transformers
from diffusify.models.lora import Lora, add_lora, default_lora
from diffusify.models.make_denoiser import disable_dropout
from diffusify.models.recipe import Recipe

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Everything that determines a training step except the number of rows; equal setups share cached counts."""

    network_class: type[PreTrainedModel]
    config: PreTrainedConfig
    recipe: Recipe
    length: int
    dtype: str = "bfloat16"
    lora: Lora | None = None

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        config = repr(vars(self.config))  # configs are mutable, so they have no hash
        return self.network_class, config, self.recipe, self.length, self.dtype, self.lora

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingSetup) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True)
class ParameterCounts:
    """The numbers of a network's parameters.

    `embeddings` are those of the token embeddings and the output projection, `trained` those that require gradients,
    `half` those that are kept in the compute dtype alone, `root` those outside the layers and `layer` those of the
    largest layer, which sharding gathers separately.
    """

    total: int
    embeddings: int
    trained: int
    half: int
    root: int
    layer: int

    @property
    def body(self) -> int:
        """The parameters other than embeddings."""
        return self.total - self.embeddings


@dataclass(frozen=True)
class Footprint:
    """A step's FLOPs, and its peak memory in bytes beyond the permanent weights and gradients.

    `copies` are weights converted to the compute dtype; `logits` is what the projection and the loss add.
    """

    flops: float
    copies: float
    activations: float
    logits: float


def count_parameters(setup: TrainingSetup) -> ParameterCounts:
    """Count the parameters of a setup's network, adapters and a draft head included."""
    denoiser = _denoiser(setup)
    network = denoiser.network
    ends = [
        module for module in (network.get_input_embeddings(), network.get_output_embeddings()) if module is not None
    ]
    layers = [layer for stack in network.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    largest = max((_count([layer]) for layer in layers), default=0)
    total = _count([denoiser])
    trained = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
    half = sum(weight.numel() for weight in denoiser.parameters() if weight.dtype != torch.float32)
    return ParameterCounts(total, _count(ends), trained, half, total - _count(layers), largest)


def sample_noise(setup: TrainingSetup, rows: int) -> Noised:
    """Sample noise as the trainer does, for rows of two documents each, because packed rows have several."""
    recipe, objective = setup.recipe, setup.recipe.objective
    columns = torch.arange(setup.length).expand(rows, -1)
    second_start = setup.length * (1 + torch.arange(rows)[:, None]) // (rows + 1)
    text = Canvas.clean(torch.zeros_like(columns), 1 + (columns >= second_start).long())
    text = replace(text, editable=text.editable & (text.position_ids >= recipe.shift))
    share = objective.ar_share if objective.ar_weight else 0.0
    generator = torch.Generator().manual_seed(0)
    step = noised(text, recipe.time, recipe.schedule, 0, ar_share=share, generator=generator)
    return replace(step, weight=recipe.position_weight(step.canvas))


def footprint(setup: TrainingSetup, rows: int, *, checkpointing: bool = False, gathered: bool = False) -> Footprint:
    """Count a forward and a backward pass over `rows` rows, with the gradients of earlier micro-batches allocated.

    `gathered` weights arrive in the compute dtype, as from sharding; otherwise autocast makes copies of the float32
    ones. Attention counts in full, masked or not, and its backward pass includes recomputation, as in fused kernels;
    the tiled kernel on CPUs computes less.
    """
    counts = _count_step(setup, rows, gathered, reentrant=False if checkpointing else None)
    # Non-reentrant checkpointing does not release fake tensors. The reentrant one does, and its backward pass holds
    # the same memory.
    backward = _count_step(setup, rows, gathered, reentrant=True).backward if checkpointing else counts.backward
    activations = max(counts.forward, backward) - counts.logits - counts.copies
    return Footprint(*map(float, (counts.flops, counts.copies, activations, counts.logits)))


@dataclass(frozen=True)
class _StepCounts:
    """A step's FLOPs, and its peaks in bytes in the forward and the backward pass.

    `copies` and `logits` are parts of the forward peak.
    """

    flops: int
    copies: int
    logits: int
    forward: int
    backward: int


def _count_step(setup: TrainingSetup, rows: int, gathered: bool, *, reentrant: bool | None = None) -> _StepCounts:
    """Count a step, with either kind of activation checkpointing, or without if `reentrant` is None."""
    recipe, half, noise = setup.recipe, DTYPES[setup.dtype], sample_noise(setup, rows)
    real_inputs = training_inputs(recipe.attention, noise.canvas, noise.text, noise.targets, shift=recipe.shift)
    n_open, n_clean, n_ar = (
        int(mask.sum()) for mask in (noise.targets, recipe.objective.ar_targets(noise), noise.ar_positions)
    )
    denoiser = _denoiser(setup).train()
    if reentrant is not None:
        # Without dropout nothing is random, and the random state would be read from a device that does not exist.
        settings = {"use_reentrant": reentrant, "preserve_rng_state": False}
        denoiser.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    with FakeTensorMode():
        _materialise(denoiser, half if gathered else torch.float32)
        zeros = torch.zeros(real_inputs.tokens.shape, dtype=torch.long)
        mask_mod = lambda b, h, q, k: (q <= k) | (b < 0)  # noqa: E731  (any mask of the right shape)
        inputs = AttentionInputs(
            zeros, zeros, zeros, zeros, mask_mod, per_row=real_inputs.per_row, unmasked=real_inputs.unmasked,
            is_mask=zeros.bool(), clean_start=real_inputs.clean_start,
        )  # fmt: skip
        index = torch.zeros(n_open + n_clean, dtype=torch.long)

        def forward() -> Tensor:
            hidden = denoiser.hidden_states(inputs, index)
            tracker.mark_body_end()
            weights = denoiser.head_parameters(hidden)
            answers, clean = (denoiser.lazy_logits(chunk, weights) for chunk in hidden.split([n_open, n_clean]))

            def masked_loss(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
                error = cross_entropy(logits, index)
                if recipe.objective.distill:
                    error = error + divergence(logits, clean.raw(index))
                return error.sum(), error.detach()

            def ar_loss(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
                error = cross_entropy(logits, index)
                return error.sum(), error.detach()

            return answers.chunked_loss(masked_loss)[0] + clean[index[:n_ar]].chunked_loss(ar_loss)[0]

        # The FLOP counter is entered after the tracker, so that it also sees operations that the tracker replaces.
        with _MemoryTracker(denoiser) as tracker, flop_counter() as flops, _DeviceLookup():
            with torch.autocast("cpu", half, enabled=half != torch.float32):
                loss = forward()
            forward_peak, tracker.peak = tracker.peak, tracker.current
            loss.backward()
    logits = forward_peak - tracker.body_end
    return _StepCounts(flops.get_total_flops(), tracker.copies, logits, forward_peak, tracker.peak)


def flop_counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, extended by attention on CPUs and the grouped products of experts."""
    additional = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
        # Each row is multiplied by one expert's matrix, in the forward and the backward pass.
        aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
    }
    return FlopCounterMode(display=False, custom_mapping=additional)


def _denoiser(setup: TrainingSetup) -> Denoiser:
    """A denoiser on the meta device, prepared as for training: the recipe's diffusion config, no dropout."""
    network_class: Any = setup.network_class
    with torch.device("meta"), quiet_transformers():
        network: PreTrainedModel = network_class._from_config(setup.config, dtype=torch.float32)
        disable_dropout(network)
        if lora := default_lora(setup.lora, setup.recipe.adapters):
            add_lora(network, lora, 0, "", setup.recipe.adapters)
        kernel: Any = network.config._attn_implementation
        half = DTYPES[setup.dtype]
        optimize_for_training(network, autocast_dtype=None if half == torch.float32 else half)
        network.set_attn_implementation(kernel)  # the tiled CPU kernel reads the mask's contents
        return Denoiser(network, setup.recipe.diffusion_config(type(network).__name__, 0, ""))


def _materialise(denoiser: Denoiser, dtype: torch.dtype) -> None:
    """Replace the network's tensors by fake CPU tensors of the active fake mode, and allocate their gradients.

    Weights in float32 get the `dtype`.
    """
    replaced: dict[int, Any] = {}
    for module in denoiser.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:  # tied weights stay tied
                    new_dtype = dtype if isinstance(old, nn.Parameter) and old.dtype == torch.float32 else old.dtype
                    new = torch.empty(old.shape, dtype=new_dtype, device="cpu")
                    replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = replaced[id(old)]
    for weight in denoiser.parameters():
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None


def _count(modules: list[nn.Module]) -> int:
    """The number of parameters of some modules; shared ones count once."""
    return sum(weight.numel() for weight in {id(w): w for module in modules for w in module.parameters()}.values())


class _DeviceLookup(TorchDispatchMode):
    """Answers lookups of a fake tensor's device, which are twice as frequent as operations, before all other modes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].device if function is torch.ops.prim.device.default else function(*args, **(kwargs or {}))


class _MemoryTracker(TorchDispatchMode):
    """Tracks the memory of all tensors that operations create, from allocation to release.

    `current` and `peak` are bytes; tensors that existed before, such as weights and their gradients, do not count.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.current = self.peak = self.body_end = self.copies = 0
        self._sizes: dict[int, int] = {}
        self._weights = {weight.untyped_storage()._cdata for weight in denoiser.parameters()}
        self._preexisting = self._weights | {
            w.grad.untyped_storage()._cdata for w in denoiser.parameters() if w.grad is not None
        }
        self._weight_copies: set[int] = set()

    def mark_body_end(self) -> None:
        """Record the memory in use after the network's body, before the projection to logits and the loss."""
        self.body_end = self.current
        self.copies = sum(self._sizes.get(key, 0) for key in self._weight_copies)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch's fake grouped product accepts bfloat16 only.
        operation = _fake_grouped_mm if function is aten._grouped_mm.default else function
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if function is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            self._weight_copies.add(out.untyped_storage()._cdata)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._preexisting:
            return
        self._sizes[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
        self._weight_copies.discard(key)


def _fake_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The empty output of a grouped product: a row for each of `a`'s, or a matrix for each group (in gradients)."""
    return a.new_empty(*([len(offs)] if b.dim() == 2 else []), a.shape[0], b.shape[-1])
