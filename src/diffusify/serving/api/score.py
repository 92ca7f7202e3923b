"""How likely is a text? Exactly where the model can say, else as a bound."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from diffusify.canvas import Canvas
from diffusify.diffusion.objectives import cross_entropy
from diffusify.evaluation.likelihood import MonteCarlo, Question
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.schemas import ScoreBody
from diffusify.serving.api.service import service, unless_gone

router = APIRouter()
TOGETHER = 16  # positions that are asked in one pass, each a row of its own


class Score:
    """The log-probability of a text behind a prompt: token by token where it is exact."""

    def __init__(self, lm: DiffusionLM, body: ScoreBody) -> None:
        self._lm, self._body = lm, body
        head = [lm.tokenizer.start_token_id, *lm.tokenizer.encode(body.prompt)]
        self.ids = lm.tokenizer.encode(body.text, continues=bool(body.prompt))
        if not self.ids:
            raise ValueError(f"text={body.text[:40]!r} has no token to score")
        self._question = Question(tuple(head), (tuple(self.ids),))
        editable = torch.tensor([[False] * len(head) + [True] * len(self.ids)])
        self.canvas = Canvas.clean(torch.tensor([[*head, *self.ids]]), editable=editable)
        self.log_prob, self.se, self.each = 0.0, 0.0, None
        reads = lm.config.reads_as_ar_model
        self.measure = {"best": "left to right" if reads else "bound", "exact": "one by one", "bound": "bound"}[
            "best" if body.measure == "exact" and reads else body.measure
        ]

    def __iter__(self) -> Iterator[None]:
        if self.measure == "bound":
            (told,) = MonteCarlo(self._body.draws, seed=self._body.seed)(self._lm.denoiser, [self._question])
            (self.log_prob,), (self.se,) = told.log_prob, told.se
        else:
            self.each = self._left_to_right() if self.measure == "left to right" else self._one_by_one()
            self.log_prob = math.fsum(self.each)
        yield

    def _left_to_right(self) -> list[float]:
        canvas = self.canvas.to(self._lm.denoiser.device)
        answers = self._lm.denoiser.predict(canvas, positions=canvas.editable)
        return answers.log_prob(canvas.tokens[canvas.editable]).tolist()

    def _one_by_one(self) -> list[float]:
        """Each token by all before it, with the rest of the text open."""
        canvas = self.canvas.to(self._lm.denoiser.device)
        at = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        told: list[float] = []
        for places in canvas.editable[0].nonzero().split(TOGETHER):
            open = at >= places
            tokens = torch.where(open, self._lm.config.mask_token_id, canvas.tokens)
            rows = Canvas(tokens, open, canvas.editable.expand_as(open), canvas.document.expand_as(tokens))
            logits = self._lm.denoiser.predict(rows, positions=at == places).logits
            told += (-cross_entropy(logits, canvas.tokens[0, places[:, 0]])).tolist()
        return told


@router.post("/v1/score", summary="The log-probability of a text, or a bound on it (nats)")
async def score(body: ScoreBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    serving.check_length(lm, [body.text, body.prompt])

    def prepare(lm: DiffusionLM) -> Score:
        work = Score(lm, body)
        serving.check_room(lm, work.canvas.tokens.shape[1])
        return work

    job = serving.submit(body.model, prepare, request, follow=False)
    await unless_gone(request, job, job.done())
    work: Score = job.work
    tokens = [
        {
            "id": i,
            "text": lm.tokenizer.decode([i], continues=True),
            "logprob": None if work.each is None else work.each[n],
        }
        for n, i in enumerate(work.ids)
    ]
    size = len(body.text.encode())
    told: dict[str, Any] = {
        "object": "score",
        "model": body.model,
        "measure": work.measure,
        "log_prob": work.log_prob,
        "standard_error": work.se,
        "bits_per_byte": -work.log_prob / math.log(2) / size,
        "tokens": tokens,
    }
    return JSONResponse(told)
