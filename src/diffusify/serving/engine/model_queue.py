"""A served model with the requests that wait for it and those that run on it."""

from collections import deque

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.batching import Loop, PassBatcher
from diffusify.serving.engine.job import Job


class ModelQueue:
    """A model and its requests: those that wait, in order, and those that are at work."""

    def __init__(self, name: str, lm: DiffusionLM, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.batcher = PassBatcher(lm.denoiser)
        self.lm = DiffusionLM(self.batcher.denoiser, lm.tokenizer)
        self.waiting: deque[Job] = deque()
        self.working: dict[Job, Loop] = {}

    @property
    def rows(self) -> int:
        return sum(len(job.work.canvas.tokens) for job in self.working)

    def receive(self, job: Job) -> None:
        """Read the request; whether it can be served at all is told at once."""
        try:
            job.work = job.prepare(self.lm)
            rows, n = job.work.canvas.tokens.shape
            if rows * n > self.tokens:
                raise ValueError(
                    f"the request needs {rows} texts of {n} tokens, but there is room for {self.tokens} in all; "
                    "ask for fewer or shorter texts"
                )
        except Exception as error:
            job.end(error)
        else:
            self.waiting.append(job)

    def admit(self) -> None:
        """Begin what fits, strictly in order, so that nobody waits for ever."""
        while self.waiting and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            loop = self.batcher.join(lambda job=job: _do(job))
            if loop in self.batcher.loops:
                self.working[job] = loop

    def _fits(self, newcomer: Job) -> bool:
        """Whether the rows of all at work, each as long as the longest, stay within the budget."""
        shapes = [job.work.canvas.tokens.shape for job in (*self.working, newcomer)]
        return sum(rows for rows, _ in shapes) * max(n for _, n in shapes) <= self.tokens

    def dismiss(self) -> None:
        """Let go of what nobody waits for any more, and of what took too long."""
        for job in [job for job in (*self.waiting, *self.working) if job.cancelled or job.late]:
            if job in self.working:
                self.batcher.leave(self.working.pop(job))
            else:
                self.waiting.remove(job)
            job.end(TimeoutError(f"not done within {job.seconds:g} s") if not job.cancelled else None)

    def step(self) -> None:
        """One pass for everybody."""
        self.batcher.advance()
        for job in [job for job, loop in self.working.items() if loop not in self.batcher.loops]:
            del self.working[job]


def _do(job: Job) -> None:
    try:
        job.tell(job.work)
        for step in job.work:
            job.tell(step)
    except Exception as error:
        job.end(error)
    else:
        job.end()
