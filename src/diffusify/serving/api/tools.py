"""Which tools a chat request offers to the model, and the prompts of their calls."""

from dataclasses import dataclass

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.chat_schemas import ChatBody, NamedTool
from diffusify.text.tool_calls import ToolCallFormat


@dataclass(frozen=True)
class ToolUse:
    """The calls that a model may make: their form, a regular expression for them, and whether one is required.

    An answer is generated freely up to the sign of a call. The call itself is generated under the regular expression,
    as the continuation of `prompt`, which is that of the chat, the answer's text, and the call's opening.
    """

    format: ToolCallFormat
    regex: str
    required: bool
    prompt: list[int]

    def call_prompt(self, lm: DiffusionLM, text: str) -> list[int]:
        """The prompt of a call after some text of the answer."""
        opening = lm.chat_template.encode_markup(self.format.opening)
        return [*self.prompt, *lm.tokenizer.encode(text, continues=True), *opening]

    def decode(self, lm: DiffusionLM, ids: list[int]) -> str:
        """The text of an answer up to the sign of a call, which may be a special token."""
        sign = lm.tokenizer.tokenizer.convert_tokens_to_ids(self.format.sign)
        if sign in lm.tokenizer.special_ids and sign in ids:
            return lm.tokenizer.decode(ids[: ids.index(sign)], continues=True) + self.format.sign
        return lm.tokenizer.decode(ids, continues=True)


def tool_use(lm: DiffusionLM, body: ChatBody, prompt: list[int]) -> ToolUse | None:
    """The tools that a request offers, None without any. ValueError if the chat template takes none."""
    functions, choice = [tool.function for tool in body.offered_tools], body.tool_choice
    if not functions:
        return None
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise ValueError(f'tool_choice: there is no function "{choice.function.name}" among the tools')
    if body.constraint is not None:
        raise ValueError(
            "tools exclude regex and response_format; set tool_choice to none, or leave out one of the two"
        )
    format = ToolCallFormat.from_template(lm.chat_template)
    plain = [function.model_dump() for function in functions]
    required = choice == "required" or isinstance(choice, NamedTool)
    return ToolUse(format, format.regex(plain, parallel=body.parallel_tool_calls), required, prompt)
