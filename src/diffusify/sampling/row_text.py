"""The text of a row: a continued prompt, the answer to a chat, or a text with filled spans.

All canvases here have one row.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from diffusify.canvas import Canvas
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.prompts import decode_canvas, decode_spans
from diffusify.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation."""

    tokenizer: TextTokenizer

    def completion(self, canvas: Canvas) -> str:
        """The generated text up to its end token."""
        given = canvas.tokens[canvas.real & ~canvas.editable].tolist()
        ids = _before_end(canvas, self.tokenizer.end_token_ids)
        return self.tokenizer.decode(ids, continues=given != [self.tokenizer.start_token_id])

    def fields(self, canvas: Canvas, dropped: str = "") -> dict[str, Any]:
        """The text fields of a `Generation`. `dropped` is the end of the completion that is left out."""
        text = decode_canvas(self.tokenizer, canvas)[0]
        return {"text": text.removesuffix(dropped), "completion": self.completion(canvas).removesuffix(dropped)}


@dataclass(frozen=True)
class Answer:
    """The assistant's next message in a chat."""

    template: ChatTemplate

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.template.tokenizer

    def completion(self, canvas: Canvas) -> str:
        """The generated text up to its end token, with the white space around it."""
        return self.tokenizer.decode(_before_end(canvas, self.template.end_token_ids), continues=True)

    def fields(self, canvas: Canvas, dropped: str = "") -> dict[str, Any]:
        """The text fields of a `Generation`, as those of a `Continuation`."""
        answer = self.completion(canvas).removesuffix(dropped).strip()
        return {"text": answer, "completion": answer}


@dataclass(frozen=True)
class Infilling:
    """A text whose masked spans are filled."""

    tokenizer: TextTokenizer

    def fields(self, canvas: Canvas) -> dict[str, Any]:
        """The text fields of a `Generation`."""
        text, spans = decode_canvas(self.tokenizer, canvas), decode_spans(self.tokenizer, canvas)
        return {"text": text[0], "spans": tuple(spans[0])}


def _before_end(canvas: Canvas, ends: tuple[int, ...]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, canvas.tokens[canvas.written].tolist()))


def leading_tokens(text: Continuation | Answer, canvas: Canvas, beginning: str) -> list[int]:
    """The tokens of the beginning of a completion.

    A token that is only partly in it is replaced by tokens of that part.
    """
    ids, start = canvas.tokens[canvas.written].tolist(), int(canvas.editable[0].long().argmax())
    count = len(ids)
    while not beginning.startswith(whole := text.completion(canvas[:, : start + count])):
        count -= 1
    return ids[:count] + text.tokenizer.encode(beginning[len(whole) :], continues=True)
