"""Packed rows on disk: made once from files of any size, opened at once by the next run, never in memory as a whole."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from platform import python_version

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from diffusify.config import cache_folder
from diffusify.text.bad_records import BadRecords
from diffusify.text.packing import BATCH, pack_batches
from diffusify.text.sources import no_documents, split_document, stream_texts
from diffusify.text.tokenizer import TextTokenizer


def cached_rows(
    source: str,
    files: list[Path],
    tokenizer: TextTokenizer,
    length: int,
    *,
    held_out: int,
    seed: int,
    max_corrupt: float,
) -> tuple[Dataset, Dataset, BadRecords, bool]:
    """Rows to train on and rows held out, on disk; what could not be read; and whether they were there already.

    As `split_off` and `pack` make them, but the documents held out are those with the lowest hashes. A folder of the
    cache belongs to the source with the sizes and times of its `files`, the tokenizer, the settings, and this code; it
    may be deleted at any time. Of several processes on a machine one makes it, and the others wait.
    """
    folder = cache_folder() / f"rows-{_key(source, files, tokenizer, length, held_out, seed)}"
    while int(os.environ.get("LOCAL_RANK", 0)) > 0 and not folder.is_dir():
        time.sleep(0.5)
    found = folder.is_dir()
    if not found:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A crash must leave no half folder under the final name.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".packing-") as parent:
            draft = Path(parent) / folder.name
            draft.mkdir()
            _make(draft, source, tokenizer, length, held_out, seed, max_corrupt)
            try:
                os.replace(draft, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and its folder is as good
                    raise
    tally = BadRecords(**json.loads((folder / "tally.json").read_text(encoding="utf-8")))
    tally.close(max_corrupt)
    return _open(folder / "train.arrow"), _open(folder / "held_out.arrow"), tally, found


def _make(
    folder: Path, source: str, tokenizer: TextTokenizer, length: int, held_out: int, seed: int, max_corrupt: float
) -> None:
    texts, tally = stream_texts(source, seed=seed), BadRecords()
    held, replaced = _hold_out(_good(texts, tally, max_corrupt), source, held_out, tokenizer, seed)
    tally.close(max_corrupt)
    left_out = set(held)
    train = (
        [replaced.get(text, text) for text in batch if text not in left_out]
        for batch in _good(texts, BadRecords(), max_corrupt)
    )
    _write(folder / "train.arrow", pack_batches(train, tokenizer, length), length)
    _write(folder / "held_out.arrow", pack_batches([held], tokenizer, length, keep_tail=True), length)
    (folder / "tally.json").write_text(json.dumps(tally.state()), encoding="utf-8")


def _good(texts: IterableDataset, tally: BadRecords, max_corrupt: float) -> Iterator[list[str]]:
    return (tally.sift(batch, max_corrupt) for batch in texts.iter(BATCH))  # pyright: ignore[reportArgumentType]


def _hold_out(
    batches: Iterable[list[str]], source: str, tokens: int, tokenizer: TextTokenizer, seed: int
) -> tuple[list[str], dict[str, str]]:
    """The documents to hold out, and those that are cut: a lone document is held out in part.

    At least one document and at most a tenth of them, worth about `tokens` tokens: those with the lowest hashes, which
    is as good as by chance, and the same for all copies.
    """
    lowest: list[tuple[int, str, int]] = []  # a heap: minus the hash, the document, its tokens
    chosen: set[str] = set()
    total = documents = 0
    others = False
    for text in chain.from_iterable(batches):
        documents += 1
        luck = int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest())
        if text in chosen:
            continue
        others = others or documents > 1
        if total >= tokens and -luck <= lowest[0][0]:
            continue
        size = len(tokenizer.document(text))
        heappush(lowest, (-luck, text, size))
        chosen.add(text)
        total += size
        while total - lowest[0][2] >= tokens:
            _, dropped, size = heappop(lowest)
            chosen.remove(dropped)
            total -= size
    if not documents:
        raise ValueError(no_documents(source))
    if not others:
        train, held = split_document(lowest[0][1], tokens, tokenizer)
        return [held], {lowest[0][1]: train}
    return [text for _, text, _ in sorted(lowest, reverse=True)][: max(1, documents // 10)], {}


def _write(path: Path, rows: Iterable[tuple[np.ndarray, np.ndarray]], length: int) -> None:
    kind = pa.list_(pa.int32(), length)
    schema = pa.schema({"tokens": kind, "document": kind})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for columns in rows:
            flat = (pa.array(column.ravel(), pa.int32()) for column in columns)
            arrays = [pa.FixedSizeListArray.from_arrays(values, length) for values in flat]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _open(path: Path) -> Dataset:
    return Dataset.from_file(str(path)).with_format("numpy")


def _key(source: str, files: list[Path], tokenizer: TextTokenizer, *settings: int) -> str:
    """A hash of everything that decides the rows, this package's code about texts included."""
    states = [(os.path.abspath(file), file.stat()) for file in files]
    there = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    decisive = json.dumps([source, there, settings, tokenizer.fingerprint, python_version()])
    digest = hashlib.sha256(decisive.encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    return digest.hexdigest()[:24]
