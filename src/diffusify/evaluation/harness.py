"""The lm-evaluation-harness model `diffusify`, registered when this module is imported, as `diffusify lm-eval` does."""

from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from diffusify.config import from_plain
from diffusify.diffusion.policies import Unmask
from diffusify.evaluation.likelihood import Autoregressive, Measure, MonteCarlo
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.scoring import truncate_left
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig

TokenizedRequest = tuple[tuple[str, str], list[int], list[int]]  # text, context ids, continuation ids


class DiffusifyLM(TemplateLM):
    """A diffusion model or an unmodified base model for the harness; text is encoded as by its `hf` model.

    `pretrained` is a source for `diffusify.load`. `add_bos_token=True` adds the start token of the model's documents.
    Likelihoods are exact if the model has an AR half (unless `bound=True`),
    otherwise the NELBO, estimated with `draws` stratified mask counts. `sampling` are fields of `SamplingConfig`; a
    task's temperature, top-p and top-k take precedence. ValueError for unknown or invalid fields.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
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
        device = "auto" if device in (None, "cuda:0") else device  # lm_eval's default, which not every machine has
        self.lm = DiffusionLM.from_pretrained(pretrained, dtype=dtype, device=device)
        self.sampling: dict[str, Any] = {"seed": seed} | sampling
        self._sampling_config({})
        exact = self.lm.config.reads_as_ar_model and not bound
        rounds = max(2, draws // 8)
        self.measure: Measure = (
            Autoregressive() if exact else MonteCarlo(draws=8, min_rounds=rounds, max_rounds=rounds, seed=seed)
        )
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
        return self.lm.denoiser.context_length or 2048

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

    def _sampling_config(self, task: dict[str, Any]) -> SamplingConfig:
        """The sampling settings with a task's own. ValueError for unknown or invalid fields."""
        return from_plain(self.sampling | task, SamplingConfig, "model_args")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        if special is None:
            ids = self.tokenizer.encode(string)
            return ids[: len(ids) - self._tokens_after_text]
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        return [self.prefix_token_id, *ids] if special else ids

    @cached_property
    def _tokens_after_text(self) -> int:
        """The number of tokens that the tokenizer adds after a text, such as [SEP]; no context ends with them."""
        last = self.tokenizer.encode("x", add_special_tokens=False)[-1]
        return self.tokenizer.encode("x")[::-1].index(last)

    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request[1])]
        likelihood_requests = [
            LikelihoodRequest(tuple(group[0][1]), tuple(tuple(continuation) for _, _, continuation in group))
            for group in groups
        ]
        results: list[tuple[float, bool]] = []
        measured = self.measure(self.lm.denoiser, likelihood_requests)
        for group, one in zip(groups, tqdm(measured, total=len(groups), disable=disable_tqdm), strict=True):
            greedy = one.greedy or ([self._is_greedy(*group[0][1:])] if len(group) == 1 else [False] * len(group))
            for (text, _, _), log_prob, is_greedy in zip(group, one.log_prob, greedy, strict=True):
                results.append((log_prob, is_greedy))
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, results[-1])
        return results

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether greedy decoding, the most confident token first, generates this continuation."""
        length = len(continuation)
        context = truncate_left(context, self.max_length, length)
        run = self.lm.prepare_generation([context], length, SamplingConfig(policy=Unmask()))
        run.results()
        return run.canvas.tokens[0, -length:].tolist() == continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        special = False if self._tokens_after_text else None  # [CLS] is no text; `hf` measures a base's own start token
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=special),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,  # besides the context of one token
                    context_len=1,
                )
            ]
            for request in requests
        ]
        likelihood_requests = [
            LikelihoodRequest(tuple(context), (tuple(text),)) for document in windows for context, text in document
        ]
        measured = self.measure(self.lm.denoiser, likelihood_requests)
        likelihoods = iter(tqdm(measured, total=len(likelihood_requests), disable=disable_tqdm))
        results = []
        for request, document in zip(requests, windows, strict=True):
            results.append(sum(next(likelihoods).log_prob[0] for _ in document))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        end = self.tokenizer.decode([self.eot_token_id])
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(requests[i].args[0])))
        texts: dict[int, str] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm)
        for _, same_settings in groupby(order, key=lambda i: repr(requests[i].args[1])):
            group = list(same_settings)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                settings: Any = normalize_gen_kwargs(requests[batch[0]].args[1], self.max_gen_toks)
                stops = handle_stop_sequences(settings["until"], eos=end)
                prompts = [requests[i].args[0] for i in batch]
                generated = self._generate(prompts, settings["max_gen_toks"], stops, settings)
                for i, text in zip(batch, generated, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.update(len(batch))
        return [texts[i] for i in range(len(requests))]

    def _generate(
        self, prompts: list[str], max_new_tokens: int, stops: list[str], settings: dict[str, Any]
    ) -> list[str]:
        task = {name: settings[name] for name in ("temperature", "top_p", "top_k") if name in settings}
        task["stop"] = [stop for stop in stops if stop]
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} leaves no room for a prompt in the context of {self.max_length} "
                "tokens; set less with --gen_kwargs max_gen_toks=..."
            )
        contexts = [truncate_left(self.tok_encode(prompt), self.max_length, max_new_tokens) for prompt in prompts]
        run = self.lm.prepare_generation(contexts, max_new_tokens, self._sampling_config(task))
        return [result.completion or "" for result in run.results()]


register_model("diffusify")(DiffusifyLM)
