"""Adaptation of a base to a folder, and the errors for bad arguments."""

import json
import shutil
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import diffusify
from diffusify.config import DiffusionConfig, to_plain
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.bench import greedy_ar
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora, adapter_base
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block, draft, mlm
from diffusify.text.sources import stream_texts
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_run_folder

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}
EARLIER = Path(__file__).parents[1] / "data" / "earlier"


@pytest.fixture(scope="module")
def one_step(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    return adapt(causal_base, corpus, tmp_path_factory.mktemp("one-step") / "run", steps=1, **TINY)


@pytest.fixture
def finished(one_step: Path, tmp_path: Path) -> Path:
    """A copy of the finished run of one step."""
    return Path(shutil.copytree(one_step, tmp_path / "run"))


def test_adapt_load_generate(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Law 10: save, load, generate; and a second call returns the finished run."""
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


def test_lora_trains_and_saves_adapters_only(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", lora=Lora(2), steps=3, **TINY)
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()
    assert diffusify.load(out).generate("The cat", max_new_tokens=4).text.startswith("The cat")
    with pytest.raises(ValueError, match="holds another run .*lora"):
        adapt(causal_base, corpus, tmp_path / "run", steps=3, **TINY)


def test_drafting_adapters_are_trained_and_continue(causal_base: str, corpus: str, tmp_path: Path) -> None:
    first = adapt(causal_base, corpus, tmp_path / "first", recipe=draft(), steps=3, **TINY)
    more = adapt(str(first), corpus, tmp_path / "more", steps=2, seed=1, **TINY)
    assert DiffusionConfig.load(more) == DiffusionConfig.load(first)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, more)]
    assert weights[0].keys() == weights[1].keys()
    assert not (more / "model.safetensors").exists() and adapter_base(more) == causal_base
    assert sum(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) > len(weights[0]) / 2
    lm, base = diffusify.load(more), load_base(causal_base).network.eval()
    assert lm.generate("The cat", max_new_tokens=9).completion == lm.tokenizer.decode(greedy_ar(lm, base, "The cat", 9))
    assert "without diffusify, the model is its base" in (more / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="holds adapters='masks', and the recipe needs adapters='all'; omit --recipe"):
        adapt(str(first), corpus, tmp_path / "other", recipe=block(4), steps=1, **TINY)
    for head in (16, None):
        with pytest.raises(ValueError, match=f"has draft_head=512, and the recipe needs draft_head={head}; omit"):
            adapt(str(first), corpus, tmp_path / "other", recipe=draft(head=head), steps=1, **TINY)


@pytest.mark.parametrize("lora", [None, Lora(2)], ids=["all", "lora"])
def test_a_diffusion_model_continues(causal_base: str, corpus: str, tmp_path: Path, lora: Lora | None) -> None:
    first = adapt(causal_base, corpus, tmp_path / "first", recipe=ar(), lora=lora, steps=2, **TINY)
    unchanged = adapt(str(first), corpus, tmp_path / "unchanged", steps=1, seed=1, learning_rate=0.0, **TINY)
    more = adapt(first, Path(corpus), tmp_path / "more", steps=2, seed=1, **TINY)
    other = adapt(str(first), corpus, tmp_path / "other", recipe=block(2), steps=1, **TINY)
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    weights = [load_file(folder / file) for folder in (first, unchanged, more)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    attention = [DiffusionConfig.load(folder).attention for folder in (first, more, other)]
    assert attention == [Bidirectional(), Bidirectional(), BlockCausal(2)]
    assert (adapter_base(more) is None) == (lora is None)
    if lora:
        with pytest.raises(ValueError, match="holds adapters, and training continues with these; omit --lora"):
            adapt(str(first), corpus, tmp_path / "twice", lora=lora, steps=1, **TINY)


def test_another_run_in_the_same_folder_is_refused(
    causal_base: str, corpus: str, tmp_path: Path, finished: Path
) -> None:
    with pytest.raises(ValueError, match="holds another run .*steps"):
        adapt(causal_base, corpus, finished, steps=2, **TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        adapt(causal_base, corpus, tmp_path / "mine", steps=1, **TINY)


def test_files_that_are_not_read_are_reported(causal_base: str, corpus: str, tmp_path: Path) -> None:
    console, folder = Console(file=StringIO(), width=200), tmp_path / "texts"
    folder.mkdir()
    shutil.copy(corpus, folder)
    (folder / "book.pdf").write_bytes(b"%PDF")
    adapt(causal_base, folder, tmp_path / "run", steps=1, console=console, **TINY)
    assert isinstance(console.file, StringIO)
    assert "1 other files of the folder are not data, such as book.pdf" in console.file.getvalue()


def test_a_run_on_other_contents_is_refused(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """The path is the same. A run of an earlier version, and one whose data are gone, are recognized."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copy(corpus, data)
    assert adapt(causal_base, str(data), run, steps=1, **TINY) == run
    data.touch()
    assert adapt(causal_base, str(data), run, steps=1, **TINY) == run
    data.write_text(data.read_text().replace("cat", "cow"))
    for finished in (True, False):
        if not finished:
            (run / "diffusion_config.json").unlink()
        with pytest.raises(ValueError, match=r"a run on other data: the files of .*data.jsonl have changed"):
            adapt(causal_base, str(data), run, steps=1, **TINY)
    settings = json.loads((run / "run.json").read_text())
    assert not check_run_folder(run, settings | {"data_checksum": None})
    del settings["data_checksum"]
    (run / "run.json").write_text(json.dumps(settings))
    assert not check_run_folder(run, settings | {"data_checksum": "0123"})


def test_a_run_without_newer_fields_is_recognized(causal_base: str, corpus: str, finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    del run["recipe"]["infilling"], run["recipe"]["objective"]["teacher"]  # fields that earlier versions do not have
    (finished / "run.json").write_text(json.dumps(run))
    assert adapt(causal_base, corpus, finished, steps=1, **TINY) == finished
    with pytest.raises(ValueError, match="holds another run .*recipe"):
        adapt(causal_base, corpus, finished, recipe=block(4, infilling=0.5), steps=1, **TINY)


@pytest.mark.parametrize(
    ("name", "recipe", "lora"), [("lora", block(4), Lora(4)), ("mlm", mlm(), None)], ids=["lora", "mlm"]
)
def test_a_run_with_former_names_is_recognized(tmp_path: Path, name: str, recipe: Recipe, lora: Lora | None) -> None:
    """The `run.json` of an earlier version, whose choices had other names, in a run that is not finished."""
    shutil.copy(EARLIER / name / "run.json", tmp_path)
    settings: dict[str, Any] = {
        "base": "BASE", "data": "TEXTS", "recipe": to_plain(recipe), "lora": to_plain(lora),
        "budget": {"steps": 3, "minutes": None}, "length": 32, "held_out": 8192, "seed": 0, "streaming": None,
        "training": {},
    }  # fmt: skip
    assert json.loads((tmp_path / "run.json").read_text())["recipe"] != settings["recipe"]
    assert check_run_folder(tmp_path, settings) is False
    with pytest.raises(ValueError, match="holds another run .*recipe"):
        check_run_folder(tmp_path, settings | {"recipe": to_plain(replace(recipe, policy=Unmask()))})


def test_a_run_with_a_class_of_the_user_is_recognized(causal_base: str, corpus: str, finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    run["recipe"]["objective"]["weight"] = {"type": "Halfway"}  # not a class of the library
    (finished / "run.json").write_text(json.dumps(run))
    assert check_run_folder(finished, run)
    with pytest.raises(ValueError, match="holds another run .*recipe"):
        adapt(causal_base, corpus, finished, steps=1, **TINY)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_without_validation(causal_base: str, tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "word.txt"
    path.write_text("quick")
    options: dict[str, Any] = {**TINY, "held_out": 0, "streaming": streaming, "logging_steps": 1}
    with pytest.raises(ValueError, match="single word 'quick', .* train without validation: held_out=0"):
        adapt(causal_base, str(path), tmp_path / "out", steps=2, **TINY)
    console = Console(file=(output := StringIO()), width=80)
    out = adapt(causal_base, str(path), tmp_path / "out", steps=2, console=console, **options)
    log = json.loads((out / "training.json").read_text())["log"]
    assert sum("loss" in entry for entry in log) == 2 and not any("eval_bound" in entry for entry in log)
    assert (out / "README.md").is_file() and not (out / "curve.png").exists() and "bound" not in output.getvalue()
    with pytest.raises(ValueError, match="held_out=0 leaves nothing to evaluate on; leave eval_strategy=steps out"):
        adapt(causal_base, str(path), tmp_path / "other", steps=2, eval_strategy="steps", **options)
    with pytest.raises(ValueError, match="nothing to evaluate on; leave eval_steps=1 out"):
        adapt(causal_base, str(path), tmp_path / "other", steps=2, eval_steps=1, **options)
    with pytest.raises(ValueError, match="held_out=-1 must be at least 0"):
        adapt(causal_base, str(path), tmp_path / "other", steps=2, **{**options, "held_out": -1})


def test_a_log_file_gets_rate_and_time_left(causal_base: str, corpus: str, tmp_path: Path) -> None:
    console = Console(file=(output := StringIO()), width=80)
    adapt(causal_base, corpus, tmp_path / "run", steps=6, console=console, logging_steps=2, **TINY)
    [line] = [line for line in output.getvalue().splitlines() if "tok/s" in line]  # the first of one per minute
    assert line.strip().startswith("33.3%  step 2  loss ") and line.endswith(" left")


def test_an_interrupted_run_is_resumed(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Budget.on_step_end

    def interrupted(self: Budget, args, state, control, **kwargs) -> None:
        real(self, args, state, control, **kwargs)
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
        ({"minutes": 1.0}, "give exactly one of the two"),
        ({"base": "./nowhere"}, "nowhere does not exist"),
        ({"data": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"length": 4096}, "length=4096"),
        ({"learning_rat": 1e-4}, 'did you mean "learning_rate"'),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' must be one of float"),
        ({"recipe": mlm()}, "is an autoregressive model: use ar"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    causal_base: str, corpus: str, tmp_path: Path, change: dict, message: str
) -> None:
    arguments = {"base": causal_base, "data": corpus, "steps": 1} | TINY | change
    with pytest.raises(ValueError, match=message):
        adapt(arguments.pop("base"), arguments.pop("data"), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_masked_base_refuses_a_shift(masked_base: str, corpus: str, tmp_path: Path) -> None:
    for recipe in (ar(), block(4)):
        with pytest.raises(ValueError, match="masked"):
            adapt(masked_base, corpus, tmp_path / "run", recipe=recipe, steps=1, **TINY)


def test_the_default_recipe_fits_the_base(masked_base: str, causal_base: str, corpus: str, tmp_path: Path) -> None:
    for base, recipe in ((masked_base, "mlm"), (causal_base, "block")):
        folder = adapt(base, corpus, tmp_path / recipe, steps=1, **TINY)
        assert json.loads((folder / "diffusion_config.json").read_text())["recipe"] == recipe


def test_a_config_of_another_architecture_and_a_truncated_file_are_refused(finished: Path) -> None:
    config = json.loads((finished / "diffusion_config.json").read_text())
    (finished / "diffusion_config.json").write_text(json.dumps(config | {"architecture": "GPT2LMHeadModel"}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        diffusify.load(finished)
    (finished / "diffusion_config.json").write_text(json.dumps(config))
    weights = (finished / "model.safetensors").read_bytes()
    (finished / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.safetensors"):
        diffusify.load(finished)


def test_minutes_end_a_run_and_lower_the_learning_rate(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", minutes=0.02, logging_steps=1, warmup_steps=1, **TINY)
    log = json.loads((out / "training.json").read_text())["log"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert len(rates) > 1 and rates[-1] < rates[0]
    assert sum("eval_bound" in entry for entry in log) >= 2


def test_training_on_a_mixture_and_on_a_stream(
    causal_base: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = adapt(causal_base, f"0.5*{corpus},0.5*{corpus}", tmp_path / "mixture", recipe=ar(), steps=2, **TINY)
    assert diffusify.load(out).config.sees_right_context
    small = tmp_path / "small.jsonl"
    small.write_text("".join(Path(corpus).read_text().splitlines(keepends=True)[:8]))
    stream = stream_texts(str(small))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    out = adapt(causal_base, "hub:some/texts", tmp_path / "stream", steps=20, **TINY)  # more than an epoch
    log = json.loads((out / "training.json").read_text())["log"]
    assert max(entry["step"] for entry in log) == 20
