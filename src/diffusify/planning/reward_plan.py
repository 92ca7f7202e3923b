"""Plans of runs that learn from rewards: the time of sampling and of learning, and memory, estimated before the run."""

from dataclasses import dataclass
from typing import Any

from diffusify.diffusion.attention import BlockCausal
from diffusify.planning.footprint import DTYPES
from diffusify.planning.plan import FLOAT32, Memory, Plan, plan

SAMPLED_POSITIONS = 16384  # of `reinforce(rollout_tokens=...)`


@dataclass(frozen=True)
class RewardPlan:
    """The estimated resources of a run of `reinforce` that samples a number of answers.

    `learning` is the plan of a training run on the sampled answers with their prompts. Prompts count for each answer,
    though a group computes its prompt once, so it is an upper bound where prompts are long. `new_tokens` is the length
    of an answer. Sampling is one forward pass over the prompt, and one over a block (of bidirectional models over the
    whole text) for each token.
    """

    learning: Plan
    answers: float
    new_tokens: int

    @property
    def forward_flops(self) -> float:
        """FLOPs of a forward pass per position, without the head."""
        return 2.0 * self.learning.parameters.body

    @property
    def head_flops(self) -> float:
        """FLOPs of the logits of one position."""
        config = self.learning.setup.config.get_text_config()
        return 2.0 * config.vocab_size * config.hidden_size

    @property
    def sampling_flops(self) -> float:
        """FLOPs of sampling all answers: an upper bound, at one token per forward pass."""
        length, pattern = self.learning.setup.length, self.learning.setup.recipe.attention
        in_blocks = isinstance(pattern, BlockCausal)
        positions = pattern.size if in_blocks else length
        predicted = pattern.size if in_blocks else self.new_tokens
        once = self.forward_flops * (length - self.new_tokens) if in_blocks else 0.0
        per_token = self.forward_flops * positions + self.head_flops * predicted
        return self.answers * (once + self.new_tokens * per_token)

    @property
    def reference_flops(self) -> float:
        """FLOPs of scoring all answers by the reference model; 0 with `kl_weight=0`."""
        length = self.learning.setup.length
        return self.answers * (self.forward_flops * length + self.head_flops * self.new_tokens)

    @property
    def sampling_hours(self) -> float:
        """The duration of sampling, at the utilisation of training."""
        return self._hours(self.sampling_flops)

    @property
    def learning_hours(self) -> float:
        """The duration of the forward and backward passes, the reference model's included."""
        return self.learning.hours + self._hours(self.reference_flops)

    @property
    def hours(self) -> float:
        """The run's duration; that of the rewards is not included."""
        return self.sampling_hours + self.learning_hours

    def _hours(self, flops: float) -> float:
        device, setup = self.learning.devices.device, self.learning.setup
        return flops / (device.peak(setup.dtype) * self.learning.utilisation) / 3600

    @property
    def reference_memory(self) -> float:
        """Bytes of the reference model, which shares weights that are not trained."""
        return FLOAT32 * self.learning.parameters.trained

    @property
    def sampling_memory(self) -> float:
        """Bytes while answers are sampled: training's permanent ones, a copy of the model, keys and values."""
        step, setup = self._step_memory, self.learning.setup
        config, width = setup.config.get_text_config(), DTYPES[setup.dtype].itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys_and_values = 2 * config.num_hidden_layers * heads * head_size * SAMPLED_POSITIONS
        copy = self.learning.parameters.total + keys_and_values
        return step.weights + step.optimizer + step.rest + self.reference_memory + width * copy

    @property
    def memory(self) -> float:
        """Bytes at the peak of the run."""
        return max(self._step_memory.total + self.reference_memory, self.sampling_memory)

    @property
    def _step_memory(self) -> Memory:
        return self.learning.memory_checkpointed if self.learning.checkpointing else self.learning.memory

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types; bytes and FLOPs are plain numbers."""
        derived = ("sampling_flops", "reference_flops", "sampling_hours", "learning_hours", "hours")
        sizes = ("reference_memory", "sampling_memory", "memory")
        return {
            "answers": self.answers,
            "new_tokens": self.new_tokens,
            **{name: getattr(self, name) for name in (*derived, *sizes)},
            "learning": self.learning.to_dict(),
        }


def plan_rewards(model: str, *, answers: float, new_tokens: int, length: int = 256, **options: Any) -> RewardPlan:
    """Estimate what a run of `reinforce` takes that samples `answers` (steps x prompts x group) of `new_tokens` each.

    `length` is that of an answer with its prompt. Other arguments and errors are those of `plan`; one device is used.
    """
    if not 1 <= new_tokens < length:
        raise ValueError(
            f"new_tokens={new_tokens} must be at least 1 and under length={length}, which includes the prompt; "
            "make length larger"
        )
    learning = plan(model, tokens=answers * length, length=length, **options)
    if learning.devices.count > 1:
        raise ValueError(f"{learning.devices} are {learning.devices.count} devices; reinforcement uses one")
    return RewardPlan(learning, answers, new_tokens)
