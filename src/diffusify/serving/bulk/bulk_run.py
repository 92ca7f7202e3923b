"""Generation for many records at once, in order, through the engine of the server."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.bulk.bulk_records import BulkSettings, with_result
from diffusify.serving.engine.job import QueuedJob
from diffusify.serving.engine.model_queue import ModelQueue

Record = dict[str, Any]


def generate_records(
    lm: DiffusionLM,
    records: Iterable[Record | ValueError],
    settings: BulkSettings = BulkSettings(),
    *,
    start: int = 0,
    tokens: int = 16384,
) -> Iterator[Record]:
    """Generate the text of each record, and yield the records with their results, in order.

    A record starts as soon as there is room for it beside those that are running, which together have at most `tokens`
    positions; each gets the text that it gets alone. A record that cannot be read or asks for something invalid is
    yielded with an `error`. The first record has the number `start`, counted from 0.
    """
    queue, numbered = ModelQueue("bulk", lm, tokens), enumerate(records, start)
    jobs: deque[tuple[int, Record | ValueError, QueuedJob]] = deque()
    while True:
        with torch.inference_mode():
            queue.admit()
            while not queue.waiting and (entry := next(numbered, None)) is not None:
                job = _job(*entry, settings)
                jobs.append((*entry, job))
                queue.receive(job)
                queue.admit()
        while jobs and jobs[0][-1].ended:
            yield _result(*jobs.popleft())
        if not jobs:
            return
        with torch.inference_mode():
            queue.step()


def _job(number: int, record: Record | ValueError, settings: BulkSettings) -> QueuedJob:
    def prepare(lm: DiffusionLM) -> Any:
        if isinstance(record, ValueError):
            raise record
        return settings.prepare(lm, record, number)

    return QueuedJob("bulk", prepare)


def _result(number: int, record: Record | ValueError, job: QueuedJob) -> Record:
    if job.error is None:
        assert isinstance(record, dict), "the job of an unreadable record ends with an error"
        return with_result(record, job.work.results()[0])
    if not isinstance(job.error, ValueError):
        job.error.add_note(f"while generating the text of record {number + 1}")
        raise job.error
    return {**(record if isinstance(record, dict) else {}), "error": str(job.error)}
