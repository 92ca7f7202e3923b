"""Text that a model writes itself, to be trained on: what its drafts are to agree with is its own way of writing."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from diffusify.config import cache_folder
from diffusify.models.bundled import config_of
from diffusify.models.lora import merge_lora
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.examples import question
from diffusify.text.sources import load_records, load_texts
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.run_folder import fast_bfloat16

OWN = re.compile(r"self:([^,]+)")
TOGETHER = 32  # texts written at once
PROMPT = 4  # a quarter of each text is given
TEMPERATURE = 0.7


def check_writer(data: str, model: str, *, masked: bool) -> None:
    """ValueError if a model is to write its own data, and does not write from left to right."""
    if OWN.search(data) and (masked or ((card := config_of(model)) and not card.reads_as_ar_model)):
        raise ValueError(f"data {data}: {model} does not write from left to right; leave self: out")


def with_own_texts(
    data: str, model: str, weights: int, network: PreTrainedModel, tokenizer: TextTokenizer, length: int, seed: int,
    console: Console,
) -> str:  # fmt: skip
    """A data source in which every `self:PROMPTS` has become a file that the model has written.

    The texts of PROMPTS are cut into pieces of `length` tokens; the network is given a quarter of each, and writes the
    rest (temperature 0.7). Files are kept in the cache folder, and one that was begun is gone on with; they are known
    by a checksum of the `weights`, taken before there are new adapters, which change nothing yet.
    """

    def written(prompts: str) -> Path:
        texts = load_texts(prompts, seed=seed)
        if not isinstance(texts, Dataset):
            raise ValueError(f"self:{prompts} has no end, and all of it would be gone on with; give a file or folder")
        pieces = [piece for text in texts["text"] for piece in _pieces(tokenizer.document(text), length)]
        if not pieces:
            raise ValueError(
                f"self:{prompts} has no text of {length} tokens to go on from; give longer ones, or less length"
            )
        writer = TextGenerator(network, tokenizer, [tokenizer.end_token_id], length, seed, console)
        path = writer.file([weights, pieces], pieces, lambda n, ids: {"text": tokenizer.decode(pieces[n] + ids)})
        console.print(f"{prompts}, gone on with by {model}: {len(pieces):,} texts in {path}", soft_wrap=True)
        return path

    return OWN.sub(lambda found: str(written(found[1].strip())), data)


def with_own_answers(
    data: str, model: str, weights: int, network: PreTrainedModel, tokenizer: TextTokenizer, length: int, seed: int,
    console: Console,
) -> str:  # fmt: skip
    """A source of records in which every `self:PROMPTS` has become a file of chats that the model has answered itself.

    Of each record of PROMPTS the chat up to the last question counts, or the first field of a pair; what is answered
    there does not. A network that writes from left to right is drawn from at temperature 0.7. An answer that does not
    end within `length` tokens, the question's included, is left out. Files are kept and gone on with, as of
    `with_own_texts`.
    """
    dialogue = ChatTemplate(tokenizer)

    def written(prompts: str) -> Path:
        chats = [question(json.loads(record)) for record in load_records(prompts, seed=seed)["record"][:]]
        asked = [(chat, ids) for chat in chats if len(ids := dialogue.prompt(chat)) <= length // 2]
        if not asked:
            raise ValueError(f"self:{prompts} has no question of up to {length // 2} tokens; give more length")
        asked.sort(key=lambda pair: len(pair[1]))  # alike in length, the written together need little padding
        ends = [dialogue.end_token_id, tokenizer.end_token_id]

        def told(n: int, ids: list[int]) -> dict[str, Any]:
            answer = dialogue.read(ids)
            if not answer or ids[-1] not in ends:
                return {}
            return {"messages": [*asked[n][0], {"role": "assistant", "content": answer}]}

        writer = TextGenerator(network, tokenizer, ends, length, seed, console)
        path = writer.file([weights, asked], [ids for _, ids in asked], told)
        console.print(f"{prompts}, answered by {model}: {len(asked):,} questions in {path}", soft_wrap=True)
        return path

    return OWN.sub(lambda found: str(written(found[1].strip())), data)


@dataclass(frozen=True)
class TextGenerator:
    """A network that writes from left to right until one of the `ends`, or `length` tokens with the prompt's."""

    network: PreTrainedModel
    tokenizer: TextTokenizer
    ends: list[int]
    length: int
    seed: int
    console: Console

    def file(self, what: Any, prompts: list[list[int]], told: Callable[[int, list[int]], dict[str, Any]]) -> Path:
        """What is `told` of each prompt, by its number and the ids behind it; a line each, if there is something.

        Its name in the cache folder follows from `what` is to be written, so that it is written once.
        """
        name = hashlib.sha256(json.dumps([*what, self.length, TEMPERATURE, self.seed]).encode()).hexdigest()[:16]
        path = cache_folder() / f"self-{name}.jsonl"
        if not path.is_file():
            draft = path.with_suffix(".unfinished")
            draft.parent.mkdir(parents=True, exist_ok=True)
            self._write(draft, prompts, told)
            lines = [line for line in draft.read_text(encoding="utf-8").splitlines(keepends=True) if line != "{}\n"]
            draft.write_text("".join(lines), encoding="utf-8")
            os.replace(draft, path)
        return path

    @torch.inference_mode()
    def _write(self, draft: Path, prompts: list[list[int]], told: Callable[[int, list[int]], dict[str, Any]]) -> None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        network: Any = copy.deepcopy(self.network)
        merge_lora(network)  # for speed
        network.to(device=device, dtype=torch.bfloat16 if fast_bfloat16() else torch.float32).eval()
        done = draft.read_text(encoding="utf-8").splitlines(keepends=True) if draft.is_file() else []
        done = done[: len(done) - len(done) % TOGETHER]
        draft.write_text("".join(done), encoding="utf-8")
        columns = (TextColumn("the model writes"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar, draft.open("a", encoding="utf-8") as file:
            task = bar.add_task("", total=len(prompts), completed=len(done))
            for at in range(len(done), len(prompts), TOGETHER):
                torch.manual_seed(self.seed + at)
                together = prompts[at : at + TOGETHER]
                width = max(map(len, together))
                given = [[self.tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in together]
                real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in together]
                written = network.generate(
                    torch.tensor(given, device=device),
                    attention_mask=torch.tensor(real, device=device),
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    max_new_tokens=self.length - width,
                    eos_token_id=self.ends,
                    pad_token_id=self.tokenizer.pad_token_id,
                    suppress_tokens=[self.tokenizer.mask_token_id],
                )
                behind = [self._ended(row) for row in written[:, width:].tolist()]
                file.writelines(json.dumps(told(at + n, ids)) + "\n" for n, ids in enumerate(behind))
                file.flush()
                bar.advance(task, len(together))

    def _ended(self, ids: list[int]) -> list[int]:
        """Up to the first end, which stays."""
        stops = [at + 1 for at, token_id in enumerate(ids) if token_id in self.ends]
        return ids[: stops[0]] if stops else ids


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """The openings of a document's pieces."""
    given = max(1, length // PROMPT)
    starts = range(0, max(1, len(ids) - length // 2), length)
    return [ids[at : at + given] for at in starts if len(ids) >= at + given]
