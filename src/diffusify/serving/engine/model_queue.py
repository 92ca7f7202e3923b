"""The requests of one model: those that wait and those that are running."""

from collections import deque

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.batching import Loop, PassBatcher
from diffusify.serving.engine.job import QueuedJob


class ModelQueue:
    """A model with its waiting jobs, in order of arrival, and its running jobs.

    The rows of all running jobs, padded to the longest, have at most `tokens` positions.
    """

    def __init__(self, name: str, lm: DiffusionLM, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.batcher = PassBatcher(lm.denoiser)
        self.lm = DiffusionLM(self.batcher.denoiser, lm.tokenizer)
        self.has_chat_template = bool(lm.tokenizer.tokenizer.chat_template)  # the first chat adds a plain one
        self.waiting: deque[QueuedJob] = deque()
        self.running: dict[QueuedJob, Loop] = {}

    @property
    def rows(self) -> int:
        """The number of rows of all running jobs."""
        return sum(len(job.work.canvas.tokens) for job in self.running)

    def receive(self, job: QueuedJob) -> None:
        """Prepare a job and add it to the queue. A job that cannot be served ends at once with its error."""
        try:
            job.work = job.prepare(self.lm)
            rows, n = job.shape
            if rows * n > self.tokens:
                raise ValueError(
                    f"the request needs {rows} x {n} tokens (texts x length), and the engine takes at most "
                    f"{self.tokens}; request fewer or shorter texts"
                )
        except Exception as error:
            job.end(error)
        else:
            self.waiting.append(job)

    def admit(self) -> None:
        """Start waiting jobs as long as they fit, strictly in order, so that no job starves."""
        while self.waiting and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            loop = self.batcher.join(lambda job=job: _run(job))
            if loop in self.batcher.loops:
                self.running[job] = loop

    def _fits(self, new: QueuedJob) -> bool:
        """Whether the rows of all running jobs and a new one, padded to the longest, stay within the budget.

        So do those of the KV pool, which has gaps where texts before others have finished.
        """
        shapes = [job.shape for job in (*self.running, new)]
        rows = max(sum(rows for rows, _ in shapes), self.batcher.pool.height)
        return rows * max(n for _, n in shapes) <= self.tokens

    def remove_ended(self) -> None:
        """Remove jobs that were cancelled or have timed out."""
        for job in [job for job in (*self.waiting, *self.running) if job.cancelled or job.timed_out]:
            if job in self.running:
                self.batcher.leave(self.running.pop(job))
            else:
                self.waiting.remove(job)
            job.end(TimeoutError(f"not finished within {job.timeout:g} s") if not job.cancelled else None)

    def step(self) -> None:
        """Run one forward pass for all running jobs."""
        self.batcher.advance()
        for job in [job for job, loop in self.running.items() if loop not in self.batcher.loops]:
            del self.running[job]


def _run(job: QueuedJob) -> None:
    try:
        job.notify(job.work)
        for step in job.work:
            job.notify(step)
    except Exception as error:
        job.end(error)
    else:
        job.end()
