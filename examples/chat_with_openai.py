"""The `openai` client with a served model: a completion, a stream, and JSON of a given schema.

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

    told = client.completions.create(model=model, prompt="The with statement", max_tokens=24, temperature=0)
    print(told.choices[0].text, told.usage)

    # extra_body holds what OpenAI has no word for: here the left-to-right model's own text, in fewer forwards.
    fast = {"tolerance": 0.0}
    for part in client.completions.create(model=model, prompt="A list", max_tokens=24, stream=True, extra_body=fast):
        print(part.choices[0].text, end="", flush=True)
    print()

    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    asked = {"role": "user", "content": "Describe a cat as JSON."}
    answer = client.chat.completions.create(model=model, messages=[asked], max_tokens=48, response_format=form)
    print(json.loads(answer.choices[0].message.content or ""))


if __name__ == "__main__":
    main(sys.argv[1])
