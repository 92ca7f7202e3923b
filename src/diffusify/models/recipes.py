"""Recipes that adapt a pretrained network to diffusion: DiffuLLaMA's, Diffusion-LLM's, and block diffusion."""

from dataclasses import replace
from typing import Any, Literal

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText
from diffusify.diffusion.length_noise import LengthNoise
from diffusify.diffusion.masked_spans import MaskedSpans
from diffusify.diffusion.objectives import Elbo, Flat, Objective, RdmWeight
from diffusify.diffusion.policies import Rdm, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Leftmost
from diffusify.diffusion.schedules import Linear, NoiseSchedule
from diffusify.models.bundled import find_diffusion_config
from diffusify.models.loading import diffusion_folder, load_config, network_class
from diffusify.models.recipe import Recipe

INFILLING_SHARE = 0.25  # of the steps, when training continues on a block model that also infills


def ar(
    annealing_steps: int = 20,
    *,
    shift: int = 1,
    schedule: NoiseSchedule = Linear(),
    objective: Objective = Objective(),
    variable_length: bool = False,
    spans: float | None = None,
    alignment: float = 0.0,
) -> Recipe:
    """The recipe for a bidirectional model from an AR one: shift and attention-mask annealing (DiffuGPT, DiffuLLaMA).

    The paper anneals over 10,000 steps; the default suits short runs. `Objective(per="open")` is the paper's own
    normalisation. With `variable_length`, the model also learns to fill masked spans of unknown length, by two more
    tokens (DreamOn, see `LengthNoise`). `spans` is the mean length of the spans in which half of the texts are masked,
    see `PerText`; it suits models that are to infill. `alignment` is that of `Recipe`.
    """
    return Recipe(
        "ar", shift, Bidirectional(), PerText(spans=spans), objective,
        schedule=schedule, annealing_steps=annealing_steps,
        length_noise=LengthNoise() if variable_length else None, alignment=alignment,
    )  # fmt: skip


def mlm(
    steps: int = 50,
    *,
    mask_ratio: float | None = None,
    prefix: bool = False,
    label_smoothing: float = 0.0,
    objective: Objective | None = None,
    variable_length: bool = False,
    spans: float | None = None,
) -> Recipe:
    """The recipe for a masked LM: all mask ratios, discrete time, coupled pairs, RDM weights (Diffusion-LLM).

    With `prefix`, prompts do not attend to the text after them. `mask_ratio` trains at that one ratio instead, as
    masked LMs are pretrained (the paper's ablation). `label_smoothing=0.1` suits training from scratch, and
    `variable_length` and `spans` are those of `ar`; a fixed `mask_ratio` masks single tokens.
    """
    time = PerText(grid=steps, draws=2, spans=spans) if mask_ratio is None else Fixed(mask_ratio)
    rdm_objective = Objective(RdmWeight(steps), per="text", label_smoothing=label_smoothing)
    mlm_objective = Objective(Flat(), per="open", label_smoothing=label_smoothing)
    objective = objective or (rdm_objective if mask_ratio is None else mlm_objective)
    length_noise = LengthNoise() if variable_length else None
    return Recipe(
        "mlm", 0, Prefix() if prefix else Bidirectional(), time, objective, policy=Rdm(), length_noise=length_noise
    )


def block(
    size: int = 4,
    *,
    masked: bool = False,
    ar_weight: float | None = None,
    distill: float | None = None,
    teacher: Literal["own", "base"] = "own",
    complement: bool = False,
    tilt: float | None = None,
    curriculum: tuple[int, ...] = (),
    infilling: float = 0.0,
    any_order: bool = False,
    adapters: Literal["all", "masks"] = "all",
    noisy: Literal["full", "causal"] = "full",
    min_t: float = 1e-3,
    total_variation: float = 0.0,
    entropy: float = 0.0,
    position_decay: float | None = None,
    variable_length: bool = False,
    alignment: float = 0.0,
) -> Recipe:
    """The recipe for block diffusion: blocks from left to right, the tokens of a block in parallel (BD3-LM).

    The KV cache of such a model is exact. On an AR network, clean text keeps causal attention, and `ar_weight` (0.5)
    keeps training the AR half, so a block's first position starts at the AR model's quality. `distill` is the share of
    the loss that learns a teacher's distributions instead of the data's tokens, after which the model drafts better; it
    defaults to 1.0 if `ar_weight` is above 0, else to 0.0. The teacher is the model's own AR half, or with
    `teacher="base"` the frozen base, which costs one more forward pass per step. A `masked` LM has neither.

    `complement` and `tilt` are those of `PerBlock`. With a `curriculum` such as (1, 2), training starts with blocks of
    these sizes (LLaDA2's warm-up; a size of the row's length is full attention).

    A share `infilling` of the steps trains the model to fill masked spans as well, with the text on both sides in
    sight, in blocks from left to right (see `BlockCausal`). An AR network keeps its order and its AR half that way, and
    the text of a span is decoded losslessly as any other; it also learns where a span of unknown length ends. With
    `any_order`, these steps are those of `ar()` instead:
    bidirectional attention and per-text noise.

    With `adapters="masks"`, only adapters are trained, which act where the input is a mask: the AR half stays the base,
    bit for bit, and teaches the masks. `noisy` is that of `BlockCausal`; `min_t=1.0` trains on fully masked blocks.
    `total_variation` and `entropy` are those of `Objective`, and `position_decay` is that of `Recipe`. With `any_order`
    and `variable_length` or an `alignment`, the infilling steps are those of `ar` with it.
    """
    attention = BlockCausal(size, clean="block" if masked else "token", noisy=noisy)
    weight = (0.0 if masked or adapters == "masks" else 0.5) if ar_weight is None else ar_weight
    distill = float(weight > 0 or adapters == "masks") if distill is None else distill
    objective = Objective(
        Elbo(), ar_weight=weight, distill=distill, teacher=teacher, total_variation=total_variation, entropy=entropy
    )
    return Recipe(
        "block",
        0 if masked else 1,
        attention,
        PerBlock(size, min_t=min_t, complement=complement, tilt=tilt),
        objective,
        policy=Unmask(quota=Threshold(0.9)),
        curriculum=curriculum,
        infilling=infilling,
        spans=MaskedSpans() if infilling and not any_order else None,
        adapters=adapters,
        position_decay=position_decay,
        length_noise=LengthNoise() if variable_length else None,
        alignment=alignment,
    )


def draft(
    size: int = 4,
    *,
    head: int | None = 512,
    total_variation: float = 0.0,
    position_decay: float | None = None,
) -> Recipe:
    """The recipe for faster text of an AR base, which stays as it is: `block(size)` with drafting adapters.

    Low-rank adapters act on masks only and learn what the base will write next, several tokens ahead, from the base's
    own distributions. Lossless decoding then gives the base's own text, token for token, in fewer forward passes. Masks
    attend to earlier ones only, and blocks are fully masked in training, as drafts are in decoding. A `head` of that
    inner size lets each draft depend on the one before it (see `DraftHead`); None leaves it out.

    `total_variation` is the share of the loss that is the rate of rejected drafts (DSpark: 0.9), and with a
    `position_decay` the k-th draft of a block weighs exp(-k / position_decay).
    """
    recipe = block(
        size, adapters="masks", noisy="causal", min_t=1.0,
        total_variation=total_variation, position_decay=position_decay,
    )  # fmt: skip
    return replace(recipe, name="draft", draft_head=head)


def default_recipe(*, masked: bool) -> Recipe:
    """The recipe for a base if none is chosen: `mlm()` for a masked LM, else `block()`."""
    return mlm() if masked else block()


def as_is(*, masked: bool = False) -> Recipe:
    """The recipe of a network that is not adapted: AR decoding, or for a `masked` LM its own predictions."""
    attention = Bidirectional() if masked else Causal()
    return Recipe("as_is", 0 if masked else 1, attention, PerText(), Objective(), policy=Unmask(Leftmost()))


def read_config(model: str) -> DiffusionConfig:
    """The config of a diffusion model, or the one that a base gets as it is, before any weights are read."""
    if folder := diffusion_folder(model):
        return DiffusionConfig.load(folder)
    network, masked = network_class(load_config(model), model)
    return as_is(masked=masked).diffusion_config(network.__name__, -1, model)


def saved_recipe(model: str) -> Recipe | None:
    """The recipe that continues a diffusion model's training, from its diffusion config; None for other models."""
    if (config := find_diffusion_config(model)) is None:
        return None
    weight = config.objective.weight
    grid: dict[str, Any] = {"grid": weight.steps, "draws": 2} if isinstance(weight, RdmWeight) else {}
    per_text = PerText(**grid, spans=config.spans)
    per_block = PerBlock(config.block_size or 1, min_t=1.0 if config.recipe == "draft" else PerBlock.min_t)
    time = per_text if config.block_size is None else per_block
    return Recipe(
        config.recipe, config.shift, config.attention, time, config.objective, config.schedule, config.policy,
        infilling=0.0 if config.infilling is None else INFILLING_SHARE,
        spans=MaskedSpans() if isinstance(config.infilling, BlockCausal) else None,
        adapters=config.adapters,
        length_noise=None if config.length_tokens is None else LengthNoise(),
        draft_head=config.draft_head,
    )  # fmt: skip
