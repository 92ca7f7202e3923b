"""Chat templates of published models, and tokenizers with their special tokens."""

from tokenizers import pre_tokenizers

from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import byte_level, sentence_bpe, unigram, word_piece

# SmolLM2: has a default system message.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful fox<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: trims contents.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Mistral 7B: no generation prompt, no system messages; roles must alternate.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Llama 2: spaces around an answer; the system message is part of the first user message.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + "
    "'\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Zephyr: roles are not special tokens.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Gemma: other names for roles, no system messages.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Qwen 3: a thought, which is empty here, before the answers after the last question only.
QWEN3 = (
    "{% set ns = namespace(last_question=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last_question = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last_question %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# Vicuna: no special tokens at all.
VICUNA = (
    "{% for message in messages %}{{ {'user': 'USER', 'assistant': 'ASSISTANT', 'system': 'SYSTEM'}[message['role']] "
    "+ ': ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# (template, whether it takes system messages)
STYLES = {
    "chatml": (CHATML, True),
    "llama3": (LLAMA3, True),
    "mistral": (MISTRAL, False),
    "llama2": (LLAMA2, True),
    "zephyr": (ZEPHYR, True),
    "gemma": (GEMMA, False),
    "vicuna": (VICUNA, True),
    "plain": (None, True),
}
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>",
)  # fmt: skip


def first_only() -> TextTokenizer:
    """As newer Llama 2 and Mistral: a space before a text's first word, and none after a special token."""
    tokenizer = unigram()
    tokenizer.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "word_piece": word_piece,
    "unigram": unigram,
    "first_only": first_only,
    "sentence_bpe": sentence_bpe,
}


def chat_tokenizer(kind: str, style: str) -> TextTokenizer:
    """A tiny tokenizer with a chat template and the special tokens of all templates."""
    tokenizer = KINDS[kind]()
    tokenizer.tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.tokenizer.chat_template = STYLES[style][0]
    if kind == "word_piece":  # templates use BOS and EOS
        tokenizer.tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    return tokenizer
