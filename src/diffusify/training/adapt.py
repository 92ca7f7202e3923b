"""The whole way: a base, some text and a recipe in; a folder with a diffusion model out."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from diffusify.config import to_plain
from diffusify.models.attention_check import check_attention
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import Base, ensure_mask_token
from diffusify.models.lora import Lora, add_lora, check_lora
from diffusify.models.recipes import Recipe, block, of_model
from diffusify.models.saving import checksum, open_base
from diffusify.text.bad_records import check_limit
from diffusify.text.corpus import open_corpus
from diffusify.text.sources import files_of
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_training_options, claim, train
from diffusify.training.self_generated import OWN, check_writer, with_own_texts


def adapt(
    base: str,
    data: str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    lora: Lora | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    length: int = 256,
    held_out: int = 8192,
    seed: int = 0,
    streaming: bool | None = None,
    max_corrupt: float = 0.01,
    max_skipped: int = 10,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Turn a pretrained language model into a diffusion model and save it in `out`; or go on with one.

    `base` as `load_base` takes it, or a diffusion model, which goes on as its card says unless there is a `recipe`, and
    with its adapters where it has some. `data` as `load_texts` takes it, and `self:DATA` is text that the base writes
    itself, going on from pieces of DATA (see `with_own_texts`); `lora` trains adapters instead of all weights; rows of
    `length` tokens; `held_out` tokens are kept aside to measure the bound. `streaming` reads texts while they are
    trained on, as hubs and files of over a GiB are anyway; other texts of over 16 MiB are packed once and kept on disk
    (see `open_corpus`). Records that cannot be read are left out and reported, up to a share `max_corrupt` of them. The
    budget is `steps` or `minutes` (200 steps when neither is given). `training` are fields of
    `transformers.TrainingArguments`. Progress goes to `console`, standard error if unset. An interrupted run goes on
    where its last checkpoint stands; a finished one is returned as it is. Steps that are not finite are skipped, and
    `max_skipped` of them in a row end the run (FloatingPointError). ValueError for anything that cannot work; what is
    not there is refused before weights are read.
    """
    recipe, out = recipe or of_model(base) or block(), Path(out)
    console = console or Console(stderr=True, highlight=False)
    check_lora(base, lora)
    budget = Budget(200 if steps is None and minutes is None else steps, minutes)
    training = check_training_options(training)
    record = {
        "base": base,
        "data": data,
        "recipe": to_plain(recipe),
        "lora": to_plain(lora),
        "budget": {"steps": budget.steps, "minutes": minutes},
        "length": length,
        "held_out": held_out,
        "seed": seed,
        "streaming": streaming,
        "training": training,
    }
    if claim(out, record):
        console.print(f"{out} holds this run already, finished")
        return out
    check_limit(max_corrupt)
    files_of(OWN.sub(r"\1", data))  # refuses what is not there
    source = open_base(base)
    check_writer(data, base, masked=source.masked)
    weights = checksum(source.network)
    torch.manual_seed(seed)  # adapters begin alike on every rank and after a resume
    denoiser, tokenizer = make_denoiser(source, recipe, lora=lora)
    if denoiser.context is not None and length > denoiser.context:
        raise ValueError(f"length={length} is more than the {denoiser.context} tokens that {base} can see; use less")
    check_attention(denoiser)
    texts = with_own_texts(data, base, weights, source.network, tokenizer, length, seed, console)
    corpus = open_corpus(
        texts, tokenizer, length, held_out=held_out, seed=seed, streaming=streaming, max_corrupt=max_corrupt
    )
    if corpus.note:
        console.print(corpus.note, soft_wrap=True)
    if corpus.tally.corrupt:
        console.print(f"left out: {corpus.tally}", soft_wrap=True)
    return train(
        out, record, denoiser, recipe, source.tokenizer,
        rows=corpus.rows, held_out=corpus.held_out, length=length, budget=budget, console=console,
        max_skipped=max_skipped,
    )  # fmt: skip


def make_denoiser(base: Base, recipe: Recipe, *, lora: Lora | None = None) -> tuple[Denoiser, TextTokenizer]:
    """A network under a recipe's card, perhaps with fresh adapters. ValueError when base and recipe do not fit."""
    check_fit(base.source, base.masked, recipe)
    mask = ensure_mask_token(base)
    without_dropout(base.network)
    if lora is not None:
        add_lora(base.network, lora, mask, base.source)
    card = recipe.diffusion_config(type(base.network).__name__, mask, base.source)
    return Denoiser(base.network, card), TextTokenizer(base.tokenizer, mask)


def check_fit(source: str, masked: bool, recipe: Recipe) -> None:
    """ValueError when a base and a recipe do not fit."""
    if masked and recipe.shift:
        raise ValueError(f"{source} is a masked model, which needs no shift: use mlm(), or block(size, masked=True)")
    if not masked and recipe.name == "mlm":
        raise ValueError(f"{source} is a left-to-right model: use ar() or block(size); mlm() is for masked models")


def without_dropout(network: nn.Module) -> None:
    """From now on the network drops nothing: its noise is the open positions."""
    for module in network.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
