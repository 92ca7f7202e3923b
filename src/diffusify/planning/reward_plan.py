"""Plans of runs that learn from rewards: the time of sampling and of learning, and memory, estimated before the run."""

import re
from dataclasses import dataclass
from typing import Any

from diffusify.diffusion.attention import BlockCausal
from diffusify.planning.devices import parse_amount
from diffusify.planning.footprint import DTYPES
from diffusify.planning.plan import FLOAT32, Memory, Plan

# The defaults of `reinforce`: prompts of a step, answers to each, and positions that are sampled at the same time.
PROMPTS, GROUP, SAMPLED_POSITIONS = 4, 8, 16384
_NEW_TOKENS = 2048  # in a forward pass of training, at most; 8 texts if they have more


@dataclass(frozen=True)
class RewardPlan:
    """The estimated resources of a run of `reinforce` that samples a number of answers.

    `learning` is the plan of a training run on the sampled answers with their prompts, `new_tokens` the length of an
    answer. Sampling takes a forward pass over the prompt, and one over a block for each token, as if all drafts were
    rejected. Bidirectional models run the whole text for each token; in block models a group of `GROUP` answers shares
    its prompt. All passes have the utilisation of `learning`. The rewards' own time is not included. ValueError if the
    answers are not shorter than their texts, or for several devices.
    """

    learning: Plan
    answers: float
    new_tokens: int

    def __post_init__(self) -> None:
        length, devices = self.learning.setup.length, self.learning.devices
        if not 1 <= self.new_tokens < length:
            raise ValueError(
                f"answers of {self.new_tokens} tokens must have at least 1 and fewer than length={length}, which "
                "includes the prompt; use a larger length"
            )
        if devices.count > 1:
            raise ValueError(f"{devices} are {devices.count} devices, and reinforcement uses 1; give one")

    @property
    def _block_size(self) -> int | None:
        pattern = self.learning.setup.recipe.attention
        return pattern.size if isinstance(pattern, BlockCausal) else None

    @property
    def positions(self) -> int | float:
        """The positions of a text, with its share of a shared prompt."""
        length = self.learning.setup.length
        return length if self._block_size is None else self.new_tokens + (length - self.new_tokens) / GROUP

    @property
    def sampling_flops(self) -> float:
        """FLOPs of sampling all answers."""
        size, new = self._block_size, self.new_tokens
        if size is None:
            return self.answers * new * self._flops(self.positions, new)
        return self.answers * (self._flops(self.positions - new, 0) + new * self._flops(size, size))

    @property
    def reference_flops(self) -> float:
        """FLOPs of scoring all answers with the reference model, which `kl_weight=0` saves."""
        return self.answers * self._flops(self.positions, self.new_tokens)

    @property
    def sampling_hours(self) -> float:
        """The duration of sampling."""
        return self._hours(self.sampling_flops)

    @property
    def learning_hours(self) -> float:
        """The duration of the forward and backward passes, those of the reference model included."""
        share = self.positions / self.learning.setup.length
        return share * self.learning.hours + self._hours(self.reference_flops)

    @property
    def hours(self) -> float:
        """The run's duration."""
        return self.sampling_hours + self.learning_hours

    @property
    def sampling_memory(self) -> float:
        """Bytes while answers are sampled: what training keeps, a copy of the model, and cached keys and values."""
        step, setup = self._step_memory, self.learning.setup
        config, width = setup.config.get_text_config(), DTYPES[setup.dtype].itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys_and_values = 2 * config.num_hidden_layers * heads * head_size * SAMPLED_POSITIONS
        kept = step.weights + step.optimizer + step.rest + self._reference_memory
        cached = keys_and_values if self._block_size else 0
        return kept + width * (self.learning.parameters.total + cached)

    @property
    def learning_memory(self) -> float:
        """Bytes at the peak of a training step, with the reference model."""
        return self._step_memory.total + self._reference_memory

    @property
    def memory(self) -> float:
        """Bytes at the peak of the run."""
        return max(self.sampling_memory, self.learning_memory)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types; bytes and FLOPs are plain numbers."""
        derived = (
            *("sampling_flops", "reference_flops", "sampling_hours", "learning_hours", "hours"),
            *("sampling_memory", "learning_memory", "memory"),
        )
        sizes = {"answers": self.answers, "new_tokens": self.new_tokens}
        return sizes | {name: getattr(self, name) for name in derived} | {"learning": self.learning.to_dict()}

    def _flops(self, positions: int | float, logits: int) -> float:
        """FLOPs of a forward pass over some positions, with the logits of some."""
        config = self.learning.setup.config.get_text_config()
        return 2.0 * (self.learning.parameters.body * positions + config.vocab_size * config.hidden_size * logits)

    def _hours(self, flops: float) -> float:
        device, dtype = self.learning.devices.device, self.learning.setup.dtype
        return flops / (device.peak(dtype) * self.learning.utilisation) / 3600

    @property
    def _reference_memory(self) -> float:
        """Bytes of the reference model, which shares the weights that are not trained."""
        return FLOAT32 * self.learning.parameters.trained

    @property
    def _step_memory(self) -> Memory:
        return self.learning.memory_checkpointed if self.learning.checkpointing else self.learning.memory


def texts_per_pass(new_tokens: int, size: int | None = None, texts: int = PROMPTS * GROUP) -> int:
    """The texts of a step that `reinforce` trains on in one forward pass: `size`, or as many as are usual.

    ValueError if `size` does not divide the `texts` of a step.
    """
    divisors = [each for each in range(1, texts + 1) if texts % each == 0]
    if size is None:
        return max(each for each in divisors if each <= max(8, _NEW_TOKENS // new_tokens))
    if size not in divisors:
        raise ValueError(
            f"per_device_train_batch_size={size} (--batch of plan) does not divide the {texts} texts of a step "
            f"(prompts x group); use one of {', '.join(map(str, divisors))}"
        )
    return size


def parse_answers(text: str) -> tuple[float, int]:
    """The number of answers and the tokens of each in text such as `6400x64`. ValueError for anything else."""
    found = re.fullmatch(r"(.+?)\s*[xX*]\s*([1-9]\d*)", text.strip())
    if not found:
        raise ValueError(f"answers={text} is not a number and a length; write 6400x64 for 6,400 answers of 64 tokens")
    return parse_amount(found[1], "answers"), int(found[2])
