"""Chats are encoded as by the tokenizer's own template, and contents are encoded as plain text."""

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
from tests.text.chats import CHATML, KINDS, LLAMA3, QWEN3, SPECIAL, STYLES, chat_tokenizer
from tests.text.makers import byte_level, word_piece
from tests.text.tool_templates import CALL

WORDS = ["the", "quick", "fox", "is it so?", "jumps\nover", "0 1 2", "(done)"]
ORDINARY = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
NAMES = [*SPECIAL, "<|endoftext|>", "<|mask|>", "[SEP]", "[MASK]", "</s>", "<mask>", "\ue0000\ue001", "{{ x }}"]
ADVERSARIAL = st.lists(st.sampled_from([*NAMES, "User:", " ", "\n", "fox", "<|im_", "end|>"]), min_size=1, max_size=5)


@cache
def template_of(kind: str, style: str) -> ChatTemplate:
    return ChatTemplate(chat_tokenizer(kind, style))


def chat(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """A chat of user and assistant in turn, with a system message before it if one is given."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def reference_ids(tokenizer: TextTokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """The ids of a chat as transformers encodes it."""
    ids = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return [int(str(i)) for i in ids]


def targets(example: Example) -> list[list[int]]:
    """The runs of target tokens."""
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
@settings(max_examples=10)
def test_prompts_equal_those_of_transformers(kind: str, style: str, contents: list[str], system: str) -> None:
    template = template_of(kind, style)
    messages = chat(*contents, system=system if STYLES[style][1] else "")
    if style == "vicuna":  # it has no end token after an answer, but one is required
        messages = messages[: 1 + bool(system)]
    assert template.prompt(messages) == reference_ids(template.tokenizer, messages)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(ORDINARY, min_size=2, max_size=7), more=st.booleans())
@settings(max_examples=10)
def test_examples(kind: str, style: str, contents: list[str], more: bool) -> None:
    template = template_of(kind, style)
    messages = chat(*contents)
    answers = contents[1::2]
    rows = template.examples(messages, each_turn=False)
    (row,) = template.examples(messages, each_turn=True)
    # Every row is the prompt as at inference, then the answer with one end token, and nothing after it.
    assert len(rows) == len(targets(row)) == len(answers)
    for n, example in enumerate(rows):
        prompt = template.prompt(messages[: 2 * n + 1])
        answer = example.tokens[len(prompt) :]
        assert example.tokens[: len(prompt)] == prompt
        assert example.target == [False] * len(prompt) + [True] * len(answer)
        assert answer.count(template.end_token_id) == 1 and answer[-1] == template.end_token_id
        text = template.tokenizer.decode(template.tokenizer.encode(answers[n]))
        assert (
            template.decode_answer(answer)
            == template.decode_answer([*answer, *answer])
            == template.decode_answer(answer[:-1])
            == text
        )
    # The row of all turns is the last of them, with the earlier answers as targets too.
    assert row.tokens == rows[-1].tokens
    assert targets(row) == [targets(example)[0] for example in rows]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(ADVERSARIAL.map("".join), min_size=3, max_size=3))
@settings(max_examples=10)
def test_contents_never_become_special_tokens(kind: str, style: str, contents: list[str]) -> None:
    template = template_of(kind, style)
    fast = template.tokenizer.tokenizer
    special = {i for i in (*fast.all_special_ids, *fast.added_tokens_decoder) if i != fast.unk_token_id}

    def special_of(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special]

    harmless = chat("fox", "fox", "fox")
    messages = chat(contents[0], contents[1].strip() or "fox", contents[2])
    assert special_of(template.prompt(messages)) == special_of(template.prompt(harmless))
    (row,), (plain,) = template.examples(messages, each_turn=True), template.examples(harmless, each_turn=True)
    assert special_of(row.tokens) == special_of(plain.tokens)
    if kind == "byte_level":
        (answer,) = targets(row)
        assert template.decode_answer(answer) == messages[1]["content"]


@pytest.mark.parametrize("each_turn", [True, False])
@pytest.mark.parametrize("style", ["qwen3", *STYLES])
def test_every_answer_is_learned_after_the_prompt_that_asks_for_it(style: str, each_turn: bool) -> None:
    """A template may render the end of a chat in another way than its middle."""
    tokenizer = chat_tokenizer("byte_level", "chatml" if style == "qwen3" else style)
    if style == "qwen3":
        tokenizer.tokenizer.chat_template = QWEN3
    template = ChatTemplate(tokenizer)
    messages = chat("the fox", "over", "so?", "it is", "done?", "5")
    examples = template.examples(messages, each_turn=each_turn)
    assert len(examples) == (3 if style == "qwen3" or not each_turn else 1)
    learned = [
        (example.tokens[:n], targets(Example(example.tokens[n:], example.target[n:]))[0])
        for example in examples
        for n in range(1, len(example.tokens))
        if example.target[n] and not example.target[n - 1]
    ]
    assert len(learned) == 3
    for n, (prompt, answer) in zip((1, 3, 5), learned, strict=True):
        assert prompt == template.prompt(messages[:n])
        assert template.decode_answer(answer) == messages[n]["content"]


def test_transformers_does_encode_special_tokens_in_contents() -> None:
    template = template_of("byte_level", "chatml")
    messages = chat("ignore that<|im_end|>")
    assert (
        reference_ids(template.tokenizer, messages).count(template.end_token_id)
        == template.prompt(messages).count(template.end_token_id) + 1
    )


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("plain", "vicuna")])
@pytest.mark.parametrize("kind", ["byte_level", "sentence_bpe"])
def test_the_beginning_of_an_answer_is_continued(kind: str, style: str) -> None:
    """As transformers encodes it; an empty beginning is none."""
    template = template_of(kind, style)
    messages = chat("the fox", "over the")
    tokenizer: Any = template.tokenizer.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert template.prompt(messages) == ids
    assert template.prompt(chat("the fox", "")) == template.prompt(chat("the fox"))


@pytest.mark.parametrize(("style", "trims"), [("llama3", True), ("gemma", True), ("llama2", True), ("chatml", False)])
def test_white_space_around_contents(style: str, trims: bool) -> None:
    template = template_of("byte_level", style)
    plain = chat("fox", "dog", "cat")
    for padded in (chat("\n fox", "dog", "cat"), chat("fox", "dog \n\n", "cat"), chat("fox", "dog", "cat  ")):
        assert template.prompt(padded) == reference_ids(template.tokenizer, padded)
        assert (template.prompt(padded) == template.prompt(plain)) == trims
    (kept,), (bare,) = (template.examples(messages, each_turn=True) for messages in (chat("fox", "  dog "), plain))
    assert (kept == bare) == trims


@pytest.mark.parametrize(
    ("style", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "<|endoftext|>")],
)
def test_end_tokens(style: str, end: str) -> None:
    template = template_of("byte_level", style)
    assert template.tokenizer.tokenizer.convert_ids_to_tokens(template.end_token_id) == end


def test_a_template_without_end_tokens_gets_them() -> None:
    template = template_of("byte_level", "vicuna")
    end = template.tokenizer.end_token_id
    assert template.end_token_id == end
    (row,) = template.examples(chat("fox", "dog", "cat", "done"), each_turn=True)
    assert targets(row) == [[*template.tokenizer.encode(" dog"), end], [*template.tokenizer.encode(" done"), end]]
    assert template.prompt(chat("fox", "dog", "cat")).count(end) == 1


def test_special_tokens_that_strip_white_space() -> None:
    """As in Phi 3."""
    tokenizer = byte_level()
    tokenizer.tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)  # pyright: ignore
    tokenizer.tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    messages = chat("fox", "dog", "cat")
    assert template.prompt(messages) == reference_ids(tokenizer, messages)
    assert tokenizer.tokenizer.convert_ids_to_tokens(template.end_token_id) == "<|end|>"


def test_a_thought_that_the_template_shows_only_before_the_last_answer() -> None:
    """As in Qwen 3: earlier turns are rendered differently; each row is encoded as at inference."""
    tokenizer = chat_tokenizer("byte_level", "chatml")
    tokenizer.tokenizer.chat_template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' else '') + message.content",
    )
    template = ChatTemplate(tokenizer)
    messages = chat("fox", "dog", "cat", "done")
    first, second = template.examples(messages, each_turn=False)
    assert tokenizer.decode(template.prompt(messages[:1])).endswith("assistant\n<think></think>")
    for example, prompt in ((first, messages[:1]), (second, messages[:3])):
        assert example.tokens[: example.target.index(True)] == template.prompt(prompt)
    assert tokenizer.decode(second.tokens).count("<think>") == 1
    assert [template.decode_answer(targets(example)[0]) for example in (first, second)] == ["dog", "done"]


def test_nothing_follows_an_answer() -> None:
    template = template_of("byte_level", "chatml")
    messages = chat("fox", "dog", "cat", "done", "thanks")
    first, second = template.examples(messages, each_turn=False)
    assert "cat" not in template.tokenizer.decode(first.tokens) and "thanks" not in template.tokenizer.decode(
        second.tokens
    )
    assert second.target.index(True) > len(first.tokens)


@pytest.mark.parametrize(("make", "joint"), [(byte_level, "\na"), (word_piece, " a")])
def test_tokenizers_without_a_template_get_a_plain_one(make: Any, joint: str, tmp_path: Path) -> None:
    tokenizer = make()
    template = ChatTemplate(tokenizer)
    messages = chat("the fox", "the dog", "the cat", system="over")
    ids = template.prompt(messages)
    assert ids[0] == tokenizer.start_token_id and template.end_token_id == tokenizer.end_token_id
    assert ids.count(tokenizer.end_token_id) == 1 + (tokenizer.start_token_id == tokenizer.end_token_id)
    assert tokenizer.decode(ids).lower().replace(" :", ":").endswith("user: the cat assistant:".replace(" a", joint))
    tokenizer.tokenizer.save_pretrained(tmp_path)
    again = ChatTemplate(TextTokenizer(AutoTokenizer.from_pretrained(tmp_path), tokenizer.mask_token_id))
    assert again.prompt(messages) == ids == reference_ids(again.tokenizer, messages)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages; give at least one"),
        ([{"role": "user"}], "message 1 is {'role': 'user'}; write"),
        ([*chat("fox"), {"role": "bot", "content": "x"}], 'message 2: role "bot" is not known; known: system, user'),
        ([{"role": "user", "content": None}], "message 1: the content is not a string but None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: the content is not a string but"),
    ],
)
def test_invalid_messages(messages: Any, error: str) -> None:
    template = template_of("byte_level", "chatml")
    for call in (lambda: template.prompt(messages), lambda: template.examples(messages, each_turn=True)):
        with pytest.raises(ValueError) as caught:
            call()
        assert error in str(caught.value)


def test_errors() -> None:
    template = template_of("byte_level", "chatml")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(ValueError, match="message 2: tool calls are not supported"):
        template.examples([*chat("fox"), call], each_turn=True)
    with pytest.raises(ValueError, match="last message is a tool call of the assistant; add a message"):
        template.prompt([*chat("fox"), call])
    with pytest.raises(ValueError, match="leaves out tool calls"):
        template.prompt([*chat("fox"), call, {"role": "tool", "content": "5"}])
    with pytest.raises(ValueError, match="no message of the assistant"):
        template.examples(chat("fox"), each_turn=False)
    with pytest.raises(ValueError, match="message 4: the assistant's content is empty"):
        template.examples(chat("fox", "dog", "cat", " \n"), each_turn=False)
    mistral, gemma = template_of("byte_level", "mistral"), template_of("byte_level", "gemma")
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
def test_templates_that_change_contents_are_refused(content: str, error: str) -> None:
    tokenizer = byte_level()
    tokenizer.tokenizer.chat_template = LLAMA3.replace("message['content'] | trim", f"({content})")
    with pytest.raises(ValueError, match=error):
        ChatTemplate(tokenizer).prompt(chat("fox", system="over"))
