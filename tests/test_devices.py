"""Everything runs on an accelerator, a pretended one, with the results of the CPU."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

import diffusify
from diffusify.canvas import Move
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.policies import Ancestral, Klass, Rdm, ReMdm, Unmask, Wino
from diffusify.diffusion.quotas import Accelerating, EntropyBudget, Factor, Threshold
from diffusify.diffusion.ranking import Entropy, Leftmost, Margin, Random, select_top
from diffusify.diffusion.step import StepState
from diffusify.evaluation.evaluate import evaluate
from diffusify.evaluation.likelihood import Autoregressive, MonteCarlo, TokenByToken
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.tasks import Infill, MultipleChoice, OpenEnded
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import save_denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.app import create_app
from diffusify.serving.engine.batching import PassBatcher
from diffusify.text.examples import Template
from diffusify.training import self_generated
from diffusify.training.adapt import adapt
from diffusify.training.tune import tune
from tests.families import tiny_network
from tests.pretend_accelerator import DeviceMismatch, accelerator
from tests.serving.models import running
from tests.text import makers
from tests.text.chats import CHATML

PROMPTS = ["The cat", "and the dog sat on the mat. It"]
ATTENTION = {"block": BlockCausal(4), "full": Bidirectional()}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "block": [
        {}, {"tolerance": 0.7}, {"temperature": 0.9}, {"temperature": 1.1, "top_p": 0.9, "suppress_tokens": (5, 9)},
        {"threshold": 0.3}, {"threshold": 0.3, "cache": "none", "temperature": 1.0}, {"policy": Klass()},
        {"guidance": 0.5}, {"regex": "[a-f]{3,8}", "repetition_penalty": 1.3},
    ],
    "full": [
        {}, {"window": 4, "cache": "prefix"}, {"window": 4, "cache": "dual"}, {"window": 4, "guidance": 0.5},
        {"policy": Unmask(Random(), Threshold(0.2))}, {"policy": Unmask(Margin(), Factor(1.0)), "steps": 5},
        {"policy": Unmask(Entropy(), EntropyBudget(0.5))}, {"policy": Unmask(Leftmost(), Accelerating()), "steps": 4},
        {"policy": Ancestral(), "steps": 5, "temperature": 1.0}, {"policy": Rdm(noise=1.0), "steps": 5},
        {"policy": Rdm("linear", conditional=True), "steps": 5}, {"policy": Wino(), "temperature": 0.8},
        {"policy": ReMdm(eta=0.3), "steps": 6, "temperature": 1.0, "top_k": 20}, {"policy": Klass()},
        {"regex": "[a-f]{3,8}", "temperature": 1.0},
    ],
}  # fmt: skip


def assert_same(actual: Any, expected: Any) -> None:
    """Equal texts, and numbers that are equal up to rounding, in nested lists and dicts."""
    if isinstance(expected, dict | list | tuple):
        assert len(actual) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(actual[key], expected[key])
    else:
        assert actual == (pytest.approx(expected, rel=1e-3, abs=1e-4) if isinstance(expected, float) else expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of tiny random models, a block diffusion model and a bidirectional one with a length head."""
    tokenizer, made = makers.byte_level(), {}
    tokenizer.tokenizer.chat_template = CHATML
    for name, attention in ATTENTION.items():
        network = tiny_network("llama", vocab_size=len(tokenizer.tokenizer) + 8, max_position_embeddings=320)
        config = DiffusionConfig(tokenizer.mask_token_id, 1, attention, "LlamaForCausalLM", recipe=name)
        config = replace(config, longest_answer=12 if name == "full" else None)
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        save_denoiser(made[name], Denoiser(network, config), tokenizer.tokenizer)
    return made


@pytest.fixture(params=["cuda", "mps"])
def on_both(request: pytest.FixtureRequest, folders: dict[str, str]) -> Callable[..., None]:
    """Checks that what a function of a model returns is the same on the CPU and on the accelerator."""

    def check(model: str, function: Callable[[DiffusionLM], Any]) -> None:
        expected = function(diffusify.load(folders[model], device="cpu"))
        with accelerator(request.param):
            lm = diffusify.load(folders[model], dtype="float32")
            assert lm.denoiser.device.type == request.param
            assert_same(function(lm), expected)

    return check


@pytest.mark.parametrize("model", ATTENTION)
def test_generated_texts(model: str, on_both: Callable[..., None]) -> None:
    def generate(lm: DiffusionLM) -> list[str]:
        return [one.text for each in SETTINGS[model] for one in lm.generate(PROMPTS, 6, **each)]

    on_both(model, generate)


def test_spans_lengths_and_chats(on_both: Callable[..., None]) -> None:
    def write(lm: DiffusionLM) -> list[str]:
        texts = ["The [[2-5]] sat on the mat", "so [[3]] it [[2]] is"]
        runs = [*lm.infill(texts), *lm.infill(texts, regex="[a-f ]+", window=4), *lm.generate(PROMPTS, length_beam=2)]
        return [one.text for one in (*runs, lm.chat([{"role": "user", "content": "is it so?"}], steps=3))]

    on_both("full", write)


def test_likelihoods_and_tasks(on_both: Callable[..., None], tmp_path: Path) -> None:
    request = LikelihoodRequest((1, 30, 40), ((50, 60), (70,), (50, 61, 62)))
    tasks = {
        "choices": [MultipleChoice("It is", (" so", " the cat"), 0)] * 2,
        "answers": [OpenEnded("The cat sat on", (" the mat",))],
        "spans": [Infill("The cat", " sat", " on the mat")],
    }

    def measure(lm: DiffusionLM) -> list[float]:
        measures = [TokenByToken(), MonteCarlo()] + [Autoregressive()] * lm.config.reads_as_ar_model
        found = [one.log_prob for each in measures for one in each(lm.denoiser, [request])]
        chosen = {name: items for name, items in tasks.items() if name != "spans" or lm.config.sees_right_context}
        scores = evaluate(lm, chosen, tmp_path / f"{lm.config.recipe}-{lm.denoiser.device.type}")
        found += [tuple(one.scores.values()) for items in scores.values() for one in items]
        return [value for values in found for value in values]

    for model in ATTENTION:
        on_both(model, measure)


@pytest.mark.parametrize("model", ATTENTION)
def test_a_server(model: str, folders: dict[str, str]) -> None:
    """Its engine runs the passes of several requests together, in a thread of its own."""
    requests: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"prompt": PROMPTS, "max_tokens": 8, "logprobs": 2, "echo": True, "temperature": 0}),
        ("completions", {"prompt": "so", "max_tokens": 12, "temperature": 1.0, "n": 2, "threshold": 0.3}),
        ("chat/completions", {"messages": [{"role": "user", "content": "is it so?"}], "max_tokens": 8}),
        ("score", {"text": " the mat", "prompt": "The cat"}),
    ]
    if model == "full":
        requests += [("infill", {"text": "The [[2-4]] mat"})]

    def answers(lm: DiffusionLM) -> list[Any]:
        with running(create_app({"m": lm})) as address, httpx.Client(base_url=f"{address}/v1/", timeout=60) as client:
            responses = [client.post(path, json={"model": "m", "seed": 1} | body) for path, body in requests]
        assert all(response.status_code == 200 for response in responses), [each.text for each in responses]
        return [{k: v for k, v in each.json().items() if k not in ("id", "created")} for each in responses]

    expected = answers(diffusify.load(folders[model], device="cpu"))
    with accelerator():
        found = answers(diffusify.load(folders[model], dtype="float32"))
    assert_same(found, expected)


@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["full", "lora"])
def test_training(lora: Lora | None, causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Adaptation, on generated texts as well, and finetuning with a length head; adapters are opened and merged.

    Of two accelerators, the one process uses the first.
    """
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"{n} is", "completion": " so" * n}) + "\n" for n in range(2, 14)))
    options: dict[str, Any] = {"lora": lora, "steps": 2, "length": 32, "bf16": False, "logging_steps": 1}

    def train(out: Path) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFFUSIFY_CACHE", str(out / "cache"))
            patch.setattr(self_generated, "fast_bfloat16", lambda: False)  # its roundings would change samples
            own, base = block(4, infilling=0.5), block(4, teacher="base")
            template = Template("{prompt}", "{completion}")
            runs = [
                adapt(causal_base, f"self:{corpus}", out / "own", recipe=own, held_out=64, **options),
                adapt(causal_base, corpus, out / "base", recipe=base, held_out=64, **options),
                tune(causal_base, str(chats), out / "ar", recipe=ar(2), template=template, length_head=True, **options),
            ]
        logs = [json.loads((run / "training.json").read_text())["log"] for run in runs]
        names = {"loss", "nll", "ar_nll", "eval_bound"}
        measured = [[{name: log[name] for name in names & set(log)} for log in run] for run in logs]
        models = [diffusify.load(run, dtype="float32") for run in runs]
        return [measured, [lm.generate("The cat", None if lm.denoiser.length_head else 8).text for lm in models]]

    expected = train(tmp_path / "cpu")
    with accelerator(memory=(1 << 40,) * 2), pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
        assert_same(train(tmp_path / "cuda"), expected)


@dataclass(frozen=True)
class RightToLeft:
    """A policy with a mistake that only shows on an accelerator: its index is on the CPU."""

    def __call__(self, state: StepState) -> Move:
        index = torch.arange(state.positions.shape[1]).float().expand(state.positions.shape)
        write = select_top(index, state.positions, torch.ones_like(state.step))
        return Move(write, erase=torch.zeros_like(write))


def test_a_mistake_fails_as_on_an_accelerator(folders: dict[str, str]) -> None:
    assert diffusify.load(folders["full"], device="cpu").generate("The cat", 4, policy=RightToLeft()).tokens == 4
    with accelerator():
        lm = diffusify.load(folders["full"], dtype="float32")
        with pytest.raises(
            DeviceMismatch, match="masked_fill: .* on the same device, but found .* on cpu, .* on cuda:0"
        ):
            lm.generate("The cat", 4, policy=RightToLeft())


def test_what_cuda_refuses_is_refused() -> None:
    with accelerator(memory=(1 << 30, 1 << 30)):
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        other, index = torch.ones(3, device="cuda:1"), torch.tensor([0, 2])
        assert there.device == torch.device("cuda", 0) and there.new_tensor(1.0).device == there.device
        assert ((there + torch.tensor(1.0)) * 2)[index].cpu().tolist() == [4.0, 4.0]
        there[index] = torch.tensor(5.0)
        here.copy_(there)
        assert here.tolist() == [5.0, 1.0, 5.0] and there.to("cuda:1").device == other.device
        refused: list[Callable[[], Any]] = [
            lambda: here + there,
            lambda: here + there.sum(),
            lambda: there + other,
            lambda: here[index.cuda()],
            lambda: there.gather(0, index),
            lambda: torch.stack([there.sum(), torch.tensor(1.0)]),
            lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
            lambda: torch.rand(3, generator=torch.Generator("cuda")),
            lambda: there.exponential_(generator=torch.Generator("cuda:1")),
            there.numpy,
        ]
        for function in refused:
            with pytest.raises((DeviceMismatch, TypeError)):
                function()
    with accelerator("mps"), pytest.raises(TypeError, match="MPS framework doesn't support float64"):
        torch.ones(3, device="mps").double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_network_that_one_accelerator_cannot_hold_is_spread_over_all(family: str, tmp_path: Path) -> None:
    """Its layers lie on two, with tied weights, adapters, a length head and the keys and values of a server."""
    tokenizer = makers.byte_level()
    changes: dict[str, Any] = (
        {"num_hidden_layers": 8, "tie_word_embeddings": True} if family != "gpt2" else {"n_layer": 8}
    )
    network = tiny_network(family, vocab_size=len(tokenizer.tokenizer), **changes)
    network.save_pretrained(tmp_path / "base")
    tokenizer.tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    recipe = mlm() if family == "bert" else block(4, infilling=0.5)
    denoiser, _ = make_denoiser(base, recipe, lora=Lora(4))
    for name, weight in denoiser.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    if family == "bert":
        denoiser.add_length_head(9)
    save_denoiser(tmp_path / "model", denoiser, base.tokenizer)
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))

    def texts(lm: DiffusionLM) -> list[str]:
        batcher, found = PassBatcher(lm.denoiser), list[str]()
        shared = DiffusionLM(batcher.denoiser, lm.tokenizer)
        for prompt in PROMPTS:
            run = shared.prepare_generation([prompt], 6, SamplingConfig(steps=3))
            batcher.join(lambda run=run: found.append(run.results()[0].text))
        while batcher.loops:
            batcher.advance()
        settings: list[dict[str, Any]] = [{}, {"steps": 3}, {"threshold": 0.2, "temperature": 1.0}]
        alone = [one.text for each in settings for one in lm.generate(PROMPTS, 6, **each)]
        lengths = [lm.generate("The cat").text] if lm.denoiser.length_head else []
        return [*found, *alone, *lengths, lm.infill("The [[4]] mat").text]

    expected = texts(diffusify.load(tmp_path / "model", device="cpu"))
    with accelerator(memory=(int(0.9 * size),) * 2):
        lm = diffusify.load(tmp_path / "model", dtype="float32")
        assert {weight.device.index for weight in lm.denoiser.parameters()} == {0, 1} and lm.denoiser.device.index == 0
        assert texts(lm) == expected
    with accelerator(memory=(2 * size,) * 2):
        lm = diffusify.load(tmp_path / "model", dtype="float32")
        assert {weight.device.index for weight in lm.denoiser.parameters()} == {0}
    with accelerator(memory=(size // 4,) * 2):
        with pytest.raises(
            ValueError, match="the 2 accelerators have .* for them; free some memory, or give device=cp"
        ):
            diffusify.load(tmp_path / "model", dtype="float32")
        lm = diffusify.load(tmp_path / "model", device="cuda:1", dtype="float32")
        assert {weight.device for weight in lm.denoiser.parameters()} == {torch.device("cuda", 1)}
