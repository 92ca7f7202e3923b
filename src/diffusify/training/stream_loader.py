"""Batches of a stream of rows for one of several processes, and where to go on behind each of them."""

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments

from diffusify.text.bad_records import BadRecords
from diffusify.text.packing import collate
from diffusify.text.stream import RowStream, State


class StreamLoader:
    """The batches of one process, without end; its workers are readers of the stream, like those of every process.

    A batch comes from one reader, and the readers of a process take turns. What has been trained on is told by the
    number of batches: what workers have read ahead is read again when a run goes on.
    """

    def __init__(self, stream: RowStream, args: TrainingArguments) -> None:
        self.stream, self.args = stream, args
        self.own = max(1, args.dataloader_num_workers)
        self.readers = self.own * args.world_size
        self.batches = 0
        self.states: list[State | None] = [None] * self.own
        # An optimizer step's batches are fetched before it is taken; whoever saves in between wants the state before.
        self._before = deque([(0, self.states)], maxlen=args.gradient_accumulation_steps + 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turn = self.batches % self.own
        first = self.args.process_index * self.own
        order = [*range(turn, self.own), *range(turn)]
        turns = [(first + worker, self.states[worker]) for worker in order]
        batches = _Batches(self.stream, turns, self.readers, self.args.train_batch_size)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        for reader, batch, state in loader:
            if batch is None:
                raise ValueError(state)
            self.batches += 1
            self.states = [*self.states]
            self.states[reader - first] = state
            self._before.append((self.batches, self.states))
            yield batch

    @property
    def tally(self) -> BadRecords:
        """What this process has read so far."""
        return sum((BadRecords(**state["read"]) for state in self.states if state), BadRecords())

    def save(self, folder: Path | str, step: int) -> None:
        """Write into a checkpoint where the stream stood after an optimizer step."""
        batches = step * self.args.gradient_accumulation_steps
        states = dict(self._before)[batches]
        text = json.dumps({"batches": batches, "readers": self.readers, "states": states})
        (Path(folder) / self._name).write_text(text, encoding="utf-8")

    def load(self, folder: Path | str) -> None:
        """Go on where a checkpoint stands. ValueError if it was made by another number of readers."""
        path = Path(folder) / self._name
        saved: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"readers": 0}
        if saved["readers"] != self.readers:
            raise ValueError(
                f"{path.parent} was made with {saved['readers'] or 'no'} readers of the stream of texts, not "
                f"{self.readers} (processes times dataloader_num_workers); give the same numbers, or another folder"
            )
        self.batches, self.states = saved["batches"], saved["states"]
        self._before.clear()
        self._before.append((self.batches, self.states))

    @property
    def _name(self) -> str:
        return f"stream_{self.args.process_index}.json"


class _Batches(IterableDataset):
    """What a worker (or the process itself) reads: (reader, batch, state), or (reader, None, what is wrong)."""

    def __init__(self, stream: RowStream, turns: list[tuple[int, State | None]], readers: int, size: int) -> None:
        self.stream, self.turns, self.readers, self.size = stream, turns, readers, size

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        worker = get_worker_info()
        if worker is not None:  # it is one of several, so that threads of its own would only be in the way
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        reader, state = self.turns[worker.id if worker else 0]
        rows = self.stream.read(reader, self.readers, state)
        try:
            while True:
                batch, states = zip(*(next(rows) for _ in range(self.size)), strict=True)
                yield reader, collate([*batch]), states[-1]
        except ValueError as error:  # would come out of a worker with its whole traceback as its message
            yield reader, None, str(error)
