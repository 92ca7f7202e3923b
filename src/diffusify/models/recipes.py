"""Recipes that adapt a pretrained network to diffusion: DiffuLLaMA's, Diffusion-LLM's, and block diffusion."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig, keeps_ar_model
from diffusify.diffusion.attention import Annealed, AttentionPattern, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText, TimeSampler
from diffusify.diffusion.length_noise import LengthNoise
from diffusify.diffusion.objectives import Elbo, Flat, Objective, RdmWeight
from diffusify.diffusion.policies import Policy, Rdm, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Leftmost
from diffusify.diffusion.schedules import Linear, NoiseSchedule
from diffusify.models.bundled import find_diffusion_config

CURRICULUM_SHARE = 0.4  # of a run, in which the block size grows
INFILLING_SHARE = 0.25  # of the steps, when training continues on a block model that also infills


@dataclass(frozen=True)
class Recipe:
    """All settings by which a network is adapted to diffusion.

    `attention` is the pattern of the adapted model; over `annealing_steps` steps, training gets there from causal
    attention (0: at once). `curriculum` lists the block sizes that training passes through first. A share `infilling`
    of the steps uses bidirectional attention, so that a block model can infill as well. With `adapters="masks"`, only
    adapters are trained, which act where the input is a mask: the AR half stays the base. With a `position_decay`, the
    k-th draft of a block weighs exp(-k / position_decay), since it only counts if the earlier ones were right (DSpark).
    With `length_noise`, the model learns to change the length of a masked span while it fills it. `alignment` is the
    weight of the distance to the hidden states of the causal base on the clean text (REPR-ALIGN: 10). `draft_head` is
    the inner size of a draft head (see `DraftHead`). ValueError for settings that exclude each other.
    """

    name: str
    shift: int
    attention: AttentionPattern
    time: TimeSampler
    objective: Objective
    schedule: NoiseSchedule = Linear()
    policy: Policy = Unmask()
    annealing_steps: int = 0
    curriculum: tuple[int, ...] = ()
    infilling: float = 0.0
    adapters: Literal["all", "masks"] = "all"
    position_decay: float | None = None
    length_noise: LengthNoise | None = None
    alignment: float = 0.0
    draft_head: int | None = None

    def __post_init__(self) -> None:
        ar_weight, distill = self.objective.ar_weight, self.objective.distill
        frozen_text = keeps_ar_model(self.attention, self.shift) and not (ar_weight or self.infilling)
        if self.adapters == "masks" and not frozen_text:
            raise ValueError(
                f"adapters='masks' keeps the AR half of an autoregressive base as it is, which ar_weight={ar_weight}, "
                f"infilling={self.infilling}, attention {self.attention} and shift={self.shift} exclude; use "
                "block(size, adapters='masks'), or adapters='all'"
            )
        if (ar_weight or self.objective.distills_from("own")) and not keeps_ar_model(self.attention, self.shift):
            raise ValueError(
                f"ar_weight={ar_weight} and distill={distill} need shift=1 and a token-causal clean half for the AR "
                "logits; use block(size) on an autoregressive network, or leave both at 0.0"
            )
        if distill and self.shift != 1:
            raise ValueError(
                f"distill={distill} needs an autoregressive teacher, and a masked LM is none (shift=0); use 0.0"
            )
        if self.position_decay is not None and (
            self.position_decay <= 0 or not isinstance(self.attention, BlockCausal)
        ):
            raise ValueError(
                f"position_decay={self.position_decay} must be above 0 and is for block(size); 2.0 is usual, and None "
                "weighs all positions equally"
            )
        blocks_only = isinstance(self.attention, BlockCausal) and not self.infilling
        if self.alignment < 0 or (self.alignment and (blocks_only or self.shift != 1)):
            raise ValueError(
                f"alignment={self.alignment} must be at least 0, and above 0 it needs an autoregressive base and "
                f"bidirectional attention, not {self.attention} with infilling={self.infilling}; use ar() or "
                "block(size, infilling=0.25), and 10.0, or leave it at 0.0"
            )
        if self.length_noise and (blocks_only or (distill and not self.infilling) or self.adapters == "masks"):
            raise ValueError(
                f"length_noise={self.length_noise} is for filling masked spans, with the data's tokens as targets; "
                f"attention {self.attention}, distill={distill} and infilling={self.infilling} exclude it; use ar(), "
                "mlm() or block(size, infilling=0.25)"
            )
        if self.draft_head is not None and not (self.draft_head > 0 and self.adapters == "masks"):
            raise ValueError(
                f"draft_head={self.draft_head} must be above 0, and is for drafting adapters; use draft(size), or None"
            )
        if self.curriculum and not isinstance(self.time, PerBlock):
            raise ValueError(f"curriculum={self.curriculum} lists block sizes; use block(size), or leave it empty")
        if not 0 <= self.infilling < 1 or (self.infilling and not isinstance(self.attention, BlockCausal)):
            raise ValueError(
                f"infilling={self.infilling} is a share of block(size)'s steps, at least 0 and under 1; 0.25 is usual, "
                "and ar() and mlm() infill without it"
            )
        if self.annealing_steps and not isinstance(self.attention, Bidirectional):
            raise ValueError(
                f"annealing_steps={self.annealing_steps} need attention=Bidirectional(), not {self.attention}"
            )
        if isinstance(self.time, PerBlock) and self.time.complement and not isinstance(self.schedule, Linear):
            raise ValueError(f"complement=True needs the schedule Linear(), not {self.schedule}")

    def at(self, step: int, progress: float) -> "Recipe":
        """The recipe of one step, when a share `progress` of the run is done.

        Annealing allows a share (step + 1) / annealing_steps of attention to later positions. The curriculum's sizes
        get equal parts of the first `CURRICULUM_SHARE` of the run. Infilling steps are spread evenly.
        """
        if int((step + 1) * self.infilling) > int(step * self.infilling):
            objective = replace(self.objective, ar_weight=0.0, distill=0.0)
            return replace(
                self, attention=Bidirectional(), time=PerText(), objective=objective, curriculum=(), infilling=0.0
            )
        if step + 1 < self.annealing_steps:
            annealed = Annealed((step + 1) / self.annealing_steps, seed=step)
            return replace(self, attention=annealed, annealing_steps=0)
        if not isinstance(self.attention, BlockCausal):
            return self
        recipe = replace(self, length_noise=None, alignment=0.0)  # which are for filling spans
        stage = int(progress / CURRICULUM_SHARE * len(self.curriculum))
        if stage >= len(self.curriculum):
            return recipe
        assert isinstance(self.time, PerBlock), "checked in __post_init__"
        size = self.curriculum[stage]
        return replace(recipe, attention=replace(self.attention, size=size), time=replace(self.time, size=size))

    def position_weight(self, canvas: Canvas) -> Float[Tensor, "b n"]:
        """The weight of each position's loss: 1 at open positions, decaying within blocks if `position_decay` is set.

        Where adapters act on masks only, it is 0 at the first positions of blocks, which clean text predicts.
        """
        weight = canvas.open.float()
        if not isinstance(self.attention, BlockCausal):
            return weight
        drafted = canvas.position_ids % self.attention.size - self.shift  # draft 0 is the first that a mask predicts
        if self.position_decay is not None:
            weight = weight * (-drafted.clamp_min(0) / self.position_decay).exp()
        return weight * (drafted >= 0) if self.adapters == "masks" else weight

    def diffusion_config(self, architecture: str, mask_token_id: int, base_model: str) -> DiffusionConfig:
        """The configuration that is saved beside the weights."""
        return DiffusionConfig(
            mask_token_id=mask_token_id,
            shift=self.shift,
            attention=self.attention,
            architecture=architecture,
            recipe=self.name,
            base_model=base_model,
            schedule=self.schedule,
            objective=self.objective,
            policy=self.policy,
            infilling=Bidirectional() if self.infilling else None,
            adapters=self.adapters,
            draft_head=self.draft_head,
        )


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
    these sizes (LLaDA2's warm-up; a size of the row's length is full attention). A share `infilling` of the steps uses
    bidirectional attention and per-text noise, so that the model both decodes in blocks and infills.

    With `adapters="masks"`, only adapters are trained, which act where the input is a mask: the AR half stays the base,
    bit for bit, and teaches the masks. `noisy` is that of `BlockCausal`; `min_t=1.0` trains on fully masked blocks.
    `total_variation` and `entropy` are those of `Objective`, and `position_decay` is that of `Recipe`. With
    `variable_length` or an `alignment`, the infilling steps are those of `ar` with it.
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


def saved_recipe(model: str) -> Recipe | None:
    """The recipe that continues a diffusion model's training, from its diffusion config; None for other models."""
    if (config := find_diffusion_config(model)) is None:
        return None
    weight = config.objective.weight
    per_text = PerText(grid=weight.steps, draws=2) if isinstance(weight, RdmWeight) else PerText()
    per_block = PerBlock(config.block_size or 1, min_t=1.0 if config.recipe == "draft" else PerBlock.min_t)
    time = per_text if config.block_size is None else per_block
    return Recipe(
        config.recipe, config.shift, config.attention, time, config.objective, config.schedule, config.policy,
        infilling=0.0 if config.infilling is None else INFILLING_SHARE,
        adapters=config.adapters,
        length_noise=None if config.length_tokens is None else LengthNoise(),
        draft_head=config.draft_head,
    )  # fmt: skip
