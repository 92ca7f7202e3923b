"""Chat templates in the forms in which published models are shown tools and write tool calls."""

from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import byte_level

# Qwen 2.5 and Hermes: calls between tags, which are tokens but not special ones.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>\n<tool_call>"
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n\' }}{% endif %}'
    "{% for message in messages %}{% if message.role == 'system' and tools %}"
    "{% elif message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}{% for call in message.tool_calls %}"
    '{% set call = call.function %}{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>"
    "<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3.1: tools in the first user message, one call at a time as plain JSON, results as JSON.
LLAMA3 = (
    "{{ bos_token }}{% set ns = namespace(messages=messages) %}{% if tools %}"
    '{{ \'<|start_header_id|>user<|end_header_id|>\n\nRespond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.\n\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}"
    "{% endfor %}{{ messages[0].content | trim + '<|eot_id|>' }}{% set ns.messages = messages[1:] %}{% endif %}"
    "{% for message in ns.messages %}{% if 'tool_calls' in message %}{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ message.content | tojson + '<|eot_id|>' }}{% else %}{{ '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Mistral Nemo: a list of calls after a special token, with ids of nine characters.
MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% if tools and message == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}{% elif message.tool_calls is defined %}{{ '[TOOL_CALLS][' }}"
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' + eos_token if loop.last else ', ') }}"
    "{% endfor %}{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + message.content + "
    "', \"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"qwen": QWEN, "llama3": LLAMA3, "mistral": MISTRAL}
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
TAGS = ("<tool_call>", "</tool_call>")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}


def tool_tokenizer(style: str) -> TextTokenizer:
    """A byte-level tokenizer with one of the templates and the tokens of all of them."""
    tokenizer = byte_level()
    tokenizer.tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.tokenizer.add_tokens(list(TAGS))
    tokenizer.tokenizer.chat_template = TEMPLATES[style]
    return tokenizer
