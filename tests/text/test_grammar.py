"""What is written matches its regular expression, in whatever order it is written."""

import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.policies import Ancestral, Rdm, ReMdm, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Random
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.text.grammar import schema_regex
from tests.families import tiny_network
from tests.text import makers

REGEXES = [
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"(yes|no|maybe)",
    r"[a-z ]{5,12}\.",
    r"([aeiou][^aeiou ]){3,}",
    "(ja|über|naïve)+ ☃",
]
POLICIES = [Unmask(), Unmask(quota=Threshold(0.01)), Unmask(Random()), Ancestral(), Rdm(), ReMdm()]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "big": {"type": "boolean"}, "n": {"enum": [1, 22]}},
    "required": ["name", "big", "n"],
}


def model(block: bool, maker=makers.byte_level) -> DiffusionLM:
    tokenizer = maker()
    network = tiny_network("llama", vocab_size=len(tokenizer.tokenizer), max_position_embeddings=128)
    attention = BlockCausal(4) if block else Bidirectional()
    card = DiffusionConfig(tokenizer.mask_token_id, 1, attention, "LlamaForCausalLM", recipe="block" if block else "ar")
    return DiffusionLM(Denoiser(network, card).eval(), tokenizer)


BLOCK, BOTH_WAYS = model(block=True), model(block=False)


@given(
    st.booleans(), st.sampled_from(REGEXES), st.sampled_from(POLICIES), st.sampled_from([0.0, 1.0]), st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_continuations_match(block: bool, regex: str, policy, temperature: float, seed: int) -> None:
    lm = BLOCK if block else BOTH_WAYS
    written = lm.generate("The cat", 24, regex=regex, policy=policy, temperature=temperature, seed=seed)
    assert written.completion is not None and re.fullmatch(regex, written.completion)


@given(st.sampled_from(POLICIES), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_holes_match_to_the_last_token(policy, seed: int) -> None:
    written = BOTH_WAYS.infill("On [[10]] and on [[10]].", regex=REGEXES[0], policy=policy, temperature=1.0, seed=seed)
    assert written.spans is not None and len(written.spans) == 2
    assert all(re.fullmatch(REGEXES[0], span) for span in written.spans)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lm", [BLOCK, BOTH_WAYS], ids=["block", "both ways"])
def test_json_of_a_schema(lm: DiffusionLM, seed: int) -> None:
    written = lm.generate("A cat: ", 64, regex=schema_regex(SCHEMA), temperature=1.0, seed=seed)
    assert written.completion is not None
    jsonschema.validate(json.loads(written.completion), SCHEMA)


def test_rows_of_a_batch_have_forms_of_their_own() -> None:
    from diffusify.sampling.sampling_config import SamplingConfig

    each = [SamplingConfig(regex=REGEXES[0]), SamplingConfig(), SamplingConfig(regex=REGEXES[1])]
    first, _, third = BLOCK.prepare_generation(["The", "The", "The"], 16, each).results()
    assert re.fullmatch(REGEXES[0], first.completion or "") and re.fullmatch(REGEXES[1], third.completion or "")


def test_sentence_pieces_match() -> None:
    written = model(block=True, maker=makers.unigram).generate("The cat", 24, regex=r" ?(fox|dog)( jumps)*")
    assert re.fullmatch(r" ?(fox|dog)( jumps)*", written.completion or "")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"regex": "(", "max_new_tokens": 8}, "cannot be followed"),
        ({"regex": r"\d{9}", "max_new_tokens": 3}, "room for 3 tokens, but its form allows texts of 9 tokens or more"),
        ({"regex": r"\d", "tolerance": 0.0}, "leave out regex"),
        ({"regex": r"([a-z]|\d)*a([a-z]|\d){40}"}, "cannot be followed: it takes too much time or memory"),
    ],
)
def test_bad_input(options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BLOCK.generate("The cat", **options)


def test_words_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="byte-level and sentence-piece"):
        model(block=False, maker=makers.word_piece).form(r"\d")


def test_a_schema_that_no_regex_can_express() -> None:
    with pytest.raises(ValueError, match="cannot be followed"):
        schema_regex({"type": "object", "patternProperties": {"a": {"$ref": "#/nowhere"}}, "$ref": "#/nowhere"})
