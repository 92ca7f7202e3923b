"""The benchmark reports its measurements, and lossless decoding in it agrees with AR decoding."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.bench import AR, PACKED_AR, bench, cut_prompts, decoding_settings, plot
from diffusify.models.loading import load_base
from diffusify.models.saving import load_denoiser
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def model(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("models") / "block"
    return str(adapt(causal_base, corpus, out, steps=1, length=32, held_out=64, bf16=False))


def test_rows_describe_the_generated_texts(model: str, causal_base: str, tmp_path: Path) -> None:
    lm, base = diffusify.load(model), load_base(causal_base).network.eval()
    prompts = cut_prompts(lm, TEXT, 3, lengths=(8, 16))
    assert [len(lm.tokenizer.encode(prompt)) for prompt in prompts] == [8, 16, 8]
    settings = {"one": SamplingConfig(policy=Unmask()), "lossless": SamplingConfig(tolerance=0.0)}
    ar_half = load_denoiser(model)[0].network
    rows = {row.way: row for row in bench(lm, base, prompts, settings, ar_half=ar_half, max_new_tokens=9)}
    assert list(rows) == [AR, PACKED_AR, "one", "lossless"]
    assert rows["lossless"].agreement == rows[PACKED_AR].agreement == 1
    assert rows[AR].tokens_per_forward == 1 == rows["one"].tokens_per_forward <= rows["lossless"].tokens_per_forward
    assert (rows["one"].agreement or 0) < 1 and rows[AR].agreement is None and rows[AR].speedup is None
    metrics = ("perplexity", "distinct_2", "entropy")
    assert [getattr(rows[AR], name) for name in metrics] == [getattr(rows["lossless"], name) for name in metrics]
    assert all(math.isfinite(row.perplexity) and row.tokens_per_second > 0 for row in rows.values())
    plot(list(rows.values()), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="the texts give only"):
        cut_prompts(lm, TEXT, 999)


def test_every_setting_runs(model: str, causal_base: str, corpus: str, tmp_path: Path) -> None:
    lm = diffusify.load(model)
    assert decoding_settings(lm)["quality"] == SamplingConfig(tolerance=0.0)
    command = ["bench", model, "--data", corpus, "--prompts", "1", "--max-new-tokens", "5", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert [row["way"] for row in json.loads(done.stdout)] == [AR, PACKED_AR, *decoding_settings(lm)]
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(done.stdout)


def test_a_base_that_cannot_score_texts_is_refused(
    model: str, causal_base: str, masked_base: str, corpus: str, tmp_path: Path
) -> None:
    recipe, out, missing = diffusify.ar(), tmp_path / "ar", str(tmp_path / "missing")
    adapted = str(adapt(causal_base, corpus, out, recipe=recipe, steps=1, length=32, held_out=64, bf16=False))
    for base, reason in {adapted: "is bidirectional", masked_base: "is bidirectional", missing: "exist"}.items():
        done = CliRunner().invoke(app, ["bench", model, "--data", corpus, "--base", base])
        assert done.exit_code == 2 and reason in done.stderr, done.output
        assert "give an AR model with --base" in done.stderr
