"""A client for the chat endpoint of `diffusify serve`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

# The options of `diffusify chat` that are also fields of a chat request.
SERVER_OPTIONS = (
    *("preset", "steps", "threshold", "tolerance", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("guidance", "regex", "window", "cache", "seed", "stop", "policy"),
)


@dataclass(frozen=True)
class ChatClient:
    """A client for the server at `url`. ValueError if the server rejects a request or cannot be reached."""

    url: str
    key: str | None = None

    def first_model(self) -> str:
        """The name of the first served model. ValueError if there is none."""
        with self._open("/v1/models") as response:
            models = json.load(response)["data"]
        if not models:
            raise ValueError(f"--url {self.url} serves no model; add one to the folder that it serves")
        return models[0]["id"]

    def answer(self, messages: list[dict[str, Any]], **fields: Any) -> str:
        """The next answer of a chat, printed while it arrives. `fields` are further fields of the request."""
        text = ""
        for chunk in self._stream(messages, fields):
            sys.stdout.write(chunk)
            sys.stdout.flush()
            text += chunk
        print()
        return text

    def _stream(self, messages: list[dict[str, Any]], fields: dict[str, Any]) -> Iterator[str]:
        """The chunks of an answer, from server-sent events."""
        with self._open("/v1/chat/completions", {"messages": messages, "stream": True, **fields}) as response:
            event = ""
            for line in response:
                field, _, value = line.decode().strip().partition(": ")
                if field == "event":
                    event = value
                elif field == "data" and event == "error":
                    raise ValueError(json.loads(value)["error"]["message"])
                elif field == "data" and value != "[DONE]":
                    yield from (choice["delta"].get("content") or "" for choice in json.loads(value)["choices"])

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self.url.rstrip("/").removesuffix("/v1") + path, data, headers))
        except HTTPError as error:
            raise ValueError(_error_message(error.read())) from error
        except (URLError, ValueError) as error:
            raise ValueError(f"--url {self.url} does not answer: {error}") from error


def _error_message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server at --url is not a `diffusify serve` server; it answered {body[:80]!r}"
