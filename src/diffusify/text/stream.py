"""Rows of texts that are read while they are trained on: shared out, shuffled, and to be gone on with anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from diffusify.text.bad_records import BadRecords
from diffusify.text.packing import BATCH, Rest, fill_rows
from diffusify.text.tokenizer import TextTokenizer

BLOCK = 1 << 20  # tokens that are shuffled together
SHARDS = 16  # that each reader should have at least, so that all have about as much to read

Row = dict[str, np.ndarray]
State = dict[str, Any]


@dataclass(frozen=True)
class RowStream:
    """Packed rows of a stream of texts (see `stream_texts` and `pack`), epoch after epoch without end.

    Several readers share the texts out among themselves: each reads shards of its own, or, where there are few, all of
    them and uses one record in so many. In every epoch a reader uses each of its texts once, its shards in an order of
    that epoch; rows are shuffled in blocks of about a million tokens (BLOCK), and what is left over at an epoch's end
    is the beginning of the next. All of it depends on the seed alone. Texts in `left_out` are never used.
    """

    texts: IterableDataset
    tokenizer: TextTokenizer
    length: int
    seed: int = 0
    left_out: frozenset[str] = frozenset()
    max_corrupt: float = 0.01

    def read(self, reader: int = 0, readers: int = 1, state: State | None = None) -> Iterator[tuple[Row, State]]:
        """The rows of one of several readers, each with the state that goes on behind it, which is plain JSON.

        A state's `read` is the `BadRecords` so far, that of the row's whole block included. Going on tokenizes no more than
        that block again, and reads its file up to there. ValueError when over a share `max_corrupt` of the records
        cannot be read, or when there is nothing to read for this reader.
        """
        done = state["rows"] if state else 0
        for start, tokens, document, read in self._blocks(reader, readers, state):
            luck = np.random.default_rng([self.seed % 2**32, reader, start["tally"]["records"]])
            for n, row in enumerate(luck.permutation(len(tokens)).tolist()):
                if n >= done:
                    yield {"tokens": tokens[row], "document": document[row]}, start | {"rows": n + 1, "read": read}
            done = 0

    def _blocks(
        self, reader: int, readers: int, state: State | None
    ) -> Iterator[tuple[State, np.ndarray, np.ndarray, State]]:
        """The rows block by block, in order, between the state at the block's start and the tally at its end."""
        texts = self._share(reader, readers)
        start = state or {"epoch": 0, "tally": BadRecords().state(), "tokens": [], "starts": [], "texts": None}
        tally = BadRecords(**start["tally"])
        rest = Rest(np.array(start["tokens"], np.int32), np.array(start["starts"], bool))
        epoch = start["epoch"]
        while True:
            texts.set_epoch(1 + (self.seed * 10_007 + epoch) % 2**31)  # epoch 0 is the one without an order of its own
            if start["texts"] is not None:
                texts.load_state_dict(start["texts"])
            block: list[tuple[np.ndarray, np.ndarray]] = []
            used = start["texts"] is not None
            for batch in texts.iter(BATCH):
                good = [text for text in tally.sift(batch, self.max_corrupt) if text not in self.left_out]  # pyright: ignore[reportArgumentType]
                used = used or bool(good)
                tokens, document, rest = fill_rows(rest, good, self.tokenizer, self.length)
                block.append((tokens, document))
                if sum(len(tokens) for tokens, _ in block) * self.length >= BLOCK:
                    yield start, *_joined(block), tally.state()
                    start, block = _state(epoch, tally, rest, texts.state_dict()), []
            if not used:
                raise ValueError(
                    f"reader {reader + 1} of {readers} has nothing to read; train with fewer processes or a smaller "
                    "dataloader_num_workers"
                )
            tally.close(self.max_corrupt)
            epoch += 1
            if block:
                yield start, *_joined(block), tally.state()
            start = _state(epoch, tally, rest, None)

    def _share(self, reader: int, readers: int) -> IterableDataset:
        if self.texts.num_shards >= SHARDS * readers:
            return self.texts.shard(readers, reader, contiguous=False)
        return split_dataset_by_node(self.texts, reader, readers)


def _joined(block: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    tokens, documents = zip(*block, strict=True)
    return np.concatenate(tokens), np.concatenate(documents)


def _state(epoch: int, tally: BadRecords, rest: Rest, texts: Any) -> State:
    waiting = {"tokens": rest.tokens.tolist(), "starts": rest.starts.tolist()}
    return {"epoch": epoch, "tally": tally.state(), "texts": texts} | waiting
