"""A recipe: all settings by which a pretrained network is adapted to diffusion."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffusify.canvas import Canvas, offsets
from diffusify.config import DiffusionConfig, keeps_ar_model
from diffusify.diffusion.attention import Annealed, AttentionPattern, Bidirectional, BlockCausal
from diffusify.diffusion.corruption import PerBlock, PerText, TimeSampler
from diffusify.diffusion.length_noise import LengthNoise
from diffusify.diffusion.masked_spans import MaskedSpans
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.policies import Policy, Unmask
from diffusify.diffusion.schedules import Linear, NoiseSchedule

CURRICULUM_SHARE = 0.4  # of a run, in which the block size grows


@dataclass(frozen=True)
class Recipe:
    """All settings by which a network is adapted to diffusion.

    `attention` is the pattern of the adapted model; over `annealing_steps` steps, training gets there from causal
    attention (0: at once). `curriculum` lists the block sizes that training passes through first. A share `infilling`
    of the steps trains a block model to infill as well: `spans` of a text, in blocks from left to right with the text
    on both sides in sight, or if they are None in any order, with bidirectional attention. With `adapters="masks"`,
    only adapters are trained, which act where the input is a mask: the AR half stays the base. With a `position_decay`,
    the k-th draft of a block weighs exp(-k / position_decay), since it only counts if the earlier ones were right
    (DSpark). With `length_noise`, the model learns to change the length of a masked span while it fills it. `alignment`
    is the weight of the distance to the hidden states of the causal base on the clean text (REPR-ALIGN: 10).
    `draft_head` is the inner size of a draft head (see `DraftHead`). ValueError for settings that exclude each other.
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
    spans: MaskedSpans | None = None
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
                "block(size, infilling=0.25, any_order=True), and 10.0, or leave it at 0.0"
            )
        if self.spans and not isinstance(self.attention, BlockCausal):
            raise ValueError(f"spans={self.spans} are filled in blocks; use block(size, infilling=0.5), or None")
        if self.spans and (self.alignment or self.length_noise):
            raise ValueError(
                f"alignment={self.alignment} and length_noise={self.length_noise} are for filling spans in any order; "
                "use block(size, infilling=0.25, any_order=True), or leave them out"
            )
        if self.length_noise and (blocks_only or (distill and not self.infilling) or self.adapters == "masks"):
            raise ValueError(
                f"length_noise={self.length_noise} is for filling masked spans, with the data's tokens as targets; "
                f"attention {self.attention}, distill={distill} and infilling={self.infilling} exclude it; use ar(), "
                "mlm() or block(size, infilling=0.25, any_order=True)"
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
            if self.spans is not None:
                return self._filling_spans()
            objective = replace(self.objective, ar_weight=0.0, distill=0.0, total_variation=0.0)
            return replace(
                self, attention=Bidirectional(), time=PerText(), objective=objective, curriculum=(), infilling=0.0,
                position_decay=None,
            )  # fmt: skip
        if step + 1 < self.annealing_steps:
            annealed = Annealed((step + 1) / self.annealing_steps, seed=step)
            return replace(self, attention=annealed, annealing_steps=0)
        if not isinstance(self.attention, BlockCausal):
            return self
        recipe = replace(self, spans=None, length_noise=None, alignment=0.0)  # which are for infilling
        stage = int(progress / CURRICULUM_SHARE * len(self.curriculum))
        if stage >= len(self.curriculum):
            return recipe
        assert isinstance(self.time, PerBlock), "checked in __post_init__"
        size = self.curriculum[stage]
        return replace(recipe, attention=replace(self.attention, size=size), time=replace(self.time, size=size))

    def _filling_spans(self) -> "Recipe":
        """The recipe of the steps that fill `spans` in blocks; all of their tokens are trained in the AR half."""
        assert isinstance(self.attention, BlockCausal) and isinstance(self.time, PerBlock), "checked in __post_init__"
        return replace(
            self,
            attention=replace(self.attention, sides="both"),
            time=replace(self.time, of_spans=True),
            objective=replace(self.objective, ar_share=1.0, teacher="own"),  # the base sees the left side only
            curriculum=(),
            infilling=0.0,
        )

    def position_weight(self, canvas: Canvas) -> Float[Tensor, "b n"]:
        """The weight of each position's loss: 1 at open positions, decaying within blocks if `position_decay` is set.

        Where adapters act on masks only, it is 0 at the first positions of blocks, which clean text predicts.
        """
        weight = canvas.open.float()
        if not isinstance(self.attention, BlockCausal):
            return weight
        drafted = offsets(self.attention.block_starts(canvas)) - self.shift  # draft 0 is the first that a mask predicts
        if self.position_decay is not None:
            weight = weight * (-drafted.clamp_min(0) / self.position_decay).exp()
        return weight * (drafted >= 0) if self.adapters == "masks" else weight

    @property
    def _infilling_attention(self) -> AttentionPattern | None:
        if not self.infilling:
            return None
        in_blocks = self.spans is not None and isinstance(self.attention, BlockCausal)
        return replace(self.attention, sides="both") if in_blocks else Bidirectional()

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
            infilling=self._infilling_attention,
            adapters=self.adapters,
            draft_head=self.draft_head,
            spans=self.time.spans if isinstance(self.time, PerText) else None,
        )
