"""Prompts for reinforcement, with the columns that their rewards read."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from diffusify.text.bad_records import BadRecords, check_limit
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.examples import Template, usable_records
from diffusify.text.messages import prompt_messages
from diffusify.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class RewardPrompt:
    """A prompt as token ids, as the rewards get it (a text, or the messages of a chat), and its record's fields."""

    ids: list[int]
    shown: str | list[dict[str, Any]]
    columns: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the answer is the next message of a chat."""
        return not isinstance(self.shown, str)


def make_prompts(
    records: Dataset, tokenizer: TextTokenizer, *, template: str | None, length: int | None, max_corrupt: float = 0.01
) -> tuple[list[RewardPrompt], list[str]]:
    """The prompts of records (see `load_records`), and notes about those that are left out.

    With a `template`, such as `"Question: {question}\\nAnswer:"`, its text is continued; otherwise the messages of a
    record before its last answer are a chat. Prompts of more than `length` tokens are left out. ValueError if more than
    a share `max_corrupt` of the records cannot be used, or none is left.
    """
    check_limit(max_corrupt)
    filled = None if template is None else Template(template, "{answer}")
    chat_template = ChatTemplate(tokenizer) if template is None else None

    def encode(record: dict[str, Any]) -> RewardPrompt:
        columns = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
        if filled is not None:
            text = filled.fill_prompt(record)
            return RewardPrompt(tokenizer.add_start(tokenizer.encode(text)), text, columns)
        assert chat_template is not None
        messages = prompt_messages(record)
        return RewardPrompt(chat_template.prompt(messages), messages, columns)

    bad_records, notes = BadRecords(problem="cannot be used"), []
    prompts = [prompt for _, prompt in usable_records(records, encode, bad_records)]
    bad_records.check(max_corrupt)
    if bad_records.corrupt:
        notes.append(f"skipped {bad_records}")
    fitting = [prompt for prompt in prompts if length is None or len(prompt.ids) <= length]
    if not fitting:
        shortest = min((len(prompt.ids) for prompt in prompts), default=0)
        raise ValueError(
            f"no prompt can be used: {bad_records}"
            if not prompts
            else f"every prompt is longer than the {length} tokens that max_new_tokens leaves of the model's context; "
            f"the shortest has {shortest}; make max_new_tokens smaller"
        )
    if len(fitting) < len(prompts):
        notes.append(f"skipped {len(prompts) - len(fitting):,} of {len(prompts):,} prompts: more than {length} tokens")
    return fitting, notes


def columns_of(prompts: list[RewardPrompt]) -> dict[str, list[Any]]:
    """The fields of all prompts' records by name, None where a record has none."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def split_off_held_out(
    prompts: list[RewardPrompt], count: int, order: list[int]
) -> tuple[list[RewardPrompt], list[RewardPrompt]]:
    """Split prompts into (train, held out): the first `count` different prompts in `order`, at most a tenth of all.

    No prompt is in both. At least one is held out if there are two, unless `count` is 0.
    """
    keys = [tuple(prompt.ids) for prompt in prompts]
    distinct = list(dict.fromkeys(keys[index] for index in order))
    held = set(distinct[: min(count, max(1, len(distinct) // 10), len(distinct) - 1)])
    first = dict(zip(reversed(keys), reversed(prompts), strict=True))  # each held-out prompt once
    train = [prompt for key, prompt in zip(keys, prompts, strict=True) if key not in held]
    return train, [first[key] for key in distinct if key in held]
