"""Training rows and held-out rows of a data source: in memory, on disk, or streamed during training."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset

from diffusify.text.bad_records import BadRecords, check_limit
from diffusify.text.compression import is_compressed
from diffusify.text.packing import BATCH, pack
from diffusify.text.row_cache import cached_rows
from diffusify.text.sources import no_documents_message, source_files, split_off, stream_texts
from diffusify.text.stream import RowStream
from diffusify.text.tokenizer import TextTokenizer

# Bytes of text, by the files' sizes. Less than IN_MEMORY is packed within seconds, so a cache on disk does not pay;
# packing more than STREAMED would delay a run by minutes.
IN_MEMORY, STREAMED = 16 << 20, 1 << 30
_COMPRESSION = 4  # a compressed file unpacks to about this many times its size


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, held-out rows, the records that could not be read, and a note on where the rows are.

    The note is empty for rows in memory.
    """

    rows: Dataset | RowStream
    held_out: Dataset
    bad_records: BadRecords
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
    """Open a source of texts (see `load_texts`) as rows of `length` tokens, and rows to evaluate on.

    Small sources are packed in memory, larger ones on disk (see `cached_rows`). Hub datasets and sources of more than
    STREAMED bytes are read during training (see `RowStream`); `streaming` forces or forbids that. About `held_out`
    tokens of whole documents are held out: a random sample, or the first documents of a stream; with 0 none. Records
    that cannot be read are skipped; ValueError if they are more than a share `max_corrupt`, or if the source has no
    texts.
    """
    check_limit(max_corrupt)
    files = source_files(source)
    if files is None and streaming is False:
        raise ValueError(f"data source {source} is on a hub, which is always streamed; leave streaming unset")
    size = sum(_size(file) for file in files or ())
    if files is None or (size > STREAMED if streaming is None else streaming):
        return _open_stream(source, tokenizer, length, held_out, seed, max_corrupt)
    if size > IN_MEMORY:
        train, held, bad_records, found = cached_rows(
            source, files, tokenizer, length, held_out=held_out, seed=seed, max_corrupt=max_corrupt
        )
        folder = Path(train.cache_files[0]["filename"]).parent
        note = f"packed rows {'reused from' if found else 'written to'} {folder}"
        return Corpus(train, _truncate(held, held_out, length), bad_records, note)
    bad_records = BadRecords()
    batches = stream_texts(source, seed=seed).iter(BATCH)
    texts = [text for batch in batches for text in bad_records.filter_batch(batch, max_corrupt)]  # pyright: ignore[reportArgumentType]
    bad_records.check(max_corrupt)
    if not texts:
        raise ValueError(no_documents_message(source))
    train, held = split_off(Dataset.from_dict({"text": texts}), held_out, tokenizer, seed=seed)
    return Corpus(pack(train, tokenizer, length), _pack_held_out(held, held_out, tokenizer, length), bad_records)


def _open_stream(
    source: str, tokenizer: TextTokenizer, length: int, held_out: int, seed: int, max_corrupt: float
) -> Corpus:
    texts, bad_records = stream_texts(source, seed=seed), BadRecords()
    held = _first_documents(texts, source, held_out, tokenizer, bad_records, max_corrupt)
    rows = RowStream(texts, tokenizer, length, seed, frozenset(held), max_corrupt)
    held_rows = _pack_held_out(Dataset.from_dict({"text": held}), held_out, tokenizer, length)
    return Corpus(rows, held_rows, bad_records, "texts are streamed during training")


def _first_documents(
    texts: IterableDataset,
    source: str,
    tokens: int,
    tokenizer: TextTokenizer,
    bad_records: BadRecords,
    max_corrupt: float,
) -> list[str]:
    """The first documents with `tokens` tokens in all. ValueError if no other document follows them."""
    taken: dict[str, None] = {}
    left = tokens
    for batch in texts.iter(BATCH):
        for text in bad_records.filter_batch(batch, max_corrupt):  # pyright: ignore[reportArgumentType]
            if left <= 0 and text not in taken:
                return [*taken]
            if text not in taken:
                taken[text] = None
                left -= len(tokenizer.document(text))
    bad_records.check(max_corrupt)
    if not taken:
        raise ValueError(no_documents_message(source))
    raise ValueError(
        f"nothing is left to train on when {tokens} tokens are held out of this stream of {len(taken)} documents; hold "
        "out less, or load the texts without streaming"
    )


def _pack_held_out(texts: Dataset, tokens: int, tokenizer: TextTokenizer, length: int) -> Dataset:
    return _truncate(pack(texts, tokenizer, length, keep_tail=True) if len(texts) else texts, tokens, length)


def _truncate(held: Dataset, tokens: int, length: int) -> Dataset:
    """At most `tokens` tokens of rows, but at least one row if there is one."""
    return held.select(range(min(len(held), max(1, tokens // length))))


def _size(file: Path) -> int:
    return file.stat().st_size * (_COMPRESSION if is_compressed(file) else 1)
