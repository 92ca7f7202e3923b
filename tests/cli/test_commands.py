"""The commands: their output, their help and their errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from diffusify.cli import COMMANDS, app
from diffusify.evaluation import benchmark_data
from diffusify.sampling.sampling_config import SamplingConfig

run = CliRunner()
SMALL = ["-o", "length=32", "-o", "held_out=64", "-o", "per_device_train_batch_size=2", "-o", "bf16=false"]


@pytest.fixture(scope="module")
def models(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of two tiny adapted models, by recipe."""
    folder = tmp_path_factory.mktemp("models")
    for recipe in ("block", "ar"):
        command = ["adapt", causal_base, "--data", corpus, "--recipe", recipe, "--steps", "2", *SMALL]
        done = run.invoke(app, [*command, "--out", str(folder / recipe)])
        assert done.exit_code == 0, done.output
        assert "diffusify generate" in done.output
    return {recipe: str(folder / recipe) for recipe in ("block", "ar")}


def test_help_does_not_import_torch() -> None:
    """In a process of its own, since this one has imported torch already."""
    code = "import sys, diffusify.cli; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", [[], *([name] for panel in COMMANDS.values() for name in panel)], ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    done = run.invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and "usage: " in done.stdout.lower()


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (SystemExit(143), 143),
        (KeyboardInterrupt(), 130),
        (OSError("the disk is full"), 1),
        (FloatingPointError("inf"), 1),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int) -> None:
    def fail(*args: object) -> bool:
        raise raised

    monkeypatch.setattr("diffusify.training.adapt.check_run_folder", fail)
    done = run.invoke(app, ["adapt", "base", "--data", "data", "--recipe", "block", "--out", str(tmp_path)])
    assert done.exit_code == code
    assert [line for line in done.stderr.splitlines() if str(raised) in line] == done.stderr.splitlines() or code > 1


def test_generate_prints_the_text(models: dict[str, str]) -> None:
    for recipe in ("block", "ar"):
        done = run.invoke(app, ["generate", models[recipe], "The cat", "--max-new-tokens", "8"])
        assert done.exit_code == 0 and done.stdout.startswith("The cat")
        assert "tokens per forward pass" in done.stderr


def test_json_has_all_fields_of_a_generation(models: dict[str, str]) -> None:
    done = run.invoke(
        app, ["generate", models["block"], "The", "--max-new-tokens", "8", "--json", "--temperature", "1"]
    )
    result = json.loads(done.stdout)
    speeds = {"tokens", "forwards", "tokens_per_forward", "seconds", "tokens_per_second"}
    assert set(result) == {"text", "completion", "seed", "finish_reason"} | speeds
    assert result["tokens_per_forward"] == pytest.approx(result["tokens"] / result["forwards"], abs=1e-3)
    done = run.invoke(app, ["infill", models["ar"], "The [[3]] sat on [[2]] mat", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert len(result["spans"]) == 2 and result["tokens"] == 5
    assert result["text"] == f"The{result['spans'][0]} sat on{result['spans'][1]} mat"


def test_steps_and_threshold(models: dict[str, str]) -> None:
    def forwards(*options: str) -> int:
        done = run.invoke(app, ["generate", models["ar"], "The", "--max-new-tokens", "12", "--json", *options])
        return json.loads(done.stdout)["forwards"]

    assert forwards("--steps", "3") <= 3
    assert forwards("--threshold", "0.000001") == 1


def test_options_override_a_preset_or_a_settings_file(models: dict[str, str], tmp_path: Path) -> None:
    def text(*options: str) -> str:
        done = run.invoke(app, ["generate", models["block"], "The", "--max-new-tokens", "12", *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    file = tmp_path / "settings.json"
    SamplingConfig(temperature=1.0, seed=3, cache="none").save(file)
    sampled = text("--temperature", "1.0", "--seed", "3", "--cache", "none")
    assert text("--settings", str(file)) == sampled
    defaults = ["--temperature", "0.0", "--cache", "exact"]
    assert text("--settings", str(file), *defaults) == text()  # a default given as an option overrides
    assert text("--preset", "quality") == text("--lossless") == text("--tolerance", "0")
    assert text("--preset", "fast", "--steps", "4") == text("--steps", "4")
    for pair in (["--preset", "fast", "--settings", str(file)], ["--lossless", "--tolerance", "1.0"]):
        done = run.invoke(app, ["generate", models["block"], "The", *pair])
        assert done.exit_code != 0 and "give one" in done.output


def test_eval_takes_the_tasks_that_it_can_get(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"question": "1 + 1?", "answer": "#### 2"}
    rows = Dataset.from_list([record])

    def load_dataset(name: str, *args: Any, **settings: Any) -> Dataset:
        if name != "openai/gsm8k":
            raise OSError("no network")
        return rows

    monkeypatch.setattr(benchmark_data, "load_dataset", load_dataset)
    done = run.invoke(app, ["eval", models["block"], "--out", str(tmp_path / "report"), "--json"])
    assert done.exit_code == 0, done.output
    assert "gsm8k" in done.stdout and "without hellaswag, " in done.stderr and "humaneval_infill" in done.stderr


def test_prompt_from_standard_input_and_no_prompt(models: dict[str, str]) -> None:
    done = run.invoke(app, ["generate", models["block"], "--max-new-tokens", "4"], input="The dog")
    assert done.stdout.startswith("The dog")
    assert run.invoke(app, ["generate", models["block"], "--unconditional", "--max-new-tokens", "4"]).exit_code == 0


def test_stop_ends_a_text(models: dict[str, str]) -> None:
    """As often as it is given; the two characters \\n are a line break."""

    def generate(*options: str) -> dict[str, Any]:
        words = ["generate", models["ar"], "The cat", "--max-new-tokens", "20", "--json", *options]
        return json.loads(run.invoke(app, words).stdout)

    completion = generate()["completion"]
    middle = completion[len(completion) // 2]
    found = generate("--stop", "never in it", "--stop", middle)
    assert found["completion"] == completion[: completion.index(middle)] and found["finish_reason"] == "stop"
    allowed = generate("--regex", "a\\nb", "--stop", r"\n")
    assert allowed["completion"] == "a" and allowed["text"] == "The cata"
    done = run.invoke(app, ["chat", models["ar"], "--max-new-tokens", "4", "--stop", ""], input="hi\n\n")
    assert done.exit_code == 2 and "a stop string is empty" in done.stderr


def test_several_texts_of_one_prompt(models: dict[str, str]) -> None:
    words = ["generate", models["block"], "The cat", "--max-new-tokens", "6", "--temperature", "1"]
    alone = [run.invoke(app, [*words, "--seed", str(seed)]).stdout for seed in (3, 4, 5)]
    assert len(set(alone)) == 3
    done = run.invoke(app, [*words, "--seed", "3", "-n", "3"])
    assert [part.strip() for part in re.split(r"^-+$", done.stdout, flags=re.MULTILINE)] == [*map(str.strip, alone)]
    found = json.loads(run.invoke(app, [*words, "--seed", "3", "--n", "3", "--json"]).stdout)
    assert [each["seed"] for each in found] == [3, 4, 5] and [f"{each['text']}\n" for each in found] == alone


def test_watch_does_not_change_the_text(models: dict[str, str]) -> None:
    plain, watched = (
        run.invoke(app, ["generate", models["ar"], "The", "--max-new-tokens", "6", *extra]).stdout
        for extra in ([], ["--watch"])
    )
    assert plain == watched


def test_a_prompt_with_the_text_of_the_mask_token_is_kept(models: dict[str, str]) -> None:
    done = run.invoke(app, ["generate", models["ar"], "a <|mask|> b", "--max-new-tokens", "4"])
    assert done.stdout.startswith("a <|mask|> b")


def test_show(models: dict[str, str]) -> None:
    facts = json.loads(run.invoke(app, ["show", models["ar"], "--json"]).stdout)
    assert facts["can_infill"] is True and facts["card"]["type"] == "DiffusionConfig"
    assert "can infill" in run.invoke(app, ["show", models["block"]]).stdout


def test_a_policy_by_name_or_as_json(models: dict[str, str]) -> None:
    def text(policy: str) -> str:
        done = run.invoke(app, ["generate", models["ar"], "The", "--max-new-tokens", "9", "--policy", policy])
        assert done.exit_code == 0, done.output
        return done.stdout

    leftmost = '{"type": "Unmask", "rank": {"type": "Leftmost"}}'
    assert text("Unmask") == text('{"type": "Unmask"}')
    assert len({text("Rdm"), text("Unmask"), text(leftmost), text("Ancestral")}) > 1


def test_adapt_from_a_recipe_file(causal_base: str, corpus: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    options = "{size: 2, length: 32, held_out: 64, bf16: false, per_device_train_batch_size: 2}"
    file.write_text(f"base: {causal_base}\ndata: {corpus}\nsteps: 900\noptions: {options}\n")
    done = run.invoke(app, ["adapt", str(file), "--steps", "1", "--out", str(tmp_path / "out"), "-o", "length=16"])
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        settings["budget"]["steps"] == 1 and settings["length"] == 16 and settings["recipe"]["attention"]["size"] == 2
    )


def test_tune_merge_and_chat(models: dict[str, str], tmp_path: Path) -> None:
    data, lora, merged = tmp_path / "pairs.jsonl", tmp_path / "lora", tmp_path / "merged"
    data.write_text("".join(json.dumps({"q": f"is it {i}", "a": "so"}) + "\n" for i in range(20)))
    words = ["--data", str(data), "--prompt", "{q}?", "--target", " {a}", "--steps", "2", "-o", "length=32"]
    words += ["-o", "bf16=false"]
    done = run.invoke(app, ["tune", models["ar"], *words, "--lora", "4", "-o", "embeddings=all", "--out", str(lora)])
    assert done.exit_code == 0, done.output
    assert f"diffusify generate {lora} '...?'" in done.stderr and f"diffusify merge {lora}" in done.stderr
    assert run.invoke(app, ["merge", str(lora), "--out", str(merged)]).exit_code == 0
    prompt = ["is it 3?", "--max-new-tokens", "5"]
    first, second = (run.invoke(app, ["generate", str(folder), *prompt]).stdout for folder in (lora, merged))
    assert first == second
    done = run.invoke(app, ["chat", str(merged), "--max-new-tokens", "4"], input="hi\n/reset\nso?\n\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("forward passes") == 2


def test_adapt_trains_a_diffusion_model_further(
    models: dict[str, str], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["adapt", models["ar"], "--data", corpus, "--steps", "1", "-o", "length=32", "-o", "bf16=false"]
    done = run.invoke(app, [*words, "-o", "size=2"])
    assert done.exit_code == 2 and "so size cannot be set; add --recipe to replace the recipe" in done.stderr
    done = run.invoke(app, [*words, "-o", "held_out=0"])
    assert done.exit_code == 0 and "curve.png" not in done.output, done.output
    (out,) = (tmp_path / "runs").iterdir()
    facts = [json.loads(run.invoke(app, ["show", folder, "--json"]).stdout) for folder in (models["ar"], str(out))]
    assert out.name.startswith("ar-") and facts[0]["can_infill"] is facts[1]["can_infill"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "{q}"], "--prompt and --target form one template"),
        ([], "--data is missing"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "DATA", "--recipe", "ar"], "is a diffusion model already"),
        (["--data", "DATA", "-o", "embeddings=all"], '"embeddings" is not known'),
        (["--data", "DATA", "--lora", "0"], "rank 0 must be at least 1"),
        (["--data", "DATA"], "give a template"),
    ],
)
def test_errors_of_tune_are_one_line(models: dict[str, str], tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "is it", "a": "so"}\n')
    words = [str(tmp_path / "data.jsonl") if word == "DATA" else word for word in words]
    done = run.invoke(app, ["tune", models["ar"], *words, "--steps", "1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_import_a_released_model(causal_base: str, tmp_path: Path) -> None:
    source, out = tmp_path / "diffullama", tmp_path / "out"
    shutil.copytree(causal_base, source)
    done = run.invoke(app, ["import", str(source), "--out", str(out), "--mask-token-id", "2", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert f"diffusify generate {out}" in done.stderr and not done.stdout
    facts = json.loads(run.invoke(app, ["show", str(out), "--json"]).stdout)
    assert facts["base"] == str(source) and facts["shift"] == 1 and facts["can_infill"] is True
    assert run.invoke(app, ["generate", str(out), "The cat", "--max-new-tokens", "4"]).stdout.startswith("The cat")
    for words, message in (
        ([str(source), "--out", str(out)], "give an empty or new folder"),
        ([causal_base, "--out", str(tmp_path / "other")], "`diffusify adapt` turns one into a diffusion model"),
        ([str(source), "--out", str(tmp_path / "other"), "--layout", "diffulama"], 'did you mean "diffullama"'),
    ):
        done = run.invoke(app, ["import", *words])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "nowhere", "x"], "nowhere is not a folder"),
        (["generate", "MODEL", "x", "--threshold", "1.5"], "threshold=1.5"),
        (["generate", "MODEL", "x", "--steps", "0"], "steps=0"),
        (["generate", "MODEL", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "MODEL", "x", "--max-new-tokens", "999"], "context is 64"),
        (["generate", "MODEL", "x", "--unconditional"], "leave out either"),
        (["generate", "MODEL", "x", "-n", "3"], "temperature 0 is greedy"),
        (["generate", "MODEL", "x", "-n", "0"], "-n 0 must be at least 1"),
        (["generate", "MODEL", "x", "-n", "3", "--watch", "--temperature", "1"], "leave out -n 3 or --watch"),
        (["infill", "MODEL", "a [[999]] b"], "context is 64"),
        (["infill", "MODEL", "no hole"], "no hole"),
        (["infill", "MODEL", "a [[x]]"], "[[x]]"),
        (["infill", "BLOCK", "a [[2]] b"], "--recipe ar"),
        (["adapt", "BASE", "--data", "DATA", "--steps", "0"], "steps=0"),
        (["adapt", "BASE", "--data", "missing.txt"], "missing.txt does not exist"),
        (["adapt", "BASE"], "--data is missing"),
        (["adapt", "./missing", "--data", "DATA"], "./missing does not exist"),
        (["adapt", "BASE", "--data", "DATA", "-o", "learning_rte=1"], 'did you mean "learning_rate"'),
        (["adapt", "BASE", "--data", "DATA", "-o", "sise=1"], 'did you mean "size"'),
        (["adapt", "BASE", "--data", "DATA", "-o", "size=four"], "size"),
        (["adapt", "BASE", "--data", "DATA", "-o", "size"], "KEY=VALUE"),
        (["adapt", "BASE", "--data", "DATA", "--out", "MODEL", "--steps", "9"], "holds another run"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_code_2(
    words: list[str], message: str, models: dict[str, str], causal_base: str, corpus: str, tmp_path: Path
) -> None:
    folders = {"MODEL": models["ar"], "BLOCK": models["block"], "BASE": causal_base, "DATA": corpus}
    words = [folders.get(word, word) for word in words]
    if words[0] == "adapt" and "--out" not in words:
        words += ["--out", str(tmp_path / "run")]
    done = run.invoke(app, words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists() and not done.stdout
