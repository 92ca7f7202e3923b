"""Many requests, one thread that runs the models: work joins and leaves between passes."""

import threading
from collections import deque
from collections.abc import Mapping

import torch

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.job import Job
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_queue import ModelQueue


class Busy(Exception):
    """Too many requests wait; the client may come again after some seconds."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is all that may; come again in {seconds} s")
        self.seconds = seconds


class Engine:
    """All models in one thread of their own, beside the event loop that serves the clients.

    At most `waiting` requests wait; the rows at work hold at most `tokens` positions for each model.
    """

    def __init__(
        self, models: Mapping[str, DiffusionLM], *, tokens: int = 16384, waiting: int = 256, metrics: Metrics
    ) -> None:
        self.queues = {name: ModelQueue(name, lm, tokens) for name, lm in models.items()}
        self.tokens, self.most, self.metrics = tokens, waiting, metrics
        self._arrivals: deque[Job] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: sum(queue.rows for queue in self.queues.values()))

    @property
    def waiting(self) -> int:
        return len(self._arrivals) + sum(len(queue.waiting) for queue in self.queues.values())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up what is at work, and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def add(self, name: str, lm: DiffusionLM) -> None:
        """Serve one model more."""
        self.queues = {**self.queues, name: ModelQueue(name, lm, self.tokens)}

    def remove(self, name: str) -> None:
        """Serve a model no more; nobody must be using it."""
        self.queues = {other: queue for other, queue in self.queues.items() if other != name}

    def submit(self, job: Job) -> Job:
        """Put a job in line. Busy if the line is too long."""
        if self.waiting >= self.most:
            self.metrics.refused.inc()
            raise Busy(self.waiting, self.metrics.usual_seconds)
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
                        job.end(ValueError(f'model "{job.model}" has just been closed; ask again'))
                for queue in self.queues.values():
                    self._turn(queue)
                idle = not any(queue.working or queue.waiting for queue in self.queues.values())
                if idle and not self._arrivals and not self._stopping:
                    self._wake.wait()
        for queue in self.queues.values():
            for job in (*queue.waiting, *queue.working):
                job.end(TimeoutError("the server is stopping"))

    def _turn(self, queue: ModelQueue) -> None:
        queue.dismiss()
        queue.admit()
        if queue.working:
            rows, passes = queue.rows, queue.batcher.passes
            queue.step()
            self.metrics.passed(queue.name, rows, queue.batcher.passes - passes)
