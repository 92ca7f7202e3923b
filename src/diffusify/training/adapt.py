"""Adaptation: trains a pretrained language model on text to become a diffusion language model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from diffusify.config import DiffusionConfig, DocumentFrame, to_plain
from diffusify.models.attention_check import check_attention
from diffusify.models.bundled import find_diffusion_config
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import Base, is_masked_lm
from diffusify.models.lora import Lora, add_lora, check_lora, default_lora, has_lora
from diffusify.models.mask_token import ensure_length_tokens, ensure_mask_token
from diffusify.models.quantization import check_load_in_4bit
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import default_recipe, saved_recipe
from diffusify.models.saving import checksum, load_heads, open_base
from diffusify.text.bad_records import check_limit
from diffusify.text.corpus import open_corpus
from diffusify.text.sources import source_checksum, source_files
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.budget import Budget
from diffusify.training.document_frame import choose_frame
from diffusify.training.run_folder import check_run_folder, check_training_options, read_frame, train
from diffusify.training.self_generated import SELF_SOURCE, check_can_generate, with_generated_texts


def adapt(
    base: str,
    data: str,
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
    out = Path(out)
    recipe = recipe or saved_recipe(base) or default_recipe(masked=is_masked_lm(base))
    console = console or Console(stderr=True, highlight=False)
    check_lora(base, lora, recipe)
    if load_in_4bit:
        check_load_in_4bit(base, lora)
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


def make_denoiser(
    base: Base,
    recipe: Recipe,
    *,
    lora: Lora | None = None,
    frame: DocumentFrame | None = None,
    mask_token_id: int | None = None,
) -> tuple[Denoiser, TextTokenizer]:
    """A denoiser with a recipe's diffusion config, and with new adapters if `lora` is given; and its tokenizer.

    Without a `frame` of documents, the base's is measured (see `choose_frame`). Changes the base's network in place.
    Raises ValueError when base and recipe do not fit.
    """
    check_fit(base.source, base.masked, recipe)
    frame = choose_frame(base)[0] if frame is None else frame
    mask = ensure_mask_token(base, mask_token_id)
    length_tokens = None if recipe.length_noise is None else ensure_length_tokens(base)
    config = recipe.diffusion_config(type(base.network).__name__, mask, base.source)
    config = replace(config, frame=frame, length_tokens=length_tokens)
    disable_dropout(base.network)
    if not has_lora(base.network) and (lora := default_lora(lora, recipe.adapters)):
        add_lora(base.network, lora, mask, base.source, recipe.adapters, length_tokens)
    denoiser, tokenizer = Denoiser(base.network, config), TextTokenizer(base.tokenizer, mask, frame)
    denoiser.limit_vocabulary(tokenizer.token_ids)
    if base.folder is not None and DiffusionConfig.load(base.folder).draft_head is not None:
        load_heads(denoiser, base.folder)
    return denoiser, tokenizer


def check_fit(source: str, masked: bool, recipe: Recipe) -> None:
    """Raise ValueError when a base and a recipe do not fit."""
    if masked and recipe.shift:
        raise ValueError(f"{source} is a masked model, which needs no shift: use mlm(), or block(size, masked=True)")
    if not masked and recipe.name == "mlm":
        raise ValueError(f"{source} is an autoregressive model: use ar() or block(size); mlm() is for masked models")


def disable_dropout(network: nn.Module) -> None:
    """Set all dropout rates of a network to 0, since the masks already are noise."""
    for module in network.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
