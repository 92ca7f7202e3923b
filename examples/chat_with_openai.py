"""Use a served model with the `openai` client: a completion, a stream, and JSON that follows a schema.

diffusify serve runs/demo &
python examples/chat_with_openai.py http://127.0.0.1:8000
"""

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "wild": {"type": "boolean"}},
    "required": ["name", "wild"],
}


def main(address: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = client.models.list().data[0].id

    completion = client.completions.create(model=model, prompt="The with statement", max_tokens=24, temperature=0)
    print(completion.choices[0].text, completion.usage)

    # extra_body holds the fields that OpenAI does not have. tolerance 0 is lossless speculative decoding: the text of
    # AR decoding, in fewer forward passes.
    extra = {"tolerance": 0.0}
    for chunk in client.completions.create(model=model, prompt="A list", max_tokens=24, stream=True, extra_body=extra):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    schema = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    message = {"role": "user", "content": "Describe a cat as JSON."}
    answer = client.chat.completions.create(model=model, messages=[message], max_tokens=48, response_format=schema)
    print(json.loads(answer.choices[0].message.content or ""))


if __name__ == "__main__":
    main(sys.argv[1])
