"""The stream loader: a resumed run on a stream trains on the same rows as an undisturbed one."""

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
    """The training arguments of one rank."""
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, use_cpu=True, dataloader_pin_memory=False, **options
    )
    args.__class__ = type("RankArguments", (TrainingArguments,), {"process_index": rank, "world_size": world})
    return args


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 320)
    monkeypatch.setattr(stream, "BATCH", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts")
    for n in range(6):
        texts = [json.dumps({"text": f"x{20 * n + i:05}"}) for i in range(20)]
        (path / f"{n}.jsonl").write_text("\n".join(texts) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a file of longer texts."""
    path = tmp_path_factory.mktemp("longer") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} cats sat on the mat. " * 9}) + "\n" for n in range(60)))
    return str(path)


def rows_of(folder: str) -> RowStream:
    return RowStream(stream_texts(folder), byte_level(), 8, seed=4)


def take(batches: Iterator[dict[str, torch.Tensor]], count: int) -> list[list[list[int]]]:
    return [batch["tokens"].tolist() for batch in islice(batches, count)]


@given(st.integers(0, 30), st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=12)
def test_resuming_after_any_step(
    folder: str,
    tmp_path_factory: pytest.TempPathFactory,
    step: int,
    ranks: tuple[int, int],
    accumulated: int,
    then: int,
) -> None:
    """The resumed run accumulates another number of batches, and is resumed again."""
    out = tmp_path_factory.mktemp("out")
    args = arguments(out, *ranks, gradient_accumulation_steps=accumulated)
    undisturbed = StreamLoader(rows_of(folder), args)
    rows = take(iter(undisturbed), step * accumulated + 6)
    stopped = StreamLoader(rows_of(folder), args)
    batches = iter(stopped)
    take(batches, step * accumulated)
    stopped.save(out, step)
    take(batches, accumulated)  # the next step's batches are fetched, but Ctrl-C comes before the step
    stopped.save(out, step)
    args.gradient_accumulation_steps = then
    resumed, again = (StreamLoader(rows_of(folder), args) for _ in range(2))
    resumed.load(out, step)
    assert take(iter(resumed), then) == rows[step * accumulated :][:then]
    resumed.save(out, step + 1)
    again.load(out, step + 1)
    assert take(iter(again), 6 - then) == rows[step * accumulated + then :]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines with one core
def test_workers_take_turns_and_resume(folder: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, dataloader_num_workers=2)
    rows = take(iter(StreamLoader(rows_of(folder), args)), 12)
    by_reader = [take(_batches_of_reader(folder, reader), 6) for reader in (0, 1)]
    assert rows == [batch for pair in zip(*by_reader, strict=True) for batch in pair]
    stopped = StreamLoader(rows_of(folder), args)
    take(iter(stopped), 5)
    stopped.save(tmp_path, 5)
    resumed = StreamLoader(rows_of(folder), args)
    resumed.load(tmp_path, 5)
    assert take(iter(resumed), 7) == rows[5:]
    assert resumed.bad_records.records > 0


def _batches_of_reader(folder: str, reader: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = rows_of(folder).read(reader, 2)
    while True:
        yield collate([next(rows)[0] for _ in range(3)])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_texts_is_reported_without_a_traceback(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x00000"}\n{\n{"text": "x00001"}\n')
    rows = replace(rows_of(str(tmp_path / "a.jsonl")), max_corrupt=0.1)
    with pytest.raises(ValueError, match="^1 of 3 records cannot be read .*a.jsonl line 2 is not JSON"):
        list(islice(iter(StreamLoader(rows, arguments(tmp_path, dataloader_num_workers=workers))), 5))


def test_another_number_of_readers_is_refused(folder: str, tmp_path: Path) -> None:
    StreamLoader(rows_of(folder), arguments(tmp_path)).save(tmp_path, 0)
    other = StreamLoader(rows_of(folder), arguments(tmp_path, world=2))
    with pytest.raises(ValueError, match="was saved with 1 readers of the text stream, not 2"):
        other.load(tmp_path, 0)
    with pytest.raises(ValueError, match="was saved with no readers"):
        other.load(tmp_path / "nowhere", 0)


def record_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """A list that gets the rows of each optimizer step."""
    steps: list[list[list[int]]] = []
    real = DiffusionTrainer.get_batch_samples

    def spy(self: DiffusionTrainer, iterator: Iterator, number: int, device: torch.device) -> Any:
        batches = list(islice(iterator, number))
        steps.append([row for batch in batches for row in batch["tokens"].tolist()])
        return real(self, iter(batches), number, device)

    monkeypatch.setattr(DiffusionTrainer, "get_batch_samples", spy)
    return steps


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT once, in the middle of a step."""
    real = DiffusionTrainer.training_step

    def training_step(self: DiffusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            monkeypatch.setattr(DiffusionTrainer, "training_step", real)
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionTrainer, "training_step", training_step)


@pytest.mark.parametrize("data", ["{folder}", "0.5*{folder},0.5*{texts}"], ids=["folder", "mixture"])
@pytest.mark.parametrize("storage", ["memory", "disk", "stream"])
def test_a_resumed_run_equals_an_undisturbed_one(
    causal_base: str,
    folder: str,
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    data: str,
) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "IN_MEMORY", 0 if storage == "disk" else 1 << 20)
    source = data.format(folder=folder, texts=texts)
    options: dict[str, Any] = TINY | {"streaming": storage == "stream", "gradient_accumulation_steps": 2}
    steps = record_rows(monkeypatch)
    undisturbed = adapt(causal_base, source, tmp_path / "undisturbed", steps=9, **options)
    expected = steps[:]
    steps.clear()
    interrupt_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        adapt(causal_base, source, tmp_path / "resumed", steps=9, **options)
    (checkpoint,) = (tmp_path / "resumed").glob("checkpoint-*")
    assert (checkpoint / "stream_0.json").is_file() == (storage == "stream")
    assert checkpoint.name == "checkpoint-6" and len(steps) == 6  # the step is completed before the run ends
    resumed = adapt(causal_base, source, tmp_path / "resumed", steps=9, **options)
    assert steps == expected
    first, second = load_file(undisturbed / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("streaming", [None, True])
def test_skipped_records_are_reported(causal_base: str, folder: str, tmp_path: Path, streaming: bool | None) -> None:
    path = tmp_path / "a.jsonl"
    good = (Path(folder) / "0.jsonl").read_text()
    path.write_text(good + "{\n" + good)
    console = Console(record=True, width=400, file=StringIO())
    options: dict[str, Any] = TINY | {"streaming": streaming, "max_corrupt": 0.05, "held_out": 8, "console": console}
    adapt(causal_base, str(path), tmp_path / "out", steps=8, **options)
    text = console.export_text()
    assert f"{path} line 21 is not JSON" in text and "records cannot be read" in text
    options["max_corrupt"] = 0.01
    with pytest.raises(ValueError, match="1 of 41 records cannot be read .* more than max_corrupt=0.01"):
        adapt(causal_base, str(path), tmp_path / "strict", steps=8, **options)
    assert not (tmp_path / "strict").exists() or streaming


def test_rows_of_several_processes_are_each_read_once(folder: str, tmp_path: Path) -> None:
    """transformers and accelerate give each process its rows of a dataset, and only fill up the last batch."""
    texts = Dataset.from_dict({"text": [dict(record)["text"] for record in stream_texts(folder)]})
    rows = pack(texts, byte_level(), 8)
    found: Counter[str] = Counter()
    for rank in range(2):
        found.update(_rows_of_rank(rows, rank))
    assert set(found) == {str(dict(row)["tokens"]) for row in rows} and sum(found.values()) - len(rows) < 2 * 7


def _rows_of_rank(rows: Dataset, rank: int) -> list[str]:
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

stream.BLOCK, stream.BATCH, rows, real = 320, 4, [], DiffusionTrainer.get_batch_samples

def spy(self, iterator, number, device):
    batches = list(islice(iterator, number))
    rows.extend(row for batch in batches for row in batch["tokens"].tolist())
    return real(self, iter(batches), number, device)

DiffusionTrainer.get_batch_samples = spy
base, data, out = sys.argv[1:]
adapt(base, data, out, steps=5, length=8, held_out=8, streaming=True, per_device_train_batch_size=8, bf16=False,
      ddp_backend="gloo", dataloader_num_workers=0)
import os
json.dump(rows, open(f"{out}-{os.environ['RANK']}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_share_a_stream(causal_base: str, folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, causal_base, folder, str(tmp_path / "out")]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"out-{n}.json").read_text()) for n in range(2))
    assert len(first) == len(second) == 40
    assert not {str(row) for row in first} & {str(row) for row in second}
    assert len({str(row) for row in first + second}) == 80
