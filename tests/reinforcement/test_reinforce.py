"""Runs that learn from rewards: they improve, resume bit for bit, and lose nothing when a reward fails."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app
from diffusify.diffusion.corruption import PerBlock
from diffusify.diffusion.objectives import Loss
from diffusify.diffusion.policy_objectives import Espo, Grpo, TraceRl, token_log_probs
from diffusify.diffusion.schedules import Linear
from diffusify.models.lora import Lora
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import load_denoiser
from diffusify.reinforcement.reinforce import reinforce
from diffusify.reinforcement.rewards import Reward
from diffusify.reinforcement.rollouts import Trace, rollouts_of, stack_rollouts
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget

SMALL: dict[str, Any] = {
    "prompt": "{question}", "group": 4, "prompts": 2, "max_new_tokens": 8, "steps": 3, "held_out": 2, "bf16": False,
    "learning_rate": 1e-2, "warmup_steps": 0,
}  # fmt: skip


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels: a reward that a byte-level model can raise at once."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "questions.jsonl"
    words = [
        (first, second) for first in ["the", "cat", "dog", "fox"] for second in ["sat", "over", "on", "and", "is", "so"]
    ]
    lines = [json.dumps({"question": " ".join(pair), "answer": "#### 7"}) + "\n" for pair in words]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="session")
def models(causal_base: str, masked_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    made = {"block": (causal_base, block()), "ar": (causal_base, ar()), "mlm": (masked_base, mlm(20))}
    options: dict[str, Any] = {"steps": 1, "length": 32, "held_out": 64, "bf16": False}
    return {
        name: str(adapt(base, corpus, folder / name, recipe=recipe, **options)) for name, (base, recipe) in made.items()
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "training.json").read_text())["log"]


POLICIES = [
    pytest.param("block", Grpo(), id="grpo"),
    pytest.param("block", TraceRl(), id="tracerl", marks=pytest.mark.slow),
    pytest.param("ar", Espo(), id="espo-ar", marks=pytest.mark.slow),
    pytest.param("mlm", Espo(), id="espo-mlm", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "policy"), POLICIES)
def test_rewards_rise(kind: str, policy: Any, models: dict[str, str], questions: str, tmp_path: Path) -> None:
    options = dict(SMALL, steps=24, group=8, held_out=8)
    out = reinforce(models[kind], questions, tmp_path / "out", rewards=vowels, policy=policy, **options)
    rewards = [entry["reward"] for entry in log_of(out) if "reward" in entry]
    assert len(rewards) == 24 and sum(rewards[-3:]) > sum(rewards[:3])
    evaluations = [entry for entry in log_of(out) if "eval_reward" in entry]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["eval_reward"] > evaluations[0]["eval_reward"]
    lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert sum(line["split"] == "train" for line in lines) == 24 * 16
    assert diffusify.load(out).generate("cat", max_new_tokens=4).text


def test_an_epoch_has_every_prompt_once(models: dict[str, str], questions: str, tmp_path: Path) -> None:
    """22 prompts of 24, two held out, in steps of two, and other ones after them."""
    out = reinforce(models["block"], questions, tmp_path / "out", rewards=vowels, **dict(SMALL, steps=12, group=2))
    lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines if line["split"] == "train"][::2]
    assert len(prompts) == 24 and len(set(prompts[:22])) == 22 == len(set(prompts))


@pytest.mark.parametrize("kind", ["block-lossless", "block-threshold"])
def test_scores_are_those_of_the_sampler(kind: str, models: dict[str, str]) -> None:
    """The canvases of a policy give each token the log-probability that it had when it was sampled."""
    lm = diffusify.load(models["block"])
    policy: Any = Grpo() if kind == "block-lossless" else TraceRl()
    settings: dict[str, Any] = {} if kind == "block-lossless" else {"threshold": 0.003}  # several tokens in a step
    run = lm.prepare_generation(["The cat sat", "It"], 13, SamplingConfig(temperature=1.0, seed=3, **settings))
    trace = Trace()
    trace(run)
    for frame in run:
        trace(frame)
    [first, second] = rollouts_of(run, trace)
    if kind == "block-threshold":
        assert first.forwards < first.tokens
    texts = stack_rollouts([first, second], torch.zeros(2), lm.tokenizer.pad_token_id)
    noised = policy.canvases(texts, PerBlock(4), Linear(), lm.config.mask_token_id, torch.Generator())
    found: list[torch.Tensor] = []

    def score(logits: Any, ar_logits: Any) -> Loss:
        scored = ar_logits if policy.reads_ar_half else logits
        found.append(token_log_probs(scored, noised.clean[policy.scored(noised)]))
        return Loss(torch.zeros(()), torch.ones(()), torch.zeros(0), torch.zeros(0))

    with torch.no_grad():
        lm.denoiser(noised.canvas, noised.text, positions=noised.targets, ar_positions=noised.ar_positions, loss=score)
    where = policy.scored(noised)
    log_prob = torch.zeros(where.shape).masked_scatter(where, found[0]).unflatten(0, (2, -1)).sum(1)
    expected = torch.where(texts.scored, run.score.clone(), 0.0)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Budget.on_step_end

    def on_step_end(self: Budget, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Budget, "on_step_end", on_step_end)


@pytest.mark.parametrize(("kind", "lora"), [("block", Lora(4)), ("ar", None)])
def test_a_resumed_run_equals_an_undisturbed_one(
    kind: str,
    lora: Lora | None,
    models: dict[str, str],
    questions: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also between two updates with the same texts; the log of texts has each once."""

    def run(name: str) -> Path:
        options = dict(SMALL, steps=5, updates=2)
        return reinforce(models[kind], questions, tmp_path / name, rewards=vowels, lora=lora, **options)

    undisturbed = run("undisturbed")
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run("interrupted")
    assert (tmp_path / "interrupted" / "checkpoint-3" / "rollouts.safetensors").is_file()
    resumed = run("interrupted")
    for file in sorted(path.name for path in undisturbed.glob("*.safetensors")):
        first, second = load_file(undisturbed / file), load_file(resumed / file)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (undisturbed / "texts.jsonl").read_text() == (resumed / "texts.jsonl").read_text()
    assert run("interrupted") == resumed


@pytest.mark.parametrize("failure", ["raises", "nothing finite"])
def test_a_failing_reward_loses_nothing(failure: str, models: dict[str, str], questions: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def moody(prompts: list[str], completions: list[str]) -> list[Any]:
        calls.append(len(completions))
        if len(completions) == SMALL["held_out"] or calls.count(len(completions)) != 2:  # of the second step's texts
            return vowels(prompts, completions)
        if failure == "raises":
            raise OSError("no disk")
        return [float("nan")] * len(completions)

    def run(name: str, reward: Callable[..., Any]) -> Path:
        rewards = Reward(reward, "mine")
        return reinforce(models["block"], questions, tmp_path / name, rewards=rewards, **dict(SMALL, steps=2))

    with pytest.raises(ValueError, match=r"the last checkpoint is .*checkpoint-1; the same command resumes"):
        run("failed", moody)
    expected = load_file(run("undisturbed", vowels) / "model.safetensors")
    found = load_file(run("failed", vowels) / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_texts_without_a_finite_reward_are_counted(models: dict[str, str], questions: str, tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float("nan"), *[1.0] * (len(completions) - 1)]

    out = reinforce(models["block"], questions, tmp_path / "out", rewards=reward, **dict(SMALL, steps=2))
    steps = [entry for entry in log_of(out) if "reward" in entry]
    assert [entry["bad_rewards"] for entry in steps] == [1, 2]
    assert all(entry["equal_groups"] == 1 and entry["reward"] == 1 for entry in steps)


def test_drafts_learn_and_the_reference_stays(models: dict[str, str], questions: str, tmp_path: Path) -> None:
    """The model is compared with what it was before, not with itself; without weights nothing is learned."""
    out = reinforce(models["block"], questions, tmp_path / "out", rewards=vowels, **SMALL)
    kl = [entry["kl"] for entry in log_of(out) if "kl" in entry]
    assert kl[0] < 1e-9 < kl[-1]
    before, _ = load_denoiser(models["block"])
    still: Any = SMALL | {"policy": Grpo(kl_weight=0.0, drafts=0.0)}
    same = reinforce(
        models["block"],
        questions,
        tmp_path / "same",
        rewards=lambda prompts, completions: [1.0] * len(prompts),
        **still,
    )
    after, _ = load_denoiser(same)
    weights = dict(before.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in after.named_parameters())


@pytest.mark.parametrize(
    "recipe",
    [
        block(4, infilling=0.5, any_order=True, variable_length=True),
        ar(variable_length=True),
        replace(ar(), objective=replace(ar().objective, distill=0.5, teacher="base")),
    ],
    ids=["block", "ar", "distilled"],
)
def test_a_model_is_its_own_reference_at_first(
    recipe: Recipe, causal_base: str, corpus: str, questions: str, tmp_path: Path
) -> None:
    """Also with length tokens, without which texts are sampled, and whatever the model was trained with."""
    model = adapt(causal_base, corpus, tmp_path / "model", recipe=recipe, steps=1, length=32, bf16=False)
    out = reinforce(str(model), questions, tmp_path / "out", rewards=vowels, **dict(SMALL, steps=1, held_out=0))
    assert [entry["kl"] < 1e-9 for entry in log_of(out) if "kl" in entry] == [True]


def test_bad_arguments_are_refused(
    models: dict[str, str],
    causal_base: str,
    corpus: str,
    questions: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = adapt(
        causal_base,
        corpus,
        tmp_path / "masks",
        recipe=block(adapters="masks"),
        steps=1,
        length=32,
        held_out=64,
        bf16=False,
    )
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(masks), {}, r"act on masks only, so its AR half, the frozen .*adapt .* --recipe block --lora 16"),
        (causal_base, {}, "is not a diffusion model; make one with"),
        ("ar", {"policy": Grpo()}, r"Grpo needs a block model .* use Espo \(--policy espo\)"),
        ("ar", {"policy": TraceRl()}, "TraceRl needs a block model"),
        ("block", {"policy": Espo()}, r"Espo is for bidirectional models.* use Grpo"),
        ("block", {"sampling": SamplingConfig(temperature=1.0, top_p=0.9)}, "top_p=0.9 changes the probabilities"),
        ("block", {"sampling": SamplingConfig(temperature=1.0, tolerance=0.5)}, "tolerance=0.5 keeps drafts"),
        ("block", {"sampling": SamplingConfig(temperature=1.0, threshold=0.9)}, "threshold decodes by the drafts"),
        ("block", {"sampling": SamplingConfig()}, "temperature=0 samples equal answers"),
        ("block", {"group": 1}, "group=1 must be at least 2: the answers to a prompt are compared"),
        ("block", {"gradient_accumulation_steps": 2}, "follows from prompts and group"),
        ("block", {"per_device_train_batch_size": 3}, "does not divide the 8 texts of a step .* one of 1, 2, 4, 8"),
        ("block", {"rewards": "builtin:code"}, "needs the field test, and the records have question, answer"),
        ("block", {"max_new_tokens": 63}, "every prompt is longer than the 1 tokens"),
        ("block", {"reward_seconds": 0.0}, "reward_seconds=0.0 must be above 0"),
    ]
    for kind, changes, message in cases:
        options: dict[str, Any] = SMALL | {"rewards": vowels} | changes
        with pytest.raises(ValueError, match=message):
            reinforce(models.get(kind, kind), questions, tmp_path / "out", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        reinforce(models["block"], questions, tmp_path / "out", rewards=vowels, **SMALL)
    assert not (tmp_path / "out").exists()


def test_command(models: dict[str, str], questions: str, tmp_path: Path) -> None:
    words = [
        "reinforce", models["block"], "--data", questions, "--reward", "builtin:math", "--reward", "0.1*builtin:json",
        "--prompt", "{question}", "--group", "2", "--prompts", "2", "--max-new-tokens", "4", "--steps", "1",
        "--lora", "2", "--out", str(tmp_path / "out"), "-o", "drafts=0.2", "-o", "held_out=2", "-o", "bf16=false",
    ]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["policy"]["drafts"] == 0.2 and run["rewards"][1] == {"name": "builtin:json", "weight": 0.1}
    assert any("eval_reward_builtin:math" in entry for entry in log_of(tmp_path / "out"))
    result = CliRunner().invoke(app, ["reinforce", models["block"], "--data", questions])
    assert result.exit_code == 2


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("diffusify.serving", "diffusify.reinforcement"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ImportError, match=r"reinforce needs `pip install 'diffusify\[serve\]'` \(greenlet is missing"):
        _ = diffusify.reinforce
    done = CliRunner().invoke(app, ["reinforce", "smollm2-chat", "--data", "x.jsonl", "--reward", "builtin:math"])
    assert done.exit_code == 2 and done.stderr.startswith("error: reinforce needs `pip install"), done.stderr
