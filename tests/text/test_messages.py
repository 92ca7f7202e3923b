"""The forms in which chats are published become the same messages."""

import json
from typing import Any

import pytest

from diffusify.text.chat_template import ChatTemplate
from diffusify.text.messages import prompt_messages, record_messages
from tests.text.chats import chat_tokenizer

USER, ANSWER = {"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}
SYSTEM = {"role": "system", "content": "be brief"}
GIVEN = {"role": "assistant", "content": "cat", "train": False}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "USER", "content": "fox"}, {"role": "ASSISTANT", "content": "dog"}]},
        {"messages": [{"role": "user", "content": parts("fox")}, {"role": "assistant", "content": parts("dog")}]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": repr([USER, ANSWER])},
        {"conversation": [{"from": "Human", "value": "fox"}, {"from": "GPT", "value": "dog"}]},
        {"messages": [USER, ANSWER], "system": "", "tools": "[]", "history": []},
        {"prompt": "fox", "chosen": "dog", "rejected": "cat"},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "cat"}]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "cat"}]},
        {
            "conversations": [{"from": "human", "value": "fox"}],
            "chosen": {"from": "gpt", "value": "dog"},
            "rejected": 0,
        },
        {"messages": [USER, ANSWER], "label": True, "kto_tag": "True"},
    ],
)
def test_forms_of_one_chat(record: dict[str, Any]) -> None:
    found = record_messages(record)
    assert [{"role": m["role"], "content": m["content"]} for m in found] == [USER, ANSWER]
    assert found[1].get("train", True)


def test_a_conversational_prompt_is_not_learned() -> None:
    earlier = {"role": "assistant", "content": "cat"}
    found = record_messages({"prompt": [USER, earlier, USER], "completion": [ANSWER]})
    assert [message.get("train", True) for message in found if message["role"] == "assistant"] == [False, True]
    assert found[-1] == ANSWER


def test_only_the_last_answer_of_a_preference_is_learned() -> None:
    chosen = [USER, {"role": "assistant", "content": "cat"}, USER, ANSWER]
    found = record_messages({"chosen": chosen, "rejected": chosen[:2]})
    assert found[1] == GIVEN and found[3] == ANSWER


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [USER, ANSWER, USER], "chosen": ANSWER}, [USER, ANSWER, USER, ANSWER]),
        ({"instruction": "fox", "input": "2", "chosen": "dog"}, [USER | {"content": "fox\n\n2"}, ANSWER]),
        ({"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "fox", "chosen": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ],
)
def test_a_preference_has_its_whole_prompt(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    record = {**record, "rejected": "cat"}
    *given, chosen = record_messages(record)
    assert [{"role": m["role"], "content": m["content"]} for m in given] == messages[:-1] and chosen == messages[-1]
    assert not any(message["train"] for message in given) and prompt_messages(record) == given


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_system_and_history_columns(field: str) -> None:
    record = {"instruction": "fox", "output": "dog", field: "be brief", "history": [["hello", "hi"]]}
    hello = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert record_messages(record) == [SYSTEM, *hello, USER, ANSWER]
    with pytest.raises(ValueError, match=f"the field {field} and another system message differ"):
        record_messages({"messages": [{"role": "system", "content": "other"}, USER, ANSWER], field: "be brief"})


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"messages": [USER, ANSWER], "tools": [{"name": "add"}]}, "the field tools is not part of the messages"),
        ({"question": "fox", "answer": "dog", "context": "x"}, "the field context is not part .* {context}"),
        ({"messages": "fox"}, "a text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "is not text but"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "message 2: weight is 0.5"),
        ({"prompt": "fox", "completion": "dog", "label": False}, "label is false"),
        ({"messages": [USER, ANSWER], "label": "False"}, "label is false"),
        ({"messages": [USER, ANSWER], "kto_tag": False}, "kto_tag is false"),
        ({"messages": [USER, ANSWER], "chosen": "dog", "rejected": "cat"}, "messages ends with one as well"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER | {"content": "x"}], "rejected": []}, "does not begin with"),
    ],
)
def test_what_cannot_be_honoured_is_refused(record: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        record_messages(record)


def test_a_label_says_nothing_about_a_prompt() -> None:
    assert prompt_messages({"messages": [USER, ANSWER], "label": False}) == [USER]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"trainable": False}])
@pytest.mark.parametrize("each_turn", [False, True])
def test_marked_answers_are_given_but_not_learned(mark: dict[str, Any], each_turn: bool) -> None:
    tokenizer = chat_tokenizer("byte_level", "chatml")
    chat = [USER, {"role": "assistant", "content": "cat"}, {"role": "user", "content": "two"}, ANSWER]
    marked = record_messages({"messages": [USER, chat[1] | mark, *chat[2:]]})
    (example,) = ChatTemplate(tokenizer).examples(marked, each_turn=each_turn)
    plain = ChatTemplate(tokenizer).examples(chat, each_turn=False)[-1]  # the last answer alone
    assert example == plain
    with pytest.raises(ValueError, match="nothing to train on"):
        ChatTemplate(tokenizer).examples(marked[:2], each_turn=each_turn)
