"""What a data source will be in training: its records, tokens and first example, and what is left out."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from datasets import Dataset

from diffusify.text.bad_records import BadRecords
from diffusify.text.examples import make_examples, parse_records, usable_records
from diffusify.text.messages import is_pair, is_preference, record_messages
from diffusify.text.packing import BATCH
from diffusify.text.sources import load_records, no_documents_message, other_files, stream_texts
from diffusify.text.tokenizer import TextTokenizer

Form = Literal["chat", "pairs", "text"]

HUB_RECORDS = 1000  # records that are read of a dataset on a hub


@dataclass(frozen=True)
class DataPreview:
    """What a data source will be in training.

    `first` is the first example as pieces of text, each with whether it is learned. Numbers of tokens are None without
    a tokenizer; examples are known only with one. `notes` say what is left out and why.
    """

    form: Form
    records: int
    first: list[tuple[str, bool]]
    tokens: int | None = None
    learned_tokens: int | None = None
    notes: list[str] = field(default_factory=list)


def preview_data(
    source: str, form: Form | None = None, tokenizer: TextTokenizer | None = None, *, each_turn: bool, length: int
) -> DataPreview:
    """Read a source as `adapt` (texts) or `tune` (chats and pairs) would: files whole, a hub's first records only.

    Without `form` it is the one of the first record. `each_turn` and `length` are as in `make_examples`. ValueError if
    the source does not exist, or has nothing of this form.
    """
    limit = HUB_RECORDS if "hub:" in source else None
    records = None if form == "text" else _try_load_records(source, form, limit)
    found = None if records is None else _form(records)
    if records is None or (form is None and found is None):
        preview = _preview_texts(source, tokenizer, limit)
    elif form is not None and found is not None and found != form:
        raise ValueError(f"{source} is not {form} but {found}; give --as {found}, or leave --as out")
    else:
        preview = _preview_records(records, form or found or "chat", tokenizer, each_turn, length)
    if limit is not None:
        preview.notes.append(f"only the first {limit:,} records of a hub are read")
    if note := other_files(source, records=preview.form != "text"):
        preview.notes.append(note)
    return preview


def _try_load_records(source: str, form: Form | None, limit: int | None) -> Dataset | None:
    """The records of a source; None if it has none, and may be a source of texts."""
    try:
        return load_records(source, limit=limit)
    except ValueError:
        if form is not None:
            raise
        return None


def _form(records: Dataset) -> Literal["chat", "pairs"] | None:
    """The form of the first record that is a chat or a pair; None if none of the first ones is."""
    for record in parse_records(records.select(range(min(BATCH, len(records))))):
        if isinstance(record, ValueError):
            continue
        try:
            record_messages(record)
        except ValueError:
            continue
        return "pairs" if is_pair(record) else "chat"
    return None


def _preview_texts(source: str, tokenizer: TextTokenizer | None, limit: int | None) -> DataPreview:
    bad_records, documents, tokens, first = BadRecords(), 0, 0, ""
    stream = stream_texts(source)
    for batch in (stream if limit is None else stream.take(limit)).iter(BATCH):
        texts = bad_records.filter_batch(batch, 1.0)  # pyright: ignore[reportArgumentType]
        documents += len(texts)
        first = first or (texts[0] if texts else "")
        tokens += sum(map(len, tokenizer.documents(texts))) if tokenizer and texts else 0
    if not documents:
        raise ValueError(no_documents_message(source))
    notes = [f"skipped: {bad_records}"] if bad_records.corrupt else []
    counted = tokens if tokenizer else None
    return DataPreview("text", documents, [(first, True)], counted, counted, notes)


def _preview_records(
    records: Dataset, form: Form, tokenizer: TextTokenizer | None, each_turn: bool, length: int
) -> DataPreview:
    if tokenizer is None:
        return _preview_messages(records, form)
    made = make_examples(records, tokenizer, template=None, each_turn=each_turn, length=length, max_corrupt=1.0)
    example: Any = made.rows[0]
    first = []
    for learned, group in groupby(zip(example["tokens"], example["target"], strict=True), lambda pair: pair[1]):
        first.append((tokenizer.decode((token for token, _ in group), continues=bool(first)), learned))
    return DataPreview(
        form,
        len(records),
        first,
        sum(map(len, made.rows["tokens"])),
        sum(map(sum, made.rows["target"])),
        list(made.notes(length)),
    )


def _preview_messages(records: Dataset, form: Form) -> DataPreview:
    bad_records, rejected = BadRecords(), 0
    first: list[tuple[str, bool]] = []
    for record, messages in usable_records(records, record_messages, bad_records):
        rejected += is_preference(record)
        first = first or [
            (f"{m['role']}: {m['content']}\n", m["role"] == "assistant" and m.get("train", True)) for m in messages
        ]
    if not first:
        raise ValueError(f"no record can be used: {bad_records}")
    notes = [f"skipped: {bad_records}"] if bad_records.corrupt else []
    if rejected:
        notes.append(f"{rejected:,} records are preferences: their rejected answers are unused")
    return DataPreview(form, len(records), first, notes=notes)
