"""Diffusion models for lm-evaluation-harness: importing this registers `--model diffusify`.

    python -m diffusify.evaluation.harness --model diffusify --model_args pretrained=DIR --tasks hellaswag

is `lm_eval` with the model known to it.
"""

from itertools import groupby
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from diffusify.config import from_plain
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.likelihood import LeftToRight, Measure, MonteCarlo, Question
from diffusify.evaluation.open_model import open_lm, suited
from diffusify.evaluation.scoring import last
from diffusify.sampling.sampling_config import SamplingConfig

Scored = tuple[tuple[str, str], list[int], list[int]]  # as text, then context and continuation as token ids


class DiffusifyLM(TemplateLM):
    """A diffusion model, or any base as it is, as the harness sees it; text is encoded as its own `hf` model does.

    `pretrained` is what `open_lm` takes. Likelihoods are exact where the model reads from left to right (unless
    `bound=True`), else the bound over `draws` stratified mask counts. `sampling` are fields of `SamplingConfig`; what a
    task says of temperature, top-p and top-k stands above them.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        bound: bool = False,
        draws: int = 32,
        max_gen_toks: int = 256,
        seed: int = 0,
        **sampling: Any,
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype} must be float32, bfloat16 or float16")
        self.lm = open_lm(pretrained, dtype=getattr(torch, dtype), device=device or "cpu")
        self.sampling: dict[str, Any] = {"seed": seed} | sampling
        self._settings({})
        exact = self.lm.config.reads_as_ar_model and not bound
        rounds = max(2, draws // 8)
        self.measure: Measure = LeftToRight() if exact else MonteCarlo(draws=8, least=rounds, most=rounds, seed=seed)
        self.pretrained, self.add_bos_token, self.max_gen_toks = pretrained, add_bos_token, max_gen_toks
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 16
        self.tokenizer: Any = self.lm.tokenizer.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.lm.tokenizer.end_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.lm.tokenizer.start_token_id

    @property
    def max_length(self) -> int:
        return self.lm.denoiser.context or 2048

    @property
    def device(self) -> torch.device:
        return self.lm.denoiser.device

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _settings(self, task: dict[str, Any]) -> SamplingConfig:
        """How to write, with what a task says about it. ValueError for what is not known or out of bounds."""
        return suited(from_plain(self.sampling | task, SamplingConfig, "model_args"), self.lm)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        if special is None:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=special)

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request[1])]
        questions = [
            Question(tuple(group[0][1]), tuple(tuple(continuation) for _, _, continuation in group)) for group in groups
        ]
        results: list[tuple[float, bool]] = []
        told = self.measure(self.lm.denoiser, questions)
        for group, one in zip(groups, tqdm(told, total=len(groups), disable=disable_tqdm), strict=True):
            greedy = one.greedy or ([self._writes(*group[0][1:])] if len(group) == 1 else [False] * len(group))
            for (text, _, _), log_prob, same in zip(group, one.log_prob, greedy, strict=True):
                results.append((log_prob, same))
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, results[-1])
        return results

    def _writes(self, context: list[int], continuation: list[int]) -> bool:
        """Whether the model writes this into room of its size, the surest token first."""
        room = len(continuation)
        writing = self.lm.prepare_generation(
            [last(context, self.max_length, room)], room, SamplingConfig(policy=Unmask())
        )
        writing.results()
        return writing.canvas.tokens[0, -room:].tolist() == continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        questions = [Question(tuple(context), (tuple(text),)) for document in windows for context, text in document]
        told = self.measure(self.lm.denoiser, questions)
        parts = iter(tqdm(told, total=len(questions), disable=disable_tqdm))
        results = []
        for request, document in zip(requests, windows, strict=True):
            results.append(sum(next(parts).log_prob[0] for _ in document))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        end = self.tokenizer.decode([self.eot_token_id])
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(requests[i].args[0])))
        found: dict[int, str] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm)
        for _, alike in groupby(order, key=lambda i: repr(requests[i].args[1])):
            batch = list(alike)
            for start in range(0, len(batch), self.batch_size):
                some = batch[start : start + self.batch_size]
                told: Any = normalize_gen_kwargs(requests[some[0]].args[1], self.max_gen_toks)
                stops = handle_stop_sequences(told["until"], eos=end)
                texts = self._generate([requests[i].args[0] for i in some], told["max_gen_toks"], stops, told)
                for i, text in zip(some, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.update(len(some))
        return [found[i] for i in range(len(requests))]

    def _generate(self, prompts: list[str], room: int, stops: list[str], told: dict[str, Any]) -> list[str]:
        task = {name: told[name] for name in ("temperature", "top_p", "top_k") if name in told}
        given = [last(self.tok_encode(prompt), self.max_length, room) for prompt in prompts]
        writing = self.lm.prepare_generation(given, room, self._settings(task))
        texts = [result.completion or "" for result in writing.results()]
        return [_until(text, stops) for text in texts]


def _until(text: str, stops: list[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]


register_model("diffusify")(DiffusifyLM)

if __name__ == "__main__":
    cli_evaluate()
