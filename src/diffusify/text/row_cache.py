"""Packed rows on disk: written once from files of any size, memory-mapped, and reused by later runs."""

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
from diffusify.text.sources import no_documents_message, split_document, stream_texts
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
    """Training rows and held-out rows on disk, the records that could not be read, and whether they were cached.

    Rows are as `split_off` and `pack` return them, except that the documents with the lowest hashes are held out. A
    folder of the cache is named by the source, the sizes and times of its `files`, the tokenizer, the settings and the
    code of this package; it may be deleted at any time. Of several processes on a machine one writes it, and the others
    wait. ValueError if over a share `max_corrupt` of the records cannot be read.
    """
    folder = cache_folder() / f"rows-{_cache_key(source, files, tokenizer, length, held_out, seed)}"
    while int(os.environ.get("LOCAL_RANK", 0)) > 0 and not folder.is_dir():
        time.sleep(0.5)
    found = folder.is_dir()
    if not found:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A crash must not leave an unfinished folder under the final name.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".packing-") as parent:
            draft = Path(parent) / folder.name
            draft.mkdir()
            _write_rows(draft, source, tokenizer, length, held_out, seed, max_corrupt)
            try:
                os.replace(draft, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, and its folder is the same
                    raise
    bad_records = BadRecords(**json.loads((folder / "bad_records.json").read_text(encoding="utf-8")))
    bad_records.check(max_corrupt)
    return _open_arrow(folder / "train.arrow"), _open_arrow(folder / "held_out.arrow"), bad_records, found


def _write_rows(
    folder: Path, source: str, tokenizer: TextTokenizer, length: int, held_out: int, seed: int, max_corrupt: float
) -> None:
    texts, bad_records = stream_texts(source, seed=seed), BadRecords()
    held, replaced = _hold_out(_document_batches(texts, bad_records, max_corrupt), source, held_out, tokenizer, seed)
    bad_records.check(max_corrupt)
    left_out = set(held)
    train = (
        [replaced.get(text, text) for text in batch if text not in left_out]
        for batch in _document_batches(texts, BadRecords(), max_corrupt)
    )
    _write_arrow(folder / "train.arrow", pack_batches(train, tokenizer, length), length)
    _write_arrow(folder / "held_out.arrow", pack_batches([held], tokenizer, length, keep_tail=True), length)
    (folder / "bad_records.json").write_text(json.dumps(bad_records.state()), encoding="utf-8")


def _document_batches(texts: IterableDataset, bad_records: BadRecords, max_corrupt: float) -> Iterator[list[str]]:
    return (bad_records.filter_batch(batch, max_corrupt) for batch in texts.iter(BATCH))  # pyright: ignore[reportArgumentType]


def _hold_out(
    batches: Iterable[list[str]], source: str, tokens: int, tokenizer: TextTokenizer, seed: int
) -> tuple[list[str], dict[str, str]]:
    """The documents to hold out, and the training text of a document of which only a part is held out.

    Held out are the documents with the lowest hashes, of about `tokens` tokens: at least one, at most a tenth of all.
    Hashes amount to a random sample and are equal for copies. If all documents are the same, it is cut in two. With 0
    tokens nothing is held out.
    """
    lowest: list[tuple[int, str, int]] = []  # a heap of (minus the hash, the document, its number of tokens)
    chosen: set[str] = set()
    total = documents = 0
    others = False
    for text in chain.from_iterable(batches):
        documents += 1
        if not tokens:
            continue
        digest = int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest())
        if text in chosen:
            continue
        others = others or documents > 1
        if total >= tokens and -digest <= lowest[0][0]:
            continue
        size = len(tokenizer.document(text))
        heappush(lowest, (-digest, text, size))
        chosen.add(text)
        total += size
        while total - lowest[0][2] >= tokens:
            _, dropped, size = heappop(lowest)
            chosen.remove(dropped)
            total -= size
    if not documents:
        raise ValueError(no_documents_message(source))
    if not tokens:
        return [], {}
    if not others:
        train, held = split_document(lowest[0][1], tokens, tokenizer)
        return [held], {lowest[0][1]: train}
    return [text for _, text, _ in sorted(lowest, reverse=True)][: max(1, documents // 10)], {}


def _write_arrow(path: Path, rows: Iterable[tuple[np.ndarray, np.ndarray]], length: int) -> None:
    row_type = pa.list_(pa.int32(), length)
    schema = pa.schema({"tokens": row_type, "document": row_type})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for columns in rows:
            flat = (pa.array(column.ravel(), pa.int32()) for column in columns)
            arrays = [pa.FixedSizeListArray.from_arrays(values, length) for values in flat]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _open_arrow(path: Path) -> Dataset:
    return Dataset.from_file(str(path)).with_format("numpy")


def _cache_key(source: str, files: list[Path], tokenizer: TextTokenizer, *settings: int) -> str:
    """A hash of everything that determines the rows, including the code in this folder."""
    stats = [(os.path.abspath(file), file.stat()) for file in files]
    versions = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    inputs = json.dumps([source, versions, settings, tokenizer.fingerprint, python_version()])
    digest = hashlib.sha256(inputs.encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    return digest.hexdigest()[:24]
