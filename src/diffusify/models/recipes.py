"""Ways from a pretrained network to a denoiser: DiffuLLaMA's, Diffusion-LLM's, and block diffusion."""

from dataclasses import dataclass, replace
from typing import Literal

from diffusify.config import DiffusionConfig, keeps_ar_model
from diffusify.diffusion.attention import Annealed, AttentionPattern, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.corruption import Fixed, PerBlock, PerText, TimeSampler
from diffusify.diffusion.objectives import Elbo, Flat, Objective, RdmWeight
from diffusify.diffusion.policies import Policy, Rdm, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Leftmost
from diffusify.diffusion.schedules import Linear, NoiseSchedule
from diffusify.models.bundled import config_of

GROWTH = 0.4  # the share of a run in which blocks grow
INFILLING = 0.25  # the share of steps in which a model that fills holes beside its blocks goes on learning that


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is adapted, in one printable value.

    `attention` is the pattern the adapted model is used with; `annealing_steps` is over how many steps training
    gets there from causal attention (0: at once). Before blocks have their own size, training passes through the sizes
    of the `curriculum`. A share `infilling` of the steps sees everything, so that the model can fill holes as well.
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

    def __post_init__(self) -> None:
        ar_weight, distill = self.objective.ar_weight, self.objective.distill
        if (ar_weight or self.objective.taught_by("own")) and not keeps_ar_model(self.attention, self.shift):
            raise ValueError(
                f"ar_weight={ar_weight} and distill={distill} need shift=1 and a token-causal clean half to read AR "
                "answers from; use block(size) on a left-to-right network, or leave both at 0.0"
            )
        if distill and self.shift != 1:
            raise ValueError(f"distill={distill} is taught by a left-to-right network; a masked one is none (shift=0)")
        if self.curriculum and not isinstance(self.time, PerBlock):
            raise ValueError(f"curriculum={self.curriculum} is of block sizes; use block(size), or leave it out")
        if not 0 <= self.infilling < 1 or (self.infilling and not isinstance(self.attention, BlockCausal)):
            raise ValueError(
                f"infilling={self.infilling} is a share of block(size)'s steps, at least 0 and under 1; 0.25 is usual, "
                "and ar() and mlm() fill holes without it"
            )
        if self.annealing_steps and not isinstance(self.attention, Bidirectional):
            raise ValueError(f"annealing_steps={self.annealing_steps} lead to full attention, not to {self.attention}")
        if isinstance(self.time, PerBlock) and self.time.complement and not isinstance(self.schedule, Linear):
            raise ValueError(f"complement=True halves time evenly, which is for Linear(), not {self.schedule}")

    def at(self, step: int, progress: float) -> "Recipe":
        """The recipe of one step, when a share `progress` of the run is done.

        Annealing allows a share (step + 1) / annealing_steps of the looks ahead. The curriculum's sizes take turns over
        `GROWTH` of the run. Steps of infilling are spread evenly.
        """
        if int((step + 1) * self.infilling) > int(step * self.infilling):
            objective = replace(self.objective, ar_weight=0.0, distill=0.0)
            return replace(
                self, attention=Bidirectional(), time=PerText(), objective=objective, curriculum=(), infilling=0.0
            )
        if step + 1 < self.annealing_steps:
            annealed = Annealed((step + 1) / self.annealing_steps, seed=step)
            return replace(self, attention=annealed, annealing_steps=0)
        stage = int(progress / GROWTH * len(self.curriculum))
        if stage >= len(self.curriculum):
            return self
        assert isinstance(self.attention, BlockCausal) and isinstance(self.time, PerBlock), "checked when it was made"
        size = self.curriculum[stage]
        return replace(self, attention=replace(self.attention, size=size), time=replace(self.time, size=size))

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
        )


def ar(
    annealing_steps: int = 20,
    *,
    shift: int = 1,
    schedule: NoiseSchedule = Linear(),
    objective: Objective = Objective(),
) -> Recipe:
    """A left-to-right network becomes fully bidirectional: shift and attention-mask annealing (DiffuGPT, DiffuLLaMA).

    The paper anneals over 10,000 steps; the default suits short runs. `Objective(per="open")` is the paper's own
    normalisation.
    """
    return Recipe(
        "ar", shift, Bidirectional(), PerText(), objective, schedule=schedule, annealing_steps=annealing_steps
    )


def mlm(
    steps: int = 50,
    *,
    mask_ratio: float | None = None,
    prefix: bool = False,
    label_smoothing: float = 0.0,
    objective: Objective | None = None,
) -> Recipe:
    """A masked network learns every masking rate: discrete time, coupled pair, RDM weights (Diffusion-LLM).

    With `prefix` a prompt does not see what is written behind it. A `mask_ratio` keeps to that one rate instead, as
    masked language models are trained: the paper's ablation. `label_smoothing` 0.1 suits training from scratch.
    """
    time = PerText(grid=steps, draws=2) if mask_ratio is None else Fixed(mask_ratio)
    usual = Objective(RdmWeight(steps), per="text", label_smoothing=label_smoothing)
    plain = Objective(Flat(), per="open", label_smoothing=label_smoothing)
    objective = objective or (usual if mask_ratio is None else plain)
    return Recipe("mlm", 0, Prefix() if prefix else Bidirectional(), time, objective, policy=Rdm())


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
) -> Recipe:
    """Blocks written left to right, the tokens of a block in parallel (BD3-LM), with an exact key-value cache.

    On a left-to-right network clean text is seen causally, and `ar_weight` (0.5) keeps the AR model alive in the same
    weights: a block's first position starts at the AR model's own quality. It is the other half's teacher, too:
    `distill` is that share of the loss (1.0: what is open learns the AR model's distributions, not the one token that
    happened to follow, and drafts better after as many steps; the default where the AR model is kept alive). With
    `teacher="base"` the frozen base is asked instead, in a pass more a step. On a `masked` network there is none.

    `complement` and `tilt` are those of `PerBlock`. With a `curriculum`, as (1, 2), blocks grow through its sizes first
    (LLaDA2's warm-up; a size as long as a row is full attention). A share `infilling` of the steps is of full
    attention and of `ar`'s or `mlm`'s noise: one model then writes in parallel blocks and fills holes.
    """
    attention = BlockCausal(size, clean="block" if masked else "token")
    weight = (0.0 if masked else 0.5) if ar_weight is None else ar_weight
    taught = float(weight > 0) if distill is None else distill
    objective = Objective(Elbo(), ar_weight=weight, distill=taught, teacher=teacher)
    return Recipe(
        "block",
        0 if masked else 1,
        attention,
        PerBlock(size, complement=complement, tilt=tilt),
        objective,
        policy=Unmask(quota=Threshold(0.9)),
        curriculum=curriculum,
        infilling=infilling,
    )


def as_is(*, masked: bool = False) -> Recipe:
    """A network that is not adapted: a left-to-right one writes token by token, a `masked` one is asked as it is."""
    attention = Bidirectional() if masked else Causal()
    return Recipe("as_is", 0 if masked else 1, attention, PerText(), Objective(), policy=Unmask(Leftmost()))


def of_model(model: str) -> Recipe | None:
    """The recipe that goes on with a diffusion model as its card says; None for what is none yet."""
    if (card := config_of(model)) is None:
        return None
    weight = card.objective.weight
    rdm = PerText(grid=weight.steps, draws=2) if isinstance(weight, RdmWeight) else PerText()
    time = rdm if card.block_size is None else PerBlock(card.block_size)
    return Recipe(
        card.recipe, card.shift, card.attention, time, card.objective, card.schedule, card.policy,
        infilling=0.0 if card.infilling is None else INFILLING,
    )  # fmt: skip
