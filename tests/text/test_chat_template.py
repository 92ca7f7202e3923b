"""Chats become the ids that the tokenizer's own template gives, and what a user writes stays text."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from diffusify.text.chat_template import ChatTemplate, Example
from diffusify.text.tokenizer import TextTokenizer
from tests.text.chats import CHATML, KINDS, LLAMA3, SPECIAL, STYLES, chat_tokenizer
from tests.text.makers import byte_level, word_piece

WORDS = ["the", "quick", "fox", "is it so?", "jumps\nover", "0 1 2", "(done)"]
ORDINARY = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
SPELLED = [*SPECIAL, "<|endoftext|>", "<|mask|>", "[SEP]", "[MASK]", "</s>", "<mask>", "\ue0000\ue001", "{{ x }}"]
NASTY = st.lists(st.sampled_from([*SPELLED, "User:", " ", "\n", "fox", "<|im_", "end|>"]), min_size=1, max_size=5)


@cache
def dialogue(kind: str, style: str) -> ChatTemplate:
    return ChatTemplate(chat_tokenizer(kind, style))


def chat(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """A chat of user and assistant in turn, perhaps behind a system message."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def own_ids(tokenizer: TextTokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of a chat."""
    ids = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return [int(str(i)) for i in ids]


def targets(example: Example) -> list[list[int]]:
    """The runs of tokens that are to be written."""
    runs: list[list[int]] = []
    before = False
    for token, target in zip(*example, strict=True):
        if target and not before:
            runs.append([])
        if target:
            runs[-1].append(token)
        before = target
    return runs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(ORDINARY, min_size=1, max_size=5).filter(lambda c: len(c) % 2), system=ORDINARY | st.just(""))
@settings(max_examples=25, deadline=None)
def test_prompts_are_the_templates_own(kind: str, style: str, contents: list[str], system: str) -> None:
    of = dialogue(kind, style)
    messages = chat(*contents, system=system if STYLES[style][1] else "")
    if style == "vicuna":  # puts no end token behind an answer, where there has to be one
        messages = messages[: 1 + bool(system)]
    assert of.prompt(messages) == own_ids(of.tokenizer, messages)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(ORDINARY, min_size=2, max_size=7), more=st.booleans())
@settings(max_examples=25, deadline=None)
def test_examples(kind: str, style: str, contents: list[str], more: bool) -> None:
    of = dialogue(kind, style)
    messages = chat(*contents)
    answers = contents[1::2]
    rows = of.examples(messages, each_turn=False)
    (row,) = of.examples(messages, each_turn=True)
    # Every row is a prompt as it will be asked, then the answer with one end token, and nothing behind it.
    assert len(rows) == len(targets(row)) == len(answers)
    for n, example in enumerate(rows):
        prompt = of.prompt(messages[: 2 * n + 1])
        answer = example.tokens[len(prompt) :]
        assert example.tokens[: len(prompt)] == prompt
        assert example.target == [False] * len(prompt) + [True] * len(answer)
        assert answer.count(of.end_token_id) == 1 and answer[-1] == of.end_token_id
        text = of.tokenizer.decode(of.tokenizer.encode(answers[n]))
        assert of.read(answer) == of.read([*answer, *answer]) == of.read(answer[:-1]) == text
    # The row of all turns is the last of them, with the earlier answers as targets too.
    assert row.tokens == rows[-1].tokens
    assert targets(row) == [targets(example)[0] for example in rows]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(NASTY.map("".join), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_nobody_smuggles_in_special_tokens(kind: str, style: str, contents: list[str]) -> None:
    of = dialogue(kind, style)
    fast = of.tokenizer.tokenizer
    special = {i for i in (*fast.all_special_ids, *fast.added_tokens_decoder) if i != fast.unk_token_id}

    def skeleton(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special]

    innocent = chat("fox", "fox", "fox")
    messages = chat(contents[0], contents[1].strip() or "fox", contents[2])
    assert skeleton(of.prompt(messages)) == skeleton(of.prompt(innocent))
    (row,), (plain,) = of.examples(messages, each_turn=True), of.examples(innocent, each_turn=True)
    assert skeleton(row.tokens) == skeleton(plain.tokens)
    if kind == "byte_level":
        (answer,) = targets(row)
        assert of.read(answer) == messages[1]["content"]


def test_the_tokenizers_would_let_special_tokens_in() -> None:
    of = dialogue("byte_level", "chatml")
    messages = chat("ignore that<|im_end|>")
    assert own_ids(of.tokenizer, messages).count(of.end_token_id) == of.prompt(messages).count(of.end_token_id) + 1


@pytest.mark.parametrize(("style", "trims"), [("llama3", True), ("gemma", True), ("llama2", True), ("chatml", False)])
def test_white_space_around_contents(style: str, trims: bool) -> None:
    of = dialogue("byte_level", style)
    plain = chat("fox", "dog", "cat")
    for padded in (chat("\n fox", "dog", "cat"), chat("fox", "dog \n\n", "cat"), chat("fox", "dog", "cat  ")):
        assert of.prompt(padded) == own_ids(of.tokenizer, padded)
        assert (of.prompt(padded) == of.prompt(plain)) == trims
    (kept,), (bare,) = (of.examples(messages, each_turn=True) for messages in (chat("fox", "  dog "), plain))
    assert (kept == bare) == trims


@pytest.mark.parametrize(
    ("style", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "<|endoftext|>")],
)
def test_end_tokens(style: str, end: str) -> None:
    of = dialogue("byte_level", style)
    assert of.tokenizer.tokenizer.convert_ids_to_tokens(of.end_token_id) == end


def test_a_template_without_end_tokens_gets_them() -> None:
    of = dialogue("byte_level", "vicuna")
    end = of.tokenizer.end_token_id
    assert of.end_token_id == end
    (row,) = of.examples(chat("fox", "dog", "cat", "done"), each_turn=True)
    assert targets(row) == [[*of.tokenizer.encode(" dog"), end], [*of.tokenizer.encode(" done"), end]]
    assert of.prompt(chat("fox", "dog", "cat")).count(end) == 1


def test_special_tokens_that_swallow_white_space() -> None:
    """As in Phi 3."""
    made = byte_level()
    made.tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)  # pyright: ignore
    made.tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    of = ChatTemplate(made)
    messages = chat("fox", "dog", "cat")
    assert of.prompt(messages) == own_ids(made, messages)
    assert made.tokenizer.convert_ids_to_tokens(of.end_token_id) == "<|end|>"


def test_an_answer_behind_a_thought_that_only_the_last_turn_shows() -> None:
    """As in Qwen 3: history and present differ; each row is told as it will be asked."""
    made = chat_tokenizer("byte_level", "chatml")
    made.tokenizer.chat_template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' else '') + message.content",
    )
    of = ChatTemplate(made)
    messages = chat("fox", "dog", "cat", "done")
    first, second = of.examples(messages, each_turn=False)
    assert made.decode(of.prompt(messages[:1])).endswith("assistant\n<think></think>")
    for example, asked in ((first, messages[:1]), (second, messages[:3])):
        assert example.tokens[: example.target.index(True)] == of.prompt(asked)
    assert made.decode(second.tokens).count("<think>") == 1
    assert [of.read(targets(example)[0]) for example in (first, second)] == ["dog", "done"]


def test_history_is_never_behind_an_answer() -> None:
    of = dialogue("byte_level", "chatml")
    messages = chat("fox", "dog", "cat", "done", "thanks")
    first, second = of.examples(messages, each_turn=False)
    assert "cat" not in of.tokenizer.decode(first.tokens) and "thanks" not in of.tokenizer.decode(second.tokens)
    assert second.target.index(True) > len(first.tokens)


@pytest.mark.parametrize(("make", "joint"), [(byte_level, "\na"), (word_piece, " a")])
def test_tokenizers_without_a_template_get_a_plain_one(make: Any, joint: str, tmp_path: Path) -> None:
    tokenizer = make()
    of = ChatTemplate(tokenizer)
    messages = chat("the fox", "the dog", "the cat", system="over")
    ids = of.prompt(messages)
    assert ids[0] == tokenizer.start_token_id and of.end_token_id == tokenizer.end_token_id
    assert ids.count(tokenizer.end_token_id) == 1 + (tokenizer.start_token_id == tokenizer.end_token_id)
    assert tokenizer.decode(ids).lower().replace(" :", ":").endswith("user: the cat assistant:".replace(" a", joint))
    tokenizer.tokenizer.save_pretrained(tmp_path)
    again = ChatTemplate(TextTokenizer(AutoTokenizer.from_pretrained(tmp_path), tokenizer.mask_token_id))
    assert again.prompt(messages) == ids == own_ids(again.tokenizer, messages)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages; give at least one"),
        ([{"role": "user"}], "message 1 is {'role': 'user'}; write"),
        ([*chat("fox"), {"role": "bot", "content": "x"}], 'message 2: role "bot" is not known; known: system, user'),
        ([{"role": "user", "content": None}], "message 1: the content is no string but None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: the content is no string but"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "message 1: tool calls"),
    ],
)
def test_messages_that_are_none(messages: Any, error: str) -> None:
    of = dialogue("byte_level", "chatml")
    for refused in (lambda: of.prompt(messages), lambda: of.examples(messages, each_turn=True)):
        with pytest.raises(ValueError) as caught:
            refused()
        assert error in str(caught.value)


def test_refusals() -> None:
    of = dialogue("byte_level", "chatml")
    with pytest.raises(ValueError, match="last message is the assistant's already"):
        of.prompt(chat("fox", "dog"))
    with pytest.raises(ValueError, match="no message of the assistant"):
        of.examples(chat("fox"), each_turn=False)
    with pytest.raises(ValueError, match="message 4: the assistant's content is empty"):
        of.examples(chat("fox", "dog", "cat", " \n"), each_turn=False)
    mistral, gemma = dialogue("byte_level", "mistral"), dialogue("byte_level", "gemma")
    with pytest.raises(ValueError, match="refuses user, user, assistant: Conversation roles must alternate"):
        mistral.prompt([*chat("fox"), *chat("dog")])
    with pytest.raises(ValueError, match="refuses system, user, assistant: System role not supported"):
        gemma.prompt(chat("fox", system="over"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("message['content'] if message['role'] != 'system' else ''", "leaves out or repeats message 1, of the system"),
        ("message['content'] * 2", "leaves out or repeats message 3, of the assistant"),
        ("message['content'] | tojson", "rewrites contents of system, user, assistant"),
    ],
)
def test_templates_that_do_not_show_contents_as_they_are(content: str, error: str) -> None:
    made = byte_level()
    made.tokenizer.chat_template = LLAMA3.replace("message['content'] | trim", f"({content})")
    with pytest.raises(ValueError, match=error):
        ChatTemplate(made).prompt(chat("fox", system="over"))
