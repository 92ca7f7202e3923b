"""A chat with a model that somebody serves."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

# Options of `diffusify chat` that a server's chats have, too.
WISHES = (
    *("preset", "steps", "threshold", "tolerance", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("guidance", "regex", "window", "cache", "seed"),
)


@dataclass(frozen=True)
class Remote:
    """A server's chat endpoint. ValueError for what it refuses, or if nobody is there."""

    url: str
    key: str | None = None

    def models(self) -> list[str]:
        with self._open("/v1/models") as answer:
            return [model["id"] for model in json.load(answer)["data"]]

    def answer(self, messages: list[dict[str, Any]], **wishes: Any) -> str:
        """The next answer, printed while it comes."""
        text = ""
        for part in self._parts(messages, wishes):
            sys.stdout.write(part)
            sys.stdout.flush()
            text += part
        print()
        return text

    def _parts(self, messages: list[dict[str, Any]], wishes: dict[str, Any]) -> Iterator[str]:
        with self._open("/v1/chat/completions", {"messages": messages, "stream": True, **wishes}) as stream:
            name = ""
            for line in stream:
                field, _, value = line.decode().strip().partition(": ")
                if field == "event":
                    name = value
                elif field == "data" and name == "error":
                    raise ValueError(json.loads(value)["error"]["message"])
                elif field == "data" and value != "[DONE]":
                    yield from (c["delta"].get("content") or "" for c in json.loads(value)["choices"])

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self.url.rstrip("/").removesuffix("/v1") + path, data, headers))
        except HTTPError as error:
            raise ValueError(_message(error.read())) from error
        except (URLError, ValueError) as error:
            raise ValueError(f"--url {self.url} does not answer: {error}") from error


def _message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answers {body[:80]!r}, which is no answer of `diffusify serve`"
