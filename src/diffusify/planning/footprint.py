"""One training step without weights and without arithmetic: what it computes, and what it keeps in memory.

The stock network, the denoiser and the loss run for real, on tensors that have shapes but no contents. So the counts
hold for every family that can be trained, and for whatever its layers save for their gradients.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig, PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionInputs, BlockCausal
from diffusify.diffusion.corruption import Noised, noised
from diffusify.diffusion.objectives import cross_entropy, divergence
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_training import optimize_for_training
from diffusify.models.logging import quiet_transformers
from diffusify.models.lora import Lora, add_lora
from diffusify.models.recipes import Recipe
from diffusify.training.adapt import without_dropout

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is trained, and how: all that decides a step but the number of rows."""

    network_class: type[PreTrainedModel]
    config: PreTrainedConfig
    recipe: Recipe
    length: int
    dtype: str = "bfloat16"
    lora: Lora | None = None


@dataclass(frozen=True)
class Sizes:
    """A network's parameters: all, those of token embeddings and vocabulary projection, those that are trained.

    `root` are those outside of the layers, `layer` those of its largest one: what sharding gathers at a time.
    """

    total: int
    embeddings: int
    trained: int
    root: int
    layer: int

    @property
    def body(self) -> int:
        return self.total - self.embeddings


@dataclass(frozen=True)
class Footprint:
    """A step's FLOPs, and the bytes it needs at its peak beside weights and gradients that stay.

    `copies` are weights in the type that is computed with; `logits` is what turning hidden states into a loss adds.
    """

    flops: float
    copies: float
    activations: float
    logits: float


def sizes(subject: Subject) -> Sizes:
    network = _denoiser(subject).network
    heads = [part for part in (network.get_input_embeddings(), network.get_output_embeddings()) if part is not None]
    layers = [part for stack in network.modules() if isinstance(stack, nn.ModuleList) for part in stack]
    biggest = max((_count([layer]) for layer in layers), default=0)
    total = _count([network])
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    return Sizes(total, _count(heads), trained, total - _count(layers), biggest)


def draw(subject: Subject, rows: int) -> Noised:
    """Noise for rows of two documents each, as packed text has several, drawn as the trainer draws it."""
    recipe, objective = subject.recipe, subject.recipe.objective
    at = torch.arange(subject.length).expand(rows, -1)
    cuts = subject.length * (1 + torch.arange(rows)[:, None]) // (rows + 1)
    text = Canvas.clean(torch.zeros_like(at), 1 + (at >= cuts).long())
    text = replace(text, editable=text.editable & (text.position_ids >= recipe.shift))
    share = objective.ar_share if objective.ar_weight else 0.0
    generator = torch.Generator().manual_seed(0)
    return noised(text, recipe.time, recipe.schedule, 0, ar_share=share, generator=generator)


def footprint(subject: Subject, rows: int, *, checkpointing: bool = False, gathered: bool = False) -> Footprint:
    """What a forward and a backward of `rows` texts take, gradients being there from the step's earlier passes.

    `gathered` weights arrive in the type that is computed with, as sharding brings them; else autocast makes copies of
    float32 ones. Attention counts in full, masked or not, and its backward with what is computed again, as fused
    kernels do it; the tiles that a CPU computes are fewer.
    """
    counted = _count_step(subject, rows, gathered, reentrant=False if checkpointing else None)
    # Where tensors have no contents the usual way of recomputing does not let go of them; the reentrant one does, and
    # holds as much on the way back.
    back = _count_step(subject, rows, gathered, reentrant=True).back if checkpointing else counted.back
    activations = max(counted.forth, back) - counted.logits - counted.copies
    return Footprint(*map(float, (counted.flops, counted.copies, activations, counted.logits)))


@dataclass(frozen=True)
class _Counted:
    """A step's FLOPs and bytes: its peaks on the way forth and back, and what of the first are copies and logits."""

    flops: int
    copies: int
    logits: int
    forth: int
    back: int


def _count_step(subject: Subject, rows: int, gathered: bool, *, reentrant: bool | None = None) -> _Counted:
    """A step, recomputing activations in either way, or keeping them."""
    recipe, half, noise = subject.recipe, DTYPES[subject.dtype], draw(subject, rows)
    drawn = recipe.attention(noise.canvas, noise.text, shift=recipe.shift)
    if isinstance(recipe.attention, BlockCausal):
        read = recipe.attention.read(noise.canvas, noise.canvas.open, views=noise.views, shift=recipe.shift)
        drawn = drawn.keep_only(read)
    asked, also, ar = (
        int(part.sum()) for part in (noise.canvas.open, recipe.objective.ar_targets(noise), noise.ar_positions)
    )
    denoiser = _denoiser(subject).train()
    if reentrant is not None:
        # The random state would be read from the device; without dropout nothing is random.
        settings = {"use_reentrant": reentrant, "preserve_rng_state": False}
        denoiser.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    with FakeTensorMode():
        _materialise(denoiser, half if gathered else torch.float32)
        at = torch.zeros(drawn.tokens.shape, dtype=torch.long)
        mask_mod = lambda b, h, q, k: (q <= k) | (b < 0)  # noqa: E731  (any mask of the right shape)
        inputs = AttentionInputs(at, at, at, at, mask_mod, per_row=drawn.per_row, unmasked=drawn.unmasked)
        wanted = torch.zeros(asked + also, dtype=torch.long)

        def forward() -> Tensor:
            hidden = denoiser.hidden_states(inputs, wanted)
            watch.mark()
            learns = denoiser.head_parameters(hidden)
            answers, clean = (denoiser.lazy_logits(part, learns) for part in hidden.split([asked, also]))

            def about(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
                error = cross_entropy(logits, index)
                if recipe.objective.distill:
                    error = error + divergence(logits, clean.raw(index))
                return error.sum(), error.detach()

            def further(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
                error = cross_entropy(logits, index)
                return error.sum(), error.detach()

            return answers.total(about)[0] + clean[wanted[:ar]].total(further)[0]

        # The counter comes last, so that it sees what the watch answers itself.
        with _Watch(denoiser) as watch, counter() as flops:
            with torch.autocast("cpu", half, enabled=half != torch.float32):
                loss = forward()
            forth, watch.peak = watch.peak, watch.now
            loss.backward()
    return _Counted(flops.get_total_flops(), watch.copies, forth - watch.marked, forth, watch.peak)


def counter() -> FlopCounterMode:
    """torch's counter of FLOPs, which also knows attention on CPUs and grouped products of experts."""
    ours = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
        # A row meets one expert: rows x inner x outer products, forwards and backwards.
        aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
    }
    return FlopCounterMode(display=False, custom_mapping=ours)


def _denoiser(subject: Subject) -> Denoiser:
    """The network without memory, under the recipe's card; without dropout, as it is trained."""
    made: Any = subject.network_class
    with torch.device("meta"), quiet_transformers():
        network: PreTrainedModel = made._from_config(subject.config, dtype=torch.float32)
        without_dropout(network)
        if subject.lora is not None:
            add_lora(network, subject.lora, 0, "")
        kernel: Any = network.config._attn_implementation
        optimize_for_training(network)
        network.set_attn_implementation(kernel)  # tiles are for a CPU, and look at what masks say
        return Denoiser(network, subject.recipe.diffusion_config(type(network).__name__, 0, ""))


def _materialise(denoiser: Denoiser, dtype: torch.dtype) -> None:
    """Give the network tensors of the fake mode that is on, with gradients: shapes that say they are on a CPU."""
    made: dict[int, Any] = {}
    for module in denoiser.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:  # tied weights stay tied
                    kind = dtype if isinstance(old, nn.Parameter) else old.dtype
                    new = torch.empty(old.shape, dtype=kind, device="cpu")
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]
    for weight in denoiser.parameters():
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None


def _count(parts: list[nn.Module]) -> int:
    """Parameters of some modules, those that are shared counted once."""
    return sum(weight.numel() for weight in {id(w): w for part in parts for w in part.parameters()}.values())


class _Watch(TorchDispatchMode):
    """Follows every new tensor's memory from its making to its end."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.marked = self.copies = 0
        self._sizes: dict[int, int] = {}
        self._weights = {weight.untyped_storage()._cdata for weight in denoiser.parameters()}
        self._old = self._weights | {
            w.grad.untyped_storage()._cdata for w in denoiser.parameters() if w.grad is not None
        }
        self._copied: set[int] = set()

    def mark(self) -> None:
        """The network's body has run: what it keeps is there, and nothing of the loss."""
        self.marked = self.now
        self.copies = sum(self._sizes.get(key, 0) for key in self._copied)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Shapes of grouped products are checked for bfloat16 alone.
        answer = _grouped if function is aten._grouped_mm.default else function
        out = answer(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        if function is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            self._copied.add(out.untyped_storage()._cdata)
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._old:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key)

    def _part(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        self._copied.discard(key)


def _grouped(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """What a grouped product gives: a row for each of `a`'s, or (the experts' gradients) a matrix for each group."""
    return a.new_empty(*([len(offs)] if b.dim() == 2 else []), a.shape[0], b.shape[-1])
