"""`diffusify plan`: what it prints, and how it says no."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.cli.planning import amount, lasting
from diffusify.planning import paper_runs

run = CliRunner()
RUN = ["--tokens", "65B", "--gpus", "64xH100", "--length", "32"]


def test_a_plan_is_printed_and_ends_with_the_run_s_command(causal_base: str) -> None:
    done = run.invoke(app, ["plan", causal_base, *RUN, "--recipe", "ar", "--price", "2.5", "-o", "annealing_steps=9"])
    assert done.exit_code == 0, done.output
    for told in ("parameters", "FLOPs", "64xH100", "DDP", "hours", "cost", "AdamW's moments", "total"):
        assert told in done.stdout
    command = done.stderr.split("next:")[1]
    assert "torchrun --nproc-per-node 8 --nnodes 8 -m diffusify adapt" in command
    assert "--recipe ar" in command and "-o annealing_steps=9 -o length=32" in command


def test_json_holds_what_a_program_wants(causal_base: str) -> None:
    words = ["plan", causal_base, *RUN, "--price", "2", "--batch", "3", "--lora", "4", "-o", "alpha=4", "--json"]
    found = json.loads(run.invoke(app, words).stdout)
    assert found["fits"] and found["tokens"] == 65e9 and found["rows"] == 3 and found["lora"]["alpha"] == 4
    assert found["cost"] == pytest.approx(found["device_hours"] * 2)
    assert found["device_hours"] == pytest.approx(64 * found["hours"])
    parts = [value for name, value in found["memory"].items() if name != "total"]
    assert found["memory"]["total"] == pytest.approx(sum(parts))
    assert found["parameters"]["trained"] < found["parameters"]["total"]


def test_what_does_not_fit_says_how_it_would(tmp_path: Path) -> None:
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=45056, num_hidden_layers=2,
        num_attention_heads=128, num_key_value_heads=128,
    ).save_pretrained(tmp_path)  # fmt: skip
    done = run.invoke(app, ["plan", str(tmp_path), "--tokens", "1B", "--gpus", "L4"])
    assert done.exit_code == 0, done.output
    assert "no" in done.stdout and "what would make it fit" in done.stdout and "--gpus" in done.stdout
    assert "diffusify plan" in done.stderr and "--gpus" in done.stderr


def test_the_paper_s_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    monkeypatch.setattr(paper_runs, "RUNS", (replace(paper_runs.RUNS[2], config=lambda: tiny, length=32),))
    done = run.invoke(app, ["plan", "--paper"])
    assert done.exit_code == 0 and done.stdout.count("DiffuLLaMA") == 2 and "2,066" in done.stdout
    row = json.loads(run.invoke(app, ["plan", "--paper", "--json"]).stdout)[0]
    assert row["paper"]["name"] == "DiffuLLaMA" and row["paper"]["rows"] == 60


def test_numbers_as_people_say_them() -> None:
    assert [amount(n) for n in (65e9, 124.4e6, 999.9e6, 12.0)] == ["65B", "124M", "1B", "12"]
    assert [lasting(h) for h in (0.2, 5.0, 72.0)] == ["12 minutes", "5 hours", "3 days"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "diffusify plan MODEL --tokens"),
        (["BASE"], "diffusify plan MODEL --tokens"),
        (["BASE", "--paper"], "leave MODEL and --tokens out"),
        (["BASE", "--tokens", "-1"], "tokens=-1 must be above 0"),
        (["BASE", "--tokens", "65Q"], "tokens=65Q is no number"),
        (["BASE", "--tokens", "1B", "--gpus", "0xH100"], "0 x H100"),
        (["BASE", "--tokens", "1B", "--gpus", "1000000xH100"], "100,000 devices"),
        (["BASE", "--tokens", "1B", "--gpus", "8xH10"], 'did you mean "H100"'),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--lora", "0"], "rank 0"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--length", "999"], "length=999"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "-o", "sise=4"], 'did you mean "size"'),
        (["./missing", "--tokens", "1B", "--gpus", "H100"], "./missing does not exist"),
        (["BASE", "--tokens", "1B", "--gpus", "H100", "--recipe", "mlm"], "left-to-right"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, causal_base: str) -> None:
    done = run.invoke(app, ["plan", *(causal_base if word == "BASE" else word for word in words)])
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not done.stdout
