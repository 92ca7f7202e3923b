"""Terminal output that commands share: errors, live text, chats and suggested commands."""

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from diffusify.sampling.diffusion_lm import DiffusionLM, GenerationRun, Message
    from diffusify.sampling.sampler import Frame
    from diffusify.sampling.sampling_config import SamplingConfig

# Messages go to standard error, and under torchrun only from rank 0.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def report_errors() -> Iterator[None]:
    """Print an expected error as one line. The exit code is 2 for wrong input, 1 for failures, 130 for Ctrl-C.

    Characters that the encoding of standard output lacks are written escaped, so that no output is lost.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="json_escape")
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (FloatingPointError, OSError) as error:  # non-finite losses, and failures of disk or network
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    """Characters that cannot be encoded as JSON writes them, so that JSON stays valid."""
    assert isinstance(error, UnicodeEncodeError), "an error handler of output"
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json_escape", _json_escape)


def read_stdin() -> str:
    """Standard input without one final line break, which `echo` and text files end with."""
    text = sys.stdin.read()
    return text.removesuffix("\n").removesuffix("\r")


def suggest(*commands: str) -> None:
    """Print commands to try next, each on one unwrapped line so that it can be copied."""
    console.print("try next:")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)


def print_generation(lm: "DiffusionLM", run: "GenerationRun", *, watch: bool, as_json: bool) -> None:
    """Finish a generation run and print its texts, with a rule between them; its statistics go to standard error.

    As JSON, one text is an object, and several are a list.
    """
    if watch:
        show_live(lm, run)
    results = run.results()
    if as_json:
        plain = [result.to_dict() for result in results]
        print(json.dumps(plain if len(plain) > 1 else plain[0], ensure_ascii=False))
        return
    for n, result in enumerate(results):
        if n:
            Console().rule(characters="-", style="dim")
        print(result.text)
    whole = replace(results[0], tokens=sum(result.tokens for result in results))
    console.print(
        f"{whole.tokens} tokens in {whole.forwards} forward passes ({whole.tokens_per_forward:.2f} tokens per forward "
        f"pass), {whole.seconds:.1f} s ({whole.tokens_per_second:.1f} tokens/s)",
        style="dim",
    )
    if lm.config.recipe == "as_is":
        console.print(f"{lm.config.base_model} is not a diffusion model yet, and was used as it is", soft_wrap=True)
        suggest(f"diffusify adapt {lm.config.base_model} --data TEXT")


def show_live(lm: "DiffusionLM", run: "GenerationRun", *, prompt: bool = True) -> None:
    """Show the text of a generation run while it is denoised, with or without its prompt."""
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        for frame in run:
            live.update(render_frame(lm, frame, prompt=prompt))


def render_frame(lm: "DiffusionLM", frame: "Frame", *, prompt: bool = True) -> Text:
    """The first row of a canvas as coloured text.

    The prompt is uncoloured, generated tokens go from red (low probability) to green (high), masked positions are dim.
    """
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


def chat_loop(answer: "Callable[[list[Message]], str]", system: str | None) -> None:
    """Read user messages from standard input and answer them, until an empty line or the end of the input."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    console.print("An empty line or Ctrl-D ends the chat. /reset starts a new one.", style="dim")
    while True:
        try:
            question = console.input("[bold]you[/] ").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(messages)})


def print_answer(
    lm: "DiffusionLM", messages: "list[Message]", max_new_tokens: int | None, settings: "SamplingConfig"
) -> str:
    """Generate the next answer of a chat and print it; in a terminal, also show it while it is denoised."""
    run = lm.prepare_chat([messages], max_new_tokens, settings)
    if console.is_terminal:
        show_live(lm, run, prompt=False)
    answer = run.results()[0]
    print(answer.text, flush=True)
    console.print(f"{answer.tokens} tokens in {answer.forwards} forward passes, {answer.seconds:.1f} s", style="dim")
    if answer.finish_reason == "length":
        console.print("the answer is cut off; a larger --max-new-tokens allows a longer one", style="dim")
    return answer.text
