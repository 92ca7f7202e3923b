"""Text that a base writes itself, to be adapted on: what its drafts are to agree with is its own way of writing."""

import copy
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffusify.config import cache_folder
from diffusify.models.loading import Base
from diffusify.text.sources import load_texts
from diffusify.text.tokens import TextTokenizer
from diffusify.training.runs import fast_bfloat16

OWN = re.compile(r"self:([^,]+)")
TOGETHER = 32  # texts written at once
PROMPT = 4  # a quarter of each text is given
TEMPERATURE = 0.7


def with_own_texts(data: str, base: Base, tokenizer: TextTokenizer, length: int, seed: int, console: Console) -> str:
    """A data source in which every `self:PROMPTS` has become a file that the base has written.

    The texts of PROMPTS are cut into pieces of `length` tokens; the base is given a quarter of each, and writes the
    rest (temperature 0.7). Files are kept in the cache folder; one that was begun is gone on with. ValueError for a
    base that does not write from left to right.
    """
    if OWN.search(data) and base.masked:
        raise ValueError(f"{data}: {base.source} is a masked model, which does not write from left to right")
    return OWN.sub(lambda found: str(_file(found[1].strip(), base, tokenizer, length, seed, console)), data)


def _file(prompts: str, base: Base, tokenizer: TextTokenizer, length: int, seed: int, console: Console) -> Path:
    texts = load_texts(prompts, seed=seed)
    if not isinstance(texts, Dataset):
        raise ValueError(f"self:{prompts} has no end, and all of it would be gone on with; give a file or folder")
    pieces = [piece for text in texts["text"] for piece in _pieces(tokenizer.document(text), length)]
    if not pieces:
        raise ValueError(
            f"self:{prompts} has no text of {length} tokens to go on from; give longer ones, or less length"
        )
    what = json.dumps([base.source, pieces, length, TEMPERATURE, seed])
    path = cache_folder() / f"self-{hashlib.sha256(what.encode()).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        draft = path.with_suffix(".unfinished")
        draft.parent.mkdir(parents=True, exist_ok=True)
        _write(draft, pieces, base, tokenizer, length, seed, console)
        os.replace(draft, path)
    console.print(f"{prompts}, gone on with by {base.source}: {len(pieces):,} texts in {path}", soft_wrap=True)
    return path


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """The openings of a document's pieces."""
    given = max(1, length // PROMPT)
    starts = range(0, max(1, len(ids) - length // 2), length)
    return [ids[at : at + given] for at in starts if len(ids) >= at + given]


@torch.inference_mode()
def _write(
    draft: Path, pieces: list[list[int]], base: Base, tokenizer: TextTokenizer, length: int, seed: int, console: Console
) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
    network: Any = copy.deepcopy(base.network)
    network.to(device=device, dtype=dtype).eval()
    done = len(draft.read_text(encoding="utf-8").splitlines()) if draft.is_file() else 0
    done -= done % TOGETHER
    kept = "".join(draft.read_text(encoding="utf-8").splitlines(keepends=True)[:done]) if done else ""
    draft.write_text(kept, encoding="utf-8")
    columns = (TextColumn("the base writes"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar, draft.open("a", encoding="utf-8") as file:
        task = bar.add_task("", total=len(pieces), completed=done)
        for at in range(done, len(pieces), TOGETHER):
            torch.manual_seed(seed + at)
            given = torch.tensor(pieces[at : at + TOGETHER], device=device)
            written = network.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                max_new_tokens=length - given.shape[1],
                eos_token_id=tokenizer.end_token_id,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=[tokenizer.mask_token_id],
            )
            file.writelines(json.dumps({"text": _text(row, given.shape[1], tokenizer)}) + "\n" for row in written)
            file.flush()
            bar.advance(task, len(given))


def _text(row: Tensor, given: int, tokenizer: TextTokenizer) -> str:
    """What was given and written, up to the end."""
    ids = row.tolist()
    ends = [at for at in range(given, len(ids)) if ids[at] == tokenizer.end_token_id]
    return tokenizer.decode(ids[: ends[0]] if ends else ids)
