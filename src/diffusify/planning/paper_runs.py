"""The training runs of DiffuGPT and DiffuLLaMA (arXiv 2410.17891, table 4 and appendix B), as reported and planned."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from diffusify.models.recipes import ar
from diffusify.planning.devices import DeviceGroup
from diffusify.planning.plan import Plan, plan


@dataclass(frozen=True)
class PaperRun:
    """A run as the paper reports it: each step has `batch` rows of `length` tokens, `rows` per device at a time."""

    name: str
    config: Callable[[], PreTrainedConfig]
    steps: int
    batch: int
    length: int
    rows: int
    hardware: str
    layout: str

    @property
    def tokens(self) -> float:
        """The number of training tokens."""
        return float(self.steps * self.batch * self.length)

    def plan(self) -> Plan:
        """Plan the same run with this package."""
        return plan(
            self.config(), tokens=self.tokens, gpus=DeviceGroup.parse(self.hardware), recipe=ar(), length=self.length
        )

    def facts(self) -> dict[str, Any]:
        """The reported settings and the number of tokens, as JSON types."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"} | {"tokens": self.tokens}


RUNS = (
    PaperRun("DiffuGPT-S", GPT2Config, 1_000_000, 256, 512, 32, "8xA100-80GB", "ZeRO-2"),
    PaperRun(
        "DiffuGPT-M", lambda: GPT2Config(n_embd=1024, n_layer=24, n_head=16), 160_000, 1280, 1024, 160, "8xA100-80GB",
        "ZeRO-2",
    ),
    # 60 rows per device, four micro-batches per step, 64 devices; 65B tokens. LlamaConfig's defaults are Llama 2 7B.
    PaperRun(
        "DiffuLLaMA", lambda: LlamaConfig(max_position_embeddings=4096), 2066, 60 * 4 * 64, 2048, 60, "64xGH200",
        "ZeRO-3, activations offloaded",
    ),
)  # fmt: skip
