"""Finetuning: only targets are noised, tasks and lengths are learned, and saved folders load."""

import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file

import diffusify
from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.models.lora import Lora, adapter_base
from diffusify.models.recipes import block, draft, mlm
from diffusify.models.saving import load_denoiser, merge_adapters
from diffusify.text.examples import Template
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.trainer import DiffusionTrainer
from diffusify.training.tune import split_off_prompts, tune
from tests.families import tiny_network
from tests.text import makers

SMALL: dict[str, Any] = {
    "length": 32, "held_out": 4, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 3e-3,
}  # fmt: skip
WIDE: dict[str, Any] = SMALL | {"length": 192}
TEMPLATE = Template("the {animal} says", " {sound}")
SOUNDS = {"dog": "so it", "cat": "mat on the dog", "fox": "done"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of 42 prompts of three kinds; each kind has its own answer, of its own length."""
    path = tmp_path_factory.mktemp("tune") / "pairs.jsonl"
    words = ["quick", "brown", "lazy", "the", "over", "jumps", "and", "sat", "on", "it", "is", "so", "cat", "mat"]
    records = [{"animal": f"{word} {animal}", "sound": sound} for word in words for animal, sound in SOUNDS.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of 24 chats of three turns."""
    path = tmp_path_factory.mktemp("tune") / "chats.jsonl"
    roles = ("user", "assistant")
    records = [
        {"messages": [{"role": roles[n % 2], "content": f"{sign} {i}"} for n, sign in enumerate("abcdef")]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def blocks(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A block diffusion model with a context of 256 tokens, trained for one step."""
    folder = tmp_path_factory.mktemp("models")
    network = tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=256)
    network.save_pretrained(folder / "base")
    makers.byte_level().tokenizer.save_pretrained(folder / "base")
    return str(adapt(str(folder / "base"), corpus, folder / "out", steps=1, length=32, held_out=64, bf16=False))


@pytest.mark.slow
def test_a_masked_base_learns_a_task_and_its_lengths(masked_base: str, pairs: str, tmp_path: Path) -> None:
    options: dict[str, Any] = SMALL | {"learning_rate": 1e-2}
    out = tune(
        masked_base,
        pairs,
        tmp_path / "out",
        template=TEMPLATE,
        recipe=mlm(20),
        length_head=True,
        steps=70,
        **options,
    )
    model = diffusify.load(out)
    prompts = [f"the brown {animal} says" for animal in SOUNDS]
    answers = [(result.completion or "").strip() for result in model.generate(prompts, length_beam=1)]
    assert answers == list(SOUNDS.values())
    log = json.loads((out / "training.json").read_text())["log"]
    bounds = [point["eval_bound"] for point in log if "eval_bound" in point]
    assert bounds[-1] < 0.3 * bounds[0]
    assert [result.tokens for result in model.generate(prompts, max_new_tokens=[3, 5, 2])] == [2, 4, 1]


def test_a_run_on_other_contents_is_refused(blocks: str, chats: str, tmp_path: Path) -> None:
    """The path is the same."""
    data = tmp_path / "chats.jsonl"
    text = Path(chats).read_text()
    data.write_text(text)
    out = tune(blocks, str(data), tmp_path / "out", steps=1, **WIDE)
    assert tune(blocks, str(data), out, steps=1, **WIDE) == out
    data.write_text(text.replace("e", "o"))
    with pytest.raises(ValueError, match=r"a run on other data: the files of .*chats.jsonl have changed"):
        tune(blocks, str(data), out, steps=1, **WIDE)


def test_only_targets_are_noised(blocks: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    real = DiffusionTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        batches.append(inputs["noised"])
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", spy)
    out = tune(blocks, chats, tmp_path / "out", steps=4, **WIDE)
    tokenizer = diffusify.load(out).tokenizer
    for batch in batches:
        canvas = batch.canvas
        assert not (canvas.open & ~canvas.editable).any() and not (batch.ar_positions & ~canvas.editable).any()
        assert not (canvas.editable & (canvas.document == 0)).any()
        for row, document, editable in zip(batch.clean, canvas.document, canvas.editable, strict=True):
            for number in document[document > 0].unique():
                answers = row[editable & (document == number)]
                assert int((answers == tokenizer.end_token_id).sum()) == 3  # one per turn
                assert tokenizer.decode(answers.tolist()).split()[0::2] == ["b", "d", "f"]


def test_adapters_load_with_their_base_and_merge(blocks: str, chats: str, tmp_path: Path) -> None:
    out = tune(blocks, chats, tmp_path / "lora", lora=Lora(4), steps=3, **WIDE)
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").exists()
    merged = merge_adapters(out, tmp_path / "merged")
    chat = [{"role": "user", "content": "a 1"}]
    texts = [diffusify.load(folder).chat(chat, max_new_tokens=8).text for folder in (out, merged, blocks)]
    assert texts[0] == texts[1]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (blocks, merged))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="holds no adapters"):
        merge_adapters(merged, tmp_path / "again")


def test_training_continues_with_a_model_s_adapters(blocks: str, chats: str, tmp_path: Path) -> None:
    first = tune(blocks, chats, tmp_path / "first", lora=Lora(4), steps=3, **WIDE)
    frozen: dict[str, Any] = WIDE | {"learning_rate": 0.0}
    unchanged = tune(str(first), chats, tmp_path / "unchanged", steps=2, seed=1, **frozen)
    more = tune(first, Path(chats), tmp_path / "more", steps=2, seed=1, **WIDE)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, unchanged, more)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert adapter_base(more) == adapter_base(first) and not (more / "model.safetensors").exists()
    assert DiffusionConfig.load(more) == DiffusionConfig.load(first)
    with pytest.raises(ValueError, match="holds adapters, and training continues with these; omit --lora"):
        tune(str(first), chats, tmp_path / "twice", lora=Lora(2), steps=1, **WIDE)


@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["all", "lora"])
def test_a_resumed_run_equals_an_undisturbed_one(
    masked_base: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Lora | None
) -> None:
    def run(name: str) -> Path:
        return tune(
            masked_base, pairs, tmp_path / name, template=TEMPLATE, recipe=mlm(20), lora=lora, length_head=True,
            steps=4, **SMALL,
        )  # fmt: skip

    undisturbed, real = run("undisturbed"), Budget.on_step_end

    def interrupted(self: Budget, args, state, control, **kwargs) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Budget, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    monkeypatch.setattr(Budget, "on_step_end", real)
    resumed = run("interrupted")
    for file in sorted(path.name for path in undisturbed.glob("*.safetensors")):
        first, second = load_file(undisturbed / file), load_file(resumed / file)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_prompt_is_both_trained_and_held_out() -> None:
    examples = Dataset.from_dict({"tokens": [[i // 2, 9, i] for i in range(40)], "target": [[False, False, True]] * 40})
    train, held = split_off_prompts(examples, 100)
    assert len(held) == 4 and len(train) == 36  # a tenth of the twenty prompts, each with two answers
    assert not {row[0] for row in train["tokens"]} & {row[0] for row in held["tokens"]}
    with pytest.raises(ValueError, match="the same prompt"):
        split_off_prompts(examples.select([0, 1]), 1)


@pytest.mark.parametrize("copies", [1, 50])
def test_training_without_validation(blocks: str, tmp_path: Path, copies: int) -> None:
    path = tmp_path / "same.jsonl"
    small: Any = {**SMALL}
    path.write_text('{"question": "is it", "answer": "so"}\n' * copies)
    with pytest.raises(ValueError, match="same prompt, so none can be held out .* held_out=0"):
        tune(blocks, str(path), tmp_path / "out", steps=2, **SMALL)
    out = tune(blocks, str(path), tmp_path / "out", steps=2, **small | {"held_out": 0, "logging_steps": 1})
    log = json.loads((out / "training.json").read_text())["log"]
    assert sum("loss" in entry for entry in log) == 2 and not any("eval_bound" in entry for entry in log)
    with pytest.raises(ValueError, match="held_out=0 leaves nothing to evaluate on; leave eval_strategy=steps out"):
        tune(blocks, str(path), tmp_path / "other", steps=2, **small | {"held_out": 0, "eval_strategy": "steps"})
    with pytest.raises(ValueError, match="held_out=-1 must be at least 0"):
        tune(blocks, str(path), tmp_path / "other", steps=2, **small | {"held_out": -1})


def test_bad_arguments_are_refused(masked_base: str, blocks: str, chats: str, pairs: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is a diffusion model already and keeps its own recipe"):
        tune(blocks, chats, out, recipe=block(8), steps=1)
    with pytest.raises(ValueError, match="leave the length head"):
        tune(blocks, chats, out, length_head=True, steps=1)
    with pytest.raises(ValueError, match="adapters of draft leave the AR half as it is, so it cannot learn"):
        tune(masked_base, chats, out, recipe=draft(), steps=1)
    with pytest.raises(ValueError, match="fits into length=3"):
        tune(masked_base, pairs, out, template=TEMPLATE, recipe=mlm(), steps=1, length=3)
    assert not out.exists()


def test_a_base_is_finetuned_with_its_default_recipe(
    masked_base: str, causal_base: str, pairs: str, tmp_path: Path
) -> None:
    for base, name in ((masked_base, "mlm"), (causal_base, "block")):
        console = Console(file=StringIO())
        out = tune(base, pairs, tmp_path / name, template=TEMPLATE, steps=1, console=console, **SMALL)
        assert DiffusionConfig.load(out).recipe == name
        assert f"recipe {name}: trains all " in console.file.getvalue()  # pyright: ignore


def test_the_length_head_reads_only_prompts(masked_base: str, pairs: str, tmp_path: Path) -> None:
    """A text's length logits depend neither on its target nor on the other texts of its row."""
    out = tune(
        masked_base, pairs, tmp_path / "out", template=TEMPLATE, recipe=mlm(20), length_head=True, steps=2, **SMALL
    )
    denoiser, _ = load_denoiser(out)
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    editable = torch.tensor([[0] * 3 + [1] * 4 + [0] * 4 + [1], [0] * 8 + [1] + [0] * 3]).bool()
    logits = denoiser.length_logits(Canvas.clean(tokens, document, editable))
    assert logits.shape[0] == 3
    other = denoiser.length_logits(Canvas.clean(torch.where(editable, 7, tokens), document, editable))
    assert torch.equal(logits, other)
    for i, (row, columns) in enumerate([(0, slice(0, 7)), (0, slice(7, 12)), (1, slice(0, 9))]):
        part = (slice(row, row + 1), columns)
        alone = denoiser.length_logits(Canvas.clean(tokens[part], torch.ones_like(tokens[part]), editable[part]))
        torch.testing.assert_close(alone[0], logits[i], atol=1e-5, rtol=1e-4)


def test_a_length_head_stays_and_is_trained_further_on_answers(
    masked_base: str, pairs: str, corpus: str, tmp_path: Path
) -> None:
    def head(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "length_head.safetensors")

    options: dict[str, Any] = SMALL | {"template": TEMPLATE, "steps": 1, "warmup_steps": 0}
    first = tune(masked_base, pairs, tmp_path / "first", recipe=mlm(20), length_head=True, **options)
    adapted = adapt(
        str(first), corpus, tmp_path / "adapted", steps=1, warmup_steps=0, length=32, held_out=64, bf16=False
    )
    assert all(torch.equal(weight, head(first)[name]) for name, weight in head(adapted).items())
    for length_head, rate in ((False, 3e-3), (True, 0.0)):
        again: Any = options | {"length_head": length_head, "learning_rate": rate}
        tuned = tune(str(adapted), pairs, tmp_path / str(rate), **again)
        assert all(torch.equal(weight, head(first)[name]) == (rate == 0) for name, weight in head(tuned).items())
    other = adapt(str(first), corpus, tmp_path / "other", recipe=block(masked=True), steps=1, length=32, bf16=False)
    assert not (other / "length_head.safetensors").exists()
