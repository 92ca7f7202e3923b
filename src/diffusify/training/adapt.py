"""Adaptation: trains a pretrained language model on text to become a diffusion language model."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffusify.config import DocumentFrame, to_plain
from diffusify.models.attention_check import check_attention
from diffusify.models.bundled import find_diffusion_config
from diffusify.models.document_frame import choose_frame
from diffusify.models.loading import is_masked_lm
from diffusify.models.lora import Lora, check_lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.quantization import check_load_in_4bit
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import default_recipe, saved_recipe
from diffusify.models.saving import checksum, open_base
from diffusify.text.bad_records import check_limit
from diffusify.text.corpus import open_corpus
from diffusify.text.sources import other_files, source_checksum, source_files
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_run_folder, check_training_options, read_frame, train
from diffusify.training.self_generated import SELF_SOURCE, check_can_generate, with_generated_texts


def adapt(
    base: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    lora: Lora | None = None,
    load_in_4bit: bool = False,
    steps: int | None = None,
    minutes: float | None = None,
    length: int = 256,
    start_token: str | None = None,
    end_token: str | None = None,
    mask_token_id: int | None = None,
    held_out: int = 8192,
    seed: int = 0,
    streaming: bool | None = None,
    max_corrupt: float = 0.01,
    max_skipped: int = 10,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Turn a pretrained language model into a diffusion model and save it in `out`, or continue to train one.

    - `base`: a model as `load_base` takes it, or a diffusion model, which continues with its own recipe unless `recipe`
      is given, and with its adapters if it has some.
    - `data`: texts as `load_texts` takes them. `self:DATA` is text that the base generates itself from openings of
      DATA's texts (see `with_generated_texts`).
    - `recipe`: default `block()`, or `mlm()` for a masked LM. `lora` trains adapters instead of all weights, which
      `draft()` does by itself; with `load_in_4bit`, on a base with 4-bit weights (QLoRA), which takes a fraction of the
      memory.
    - `length` is the number of tokens per row; about `held_out` tokens are held out to measure the NELBO; 0
      trains on all and measures nothing.
    - `start_token` and `end_token` are put around documents, and the first before prompts; `start_token="none"` leaves
      it out before prompts. Default: those of a diffusion model, and what suits a base best (see `choose_frame`).
    - `mask_token_id` is the token that stands for noise, where another program expects a certain one; it may be the
      next id of the vocabulary. Default: see `ensure_mask_token`.
    - `streaming` reads texts during training, which is the default for hubs and files above 1 GiB. Other texts above
      16 MiB are packed once and cached on disk (see `open_corpus`). Corrupt records are skipped and reported, up to a
      share `max_corrupt`.
    - `steps` or `minutes` is the budget; default: 200 steps.
    - `training` are fields of `transformers.TrainingArguments`. Progress goes to `console`; default: standard error.

    An interrupted run resumes from its newest valid checkpoint; a finished one is returned unchanged. Non-finite steps
    are skipped; `max_skipped` of them in a row raise FloatingPointError. Raises ValueError for bad arguments; missing
    files are reported before weights are read.
    """
    base, data, out = str(base), str(data), Path(out)
    recipe = recipe or saved_recipe(base) or default_recipe(masked=is_masked_lm(base))
    console = console or Console(stderr=True, highlight=False)
    check_lora(base, lora, recipe)
    if load_in_4bit:
        check_load_in_4bit(base, lora, recipe)
    budget = Budget(200 if steps is None and minutes is None else steps, minutes)
    training = check_training_options(training, minutes=minutes, held_out=held_out)
    settings = {
        "base": base,
        "data": data,
        "data_checksum": source_checksum(SELF_SOURCE.sub(r"\1", data)),
        "recipe": to_plain(recipe),
        "lora": to_plain(lora),
        "load_in_4bit": load_in_4bit or None,  # earlier versions saved nothing
        "budget": {"steps": budget.steps, "minutes": minutes},
        "length": length,
        "start_token": start_token,
        "end_token": end_token,
        "held_out": held_out,
        "seed": seed,
        "streaming": streaming,
        "mask_token_id": mask_token_id,
        "training": training,
    }
    if check_run_folder(out, settings):
        console.print(f"{out} already holds this run, finished")
        return out
    check_limit(max_corrupt)
    source_files(SELF_SOURCE.sub(r"\1", data))  # raises if files are missing
    source = open_base(base, load_in_4bit=load_in_4bit)
    check_can_generate(data, base, masked=source.masked)
    weights = checksum(source.network)
    frame, note = choose_frame(source, known_frame(out, base), start_token=start_token, end_token=end_token)
    if note:
        console.print(note, markup=False, soft_wrap=True)
    torch.manual_seed(seed)  # new adapters are the same on every rank and after a resume
    denoiser, tokenizer = make_denoiser(source, recipe, lora=lora, frame=frame, mask_token_id=mask_token_id)
    if denoiser.context_length is not None and length > denoiser.context_length:
        raise ValueError(
            f"length={length} is more than the {denoiser.context_length} tokens of {base}'s context; make it smaller"
        )
    check_attention(denoiser)
    texts = with_generated_texts(data, base, weights, source.network, tokenizer, length, seed, console)
    corpus = open_corpus(
        texts, tokenizer, length, held_out=held_out, seed=seed, streaming=streaming, max_corrupt=max_corrupt
    )
    if note := other_files(data):
        console.print(note, markup=False, soft_wrap=True)
    if corpus.note:
        console.print(corpus.note, soft_wrap=True)
    if corpus.bad_records.corrupt:
        console.print(f"skipped: {corpus.bad_records}", soft_wrap=True)
    return train(
        out, settings, denoiser, recipe, source.tokenizer,
        rows=corpus.rows, held_out=corpus.held_out, length=length, budget=budget, console=console,
        max_skipped=max_skipped,
    )  # fmt: skip


def known_frame(out: Path, model: str) -> DocumentFrame | None:
    """The frame of documents of the unfinished run in `out`, else that of a diffusion model; None if there is none."""
    config = find_diffusion_config(model)
    return read_frame(out) or (config.frame if config else None)
