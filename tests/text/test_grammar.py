"""Generated texts match their regular expression or schema, whatever the order of decoding."""

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
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text import regex_worker
from diffusify.text.grammar import compile_regex, schema_regex
from diffusify.text.tokenizer import TextTokenizer
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


def tiny_model(block: bool, tokenizer: TextTokenizer) -> DiffusionLM:
    """A random block model or bidirectional model."""
    network = tiny_network("llama", vocab_size=len(tokenizer.tokenizer), max_position_embeddings=128)
    attention = BlockCausal(4) if block else Bidirectional()
    recipe = "block" if block else "ar"
    config = DiffusionConfig(tokenizer.mask_token_id, 1, attention, "LlamaForCausalLM", recipe=recipe)
    return DiffusionLM(Denoiser(network, config).eval(), tokenizer)


BYTES = makers.byte_level()
BLOCK, BIDIRECTIONAL = tiny_model(True, BYTES), tiny_model(False, BYTES)
BIDIRECTIONAL.compile_regex = BLOCK.compile_regex  # they share compiled automata


@pytest.mark.slow
@given(
    st.booleans(),
    st.sampled_from(REGEXES),
    st.sampled_from(POLICIES),
    st.sampled_from([4, 14]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 9),
)
@settings(max_examples=40)
def test_continuations_match(block: bool, regex: str, policy, steps: int, temperature: float, seed: int) -> None:
    lm = BLOCK if block else BIDIRECTIONAL
    result = lm.generate("The cat", 14, regex=regex, policy=policy, steps=steps, temperature=temperature, seed=seed)
    assert result.completion is not None and re.fullmatch(regex, result.completion)


@given(st.sampled_from(POLICIES), st.sampled_from([3, 12]), st.integers(0, 9))
@settings(max_examples=15)
def test_masked_spans_match_to_the_last_token(policy, steps: int, seed: int) -> None:
    regex = r"[0-9]{2}-[a-z]{3}"
    sampling = {"policy": policy, "steps": steps, "temperature": 1.0, "seed": seed}
    result = BIDIRECTIONAL.infill("On [[6]] and on [[6]].", regex=regex, **sampling)
    assert result.spans is not None and len(result.spans) == 2
    assert all(re.fullmatch(regex, span) for span in result.spans)


@pytest.mark.parametrize("lm", [BLOCK, BIDIRECTIONAL], ids=["block", "bidirectional"])
def test_json_of_a_schema(lm: DiffusionLM) -> None:
    """Five texts with the seeds 0 to 4."""
    for result in lm.generate(["A cat: "] * 5, 64, regex=schema_regex(SCHEMA), steps=16, temperature=1.0):
        assert result.completion is not None
        jsonschema.validate(json.loads(result.completion), SCHEMA)


def test_rows_of_a_batch_have_their_own_constraints() -> None:
    each = [SamplingConfig(regex=REGEXES[0]), SamplingConfig(temperature=0.5), SamplingConfig(regex=REGEXES[1])]
    first, _, third = BLOCK.prepare_generation(["The", "The", "The"], 16, each).results()
    assert re.fullmatch(REGEXES[0], first.completion or "") and re.fullmatch(REGEXES[1], third.completion or "")


def test_anchors_at_the_ends_match() -> None:
    assert re.fullmatch("[0-9]{4}", BLOCK.generate("The cat", 8, regex="^[0-9]{4}$").completion or "")


def test_lengths_that_cannot_match_are_not_tried() -> None:
    result = BIDIRECTIONAL.infill("On [[2-5]] and on [[4]].", regex="[0-9]{4}")
    assert result.spans is not None and all(re.fullmatch("[0-9]{4}", span) for span in result.spans)


@pytest.mark.parametrize("sampling", [{}, {"threshold": 0.5}, {"temperature": 1.0}])
def test_suppressed_tokens_are_in_no_matching_text(sampling: dict) -> None:
    suppressed = tuple(BYTES.encode(digit, continues=True)[0] for digit in "012345678")
    assert BLOCK.generate("The cat", 8, regex="[0-9]{4}", suppress_tokens=suppressed, **sampling).completion == "9999"
    with pytest.raises(ValueError, match="8 tokens, but its constraint allows no text of exactly that length"):
        BLOCK.generate("The cat", 8, regex="[0-9]{4}", suppress_tokens=(BYTES.end_token_id,), **sampling)


def test_sentencepiece_tokens_match() -> None:
    result = tiny_model(True, makers.unigram()).generate("The cat", 24, regex=r" ?(fox|dog)( jumps)*")
    assert re.fullmatch(r" ?(fox|dog)( jumps)*", result.completion or "")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"regex": "(", "max_new_tokens": 8}, "cannot be compiled"),
        ({"regex": r"\d{9}", "max_new_tokens": 3}, "3 tokens, but its constraint allows texts of 9 tokens or more"),
        ({"regex": "a^b"}, r"regex='a\^b' cannot be compiled: the anchor \^ can only be at an end"),
        ({"regex": r"([a-z]|\d)*a([a-z]|\d){40}"}, "cannot be compiled: it takes too much time or memory"),
    ],
)
def test_bad_input(options: dict, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex_worker, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match=error):
        BLOCK.generate("The cat", **options)


def test_tokenizers_whose_tokens_are_not_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="need a byte-level or SentencePiece tokenizer; this one has a WordPiece"):
        compile_regex(makers.word_piece(), r"\d")


def test_a_schema_without_a_regex_is_refused() -> None:
    with pytest.raises(ValueError, match="the JSON schema cannot be compiled"):
        schema_regex({"type": "object", "patternProperties": {"a": {"$ref": "#/nowhere"}}, "$ref": "#/nowhere"})
