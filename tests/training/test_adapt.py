"""From a base to a folder, and every way it is refused."""

import json
import shutil
import signal
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import diffusify
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.models.lora import Lora, base_of
from diffusify.models.recipes import ar, block, mlm
from diffusify.text.sources import stream_texts
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.run_folder import claim

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}


def test_adapt_load_generate(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Law 10: save, load, generate; and a second call finds the finished run."""
    out = adapt(causal_base, corpus, tmp_path / "run", steps=3, **TINY)
    assert {"config.json", "model.safetensors", "diffusion_config.json", "curve.png", "training.json"} <= {
        path.name for path in out.iterdir()
    }
    assert not list(out.glob("checkpoint-*"))
    first, second = (diffusify.load(out).generate("The cat", max_new_tokens=12, temperature=1.0) for _ in range(2))
    assert first.text == second.text and first.text.startswith("The cat")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert adapt(causal_base, corpus, out, steps=3, **TINY) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_adapters_alone_are_trained(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", lora=Lora(2), steps=3, **TINY)
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()
    assert diffusify.load(out).generate("The cat", max_new_tokens=4).text.startswith("The cat")
    with pytest.raises(ValueError, match="holds another run .*lora"):
        adapt(causal_base, corpus, tmp_path / "run", steps=3, **TINY)


@pytest.mark.parametrize("lora", [None, Lora(2)], ids=["all", "lora"])
def test_a_diffusion_model_is_trained_on(causal_base: str, corpus: str, tmp_path: Path, lora: Lora | None) -> None:
    first = adapt(causal_base, corpus, tmp_path / "first", recipe=ar(), lora=lora, steps=2, **TINY)
    still = adapt(str(first), corpus, tmp_path / "still", steps=1, seed=1, learning_rate=0.0, **TINY)
    more = adapt(str(first), corpus, tmp_path / "more", steps=2, seed=1, **TINY)
    other = adapt(str(first), corpus, tmp_path / "other", recipe=block(2), steps=1, **TINY)
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    weights = [load_file(folder / file) for folder in (first, still, more)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    attention = [DiffusionConfig.load(folder).attention for folder in (first, more, other)]
    assert attention == [Bidirectional(), Bidirectional(), BlockCausal(2)]
    assert (base_of(more) is None) == (lora is None)
    if lora:
        with pytest.raises(ValueError, match="holds adapters, which are trained on; leave --lora out"):
            adapt(str(first), corpus, tmp_path / "twice", lora=lora, steps=1, **TINY)


def test_another_run_in_the_same_folder_is_refused(causal_base: str, corpus: str, tmp_path: Path) -> None:
    adapt(causal_base, corpus, tmp_path / "run", steps=1, **TINY)
    with pytest.raises(ValueError, match="holds another run .*steps"):
        adapt(causal_base, corpus, tmp_path / "run", steps=2, **TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        adapt(causal_base, corpus, tmp_path / "mine", steps=1, **TINY)


def test_a_run_of_an_earlier_version_is_known_again(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", steps=1, **TINY)
    run = json.loads((out / "run.json").read_text())
    del run["recipe"]["infilling"], run["recipe"]["objective"]["teacher"]  # what had not been thought of yet
    (out / "run.json").write_text(json.dumps(run))
    assert adapt(causal_base, corpus, out, steps=1, **TINY) == out
    with pytest.raises(ValueError, match="holds another run .*recipe"):
        adapt(causal_base, corpus, out, recipe=block(4, infilling=0.5), steps=1, **TINY)


def test_a_run_with_a_choice_of_one_s_own_is_known_again(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", steps=1, **TINY)
    run = json.loads((out / "run.json").read_text())
    run["recipe"]["objective"]["weight"] = {"type": "Halfway"}  # which the library does not know
    (out / "run.json").write_text(json.dumps(run))
    assert claim(out, run)
    with pytest.raises(ValueError, match="holds another run .*recipe"):
        adapt(causal_base, corpus, out, steps=1, **TINY)


def test_a_log_file_tells_of_rate_and_time_left(causal_base: str, corpus: str, tmp_path: Path) -> None:
    console = Console(file=(said := StringIO()), width=80)
    adapt(causal_base, corpus, tmp_path / "run", steps=6, console=console, logging_steps=2, **TINY)
    [line] = [line for line in said.getvalue().splitlines() if "tok/s" in line]  # one a minute, the first at once
    assert line.strip().startswith("33.3%  step 2  loss ") and line.endswith(" left")


def test_an_interrupted_run_goes_on(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Budget.on_step_end

    def interrupted(self: Budget, args, state, control, **more) -> None:
        real(self, args, state, control, **more)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Budget, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt(causal_base, corpus, tmp_path / "run", steps=4, **TINY)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(Budget, "on_step_end", real)
    adapt(causal_base, corpus, tmp_path / "run", steps=4, **TINY)
    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    assert max(entry["step"] for entry in log) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"minutes": 0.0, "steps": None}, "minutes=0.0"),
        ({"minutes": 1.0}, "give one of the two"),
        ({"base": "./nowhere"}, "nowhere does not exist"),
        ({"data": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"length": 4096}, "length=4096"),
        ({"learning_rat": 1e-4}, 'did you mean "learning_rate"'),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' must be one of float"),
        ({"recipe": mlm()}, "left-to-right"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    causal_base: str, corpus: str, tmp_path: Path, change: dict, message: str
) -> None:
    given = {"base": causal_base, "data": corpus, "steps": 1} | TINY | change
    with pytest.raises(ValueError, match=message):
        adapt(given.pop("base"), given.pop("data"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_masked_base_refuses_a_shift(masked_base: str, corpus: str, tmp_path: Path) -> None:
    for recipe in (ar(), block(4)):
        with pytest.raises(ValueError, match="masked"):
            adapt(masked_base, corpus, tmp_path / "run", recipe=recipe, steps=1, **TINY)


def test_a_card_for_another_architecture_is_refused(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", steps=1, **TINY)
    card = json.loads((out / "diffusion_config.json").read_text())
    (out / "diffusion_config.json").write_text(json.dumps(card | {"architecture": "GPT2LMHeadModel"}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        diffusify.load(out)
    (out / "diffusion_config.json").write_text(json.dumps(card))
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors"):
        diffusify.load(out)
    shutil.rmtree(out)


def test_minutes_end_a_run_and_lower_the_learning_rate(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", minutes=0.02, logging_steps=1, warmup_steps=1, **TINY)
    log = json.loads((out / "training.json").read_text())["log"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert len(rates) > 1 and rates[-1] < rates[0]
    assert sum("eval_bound" in entry for entry in log) >= 2


def test_a_mixture_and_a_stream_train(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = adapt(causal_base, f"0.5*{corpus},0.5*{corpus}", tmp_path / "mixture", recipe=ar(), steps=2, **TINY)
    assert diffusify.load(out).config.sees_right_context
    stream = stream_texts(corpus)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **settings: stream)
    out = adapt(causal_base, "hub:some/texts", tmp_path / "stream", steps=60, **TINY)  # more than an epoch
    log = json.loads((out / "training.json").read_text())["log"]
    assert max(entry["step"] for entry in log) == 60
