"""A resumable loader of batches from a stream of rows, for one of several processes."""

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
    """An endless iterator over one process's batches. Its workers are readers of the stream.

    A batch comes from one reader, and a process's readers take turns. A saved state refers to the batches that were
    trained on: batches that workers have prefetched are read again when the run resumes.
    """

    def __init__(self, stream: RowStream, args: TrainingArguments) -> None:
        self.stream, self.args = stream, args
        self.workers = max(1, args.dataloader_num_workers)
        self.readers = self.workers * args.world_size  # of all processes
        self.batches = 0
        self._earlier = 0  # batches beyond those of equal steps, if a resumed run had other accumulation before
        self.states: list[State | None] = [None] * self.workers
        # A step's batches are fetched before the step is taken. A checkpoint saved in between needs the earlier state.
        self._history = deque([(0, self.states)], maxlen=args.gradient_accumulation_steps + 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turn = self.batches % self.workers
        first = self.args.process_index * self.workers
        order = [*range(turn, self.workers), *range(turn)]
        starts = [(first + worker, self.states[worker]) for worker in order]
        batches = _StreamBatches(self.stream, starts, self.readers, self.args.train_batch_size)
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
            self._history.append((self.batches, self.states))
            yield batch

    @property
    def bad_records(self) -> BadRecords:
        """The counts of records that this process has read so far."""
        return sum((BadRecords(**state["read"]) for state in self.states if state), BadRecords())

    def save(self, folder: Path | str, step: int) -> None:
        """Save the stream's state after an optimizer step in a checkpoint folder."""
        batches = self._earlier + step * self.args.gradient_accumulation_steps
        states = dict(self._history)[batches]
        text = json.dumps({"batches": batches, "readers": self.readers, "states": states})
        (Path(folder) / self._file_name).write_text(text, encoding="utf-8")

    def load(self, folder: Path | str, step: int) -> None:
        """Continue from a step's checkpoint. Raises ValueError if it was saved with another number of readers."""
        path = Path(folder) / self._file_name
        saved: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"readers": 0}
        if saved["readers"] != self.readers:
            raise ValueError(
                f"{path.parent} was saved with {saved['readers'] or 'no'} readers of the text stream, not "
                f"{self.readers} (processes times dataloader_num_workers); set the same numbers, or give another folder"
            )
        self.batches, self.states = saved["batches"], saved["states"]
        self._earlier = self.batches - step * self.args.gradient_accumulation_steps
        self._history.clear()
        self._history.append((self.batches, self.states))

    @property
    def _file_name(self) -> str:
        return f"stream_{self.args.process_index}.json"


class _StreamBatches(IterableDataset):
    """The batches of one worker (or of the process itself): (reader, batch, state), or (reader, None, error message).

    `starts` has each worker's reader and the state that it starts from.
    """

    def __init__(self, stream: RowStream, starts: list[tuple[int, State | None]], readers: int, size: int) -> None:
        self.stream, self.starts, self.readers, self.size = stream, starts, readers, size

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        worker = get_worker_info()
        if worker is not None:  # the tokenizer's threads would compete with the other workers
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        reader, state = self.starts[worker.id if worker else 0]
        rows = self.stream.read(reader, self.readers, state)
        try:
            while True:
                batch, states = zip(*(next(rows) for _ in range(self.size)), strict=True)
                yield reader, collate([*batch]), states[-1]
        except ValueError as error:  # raised in a worker, its message would contain the whole traceback
            yield reader, None, str(error)
