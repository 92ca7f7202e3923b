"""Folders that an earlier version saved load, and generate the same texts."""

import json
import shutil
from pathlib import Path

import pytest

import diffusify
from diffusify.diffusion.objectives import RdmWeight
from diffusify.diffusion.policies import Rdm, Unmask

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
TEXTS = json.loads((EARLIER / "texts.json").read_text())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """The LoRA folder, with the path of its base adjusted."""
    folder = tmp_path / "lora"
    shutil.copytree(EARLIER / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(EARLIER / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_lora_folder(lora: Path) -> None:
    model = diffusify.load(lora)
    stepwise = model.generate("The cat", max_new_tokens=12, policy=model.config.policy)
    lossless = model.generate("The cat", max_new_tokens=12)
    assert [stepwise.text, lossless.text] == TEXTS["lora"]


def test_full_model_with_former_names_in_its_diffusion_config() -> None:
    config = json.loads((EARLIER / "mlm" / "diffusion_config.json").read_text())
    assert config["policy"]["type"] == "Reparam" and config["objective"]["weight"]["type"] == "Rdm"
    model = diffusify.load(EARLIER / "mlm")
    assert model.config.policy == Rdm() and model.config.objective.weight == RdmWeight()
    generated = model.generate("the cat", max_new_tokens=12, policy=Unmask())
    infilled = model.infill("the [[3]] sat", policy=Unmask())
    assert [generated.text, infilled.text] == TEXTS["mlm"]
