"""One thread that runs all models: requests join and leave between forward passes."""

import threading
from collections import deque
from collections.abc import Mapping

import torch

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.job import Job
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_queue import ModelQueue


class QueueFull(Exception):
    """Too many requests wait; the client may retry after some seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is the limit; retry after {retry_after} s")
        self.retry_after = retry_after


class Engine:
    """Runs all models in one thread, beside the event loop that serves the clients.

    At most `waiting` requests wait. The rows of all running requests have at most `tokens` positions for each model.
    """

    def __init__(
        self, models: Mapping[str, DiffusionLM], *, tokens: int = 16384, waiting: int = 256, metrics: Metrics
    ) -> None:
        self.queues = {name: ModelQueue(name, lm, tokens) for name, lm in models.items()}
        self.tokens, self.max_waiting, self.metrics = tokens, waiting, metrics
        self._arrivals: deque[Job] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.set_gauges(lambda: self.waiting, lambda: sum(queue.rows for queue in self.queues.values()))

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._arrivals) + sum(len(queue.waiting) for queue in self.queues.values())

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Abort all requests and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def add(self, name: str, lm: DiffusionLM) -> None:
        """Add a model."""
        self.queues = {**self.queues, name: ModelQueue(name, lm, self.tokens)}

    def remove(self, name: str) -> None:
        """Remove a model, which must have no requests."""
        self.queues = {other: queue for other, queue in self.queues.items() if other != name}

    def submit(self, job: Job) -> Job:
        """Add a job to the queue. Raises QueueFull if too many wait."""
        if self.waiting >= self.max_waiting:
            self.metrics.refused.inc()
            raise QueueFull(self.waiting, self.metrics.retry_after)
        self._arrivals.append(job)
        self._wake.set()
        return job

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                self._wake.clear()
                while self._arrivals:
                    job = self._arrivals.popleft()
                    if job.model in self.queues:
                        self.queues[job.model].receive(job)
                    else:
                        job.end(ValueError(f'model "{job.model}" has just been closed; send the request again'))
                for queue in self.queues.values():
                    self._step(queue)
                idle = not any(queue.running or queue.waiting for queue in self.queues.values())
                if idle and not self._arrivals and not self._stopping:
                    self._wake.wait()
        for queue in self.queues.values():
            for job in (*queue.waiting, *queue.running):
                job.end(TimeoutError("the server is stopping"))

    def _step(self, queue: ModelQueue) -> None:
        queue.remove_ended()
        queue.admit()
        if queue.running:
            rows, passes = queue.rows, queue.batcher.passes
            queue.step()
            self.metrics.observe_step(queue.name, rows, queue.batcher.passes - passes)
