"""The command line: what it prints, and how it says no."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.sampling.sampling_config import SamplingConfig

run = CliRunner()
SMALL = ["-o", "length=32", "-o", "held_out=64", "-o", "per_device_train_batch_size=2", "-o", "bf16=false"]


@pytest.fixture(scope="module")
def models(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for recipe in ("block", "ar"):
        done = run.invoke(
            app,
            [
                "adapt",
                causal_base,
                "--data",
                corpus,
                "--recipe",
                recipe,
                "--steps",
                "2",
                "--out",
                str(folder / recipe),
                *SMALL,
            ],
        )
        assert done.exit_code == 0, done.output
        assert "diffusify generate" in done.output
    return {recipe: str(folder / recipe) for recipe in ("block", "ar")}


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        (SystemExit(143), 143),
        (KeyboardInterrupt(), 130),
        (OSError("the disk is full"), 1),
        (FloatingPointError("inf"), 1),
    ],
)
def test_what_ends_a_run_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, happens: BaseException, code: int
) -> None:
    def claim(*given: object) -> bool:
        raise happens

    monkeypatch.setattr("diffusify.training.adapt.claim", claim)
    done = run.invoke(app, ["adapt", "base", "--data", "data", "--out", str(tmp_path)])
    assert done.exit_code == code
    assert [line for line in done.stderr.splitlines() if str(happens) in line] == done.stderr.splitlines() or code > 1


def test_generate_prints_the_text(models: dict[str, str]) -> None:
    for recipe in ("block", "ar"):
        done = run.invoke(app, ["generate", models[recipe], "The cat", "--max-new-tokens", "8"])
        assert done.exit_code == 0 and done.stdout.startswith("The cat")
        assert "tokens per forward" in done.stderr


def test_json_holds_what_a_program_wants(models: dict[str, str]) -> None:
    done = run.invoke(
        app, ["generate", models["block"], "The", "--max-new-tokens", "8", "--json", "--temperature", "1"]
    )
    result = json.loads(done.stdout)
    assert {
        "text",
        "completion",
        "tokens",
        "forwards",
        "tokens_per_forward",
        "seconds",
        "tokens_per_second",
        "seed",
    } == set(result)
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


def test_a_preset_or_a_file_and_what_options_change(models: dict[str, str], tmp_path: Path) -> None:
    def text(*options: str) -> str:
        done = run.invoke(app, ["generate", models["block"], "The", "--max-new-tokens", "12", *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    file = tmp_path / "settings.json"
    SamplingConfig(temperature=1.0, seed=3, cache="none").save(file)
    drawn = text("--temperature", "1.0", "--seed", "3", "--cache", "none")
    assert text("--settings", str(file)) == drawn == text("--settings", str(file), "--cache", "exact")
    assert text("--settings", str(file), "--temperature", "0.0") == text()  # a default that is asked for is a change
    assert text("--preset", "quality") == text("--lossless") == text("--tolerance", "0")
    for two in (["--preset", "fast", "--settings", str(file)], ["--lossless", "--tolerance", "1.0"]):
        done = run.invoke(app, ["generate", models["block"], "The", *two])
        assert done.exit_code != 0 and "give one" in done.output


def test_prompts_from_standard_input_and_from_nothing(models: dict[str, str]) -> None:
    done = run.invoke(app, ["generate", models["block"], "--max-new-tokens", "4"], input="The dog")
    assert done.stdout.startswith("The dog")
    assert run.invoke(app, ["generate", models["block"], "--unconditional", "--max-new-tokens", "4"]).exit_code == 0


def test_watching_ends_with_the_same_text(models: dict[str, str]) -> None:
    plain, watched = (
        run.invoke(app, ["generate", models["ar"], "The", "--max-new-tokens", "6", *extra]).stdout
        for extra in ([], ["--watch"])
    )
    assert plain == watched


def test_a_prompt_that_spells_the_mask_token_stays_text(models: dict[str, str]) -> None:
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

    left = '{"type": "Unmask", "rank": {"type": "Leftmost"}}'
    assert text("Unmask") == text('{"type": "Unmask"}')
    assert len({text("Rdm"), text("Unmask"), text(left), text("Ancestral")}) > 1


def test_a_file_says_the_whole_command(causal_base: str, corpus: str, tmp_path: Path) -> None:
    story = tmp_path / "story.yaml"
    options = "{size: 2, length: 32, held_out: 64, bf16: false, per_device_train_batch_size: 2}"
    story.write_text(f"base: {causal_base}\ndata: {corpus}\nsteps: 900\noptions: {options}\n")
    done = run.invoke(app, ["adapt", str(story), "--steps", "1", "--out", str(tmp_path / "out"), "-o", "length=16"])
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        settings["budget"]["steps"] == 1 and settings["length"] == 16 and settings["recipe"]["attention"]["size"] == 2
    )


def test_tune_talk_and_merge(models: dict[str, str], tmp_path: Path) -> None:
    data, lora, whole = tmp_path / "pairs.jsonl", tmp_path / "lora", tmp_path / "whole"
    data.write_text("".join(json.dumps({"q": f"is it {i}", "a": "so"}) + "\n" for i in range(20)))
    words = ["--data", str(data), "--prompt", "{q}?", "--target", " {a}", "--steps", "2", "-o", "length=32"]
    words += ["-o", "bf16=false"]
    done = run.invoke(app, ["tune", models["ar"], *words, "--lora", "4", "-o", "embeddings=all", "--out", str(lora)])
    assert done.exit_code == 0, done.output
    assert f"diffusify merge {lora}" in done.stderr
    assert run.invoke(app, ["merge", str(lora), "--out", str(whole)]).exit_code == 0
    ask = ["is it 3?", "--max-new-tokens", "5"]
    first, second = (run.invoke(app, ["generate", str(folder), *ask]).stdout for folder in (lora, whole))
    assert first == second
    done = run.invoke(app, ["chat", str(whole), "--max-new-tokens", "4"], input="hi\n/reset\nso?\n\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("forwards") == 2


def test_a_diffusion_model_is_adapted_on(
    models: dict[str, str], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["adapt", models["ar"], "--data", corpus, "--steps", "1", "-o", "length=32", "-o", "bf16=false"]
    done = run.invoke(app, [*words, "-o", "size=2"])
    assert done.exit_code == 2 and "goes on as its card says, without size; or give the --recipe for it" in done.stderr
    done = run.invoke(app, [*words, "-o", "held_out=64"])
    assert done.exit_code == 0, done.output
    (out,) = (tmp_path / "runs").iterdir()
    facts = [json.loads(run.invoke(app, ["show", folder, "--json"]).stdout) for folder in (models["ar"], str(out))]
    assert out.name.startswith("ar-") and facts[0]["can_infill"] is facts[1]["can_infill"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "{q}"], "--prompt and --target make a template together"),
        ([], "--data is missing"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "DATA", "--recipe", "ar"], "is a diffusion model already"),
        (["--data", "DATA", "-o", "embeddings=all"], '"embeddings" is not known'),
        (["--data", "DATA", "--lora", "0"], "rank 0 must be at least 1"),
        (["--data", "DATA"], "give a template"),
    ],
)
def test_tuning_mistakes_are_one_line(models: dict[str, str], tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "is it", "a": "so"}\n')
    words = [str(tmp_path / "data.jsonl") if word == "DATA" else word for word in words]
    done = run.invoke(app, ["tune", models["ar"], *words, "--steps", "1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_released_model_is_imported(causal_base: str, tmp_path: Path) -> None:
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
        ([causal_base, "--out", str(tmp_path / "other")], "`diffusify adapt` is what turns one into a diffusion model"),
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
        (["generate", "MODEL", "x", "--max-new-tokens", "999"], "can see 64"),
        (["generate", "MODEL", "x", "--unconditional"], "leave one of the two out"),
        (["infill", "MODEL", "a [[999]] b"], "can see 64"),
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
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, models: dict[str, str], causal_base: str, corpus: str, tmp_path: Path
) -> None:
    named = {"MODEL": models["ar"], "BLOCK": models["block"], "BASE": causal_base, "DATA": corpus}
    words = [named.get(word, word) for word in words]
    if words[0] == "adapt" and "--out" not in words:
        words += ["--out", str(tmp_path / "run")]
    done = run.invoke(app, words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists() and not done.stdout
