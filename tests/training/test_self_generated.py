"""Self-generated training text is sampled once, cached, and continued after an interruption."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import checksum
from diffusify.text.examples import Template
from diffusify.text.sources import load_texts
from diffusify.training import self_generated
from diffusify.training.adapt import adapt
from diffusify.training.self_generated import TextGenerator, with_generated_texts
from diffusify.training.tune import tune
from tests.families import tiny_network

TINY: dict[str, Any] = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_generated, "BATCH_SIZE", 4)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def corpus(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the first four texts of the corpus, which are 16 chunks of 32 tokens."""
    path = tmp_path_factory.mktemp("few") / "texts.jsonl"
    path.write_text("".join(Path(corpus).read_text().splitlines(keepends=True)[:4]))
    return str(path)


def generated(base: str, data: str, length: int = 32) -> str:
    source = load_base(base)
    tokenizer = make_denoiser(source, mlm() if source.masked else block())[1]
    return with_generated_texts(
        data, base, checksum(source.network), source.network, tokenizer, length, 0, Console(quiet=True)
    )


def test_texts_continue_the_openings_of_chunks(causal_base: str, corpus: str, cache: Path) -> None:
    source = generated(causal_base, f"0.5*self:{corpus},0.5*{corpus}")
    assert source.startswith("0.5*") and source.endswith(f",0.5*{corpus}") and "self:" not in source
    (path,) = cache.glob("self-*.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    tokenizer = make_denoiser(load_base(causal_base), block())[1]
    documents = [tokenizer.document(text) for text in load_texts(corpus)["text"]]
    starts = [(d, start) for d in documents for start in range(0, max(1, len(d) - 16), 32)]
    openings = [tokenizer.decode(d[start : start + 8]) for d, start in starts]
    assert len(texts) > 8 and len(texts) == len([o for o in openings if o])
    assert all(text.startswith(opening) for text, opening in zip(texts, openings, strict=True))
    assert any(len(text) > len(opening) for text, opening in zip(texts, openings, strict=True))


def test_texts_are_cached_and_partial_files_continued(causal_base: str, corpus: str, cache: Path) -> None:
    path = Path(generated(causal_base, f"self:{corpus}"))
    lines, modified = path.read_text(), path.stat().st_mtime_ns
    assert generated(causal_base, f"self:{corpus}") == str(path) and path.stat().st_mtime_ns == modified
    head = "".join(lines.splitlines(keepends=True)[:6])
    path.with_suffix(".unfinished").write_text(head + '{"text": "cut of')
    path.unlink()
    assert Path(generated(causal_base, f"self:{corpus}")).read_text() == lines


def test_of_several_processes_one_generates(causal_base: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_base(causal_base)
    generator = TextGenerator(source.network, make_denoiser(source, block())[1], [0], 8, 0, Console(quiet=True))
    context = multiprocessing.get_context("fork")
    started, calls = context.Event(), context.Value("i", 0)

    def run() -> None:
        assert generator.generate_file([], [], lambda n, ids: {}).read_text() == "{} \n"

    other = context.Process(target=lambda: (started.set(), run()))

    def generate(_: TextGenerator, partial: Path, *args: Any) -> None:
        calls.value += 1
        if calls.value == 1:
            other.start()
            assert started.wait(60)
        partial.write_text("{} \n")

    monkeypatch.setattr(TextGenerator, "_generate", generate)
    run()
    other.join()
    assert (other.exitcode, calls.value) == (0, 1)
    assert [path.suffix for path in cache.iterdir()] == [".jsonl"]


def test_new_adapters_use_the_cached_texts_of_their_base(
    causal_base: str, corpus: str, cache: Path, tmp_path: Path
) -> None:
    for n, lora in enumerate((None, Lora(2), Lora(4))):
        adapt(causal_base, f"self:{corpus}", tmp_path / str(n), lora=lora, seed=0, steps=1, **TINY)
    assert len(list(cache.glob("self-*.jsonl"))) == 1
    assert json.loads((tmp_path / "0" / "run.json").read_text())["data"] == f"self:{corpus}"
    adapt(str(tmp_path / "2"), f"self:{corpus}", tmp_path / "more", steps=1, **TINY)
    assert len(list(cache.glob("self-*.jsonl"))) == 2


def test_sources_that_cannot_be_generated_are_refused(
    causal_base: str, masked_base: str, corpus: str, tmp_path: Path
) -> None:
    infiller = adapt(causal_base, corpus, tmp_path / "infiller", recipe=ar(), steps=1, **TINY)
    for model in (masked_base, str(infiller)):
        recipe = mlm() if model == masked_base else None
        with pytest.raises(
            ValueError, match=f"{model} has no autoregressive model to generate it with; leave self: out"
        ):
            adapt(model, f"self:{corpus}", tmp_path / "run", recipe=recipe, steps=1, **TINY)
    with pytest.raises(ValueError, match="nowhere.txt does not exist"):
        adapt(causal_base, "self:nowhere.txt", tmp_path / "run", steps=1, **TINY)
    with pytest.raises(ValueError, match="no text of 4000 tokens"):
        generated(causal_base, f"self:{corpus}", length=4000)


@pytest.fixture
def wide_base(causal_base: str, tmp_path: Path) -> str:
    """The tiny Llama with a context that is long enough for a chat."""
    folder = shutil.copytree(causal_base, tmp_path / "wide")
    network = tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=256)
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """The path of six chats and twenty pairs without an answer."""
    path = tmp_path / "questions.jsonl"
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": "no"}] for word in "abcdef"]
    pairs = [{"instruction": f"say {word}", "output": None} for word in "ghijklmnopqrstuvwxyz"]
    records = [{"messages": chat} for chat in chats] + pairs
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_questions_that_cannot_be_used_are_counted(wide_base: str, questions: str, cache: Path, tmp_path: Path) -> None:
    with open(questions, "a") as file:
        file.write('{"messages": "x"}\n{\n')
    options: dict[str, Any] = TINY | {"length": 192}
    with pytest.raises(ValueError, match=r"2 of 28 records cannot be used \(record 27: .*; record 28: .* is not JSON"):
        tune(wide_base, f"self:{questions}", tmp_path / "run", recipe=block(4), steps=1, **options)


def test_a_model_is_tuned_on_its_own_answers(
    wide_base: str, questions: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "BATCH_SIZE", 32)
    options: dict[str, Any] = TINY | {"length": 192}
    out = tune(wide_base, f"self:{questions}", tmp_path / "run", recipe=block(4), steps=1, **options)
    assert json.loads((out / "run.json").read_text())["data"] == f"self:{questions}"
    (path,) = cache.glob("self-*.jsonl")
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert 4 < len(chats) < 26  # not all answers end within the length
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    contents = [chat[0]["content"] for chat in chats]
    expected = [*"abcdef", *(f"say {word}" for word in "ghijklmnopqrstuvwxyz")]
    assert len(set(contents)) == len(contents) and set(contents) < set(expected)
    assert all(chat[1]["content"].strip() not in ("", "no") for chat in chats)


def test_texts_do_not_depend_on_their_batch(causal_base: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_base(causal_base)
    tokenizer = make_denoiser(source, block())[1]
    generator = TextGenerator(source.network, tokenizer, [*range(0, 320, 9)], 48, 0, Console(quiet=True))
    prompts = [tokenizer.encode("the cat sat on the mat"[:size]) for size in range(2, 20, 3)]
    monkeypatch.setattr(self_generated, "TEMPERATURE", 1e-6)  # greedy
    monkeypatch.setattr(self_generated, "fast_bfloat16", lambda: False)
    results = []
    for batch_size in (1, 4):
        monkeypatch.setattr(self_generated, "BATCH_SIZE", batch_size)
        path = generator.generate_file([batch_size], prompts, lambda n, ids: {"n": n, "ids": ids})
        results.append([json.loads(line) for line in path.read_text().splitlines()])
    assert len(results[0]) == len(results[1]) == len(prompts)
    for alone, batched in zip(*results, strict=True):
        size = len(batched["ids"])  # padding counts towards the length
        assert size and alone["ids"][:size] == batched["ids"]
        assert all(token_id % 9 for token_id in alone["ids"][:-1])  # nothing after an end token


def test_a_model_without_an_ar_half_cannot_answer(
    causal_base: str, masked_base: str, corpus: str, questions: str, tmp_path: Path
) -> None:
    infiller = adapt(causal_base, corpus, tmp_path / "infiller", recipe=ar(), steps=1, **TINY)
    with pytest.raises(ValueError, match="has no autoregressive model to generate it with; leave self: out"):
        tune(str(infiller), f"self:{questions}", tmp_path / "no", steps=1, **TINY)
    with pytest.raises(ValueError, match="has no autoregressive model to generate it with; leave self: out"):
        tune(masked_base, f"self:{questions}", tmp_path / "no", recipe=mlm(), steps=1, **TINY)
    with pytest.raises(ValueError, match="need no template"):
        template = Template("{instruction}", "{output}")
        tune(causal_base, f"self:{questions}", tmp_path / "no", recipe=block(), template=template, steps=1, **TINY)
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        tune(causal_base, "self:nowhere.jsonl", tmp_path / "no", recipe=block(), steps=1, **TINY)
