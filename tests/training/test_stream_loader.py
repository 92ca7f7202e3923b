"""A run on a stream, stopped and gone on with, trains on the very rows of one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainingArguments

from diffusify.text import corpus, stream
from diffusify.text.packing import collate, pack
from diffusify.text.sources import stream_texts
from diffusify.text.stream import RowStream
from diffusify.training.adapt import adapt
from diffusify.training.stream_loader import StreamLoader
from diffusify.training.trainer import DiffusionTrainer
from tests.text.makers import byte_level

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}


def arguments(folder: Path, rank: int = 0, world: int = 1, **options: Any) -> TrainingArguments:
    """What a process of several would be told."""
    made = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, use_cpu=True, dataloader_pin_memory=False, **options
    )
    made.__class__ = type("Rank", (TrainingArguments,), {"process_index": rank, "world_size": world})
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 320)
    monkeypatch.setattr(stream, "BATCH", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts")
    for n in range(6):
        texts = [json.dumps({"text": f"x{20 * n + i:05}"}) for i in range(20)]
        (path / f"{n}.jsonl").write_text("\n".join(texts) + "\n")
    return str(path)


def rows_of(folder: str) -> RowStream:
    return RowStream(stream_texts(folder), byte_level(), 8, seed=4)


def taken(batches: Iterator[dict[str, torch.Tensor]], count: int) -> list[list[list[int]]]:
    return [batch["tokens"].tolist() for batch in islice(batches, count)]


@given(st.integers(0, 30), st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_going_on_after_any_step(
    folder: str, tmp_path_factory: pytest.TempPathFactory, step: int, ranks: tuple[int, int], accumulated: int
) -> None:
    out = tmp_path_factory.mktemp("out")
    args = arguments(out, *ranks, gradient_accumulation_steps=accumulated)
    whole = StreamLoader(rows_of(folder), args)
    rows = taken(iter(whole), step * accumulated + 6)
    stopped = StreamLoader(rows_of(folder), args)
    batches = iter(stopped)
    taken(batches, step * accumulated)
    stopped.save(out, step)
    taken(batches, accumulated)  # the next step's batches are there, but Ctrl-C came before it was taken
    stopped.save(out, step)
    again = StreamLoader(rows_of(folder), args)
    again.load(out)
    assert taken(iter(again), 6) == rows[step * accumulated :]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one core
def test_workers_take_turns_and_go_on(folder: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, dataloader_num_workers=2)
    rows = taken(iter(StreamLoader(rows_of(folder), args)), 12)
    plain = [taken(_alone(folder, reader), 6) for reader in (0, 1)]
    assert rows == [batch for pair in zip(*plain, strict=True) for batch in pair]
    stopped = StreamLoader(rows_of(folder), args)
    taken(iter(stopped), 5)
    stopped.save(tmp_path, 5)
    again = StreamLoader(rows_of(folder), args)
    again.load(tmp_path)
    assert taken(iter(again), 7) == rows[5:]
    assert again.tally.records > 0


def _alone(folder: str, reader: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = rows_of(folder).read(reader, 2)
    while True:
        yield collate([next(rows)[0] for _ in range(3)])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_texts_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x00000"}\n{\n{"text": "x00001"}\n')
    rows = replace(rows_of(str(tmp_path / "a.jsonl")), max_corrupt=0.1)
    with pytest.raises(ValueError, match="^1 of 3 records cannot be read .*a.jsonl line 2 is not JSON"):
        list(islice(iter(StreamLoader(rows, arguments(tmp_path, dataloader_num_workers=workers))), 5))


def test_another_number_of_readers_is_refused(folder: str, tmp_path: Path) -> None:
    StreamLoader(rows_of(folder), arguments(tmp_path)).save(tmp_path, 0)
    other = StreamLoader(rows_of(folder), arguments(tmp_path, world=2))
    with pytest.raises(ValueError, match="was made with 1 readers of the stream of texts, not 2"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match="was made with no readers"):
        other.load(tmp_path / "nowhere")


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The rows that each optimizer step is taken on."""
    seen: list[list[list[int]]] = []
    real = DiffusionTrainer.get_batch_samples

    def spy(self: DiffusionTrainer, iterator: Iterator, number: int, device: torch.device) -> Any:
        batches = list(islice(iterator, number))
        seen.append([row for batch in batches for row in batch["tokens"].tolist()])
        return real(self, iter(batches), number, device)

    monkeypatch.setattr(DiffusionTrainer, "get_batch_samples", spy)
    return seen


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ctrl-C in the middle of a step, and not again."""
    real = DiffusionTrainer.training_step

    def dies(self: DiffusionTrainer, *given: Any, **more: Any) -> Any:
        if self.state.global_step == step:
            monkeypatch.setattr(DiffusionTrainer, "training_step", real)
            signal.raise_signal(signal.SIGINT)
        return real(self, *given, **more)

    monkeypatch.setattr(DiffusionTrainer, "training_step", dies)


@pytest.mark.parametrize("data", ["{folder}", "0.5*{folder},0.5*builtin:pydoc"], ids=["folder", "mixture"])
@pytest.mark.parametrize("way", ["memory", "disk", "stream"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    causal_base: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, data: str
) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "IN_MEMORY", 0 if way == "disk" else 1 << 20)
    source = data.format(folder=folder)
    options: dict[str, Any] = TINY | {"streaming": way == "stream", "gradient_accumulation_steps": 2}
    seen = spied(monkeypatch)
    whole = adapt(causal_base, source, tmp_path / "whole", steps=9, **options)
    rows = seen[:]
    seen.clear()
    interrupted_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        adapt(causal_base, source, tmp_path / "parts", steps=9, **options)
    (kept,) = (tmp_path / "parts").glob("checkpoint-*")
    assert (kept / "stream_0.json").is_file() == (way == "stream")
    assert kept.name == "checkpoint-6" and len(seen) == 6  # the step was taken to its end
    parts = adapt(causal_base, source, tmp_path / "parts", steps=9, **options)
    assert seen == rows
    first, second = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("streaming", [None, True])
def test_what_is_left_out_is_told(causal_base: str, folder: str, tmp_path: Path, streaming: bool | None) -> None:
    path = tmp_path / "a.jsonl"
    good = (Path(folder) / "0.jsonl").read_text()
    path.write_text(good + "{\n" + good)
    told = Console(record=True, width=400, file=StringIO())
    options: dict[str, Any] = TINY | {"streaming": streaming, "max_corrupt": 0.05, "held_out": 8, "console": told}
    adapt(causal_base, str(path), tmp_path / "out", steps=8, **options)
    text = told.export_text()
    assert f"{path} line 21 is not JSON" in text and "records cannot be read" in text
    options["max_corrupt"] = 0.01
    with pytest.raises(ValueError, match="1 of 41 records cannot be read .* more than max_corrupt=0.01"):
        adapt(causal_base, str(path), tmp_path / "strict", steps=8, **options)
    assert not (tmp_path / "strict").exists() or streaming


def test_rows_of_several_processes_are_each_read_once(folder: str, tmp_path: Path) -> None:
    """What transformers and accelerate deal out of rows that have numbers: the last batch is filled up, no more."""
    texts = Dataset.from_dict({"text": [dict(record)["text"] for record in stream_texts(folder)]})
    rows = pack(texts, byte_level(), 8)
    found: Counter[str] = Counter()
    for rank in range(2):
        found.update(_dealt(rows, rank))
    assert set(found) == {str(dict(row)["tokens"]) for row in rows} and sum(found.values()) - len(rows) < 2 * 7


def _dealt(rows: Dataset, rank: int) -> list[str]:
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(1))  # pyright: ignore[reportArgumentType]
    loader = DataLoader(rows, batch_size=7, sampler=sampler, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    loader = prepare_data_loader(loader, num_processes=2, process_index=rank, use_seedable_sampler=True, data_seed=3)
    return [str(row) for batch in loader for row in batch["tokens"].tolist()]


RANKS = """
import json, sys
from itertools import islice
from diffusify.text import stream
from diffusify.training.adapt import adapt
from diffusify.training.trainer import DiffusionTrainer

stream.BLOCK, stream.BATCH, seen, real = 320, 4, [], DiffusionTrainer.get_batch_samples

def spy(self, iterator, number, device):
    batches = list(islice(iterator, number))
    seen.extend(row for batch in batches for row in batch["tokens"].tolist())
    return real(self, iter(batches), number, device)

DiffusionTrainer.get_batch_samples = spy
base, data, out = sys.argv[1:]
adapt(base, data, out, steps=5, length=8, held_out=8, streaming=True, per_device_train_batch_size=8, bf16=False,
      ddp_backend="gloo", dataloader_num_workers=0)
import os
json.dump(seen, open(f"{out}-{os.environ['RANK']}.json", "w"))
"""


def test_two_processes_share_a_stream(causal_base: str, folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, causal_base, folder, str(tmp_path / "out")]
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    ends = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    first, second = (json.loads((tmp_path / f"out-{n}.json").read_text()) for n in range(2))
    assert len(first) == len(second) == 40
    assert not {str(row) for row in first} & {str(row) for row in second}
    assert len({str(row) for row in first + second}) == 80
