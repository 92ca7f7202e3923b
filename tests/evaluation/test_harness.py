"""The real lm-evaluation-harness, offline, on tasks of a local file: its own `hf` model beside ours."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.harness import DiffusifyLM
from diffusify.evaluation.likelihood import Autoregressive, MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.models.recipes import ar, block
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

HFLM: Any = huggingface.HFLM  # wrongly annotated
RECORDS = [
    {"q": "The quick brown fox jumps over", "choices": ["the lazy dog", "a cat", "it"], "gold": 0},
    {"q": "The cat sat on", "choices": ["the mat", "done: 5", "the mats"], "gold": 0},
    {"q": "Is it so", "choices": ["It is!", "no", "0 1 2 3"], "gold": 1},
]
TASKS: list[dict[str, Any]] = [
    {"task": "choosing", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"},
    {"task": "ending", "output_type": "loglikelihood", "doc_to_target": "{{' ' + choices[0]}}",
     "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_target": "{{q * 9}}",
     "metric_list": [{"metric": "bits_per_byte"}]},
    {"task": "writing", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
     "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
     "metric_list": [{"metric": "exact_match"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for task in TASKS:
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
        common |= {"test_split": "test", "doc_to_text": "" if task["task"] == "rolling" else "{{q}}"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return TaskManager(include_path=str(folder), include_defaults=False)


class HF(HFLM):
    """The harness's own model without the mask token, which a trained base model would not predict anyway."""

    def __init__(self, folder: str, max_length: int = 64) -> None:
        super().__init__(folder, device="cpu", dtype="float32", batch_size=2, max_length=max_length)
        self.mask: Any = self.tokenizer.mask_token_id

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        return super()._model_call(inps, attn_mask, labels).index_fill(-1, torch.tensor([self.mask]), -torch.inf)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_generate(*args, **kwargs, suppress_tokens=[self.mask])


def evaluate(model: Any, tasks: TaskManager) -> dict[str, list[Any]]:
    simple_evaluate: Any = lm_eval.simple_evaluate
    found = simple_evaluate(
        model, tasks=[task["task"] for task in TASKS], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return {name: [sample["filtered_resps"] for sample in samples] for name, samples in found["samples"].items()}


@pytest.fixture(scope="module")
def theirs(causal_base: str, tasks: TaskManager) -> dict[str, list[Any]]:
    return evaluate(HF(causal_base), tasks)


def numbers(found: dict[str, list[Any]]) -> dict[str, list[float]]:
    def flat(value: Any) -> list[float]:
        return [y for x in value for y in flat(x)] if isinstance(value, list | tuple) else [float(value)]

    return {name: flat(values) for name, values in found.items() if name != "writing"}


def test_an_unmodified_base_model_scores_as_in_the_harness(
    causal_base: str, tasks: TaskManager, theirs: dict[str, list[Any]]
) -> None:
    ours = evaluate(DiffusifyLM(causal_base), tasks)
    for name, values in numbers(theirs).items():
        assert numbers(ours)[name] == pytest.approx(values, abs=1e-3), name
    assert ours["writing"] == theirs["writing"]


def test_a_block_model_keeps_the_ar_scores_or_measures_its_bound(
    causal_base: str, corpus: str, tasks: TaskManager, tmp_path: Path
) -> None:
    model = adapt(
        causal_base, corpus, tmp_path / "block", recipe=block(4), steps=1, length=32, held_out=64,
        learning_rate=1e-12, bf16=False,
    )  # fmt: skip
    exact = DiffusifyLM(str(model), tolerance=0.0)
    assert isinstance(exact.measure, Autoregressive)
    theirs, ours = evaluate(HF(str(model)), tasks), evaluate(exact, tasks)
    for name, values in numbers(theirs).items():
        assert numbers(ours)[name] == pytest.approx(values, abs=1e-3), name
    assert ours["writing"] == theirs["writing"]
    bound = evaluate(DiffusifyLM(str(model), bound=True, draws=16), tasks)
    assert numbers(bound)["rolling"] != pytest.approx(numbers(ours)["rolling"], abs=1e-3)


def test_a_bidirectional_model_is_measured_by_its_bound(
    causal_base: str, corpus: str, tasks: TaskManager, tmp_path: Path
) -> None:
    model = adapt(causal_base, corpus, tmp_path / "ar", recipe=ar(), steps=1, length=32, held_out=64, bf16=False)
    lm = DiffusifyLM(str(model), draws=16, steps=4)
    assert isinstance(lm.measure, MonteCarlo)
    found = evaluate(lm, tasks)
    assert all(value < 0 for value in numbers(found)["rolling"])
    assert all("e" not in text for texts in found["writing"] for text in texts)
    again = evaluate(DiffusifyLM(str(model), draws=16, steps=4), tasks)
    assert found == again


def test_a_greedy_continuation_is_recognised(causal_base: str, corpus: str, tmp_path: Path) -> None:
    model = adapt(causal_base, corpus, tmp_path / "ar", recipe=ar(), steps=1, length=32, held_out=64, bf16=False)
    lm = DiffusifyLM(str(model), draws=16)
    prompt = lm.tok_encode("The cat sat")
    run = lm.lm.prepare_generation([prompt], 4, SamplingConfig(policy=Unmask()))
    run.results()
    greedy = run.canvas.tokens[0, -4:].tolist()
    other = [greedy[0] + 1, *greedy[1:]]
    results = lm._loglikelihood_tokens([(("", ""), prompt, greedy), (("", "x"), prompt[:-1], other)])
    assert [is_greedy for _, is_greedy in results] == [True, False]


def test_a_masked_model_reads_texts_without_the_tokens_around_them(masked_base: str) -> None:
    """The tokens that a tokenizer adds after a text are not part of contexts, continuations and documents."""
    lm = DiffusifyLM(masked_base)
    cls, encode = lm.prefix_token_id, lm.lm.tokenizer.encode
    assert lm._encode_pair("the cat sat on", " the mat") == ([cls, *encode("the cat sat on")], encode("the mat"))
    (document,) = lm.loglikelihood_rolling([SimpleNamespace(args=("the mat",))])
    (expected,) = lm.measure(lm.lm.denoiser, [LikelihoodRequest((cls,), (tuple(encode("the mat")),))])
    assert document == expected.log_prob[0]


def test_a_long_document_is_measured_in_windows_that_fit(causal_base: str) -> None:
    """In those that the harness's own model takes if its context is one token shorter."""
    documents = [SimpleNamespace(args=("0 1 2 3 " * 40,)), SimpleNamespace(args=("fox " * 12,))]
    found = DiffusifyLM(causal_base).loglikelihood_rolling(documents)
    assert found == pytest.approx(HF(causal_base, max_length=63).loglikelihood_rolling(documents), abs=1e-3)


def test_a_generation_without_room_for_its_prompt_is_refused(causal_base: str) -> None:
    lm = DiffusifyLM(causal_base)
    request = SimpleNamespace(args=("The cat", {"until": ["."], "max_gen_toks": 64}))
    with pytest.raises(ValueError, match="max_gen_toks=64 leaves no room for a prompt in the context of 64 tokens"):
        lm.generate_until([request])


@pytest.mark.slow  # the harness reads the files of all its tasks
def test_the_command_runs_an_evaluation(
    causal_base: str, tasks: TaskManager, theirs: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = ["lm-eval", "--model", "diffusify", "--model_args", f"pretrained={causal_base}", "--tasks"]
    words += [f"{tasks.include_path}/choosing.yaml", "-o", str(tmp_path), "-s"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "|choosing|" in done.stdout, done.output
    (samples,) = tmp_path.rglob("samples_choosing_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    likelihoods = [float(likelihood) for responses in found for likelihood, _ in responses]
    assert likelihoods == pytest.approx(numbers(theirs)["choosing"][::2], abs=1e-3)


def test_the_command_takes_the_arguments_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    done = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert done.exit_code == 0 and "--include_path" in done.stdout and "Evaluate language models" in done.stdout
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    done = CliRunner().invoke(app, ["lm-eval", "--model", "diffusify", "--tasks", "hellaswag"])
    assert done.exit_code == 2 and done.stderr.startswith("error: lm-eval needs `pip install 'diffusify[eval]'`")


def test_invalid_arguments_are_refused(causal_base: str) -> None:
    with pytest.raises(ValueError, match='dtype "int8"'):
        DiffusifyLM(causal_base, dtype="int8")
    with pytest.raises(ValueError, match="temperature"):
        DiffusifyLM(causal_base, temperature=-1.0)
    with pytest.raises(ValueError, match="colour"):
        DiffusifyLM(causal_base, colour="red")
