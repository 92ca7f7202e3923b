"""The programs in `examples/` run with tiny models."""

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from diffusify.models.saving import save_denoiser
from tests.serving.models import serving, tiny_lm

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_examples_with_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The cat sat\non the mat.\nIt is so.\n")
    with serving() as address:
        assert example("complete_at_cursor").main(address, str(file), 2)
        with serving(first="left-to-right") as other:
            example("chat_with_openai").main(other)
    assert "'wild':" in capsys.readouterr().out


TINY = {"steps": 1, "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}


def test_adapt_your_model(
    causal_base: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("adapt_your_model")
    monkeypatch.setattr(module, "PROMPT", "The cat")  # the tiny base has a context of 64 tokens
    module.main(causal_base, corpus, str(tmp_path / "mine"), **TINY)
    output = capsys.readouterr().out
    assert "eval_ar_nll" in output and all(f"{preset}, " in output for preset in ("quality", "balanced", "fast"))


def test_learn_from_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_lm(infills=False)
    save_denoiser(tmp_path / "model", lm.denoiser, lm.tokenizer.tokenizer)
    small = {"steps": 1, "group": 2, "prompts": 1, "max_new_tokens": 4, "held_out": 1, "bf16": False}
    example("learn_from_rewards").main(str(tmp_path / "model"), str(tmp_path / "out"), **small)
    assert "'builtin:json': 0.0" in capsys.readouterr().out


def test_infill_document(tmp_path: Path) -> None:
    lm = tiny_lm(infills=True)
    save_denoiser(tmp_path / "model", lm.denoiser, lm.tokenizer.tokenizer)
    file = tmp_path / "letter.md"
    file.write_text("# A cat\n\nThe [[3]] sat on [[...]] mat.\n\nIt is so.\n\nA \\[[ and [[2]].\n")
    filled = example("infill_document").main(str(tmp_path / "model"), str(file))
    assert filled.startswith("# A cat\n\nThe") and "\n\nIt is so.\n\nA [[ and" in filled


@pytest.mark.skipif(find_spec("rxnfp") is None, reason="the package rxnfp, which has the model, is not installed")
def test_reaction_model(tmp_path: Path) -> None:
    data = tmp_path / "reactions.jsonl"
    texts = [f"{'C' * i}O.CC(=O)O>>CC(=O)O{'C' * i}" for i in range(1, 40)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = example("reaction_model").main(str(data), str(tmp_path / "out"), "CCO.CC(=O)O>>[[9]]", **TINY)
    assert text.startswith("CCO.CC(=O)O>>") and len(text) > len("CCO.CC(=O)O>>")
