"""What people see in the terminal: texts that fill in, chats, one clear line for a mistake."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from diffusify.sampling.diffusion_lm import DiffusionLM, GenerationRun, Message
    from diffusify.sampling.sampler import Frame
    from diffusify.sampling.sampling_config import SamplingConfig

# Of several processes only the first one speaks.
say = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the user did wrong is one line and exit code 2; what went wrong meanwhile is one line and exit code 1."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        say.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (FloatingPointError, OSError) as error:  # the machine's doing, or the numbers'
        say.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def suggest(*commands: str) -> None:
    """Commands to try next, never wrapped: they are there to be copied."""
    say.print("next:")
    for command in commands:
        say.print(f"  {command}", markup=False, soft_wrap=True)


def write(lm: "DiffusionLM", writing: "GenerationRun", *, watch: bool, as_json: bool) -> None:
    """Take a writing to its end and print it."""
    if watch:
        look(lm, writing)
    result = writing.results()[0]
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
        return
    print(result.text)
    say.print(
        f"{result.tokens} tokens, {result.forwards} forwards ({result.tokens_per_forward:.2f} tokens per forward), "
        f"{result.seconds:.1f} s ({result.tokens_per_second:.1f} tokens/s)",
        style="dim",
    )


def look(lm: "DiffusionLM", writing: "GenerationRun", *, prompt: bool = True) -> None:
    """Show a writing live."""
    with Live(console=say, refresh_per_second=12, transient=True) as live:
        for frame in writing:
            live.update(picture(lm, frame, prompt=prompt))


def picture(lm: "DiffusionLM", frame: "Frame", *, prompt: bool = True) -> Text:
    """A canvas for the terminal: the prompt as it is, written tokens from red (guessed) to green (sure), holes dim."""
    canvas, text = frame.canvas, Text()
    cells = zip(canvas.tokens[0].tolist(), canvas.open[0].tolist(), canvas.editable[0].tolist(), strict=True)
    for (token, is_open, editable), score in zip(cells, frame.score[0].exp().tolist(), strict=True):
        if not (editable or prompt):
            continue
        if is_open:
            text.append("\u2581", style="dim")
            continue
        colour = f"rgb({int(255 * (1 - score))},{int(90 + 130 * score)},90)" if editable else ""
        text.append(lm.tokenizer.decode([token], continues=bool(text)), style=colour)
    return text


def converse(answer: "Callable[[list[Message]], str]", system: str | None) -> None:
    """Questions from standard input, answers on standard output, until the input ends."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    say.print("an empty line or Ctrl-D ends the chat, /reset forgets it", style="dim")
    while True:
        try:
            question = say.input("[bold]you[/] ").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(messages)})


def answer_live(lm: "DiffusionLM", messages: "list[Message]", room: int | None, settings: "SamplingConfig") -> str:
    """The next answer of a chat, printed, and shown filling in before that."""
    writing = lm.prepare_chat([messages], room, settings)
    if say.is_terminal:
        look(lm, writing, prompt=False)
    answer = writing.results()[0]
    print(answer.text, flush=True)
    say.print(f"{answer.tokens} tokens, {answer.forwards} forwards, {answer.seconds:.1f} s", style="dim")
    return answer.text
