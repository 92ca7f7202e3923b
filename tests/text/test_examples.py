"""Records become examples with the right tokens as prompt and the right ones as target."""

import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.text.chat_template import ChatTemplate
from diffusify.text.examples import Template, make_examples
from diffusify.text.tokenizer import TextTokenizer
from tests.text.chats import chat_tokenizer
from tests.text.makers import byte_level, sentence_bpe, unigram, word_piece

BYTES = byte_level()
ALL = [BYTES, word_piece(), unigram(), sentence_bpe()]
TRANSLATE = Template("German: {de}\nEnglish:", " {en}")
TEXT = st.text("the fox<|mask|>{}\n[SEP]</s>", max_size=12)


def records(*given: dict[str, Any]) -> Dataset:
    return Dataset.from_dict({"record": [json.dumps(record) for record in given], "fault": [None] * len(given)})


def examples_of(
    tokenizer: TextTokenizer,
    *given: dict[str, Any],
    template: Template | None = None,
    each_turn: bool = False,
    length: int = 1000,
) -> list[dict[str, list[int]]]:
    made = make_examples(records(*given), tokenizer, template=template, each_turn=each_turn, length=length)
    assert not made.too_long and made.rows.column_names == ["tokens", "target"]
    return [dict(row) for row in made.rows]  # pyright: ignore  (a row is a dict)


@pytest.mark.parametrize("tokenizer", ALL)
@given(de=TEXT, en=TEXT.filter(str.strip))
@settings(max_examples=20)
def test_a_templated_pair(tokenizer: TextTokenizer, de: str, en: str) -> None:
    (row,) = examples_of(tokenizer, {"de": de, "en": en}, template=TRANSLATE)
    prompt = [tokenizer.start_token_id, *tokenizer.encode(f"German: {de}\nEnglish:")]
    answer = row["tokens"][len(prompt) :]
    assert row["tokens"][: len(prompt)] == prompt
    assert row["target"] == [False] * len(prompt) + [True] * len(answer)
    assert answer == [*tokenizer.encode(f" {en}", continues=True), tokenizer.end_token_id]
    assert answer.count(tokenizer.end_token_id) == 1  # and no padding, even where that is the end token
    assert tokenizer.mask_token_id not in row["tokens"]


def test_a_pair_without_a_prompt() -> None:
    for tokenizer in ALL:
        (row,) = examples_of(tokenizer, {"en": "the fox"}, template=Template("", "{en}"))
        assert row["tokens"] == tokenizer.document("the fox")
        assert row["target"] == [False] + [True] * (len(row["tokens"]) - 1)


def test_filling_a_template() -> None:
    template = Template('{{"{a b}": {n}}}', "{flag}{x}")
    record = {"a b": "{n}", "n": 3, "flag": True, "x": ["\u00e9"], "nothing": None}
    assert template.fill_prompt(record) == '{"{n}": 3}'
    assert template.fill_target(record) == 'true["\u00e9"]'
    with pytest.raises(ValueError, match='no field "de" for template .*; fields: a b, n, flag, x, nothing'):
        TRANSLATE.fill_prompt(record)
    with pytest.raises(ValueError, match='no field "nothing"'):
        Template("{nothing}", "{x}").fill_prompt(record)


@pytest.mark.parametrize("text", ["{", "}", "{}", "{a!r}", "{a:>3}", '{"a": {a}}', "{a"])
def test_invalid_templates(text: str) -> None:
    for prompt, target in ((text, "{a}"), ("{a}", "{a}" + text)):
        with pytest.raises(ValueError, match="template .*written twice"):
            Template(prompt, target)


def test_a_target_without_a_field() -> None:
    with pytest.raises(ValueError, match="target ' the end' of the template has no field"):
        Template("{a}", " the end")


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "fox", "output": "dog"}, "fox"),
        ({"instruction": "fox", "input": "cat", "output": "dog"}, "fox\n\ncat"),
        ({"instruction": "fox", "input": "", "output": "dog"}, "fox"),
        ({"instruction": "fox", "input": None, "output": "dog", "id": 3}, "fox"),
        ({"prompt": "fox", "completion": "dog"}, "fox"),
        ({"prompt": "fox", "completion": None, "response": "dog"}, "fox"),
        ({"question": "fox", "answer": "dog"}, "fox"),
        ({"inputs": "fox", "targets": "dog"}, "fox"),
        ({"source": "fox", "target": "dog"}, "fox"),
        ({"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}, "fox"),
        ({"conversations": [{"from": "human", "value": "fox"}, {"from": "gpt", "value": "dog"}]}, "fox"),
        ({"conversations": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}, "fox"),
    ],
)
def test_record_formats(record: dict[str, Any], question: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "dog"}]
    tokenizer = chat_tokenizer("byte_level", "chatml")
    (example,) = ChatTemplate(tokenizer).examples(messages, each_turn=True)
    assert examples_of(tokenizer, record) == [{"tokens": example.tokens, "target": example.target}]


def test_chats_of_several_turns() -> None:
    turns = [("system", "over"), ("human", "fox"), ("gpt", "dog"), ("human", "cat"), ("gpt", "done")]
    record = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    tokenizer = chat_tokenizer("byte_level", "llama3")
    first, second = examples_of(tokenizer, record)
    (whole,) = examples_of(tokenizer, record, each_turn=True)
    assert whole["tokens"] == second["tokens"] and sum(whole["target"]) == sum(first["target"]) + sum(second["target"])


def test_the_chosen_answer_of_a_preference_is_learned_and_told() -> None:
    preference = {"prompt": "fox", "chosen": "dog", "rejected": "cat"}
    made = make_examples(records(preference), byte_level(), template=None, each_turn=False, length=100)
    assert BYTES.decode(made.rows["tokens"][0]) == "User: fox\nAssistant: dog"
    assert list(made.notes(100)) == ["1 records are preferences: chosen answers are learned, rejected ones unused"]


def test_a_tokenizer_without_a_chat_template_is_given_one() -> None:
    tokenizer = byte_level()
    (row,) = examples_of(tokenizer, {"question": "fox", "answer": "dog"})
    assert tokenizer.decode(row["tokens"]) == "User: fox\nAssistant: dog"
    assert tokenizer.tokenizer.chat_template


def test_long_examples_are_left_out_whole() -> None:
    pairs = [{"de": "fox", "en": "dog " * n} for n in (1, 9, 2, 30)]
    sizes = [len(row["tokens"]) for row in examples_of(BYTES, *pairs, template=TRANSLATE)]
    made = make_examples(records(*pairs), BYTES, template=TRANSLATE, each_turn=False, length=sizes[1])
    assert made.too_long == 1 and [len(tokens) for tokens in made.rows["tokens"]] == sizes[:3]
    made = make_examples(records(*pairs), BYTES, template=TRANSLATE, each_turn=False, length=sizes[1] - 1)
    assert made.too_long == 2 and [len(tokens) for tokens in made.rows["tokens"]] == [sizes[0], sizes[2]]
    with pytest.raises(ValueError, match=f"no example fits into length=5; the shortest has {sizes[0]} tokens"):
        make_examples(records(*pairs), BYTES, template=TRANSLATE, each_turn=False, length=5)


@pytest.mark.parametrize(
    ("record", "template", "error"),
    [
        ({"task": "x", "body": "y"}, None, r"fields task, body are neither .* '{task}\\nAnswer:' and ' {body}'"),
        ({}, None, "fields none are neither"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, None, "prompt and completion must be strings, not"),
        ({"instruction": "x", "input": ["y"], "output": "z"}, None, "must be strings, not .'y'"),
        ({"question": "x", "answer": " "}, None, "message 2: the assistant's content is empty"),
        ({"messages": []}, None, "no messages"),
        ({"messages": [{"from": "bard", "value": "x"}]}, None, 'message 1: role "bard" is not known'),
        ({"messages": ["x"]}, None, "x is not a message; write"),
        ({"de": "x"}, TRANSLATE, 'no field "en" for template .*; fields: de'),
        ({"question": "x", "answer": "nice \ud83d"}, None, "lone surrogate"),
        ({"de": "nice \ud83d", "en": "x"}, TRANSLATE, "lone surrogate"),
        ({"de": "x", "en": "\n"}, TRANSLATE, "the target ' {en}' is empty for this record"),
    ],
)
def test_errors(record: dict[str, Any], template: Template | None, error: str) -> None:
    valid = {"question": "fox", "answer": "dog", "de": "fox", "en": "dog"}
    with pytest.raises(ValueError, match=f"record 2: .*{error}"):
        examples_of(byte_level(), valid, record, template=template)


def test_errors_without_records() -> None:
    with pytest.raises(ValueError, match="no records"):
        make_examples(records(), BYTES, template=None, each_turn=False, length=10)
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        examples_of(BYTES, {"de": "x", "en": "y"}, template=TRANSLATE, length=1)
