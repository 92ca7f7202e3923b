"""`diffusify plan`: its output and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.cli.plan import duration, short_number
from diffusify.planning import paper_runs
from diffusify.planning.footprint import Footprint

run = CliRunner()
RUN = ["--tokens", "65B", "--gpus", "64xH100", "--length", "32"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as if counted for 4 and 16 rows; tests/planning has those that are."""
    steps = Footprint(1e9, 0.0, 1e6, 1e6), Footprint(4e9, 0.0, 4e6, 4e6)
    monkeypatch.setattr("diffusify.planning.plan._counted_steps", lambda *arguments: steps)


def test_a_plan_ends_with_the_command_of_the_run(causal_base: str) -> None:
    done = run.invoke(app, ["plan", causal_base, *RUN, "--recipe", "ar", "--price", "2.5", "-o", "annealing_steps=9"])
    assert done.exit_code == 0, done.output
    for text in ("parameters", "FLOPs", "64xH100", "DDP", "hours", "cost", "AdamW moments", "total"):
        assert text in done.stdout
    command = done.stderr.split("next:")[1]
    assert "torchrun --nproc-per-node 8 --nnodes 8 -m diffusify adapt" in command
    assert "--recipe ar" in command and "-o annealing_steps=9 -o length=32" in command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "draft", "--lora", "8"], "diffusify adapt BASE --data DATA --recipe draft --lora 8 --steps"),
        (["--gpus", "12xH100"], "torchrun --nproc-per-node 6 --nnodes 2 -m diffusify adapt"),
        (["--dtype", "float32"], "-o bf16=false"),
        (["--dtype", "float16"], "-o fp16=true"),
        (["--gpus", "V100"], "-o fp16=true"),
        (["--gpus", "L4", "--batch", "9999999", "--dtype", "float32", "--utilisation", "0.3"],
         "plan BASE --tokens 1B --gpus L4 --length 32 --batch 32768 --dtype float32 --utilisation 0.3"),
        (["--answers", "6400x40", "--length", "64"], "32 sequences per device at a time"),
        (["--answers", "6400x40", "--length", "64", "--batch", "4"], "-o per_device_train_batch_size=4"),
    ],
)  # fmt: skip
def test_the_command_is_the_planned_run(
    causal_base: str, counted: None, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    defaults = ["--gpus", "H100", "--length", "32", *([] if "--answers" in words else ["--tokens", "1B"])]
    done = run.invoke(app, ["plan", causal_base, *defaults, *words])
    assert done.exit_code == 0, done.output
    assert expected.replace("BASE", causal_base) in " ".join(done.output.split())


def test_json_has_all_fields_of_the_plan(causal_base: str, counted: None) -> None:
    words = ["plan", causal_base, *RUN, "--recipe", "ar", "--price", "2", "--batch", "3", "--lora", "4"]
    words += ["-o", "alpha=4", "--json"]
    found = json.loads(run.invoke(app, words).stdout)
    assert found["fits"] and found["tokens"] == 65e9 and found["rows"] == 3 and found["lora"]["alpha"] == 4
    assert found["cost"] == pytest.approx(found["device_hours"] * 2)
    assert found["device_hours"] == pytest.approx(64 * found["hours"])
    parts = [value for name, value in found["memory"].items() if name != "total"]
    assert found["memory"]["total"] == pytest.approx(sum(parts))
    assert found["parameters"]["trained"] < found["parameters"]["total"]


def test_a_run_that_does_not_fit_prints_options_that_make_it_fit(tmp_path: Path, counted: None) -> None:
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=45056, num_hidden_layers=1,
        num_attention_heads=128, num_key_value_heads=128,
    ).save_pretrained(tmp_path)  # fmt: skip
    done = run.invoke(
        app, ["plan", str(tmp_path), "--tokens", "1B", "--gpus", "L4", "--length", "32", "--recipe", "ar"]
    )
    assert done.exit_code == 0, done.output
    assert "no: " in done.stdout and "would make it fit:" in done.stdout and "--gpus" in done.stdout
    assert "diffusify plan" in done.stderr and "--gpus" in done.stderr


def test_a_run_that_learns_from_rewards(causal_base: str, counted: None) -> None:
    words = ["plan", causal_base, "--answers", "6400x8", "--gpus", "H100", "--length", "32", "--recipe", "block"]
    done = run.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "for 6.4K answers" in done.stdout and "with a reference model" in done.stdout
    command = " ".join(done.stderr.split("next:")[1].split())
    assert "reinforce" in command and "--data DATA --reward REWARD --max-new-tokens 8 --steps 200" in command
    found = json.loads(run.invoke(app, [*words, "--json"]).stdout)
    assert found["learning"]["tokens"] == 6400 * 32 and found["hours"] > found["sampling_hours"] > 0


def test_the_runs_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    monkeypatch.setattr(paper_runs, "RUNS", (replace(paper_runs.RUNS[2], config=lambda: tiny, length=32),))
    done = run.invoke(app, ["plan", "--paper"])
    assert done.exit_code == 0 and done.stdout.count("DiffuLLaMA") == 2 and "2,066" in done.stdout
    row = json.loads(run.invoke(app, ["plan", "--paper", "--json"]).stdout)[0]
    assert row["paper"]["name"] == "DiffuLLaMA" and row["paper"]["rows"] == 60


def test_numbers_and_durations_have_units() -> None:
    assert [short_number(n) for n in (65e9, 124.4e6, 999.9e6, 12.0)] == ["65B", "124M", "1B", "12"]
    assert [duration(h) for h in (0.2, 5.0, 72.0)] == ["12 minutes", "5 hours", "3 days"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "diffusify plan MODEL --tokens"),
        (["BASE"], "diffusify plan MODEL --tokens"),
        (["BASE", "--paper"], "leave MODEL, --tokens and --answers out"),
        (["BASE", "--tokens", "1B", "--answers", "9x9"], "either --tokens or --answers"),
        (["BASE", "--answers", "640"], "answers=640 is not a number and a length"),
        (["BASE", "--tokens", "-1"], "tokens=-1 must be above 0"),
        (["BASE", "--tokens", "65Q"], "tokens=65Q is not a number"),
        (["BASE", "--tokens", "1B", "--gpus", "0xH100"], "0 x H100"),
        (["BASE", "--tokens", "1B", "--gpus", "1000000xH100"], "100,000 devices"),
        (["BASE", "--tokens", "1B", "--gpus", "8xH10"], 'did you mean "H100"'),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--lora", "0"], "rank 0"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--length", "999"], "length=999"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "-o", "sise=4"], 'did you mean "size"'),
        (["./missing", "--tokens", "1B", "--gpus", "H100"], "./missing does not exist"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--recipe", "mlm"], "is an autoregressive model"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, causal_base: str) -> None:
    done = run.invoke(app, ["plan", *(causal_base if word == "BASE" else word for word in words)])
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not done.stdout
