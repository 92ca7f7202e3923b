"""The chat that a record holds: the forms in which chats, pairs and preferences are published, as messages.

A message has `role` and `content`, and `train: False` if it is given and not to be learnt.
"""

import ast
import json
from typing import Any

Message = dict[str, Any]

CHAT_FIELDS = ("messages", "conversations", "conversation")
PAIR_FIELDS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("inputs", "targets"),
    ("source", "target"),
)
_PROMPT_FIELDS = ("prompt", "question", "instruction", *CHAT_FIELDS)  # beside `chosen` and `rejected`
LABEL_FIELDS = ("label", "kto_tag")  # false beside an answer to avoid, as for KTO
_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
# What belongs to a chat but is not among its messages, so a chat without it would be another one.
_UNSUPPORTED_FIELDS = ("context", "tools", "functions", "documents", "image", "images", "video", "videos", "audio")
_UNSUPPORTED_KEYS = ("function_call", "reasoning_content", "reasoning", "thinking", "train_detail")
# Names of the field that says whether a message is learnt: of OpenAI, Axolotl, Swift and others.
_LEARNT_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
}  # fmt: skip
_EMPTY = (None, "", "[]", "{}", "null", [], {})


def record_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record. ValueError if it has none of the known forms, or holds more than they can express.

    - `messages` or `conversations`: a list of messages, or the list as JSON in a string; ShareGPT's `from` and `value`;
      roles in any case; contents as a string or as parts of text.
    - A pair (see PAIR_FIELDS): two texts, with `input` or `context` for an `instruction`; or two lists of messages, of
      which only the second is learnt.
    - `chosen` and `rejected`, with a prompt (a text, or messages) or without: only the chosen answer is learnt.
    - `system` is the first message, `history` the turns before the others.

    Messages with `weight: 0`, `train: false`, `loss_mask: 0` or `trainable: false` are not learnt. A record with
    `label: false` or `kto_tag: false` is refused.
    """
    field = next((field for field in CHAT_FIELDS if record.get(field) is not None), None)
    if is_preference(record):
        messages, used = _preferred(record)
    elif field is not None:
        messages, used = _messages(record[field], field), ()
    else:
        messages, used = _pair(record)
    for name in _UNSUPPORTED_FIELDS:
        if name not in used and record.get(name) not in _EMPTY:
            raise ValueError(
                f"the field {name} is not part of the messages, so it would be left out; write it into them, give a "
                f"template that has {{{name}}}, or remove the field"
            )
    for name in LABEL_FIELDS:
        if str(record.get(name)).lower() == "false":
            raise ValueError(f"{name} is false, so the answer is one to avoid; leave the record out")
    messages = _with_opening(record, messages)
    return _only_last_learnt(messages) if is_preference(record) else messages


def prompt_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record without the last answer; a pair may lack it. ValueError as in `record_messages`."""
    answers = {  # an empty string or list, like the question
        answer: type(record[question])()
        for question, answer in PAIR_FIELDS
        if isinstance(record.get(question), str | list)
    }
    given = {name: value for name, value in record.items() if value is not None and name not in LABEL_FIELDS}
    messages = record_messages(answers | given)
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return messages


def is_preference(record: dict[str, Any]) -> bool:
    """Whether a record holds a chosen and a rejected answer."""
    return record.get("chosen") is not None and record.get("rejected") is not None


def is_pair(record: dict[str, Any]) -> bool:
    """Whether a record that has messages is a question and its answer as texts."""
    if any(record.get(field) is not None for field in CHAT_FIELDS) or is_preference(record):
        return False
    return any(isinstance(record.get(question), str) for question, _ in PAIR_FIELDS)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if set(keys) <= value[0].keys()), None)
    return keys is not None and str(value[0][keys[0]]).lower() in _ROLES and all(keys[0] in item for item in value)


def _messages(value: Any, field: str) -> list[Message]:
    """A list of messages, which may be written as a string."""
    if isinstance(value, str):
        value = _parse_list(value, field)
    if not isinstance(value, list):
        raise ValueError(f"the field {field} is not a list of messages but {str(value)[:40]}")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _parse_list(text: str, field: str) -> Any:
    for parse in (json.loads, ast.literal_eval):  # the second for tables that pandas wrote
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"the field {field} is a text that is not JSON but {text[:40]!r}; write a list of messages")


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{str(message)[:40]} is not a message; write {{"role": "user", "content": "Hello"}}')
    if message.get("from") is not None and "value" in message:
        message = {**message, "role": message["from"], "content": message["value"]}
    if not {"role", "content"} <= message.keys():
        return message  # which ChatTemplate refuses
    for key in _UNSUPPORTED_KEYS:
        if message.get(key) not in _EMPTY:
            raise ValueError(f"message {number}: the field {key} is not supported; write it into the content")
    role, content = message["role"], message["content"]
    role = _ROLES.get(role.lower(), role) if isinstance(role, str) else role
    content = "\n".join(_part(part, number) for part in content) if isinstance(content, list) else content
    cleaned = {"role": role, "content": content}
    if message.get("tool_calls") not in _EMPTY:
        cleaned["tool_calls"] = message["tool_calls"]
    return cleaned | _learnt(message, role, number)


def _part(part: Any, number: int) -> str:
    """The text of a part of a content."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str) and (not isinstance(part, dict) or str(part.get("type", "text")).endswith("text")):
        return text
    raise ValueError(f"message {number}: a part of the content is not text but {str(part)[:40]}; leave the chat out")


def _learnt(message: Message, role: Any, number: int) -> dict[str, bool]:
    """`train: False` for an answer that is marked as not to be learnt."""
    marks = {key: message[key] for key in _LEARNT_KEYS if message.get(key) is not None}
    learnt = True
    for key, value in marks.items():
        value = {"true": 1, "false": 0, "1": 1, "0": 0}.get(value.lower()) if isinstance(value, str) else value
        if value not in (0, 1):
            raise ValueError(
                f"message {number}: {key} is {str(message[key])[:40]}, but a message is learnt (1) or not (0)"
            )
        if value and role != "assistant":
            raise ValueError(
                f"message {number}: {key} is set for the {role}, but only the assistant's messages are learnt"
            )
        learnt = learnt and bool(value)
    return {} if learnt or role != "assistant" else {"train": False}


def _preferred(record: dict[str, Any]) -> tuple[list[Message], tuple[str, ...]]:
    """The prompt of a preference and its chosen answer, and the names of further fields that are in them."""
    field = next((field for field in _PROMPT_FIELDS if record.get(field) is not None), None)
    prompt, used = ([], ()) if field is None else _question(record, field)
    chosen = _turns(record["chosen"], "assistant", "chosen")
    if not prompt and isinstance(record["chosen"], str):
        raise ValueError("chosen is a text without a prompt; add a field prompt, or write lists of messages")
    if not chosen or chosen[0].get("role") == "assistant":
        if prompt and prompt[-1].get("role") == "assistant":
            raise ValueError(f"chosen is an answer, but {field} ends with one as well; remove one of the two")
        return prompt + chosen, used
    (systems, given), (own, turns) = _split_system(prompt), _split_system(chosen)
    if turns[: len(given)] != given or (systems and own and systems != own):
        raise ValueError("chosen is a whole chat that does not begin with the prompt; remove one of the two")
    return (own or systems) + turns, used


def _pair(record: dict[str, Any]) -> tuple[list[Message], tuple[str, ...]]:
    """The messages of a question and its answer, and the names of further fields that are in them."""
    for question, answer in PAIR_FIELDS:
        if record.get(question) is None or record.get(answer) is None:
            continue
        if isinstance(record[question], list) and isinstance(record[answer], list):
            given = [message | {"train": False} for message in _messages(record[question], question)]
            return given + _messages(record[answer], answer), ()
        for text in (record[question], record[answer]):
            if not isinstance(text, str):
                raise ValueError(f"{question} and {answer} must be strings, not {str(text)[:40]}; or give a template")
        messages, used = _question(record, question)
        return [*messages, {"role": "assistant", "content": record[answer]}], used
    fields = list(record) or ["question", "answer"]
    found = ", ".join(f"{name} (null)" if value is None else name for name, value in record.items()) or "none"
    raise ValueError(
        f"fields {found} are neither a chat nor a known pair; give a template of prompt and "
        f"target, such as '{{{fields[0]}}}\\nAnswer:' and ' {{{fields[-1]}}}'"
    )


def _question(record: dict[str, Any], field: str) -> tuple[list[Message], tuple[str, ...]]:
    """A prompt, after an instruction with its input, and the names of further fields that may be in it."""
    value = record[field]
    used = ("input", "context") if field == "instruction" and isinstance(value, str) else ()
    for name in used:
        if record.get(name) and not isinstance(record[name], str):
            raise ValueError(f"{field} and {name} must be strings, not {str(record[name])[:40]}; or give a template")
        value = f"{value}\n\n{record[name]}" if record.get(name) else value
    return _messages(value, field) if field in CHAT_FIELDS else _turns(value, "user", field), used


def _turns(value: Any, role: str, field: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages([value] if isinstance(value, dict) else value, field)


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message at the start, if there is one, and the others."""
    count = int(bool(messages) and messages[0].get("role") == "system")
    return messages[:count], messages[count:]


def _with_opening(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the record's system message and history."""
    systems, turns = _split_system(messages)
    for field in _SYSTEM_FIELDS:
        text = record.get(field)
        if text in _EMPTY:
            continue
        if not isinstance(text, str):
            raise ValueError(f"the field {field} is not a text but {str(text)[:40]}")
        if systems and systems[0]["content"] != text:
            raise ValueError(f"the field {field} and another system message differ; remove one of the two")
        systems = [{"role": "system", "content": text}]
    return systems + _history(record.get("history")) + turns


def _history(value: Any) -> list[Message]:
    """Earlier turns: a list of messages, or of pairs of question and answer."""
    value = _parse_list(value, "history") if isinstance(value, str) and value.strip() else value
    if value in _EMPTY:
        return []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        roles = ("user", "assistant")
        value = [{"role": role, "content": text} for turn in value for role, text in zip(roles, turn, strict=True)]
    return _messages(value, "history")


def _only_last_learnt(messages: list[Message]) -> list[Message]:
    last = max((n for n, message in enumerate(messages) if message.get("role") == "assistant"), default=0)
    return [message if n == last else message | {"train": False} for n, message in enumerate(messages)]
