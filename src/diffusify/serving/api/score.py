"""The endpoint for a text's log-probability: exact where the model allows it, else a lower bound (the NELBO)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from diffusify.canvas import Canvas
from diffusify.diffusion.objectives import cross_entropy
from diffusify.evaluation.likelihood import LikelihoodRequest, MonteCarlo
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.schemas import ScoreBody
from diffusify.serving.api.service import get_service, wait_or_cancel

router = APIRouter()
ROWS_PER_PASS = 16  # of `exact` scores; each row predicts one token


class Score:
    """The log-probability of a text after a prompt, in nats; for `Job.work`.

    `measure` says how it is computed. `token_log_probs` are those of the single tokens, None for a bound.
    """

    def __init__(self, lm: DiffusionLM, body: ScoreBody) -> None:
        self._lm, self._body = lm, body
        prompt = [lm.tokenizer.start_token_id, *lm.tokenizer.encode(body.prompt)]
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
            self.token_log_probs = self._left_to_right() if self.measure == "left to right" else self._one_by_one()
            self.log_prob = math.fsum(self.token_log_probs)
        yield

    def _left_to_right(self) -> list[float]:
        """Each token's log-probability under the AR model or AR half, in one forward pass."""
        canvas = self.canvas.to(self._lm.denoiser.device)
        logits = self._lm.denoiser.predict(canvas, positions=canvas.editable)
        return logits.log_prob(canvas.tokens[canvas.editable]).tolist()

    def _one_by_one(self) -> list[float]:
        """Each token's log-probability given the tokens before it, with all later positions open."""
        canvas = self.canvas.to(self._lm.denoiser.device)
        index = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        log_probs: list[float] = []
        for positions in canvas.editable[0].nonzero().split(ROWS_PER_PASS):
            open = index >= positions
            tokens = torch.where(open, self._lm.config.mask_token_id, canvas.tokens)
            rows = Canvas(tokens, open, canvas.editable.expand_as(open), canvas.document.expand_as(tokens))
            logits = self._lm.denoiser.predict(rows, positions=index == positions).logits
            log_probs += (-cross_entropy(logits, canvas.tokens[0, positions[:, 0]])).tolist()
        return log_probs


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
    await wait_or_cancel(request, job, job.result())
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
