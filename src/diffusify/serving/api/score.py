"""The endpoint for a text's log-probability: exact where the model allows it, else a lower bound (the NELBO)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from diffusify.canvas import Canvas
from diffusify.diffusion.objectives import cross_entropy
from diffusify.evaluation.likelihood import MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.schemas import ScoreBody
from diffusify.serving.api.service import get_service, wait_or_cancel
from diffusify.serving.api.token_logits import token_logits

router = APIRouter()


class Score:
    """The log-probability of a text after a prompt, in nats; for `Job.work`.

    `measure` says how it is computed. `token_log_probs` are those of the single tokens, None for a bound.
    """

    def __init__(self, lm: DiffusionLM, body: ScoreBody) -> None:
        self._lm, self._body = lm, body
        prompt = lm.tokenizer.add_start(lm.tokenizer.encode(body.prompt))
        self.ids = lm.tokenizer.encode(body.text, continues=bool(body.prompt))
        if not self.ids:
            raise ValueError(f"text={body.text[:40]!r} has no token to score")
        self._request = LikelihoodRequest(tuple(prompt), (tuple(self.ids),))
        editable = torch.tensor([[False] * len(prompt) + [True] * len(self.ids)])
        self.canvas = Canvas.clean(torch.tensor([[*prompt, *self.ids]]), editable=editable)
        self.log_prob, self.standard_error, self.token_log_probs = 0.0, 0.0, None
        has_ar = lm.config.reads_as_ar_model
        self.measure = {"best": "left to right" if has_ar else "bound", "exact": "one by one", "bound": "bound"}[
            "best" if body.measure == "exact" and has_ar else body.measure
        ]

    def __iter__(self) -> Iterator[None]:
        if self.measure == "bound":
            (likelihood,) = MonteCarlo(self._body.draws, seed=self._body.seed)(self._lm.denoiser, [self._request])
            (self.log_prob,), (self.standard_error,) = likelihood.log_prob, likelihood.se
        else:
            chunks = [
                -cross_entropy(logits, self.canvas.tokens[0, cells[:, 1].cpu()].to(logits.device))
                for logits, cells in token_logits(self._lm, self.canvas)
            ]
            self.token_log_probs = torch.cat(chunks).tolist()
            self.log_prob = math.fsum(self.token_log_probs)
        yield


@router.post("/v1/score", summary="The log-probability of a text, or a lower bound on it (nats)")
async def score(body: ScoreBody, request: Request) -> Response:
    """The log-probability of a text after a prompt."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    service.check_texts(lm, [body.text, body.prompt])

    def prepare(lm: DiffusionLM) -> Score:
        work = Score(lm, body)
        service.check_length(lm, work.canvas.tokens.shape[1])
        return work

    job = service.submit(body.model, prepare, request, progress=False)
    await wait_or_cancel(request, job.result())
    work: Score = job.work
    tokens = [
        {
            "id": token,
            "text": lm.tokenizer.decode([token], continues=True),
            "logprob": None if work.token_log_probs is None else work.token_log_probs[i],
        }
        for i, token in enumerate(work.ids)
    ]
    result: dict[str, Any] = {
        "object": "score",
        "model": body.model,
        "measure": work.measure,
        "log_prob": work.log_prob,
        "standard_error": work.standard_error,
        "bits_per_byte": -work.log_prob / math.log(2) / len(body.text.encode()),
        "tokens": tokens,
    }
    return JSONResponse(result)
