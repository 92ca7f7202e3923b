"""A base writes its own training text, once, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from diffusify.models.loading import load_base
from diffusify.models.recipes import block, mlm
from diffusify.text.sources import load_texts
from diffusify.training import selfmade
from diffusify.training.adapt import adapt, make_denoiser
from diffusify.training.selfmade import with_own_texts

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfmade, "TOGETHER", 4)
    return tmp_path / "cache"


def written(base: str, data: str, length: int = 32) -> str:
    source = load_base(base)
    tokenizer = make_denoiser(source, mlm() if source.masked else block())[1]
    return with_own_texts(data, source, tokenizer, length, 0, Console(quiet=True))


def test_pieces_of_the_prompts_are_gone_on_with(causal_base: str, corpus: str, cache: Path) -> None:
    made = written(causal_base, f"0.5*self:{corpus},0.5*{corpus}")
    assert made.startswith("0.5*") and made.endswith(f",0.5*{corpus}") and "self:" not in made
    (path,) = cache.glob("self-*.jsonl")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    tokenizer = make_denoiser(load_base(causal_base), block())[1]
    documents = [tokenizer.document(text) for text in load_texts(corpus)["text"]]
    openings = [tokenizer.decode(d[at : at + 8]) for d in documents for at in range(0, max(1, len(d) - 16), 32)]
    assert len(texts) > 8 and len(texts) == len([o for o in openings if o])
    assert all(text.startswith(opening) for text, opening in zip(texts, openings, strict=True))
    assert any(len(text) > len(opening) for text, opening in zip(texts, openings, strict=True))


def test_a_second_call_finds_the_texts_and_a_stopped_one_goes_on(causal_base: str, corpus: str, cache: Path) -> None:
    whole = Path(written(causal_base, f"self:{corpus}"))
    lines, stamp = whole.read_text(), whole.stat().st_mtime_ns
    assert written(causal_base, f"self:{corpus}") == str(whole) and whole.stat().st_mtime_ns == stamp
    head = "".join(lines.splitlines(keepends=True)[:6])
    whole.with_suffix(".unfinished").write_text(head + '{"text": "cut of')
    whole.unlink()
    assert Path(written(causal_base, f"self:{corpus}")).read_text() == lines


def test_a_model_is_adapted_on_its_own_text(causal_base: str, corpus: str, tmp_path: Path) -> None:
    out = adapt(causal_base, f"self:{corpus}", tmp_path / "run", steps=1, **TINY)
    assert json.loads((out / "run.json").read_text())["data"] == f"self:{corpus}"


def test_what_cannot_be_written_is_refused(causal_base: str, masked_base: str, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a masked model"):
        written(masked_base, f"self:{corpus}")
    with pytest.raises(ValueError, match="nowhere.txt does not exist"):
        adapt(causal_base, "self:nowhere.txt", tmp_path / "run", steps=1, **TINY)
    with pytest.raises(ValueError, match="no text of 4000 tokens"):
        written(causal_base, f"self:{corpus}", length=4000)
