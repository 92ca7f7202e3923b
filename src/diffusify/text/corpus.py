"""What a run trains on and what it measures on: rows in memory, on disk, or read while they are used."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset

from diffusify.text.bad_records import BadRecords, check_limit
from diffusify.text.packing import BATCH, pack
from diffusify.text.row_cache import cached_rows
from diffusify.text.sources import files_of, no_documents, split_off, stream_texts
from diffusify.text.stream import RowStream
from diffusify.text.tokenizer import TextTokenizer

# Bytes of text, by the files' sizes. Less than IN_MEMORY is packed in a few seconds, so that a cache is not worth its
# place; more than STREAMED would keep a run waiting for minutes.
IN_MEMORY, STREAMED = 16 << 20, 1 << 30
_GZIPPED = 4  # times its size is about what a file unpacks to


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, rows held out, what could not be read of the texts, and where rows are if not in memory."""

    rows: Dataset | RowStream
    held_out: Dataset
    tally: BadRecords
    note: str = ""


def open_corpus(
    source: str,
    tokenizer: TextTokenizer,
    length: int,
    *,
    held_out: int,
    seed: int = 0,
    streaming: bool | None = None,
    max_corrupt: float = 0.01,
) -> Corpus:
    """A source of texts (see `load_texts`) as rows of `length` tokens, and rows to measure on.

    Small sources are packed in memory, larger ones on disk (see `cached_rows`), and hubs and sources of more than
    STREAMED bytes are read while they are used (see `RowStream`), which `streaming` asks for or forbids. About
    `held_out` tokens of whole documents are kept aside: drawn by chance, but of a stream the first. Records that cannot
    be read are left out; ValueError when they are more than a share `max_corrupt`, and for a source without texts.
    """
    check_limit(max_corrupt)
    if held_out < 1:
        raise ValueError(f"held_out={held_out} must be at least 1, or there is nothing to measure on")
    files = files_of(source)
    if files is None and streaming is False:
        raise ValueError(f"data source {source} is on a hub, which is always streamed; leave streaming unset")
    size = sum(_size(file) for file in files or ())
    if files is None or (size > STREAMED if streaming is None else streaming):
        return _streamed(source, tokenizer, length, held_out, seed, max_corrupt)
    if size > IN_MEMORY:
        train, held, tally, found = cached_rows(
            source, files, tokenizer, length, held_out=held_out, seed=seed, max_corrupt=max_corrupt
        )
        place = Path(train.cache_files[0]["filename"]).parent
        note = f"packed rows {'found' if found else 'made, and kept for the next run,'} in {place}"
        return Corpus(train, _enough(held, held_out, length), tally, note)
    tally = BadRecords()
    texts = [text for batch in stream_texts(source, seed=seed).iter(BATCH) for text in tally.sift(batch, max_corrupt)]  # pyright: ignore[reportArgumentType]
    tally.close(max_corrupt)
    if not texts:
        raise ValueError(no_documents(source))
    train, held = split_off(Dataset.from_dict({"text": texts}), held_out, tokenizer, seed=seed)
    packed = pack(held, tokenizer, length, keep_tail=True)
    return Corpus(pack(train, tokenizer, length), _enough(packed, held_out, length), tally)


def _streamed(
    source: str, tokenizer: TextTokenizer, length: int, held_out: int, seed: int, max_corrupt: float
) -> Corpus:
    texts, tally = stream_texts(source, seed=seed), BadRecords()
    held = _first(texts, source, held_out, tokenizer, tally, max_corrupt)
    rows = RowStream(texts, tokenizer, length, seed, frozenset(held), max_corrupt)
    packed = pack(Dataset.from_dict({"text": held}), tokenizer, length, keep_tail=True)
    return Corpus(rows, _enough(packed, held_out, length), tally, "texts are read while they are trained on")


def _first(
    texts: IterableDataset, source: str, tokens: int, tokenizer: TextTokenizer, tally: BadRecords, max_corrupt: float
) -> list[str]:
    """The first documents, worth `tokens` tokens; there is another one behind them."""
    taken: dict[str, None] = {}
    left = tokens
    for batch in texts.iter(BATCH):
        for text in tally.sift(batch, max_corrupt):  # pyright: ignore[reportArgumentType]
            if left <= 0 and text not in taken:
                return [*taken]
            if text not in taken:
                taken[text] = None
                left -= len(tokenizer.document(text))
    tally.close(max_corrupt)
    if not taken:
        raise ValueError(no_documents(source))
    raise ValueError(
        f"nothing is left to train on when {tokens} tokens are held out of this stream of {len(taken)} documents; hold "
        "out less, or load the texts without streaming"
    )


def _enough(held: Dataset, tokens: int, length: int) -> Dataset:
    """No more rows than were asked for, but one."""
    return held.select(range(min(len(held), max(1, tokens // length))))


def _size(file: Path) -> int:
    return file.stat().st_size * (_GZIPPED if file.suffix.lower() == ".gz" else 1)
