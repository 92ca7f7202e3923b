"""Packed rows of texts that are read during training: split among readers, shuffled, and resumable at any row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from diffusify.text.bad_records import BadRecords
from diffusify.text.packing import BATCH, Leftover, fill_rows
from diffusify.text.tokenizer import TextTokenizer

BLOCK = 1 << 20  # tokens shuffled together
SHARDS = 16  # the least number of shards per reader, so that readers have about the same amount to read

Row = dict[str, np.ndarray]
State = dict[str, Any]


@dataclass(frozen=True)
class RowStream:
    """An endless stream of packed rows (see `pack`), epoch after epoch, from a stream of texts (see `stream_texts`).

    Texts are split among readers: each reads its own shards or, if there are too few, reads all shards and uses every
    n-th record. A reader uses each of its texts once per epoch, and every epoch has its own order of shards. Rows are
    shuffled within blocks of about a million tokens (BLOCK); tokens left over at the end of an epoch start the next.
    The order depends only on the seed. Texts in `left_out` are never used.
    """

    texts: IterableDataset
    tokenizer: TextTokenizer
    length: int
    seed: int = 0
    left_out: frozenset[str] = frozenset()
    max_corrupt: float = 0.01

    def read(self, reader: int = 0, readers: int = 1, state: State | None = None) -> Iterator[tuple[Row, State]]:
        """The rows of one of several readers, each with the state (plain JSON) from which reading resumes after it.

        `read` in a state is the `BadRecords` so far, including the row's whole block. Resuming tokenizes only that
        block again, and reads its file again up to there. ValueError if over a share `max_corrupt` of the records
        cannot be read, or if there is nothing to read for this reader.
        """
        done = state["rows"] if state else 0
        for start, tokens, document, read in self._blocks(reader, readers, state):
            rng = np.random.default_rng([self.seed % 2**32, reader, start["tally"]["records"]])
            for n, row in enumerate(rng.permutation(len(tokens)).tolist()):
                if n >= done:
                    yield {"tokens": tokens[row], "document": document[row]}, start | {"rows": n + 1, "read": read}
            done = 0

    def _blocks(
        self, reader: int, readers: int, state: State | None
    ) -> Iterator[tuple[State, np.ndarray, np.ndarray, State]]:
        """Each block in order: the state at its start, its tokens and documents, the bad records at its end."""
        texts = self._reader_texts(reader, readers)
        start = state or {"epoch": 0, "tally": BadRecords().state(), "tokens": [], "starts": [], "texts": None}
        bad_records = BadRecords(**start["tally"])
        leftover = Leftover(np.array(start["tokens"], np.int32), np.array(start["starts"], bool))
        epoch = start["epoch"]
        while True:
            texts.set_epoch(1 + (self.seed * 10_007 + epoch) % 2**31)  # datasets does not shuffle epoch 0
            if start["texts"] is not None:
                texts.load_state_dict(start["texts"])
            block: list[tuple[np.ndarray, np.ndarray]] = []
            any_text = start["texts"] is not None
            for batch in texts.iter(BATCH):
                documents = bad_records.filter_batch(batch, self.max_corrupt)  # pyright: ignore[reportArgumentType]
                documents = [text for text in documents if text not in self.left_out]
                any_text = any_text or bool(documents)
                tokens, document, leftover = fill_rows(leftover, documents, self.tokenizer, self.length)
                block.append((tokens, document))
                if sum(len(tokens) for tokens, _ in block) * self.length >= BLOCK:
                    yield start, *_concatenate(block), bad_records.state()
                    start, block = _state(epoch, bad_records, leftover, texts.state_dict()), []
            if not any_text:
                raise ValueError(
                    f"reader {reader + 1} of {readers} has nothing to read; train with fewer processes or a smaller "
                    "dataloader_num_workers"
                )
            bad_records.check(self.max_corrupt)
            epoch += 1
            if block:
                yield start, *_concatenate(block), bad_records.state()
            start = _state(epoch, bad_records, leftover, None)

    def _reader_texts(self, reader: int, readers: int) -> IterableDataset:
        if self.texts.num_shards >= SHARDS * readers:
            return self.texts.shard(readers, reader, contiguous=False)
        return split_dataset_by_node(self.texts, reader, readers)


def _concatenate(block: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    tokens, documents = zip(*block, strict=True)
    return np.concatenate(tokens), np.concatenate(documents)


def _state(epoch: int, bad_records: BadRecords, leftover: Leftover, texts: Any) -> State:
    """A state as checkpoints store it."""
    waiting = {"tokens": leftover.tokens.tolist(), "starts": leftover.starts.tolist()}
    return {"epoch": epoch, "tally": bad_records.state(), "texts": texts} | waiting
