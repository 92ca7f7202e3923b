"""Stop strings: texts end before them, and rows that have one take part in no more passes."""

import re
from typing import Any

import pytest

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal
from diffusify.diffusion.policies import Rdm, Unmask
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.tokenizer import TextTokenizer
from tests.families import tiny_network
from tests.text import makers

PROMPTS = ["The cat", "and the dog sat on the", "Is it so?"]


def model(attention: AttentionPattern, tokenizer: TextTokenizer | None = None, family: str = "llama") -> DiffusionLM:
    tokenizer = tokenizer or makers.byte_level()
    network = tiny_network(family, vocab_size=len(tokenizer.tokenizer), max_position_embeddings=256)
    config = DiffusionConfig(tokenizer.mask_token_id, int(family == "llama"), attention, type(network).__name__)
    return DiffusionLM(Denoiser(network, config).eval(), tokenizer)


def stops_in(text: str) -> list[str]:
    """Some strings of a text: whole words, single characters, parts of tokens, and its end."""
    words = re.findall(r"[ -~]+", text)
    assert words, "the text has readable words"
    return [*dict.fromkeys(part for word in words for part in (word, word[0], word[1:3], word[-2:]) if part)][:8]


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        (BlockCausal(4), {}),
        (BlockCausal(4), {"temperature": 1.0, "seed": 5}),
        (BlockCausal(4), {"policy": Unmask()}),
        (Bidirectional(), {"window": 8, "temperature": 1.0}),
        (Bidirectional(), {"policy": Rdm(), "temperature": 1.0, "steps": 6}),
    ],
)
def test_a_text_ends_before_its_first_stop(attention: AttentionPattern, settings: dict[str, Any]) -> None:
    lm = model(attention)
    whole = lm.generate("The cat", 40, **settings)
    assert whole.completion and whole.finish_reason == "length" and whole.tokens == 40
    for stop in stops_in(whole.completion):
        expected = whole.completion[: whole.completion.index(stop)]
        found = lm.generate("The cat", 40, stop=["never in it", stop], **settings)
        assert (found.completion, found.text) == (expected, "The cat" + expected), stop
        assert found.finish_reason == "stop" and found.tokens <= whole.tokens and found.forwards <= whole.forwards
        *_, last = lm.stream("The cat", 40, stop=stop, **settings)
        assert lm.read(last) == found.text and int(last.written.sum()) == found.tokens
    assert lm.generate("The cat", 40, stop="never in it", **settings).completion == whole.completion


def test_a_stop_inside_a_word_piece() -> None:
    lm = model(Bidirectional(), makers.word_piece(), "bert")
    whole = lm.generate("the cat", 24, temperature=1.0).completion or ""
    for stop in stops_in(whole):
        assert lm.generate("the cat", 24, temperature=1.0, stop=stop).completion == whole[: whole.index(stop)]


@pytest.mark.parametrize("settings", [{"policy": Unmask(), "cache": "none"}, {}])
def test_a_stopped_row_takes_part_in_no_more_passes(settings: dict[str, Any]) -> None:
    """Each row of a batch ends at its own stop, and the others go on."""
    lm = model(BlockCausal(4))
    texts = [result.completion or "" for result in lm.generate(PROMPTS, 40, **settings)]
    per_text = [SamplingConfig(**settings, stop=stops_in(texts[0])[0]), SamplingConfig(**settings)] * 2
    prompts = [PROMPTS[0], PROMPTS[1]] * 2
    alone = [lm.prepare_generation([p], 40, one).results()[0] for p, one in zip(prompts, per_text, strict=True)]
    run = lm.prepare_generation(prompts, 40, per_text)
    open_rows = [frame.canvas.open.any(1).tolist() for frame in run]
    together = run.results()
    assert [result.completion for result in together] == [result.completion for result in alone]
    assert [result.finish_reason for result in together] == ["stop", "length"] * 2
    passes = [sum(row) + 1 for row in zip(*open_rows, strict=True)]
    assert passes[0] < passes[1] == together[0].forwards
    if settings:  # lossless decoding drafts less where more texts share a pass
        assert passes[:2] == [alone[0].forwards, alone[1].forwards]


def test_an_answer_is_trimmed_after_its_stop() -> None:
    lm = model(BlockCausal(4))
    messages = [{"role": "user", "content": "is it so?"}]
    whole = lm.chat(messages, 40).text
    for stop in stops_in(whole)[1:]:
        answer = lm.chat(messages, 40, stop=stop)
        assert answer.text == answer.completion == whole[: whole.index(stop)].strip()


def test_stops_are_refused_where_they_have_no_meaning() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        SamplingConfig(stop="")
    with pytest.raises(ValueError, match="stop='so' ends a continuation, but a masked span has a length"):
        model(Bidirectional()).infill("it is [[3]]", stop="so")
