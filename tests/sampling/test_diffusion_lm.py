"""`DiffusionLM` and its settings: batches, infilling, predicted lengths, chats, guidance and presets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Prefix
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.policies import Ancestral, Klass, Policy, Rdm, ReMdm, Unmask, Wino
from diffusify.diffusion.quotas import EntropyBudget
from diffusify.diffusion.ranking import Entropy, Random
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.guidance import GuidedDenoiser
from diffusify.sampling.row_text import Continuation
from diffusify.sampling.sampler import Sampler
from diffusify.sampling.sampling_config import Preset, SamplingConfig
from diffusify.text.prompts import continuation_canvas
from tests.families import MASK, tiny_denoiser, tiny_network
from tests.text import makers
from tests.text.chats import CHATML

PROMPTS = ["The cat", "and the dog sat on the", ""]


def model(attention: AttentionPattern = Bidirectional(), family: str = "llama") -> DiffusionLM:
    tokenizer = makers.byte_level()
    return DiffusionLM(tiny_denoiser(family, attention, vocab_size=320, max_position_embeddings=256), tokenizer)


@pytest.mark.parametrize("attention", [Bidirectional(), BlockCausal(4), BlockCausal(4, clean="block")])
@pytest.mark.parametrize("policy", [None, Rdm(), Unmask()])
def test_a_batch_gives_the_texts_of_single_prompts(attention, policy) -> None:
    lm = model(attention)
    together = lm.generate(PROMPTS, max_new_tokens=6, policy=policy)
    alone = [lm.generate(prompt, max_new_tokens=6, policy=policy) for prompt in PROMPTS]
    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert all(result.text == prompt + (result.completion or "") for result, prompt in zip(alone, PROMPTS, strict=True))


def test_a_completion_without_a_prompt_begins_like_a_text_also_in_a_padded_row() -> None:
    tokenizer = makers.unigram()
    ids = tokenizer.encode("the cat")
    canvas = continuation_canvas(tokenizer, ["", "the dog sat on the mat"], len(ids), context=None)
    canvas.tokens[0, canvas.open[0]] = torch.tensor(ids)
    written = replace(canvas, open=torch.zeros_like(canvas.open))
    assert not canvas.real[0].all() and Continuation(tokenizer).completion(written[:1]) == "the cat"


def test_a_block_model_with_an_infilling_attention_does_both() -> None:
    """With the same weights, it continues as a block model and infills as a bidirectional model."""
    block, full = model(BlockCausal(4)), model(Bidirectional())
    both = model(BlockCausal(4))
    both.denoiser.diffusion_config = replace(both.config, infilling=Bidirectional())
    for lm in (full, both):
        lm.denoiser.network = block.denoiser.network
    texts = ["The [[4]] sat on the mat", "so [[2-5]] it [[3]] is"]
    assert [r.text for r in both.infill(texts)] == [r.text for r in full.infill(texts)]
    assert [r.text for r in both.infill(texts, window=4)] == [r.text for r in full.infill(texts, window=4)]
    for settings in ({}, {"tolerance": 0.0}):
        expected = block.generate(PROMPTS, max_new_tokens=6, **settings)
        assert [r.text for r in both.generate(PROMPTS, max_new_tokens=6, **settings)] == [r.text for r in expected]
    assert both.config.sees_right_context and not block.config.sees_right_context


@pytest.mark.parametrize("attention", [Bidirectional(), BlockCausal(4)])
@pytest.mark.parametrize("policy", [Unmask(rank=Random()), Ancestral(), Rdm(noise=1.0), ReMdm(eta=0.3)])
def test_sampled_texts_do_not_depend_on_neighbours(attention: AttentionPattern, policy: Policy) -> None:
    """Each text has its own seed, which gives the same text on its own."""
    lm = model(attention)
    together = lm.generate(PROMPTS, max_new_tokens=6, policy=policy, temperature=1.0, seed=7)
    assert [result.seed for result in together] == [7, 8, 9]
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = lm.generate(prompt, max_new_tokens=6, policy=policy, temperature=1.0, seed=result.seed)
        assert alone.text == result.text
    samples = lm.generate([PROMPTS[0]] * 3, max_new_tokens=6, policy=policy, temperature=1.0)
    assert len({result.text for result in samples}) > 1


@pytest.mark.parametrize("attention", [Bidirectional(), BlockCausal(4)])
def test_ids_without_a_token_are_never_written(attention: AttentionPattern) -> None:
    """Many networks have more embeddings than their tokenizer has tokens."""
    tokenizer = makers.byte_level()
    network = tiny_network("llama", vocab_size=400, max_position_embeddings=256)
    lm = DiffusionLM(Denoiser(network, DiffusionConfig(MASK, 1, attention, "LlamaForCausalLM")).eval(), tokenizer)
    chat = [[{"role": "user", "content": "The cat"}]]
    runs = [lm.prepare_generation(PROMPTS * 4, 24, SamplingConfig(temperature=t)) for t in (0.0, 1.0, 3.0)]
    runs.append(lm.prepare_chat(chat, 24, SamplingConfig(temperature=2.0)))
    if lm.config.sees_right_context:
        runs.append(lm.prepare_infilling(["The [[12]] mat"] * 4, SamplingConfig(temperature=2.0)))
    else:
        runs.append(lm.prepare_generation(PROMPTS, 24, SamplingConfig(tolerance=0.0, temperature=2.0)))
    for run in runs:
        run.results()
        assert tokenizer.token_ids.issuperset(run.canvas.tokens[run.canvas.written].tolist())


def test_logits_do_not_change_where_every_id_has_a_token() -> None:
    tokenizer = makers.byte_level()
    denoiser = tiny_denoiser(vocab_size=len(tokenizer.tokenizer))
    canvas = Canvas.clean(torch.arange(20)[None])
    before = denoiser(canvas).logits
    DiffusionLM(denoiser, tokenizer)
    assert denoiser.unused_token_ids is None and torch.equal(denoiser(canvas).logits, before)


def test_each_prompt_may_have_its_own_max_new_tokens() -> None:
    lm = model()
    short, long = lm.generate(PROMPTS[:2], max_new_tokens=[2, 11], temperature=1.0)
    assert short.tokens <= 2 and long.tokens <= 11
    with pytest.raises(ValueError, match="2 values of max_new_tokens for 3 prompts"):
        lm.generate(PROMPTS, max_new_tokens=[2, 3])


def test_infilling_in_batches() -> None:
    lm = model()
    texts = ["The [[3]] sat on [[2]] mat", "so [[4]]"]
    together = lm.infill(texts)
    assert [result.spans for result in together] == [lm.infill(text).spans for text in texts]
    assert [len(result.spans or ()) for result in together] == [2, 1]


def test_the_most_confident_length_of_a_span_is_kept() -> None:
    lm = model()
    result = lm.infill("The [[2-4]] on the mat")
    candidates = []
    for length in (2, 3, 4):
        run = lm.prepare_infilling([f"The [[{length}]] on the mat"], SamplingConfig())
        *_, last = run
        candidates.append((last.score[0][last.canvas.editable[0]].mean().detach().item(), run.results()[0].text))
    assert result.text == max(candidates)[1]
    together = lm.infill(["The [[2-4]] on the mat", "so [[3]] it"])
    assert [each.text for each in together] == [result.text, lm.infill("so [[3]] it").text]


def test_the_most_confident_of_the_predicted_lengths_is_kept() -> None:
    lm = model()
    torch.manual_seed(3)
    lm.denoiser.add_length_head(12)
    prompt = "The cat"
    result = lm.generate(prompt, length_beam=4)
    canvas = next(iter(lm.prepare_generation([prompt], 1, SamplingConfig()))).canvas
    lengths = (lm.denoiser.length_logits(canvas).topk(4).indices[0] + 1).tolist()
    candidates = []
    for length in lengths:
        run = lm.prepare_generation([prompt], length, SamplingConfig())
        *_, last = run
        candidate = run.results()[0]
        scores = last.score[0][last.canvas.editable[0]][: candidate.tokens]
        candidates.append((scores.mean().detach().item() if candidate.tokens else 0.0, candidate.text))
    assert result.text == max(candidates)[1]
    assert lm.generate(prompt, length_beam=1).text == candidates[0][1]
    assert lm.generate(prompt, max_new_tokens=5).tokens <= 5  # max_new_tokens overrides the predictions


def test_predicted_lengths_fit_into_the_context() -> None:
    lm = model()
    lm.denoiser.add_length_head(400)
    assert lm.generate("The cat " * 30, length_beam=2, steps=2).text.startswith("The cat")


def test_an_answer_ends_with_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(BlockCausal(4))
    lm.tokenizer.tokenizer.chat_template = CHATML
    end = lm.chat_template.end_token_id
    assert end != lm.tokenizer.end_token_id
    messages = [{"role": "user", "content": "is it so?"}]

    def predict(canvas, *, positions):
        """A model that answers " it", then ends its turn."""
        it = lm.tokenizer.encode(" it")[0]
        first = canvas.position_ids == (canvas.editable.long().cumsum(1) == 1).long().argmax(1, keepdim=True)
        logits = torch.zeros(int(positions.sum()), 320)
        logits[torch.arange(len(logits)), torch.where(first[positions], it, end)] = 9.0
        return LazyLogits.from_tensor(logits)

    monkeypatch.setattr(lm.denoiser, "predict", predict)
    for end in lm.chat_template.end_token_ids:  # noqa: B007  (read by `predict`): the end of a turn, and that of a text
        answer = lm.chat(messages, max_new_tokens=16, cache="none")
        assert (answer.text, answer.tokens) == ("it", 1) and answer.forwards <= 4 and answer.finish_reason == "stop"


@pytest.mark.parametrize("attention", [Bidirectional(), BlockCausal(4)])
def test_guidance_is_llada_s_formula(attention: AttentionPattern) -> None:
    """LLaDA's formula: unconditional + (scale + 1) * (conditional - unconditional)."""
    lm = model(attention)
    canvas = next(iter(lm.prepare_generation(["The cat"], 6, SamplingConfig()))).canvas
    positions, mask = canvas.open, lm.config.mask_token_id
    guided = GuidedDenoiser(lm.denoiser.predict, lm.denoiser.predict, 1.5, mask)(canvas, positions=positions).logits
    masked = canvas.tokens.masked_fill(~canvas.editable & (canvas.position_ids > 0), mask)
    conditional, unconditional = (
        lm.denoiser(replace(canvas, tokens=tokens), positions=positions).logits for tokens in (canvas.tokens, masked)
    )
    finite = conditional.isfinite()
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guided[finite], expected[finite])
    assert torch.equal(guided.isfinite(), finite) and not torch.allclose(guided[finite], conditional[finite])
    plain, zero = (lm.generate("The cat", 6, **more).text for more in ({}, {"guidance": 0.0}))
    cached, uncached = (lm.generate("The cat", 6, guidance=2.0, cache=c).text for c in ("exact", "none"))
    assert plain == zero and cached == uncached
    assert lm.generate("The cat", 6, steps=3, guidance=2.0).forwards == 6


def test_windows_are_decoded_from_left_to_right() -> None:
    lm = model()
    frames = [frame.canvas.open[0] for frame in lm.prepare_generation(["The"], 12, SamplingConfig(window=4))]
    positions = lm.prepare_generation(["The"], 12, SamplingConfig()).canvas.position_ids[0]
    for open in frames:
        if open.any():
            first = positions[open][0] // 4
            assert open[positions // 4 > first].all() or first == positions.max() // 4


def test_repetition_penalty_equals_transformers() -> None:
    lm = model()
    canvas = lm.prepare_generation(["The cat and the dog"], 3, SamplingConfig()).canvas
    logits = torch.randn(3, 320)
    reference: Any = RepetitionPenaltyLogitsProcessor(1.7)
    sampler = Sampler(repetition_penalty=1.7)
    actual = sampler.process_logits(LazyLogits.from_tensor(logits), canvas, canvas.open).logits
    given = canvas.tokens[~canvas.open]
    torch.testing.assert_close(actual, torch.cat([reference(given[None], row[None]) for row in logits]))


def test_speculative_texts_do_not_depend_on_neighbours() -> None:
    lm = model(BlockCausal(4))
    together = lm.generate(PROMPTS, max_new_tokens=9, tolerance=0.0)
    alone = [lm.generate(prompt, max_new_tokens=9, tolerance=0.0) for prompt in PROMPTS]
    assert [result.text for result in together] == [result.text for result in alone]
    assert all(result.forwards <= 9 for result in alone)
    sampled = lm.generate(PROMPTS, max_new_tokens=9, tolerance=0.0, temperature=1.0, seed=3)
    for prompt, result in zip(PROMPTS, sampled, strict=True):
        again = lm.generate(prompt, max_new_tokens=9, tolerance=0.0, temperature=1.0, seed=result.seed)
        assert again.text == result.text
    with pytest.raises(ValueError, match="keeps its AR half"):
        model().generate("The", max_new_tokens=4, tolerance=0.0)


def test_each_text_of_a_batch_may_have_its_own_settings() -> None:
    lm = model()
    per_text = [
        SamplingConfig(temperature=1.0, seed=4),
        SamplingConfig(threshold=0.02, suppress_tokens=(65, 66)),
        SamplingConfig(policy=Klass(), window=3, seed=9),
    ]
    together = lm.prepare_generation(PROMPTS, 9, per_text).results()
    assert [result.seed for result in together] == [4, 0, 9]
    for prompt, settings, result in zip(PROMPTS, per_text, together, strict=True):
        assert lm.prepare_generation([prompt], 9, settings).results()[0].text == result.text
    with pytest.raises(ValueError, match="2 settings for 3 texts"):
        lm.prepare_generation(PROMPTS, 9, per_text[:2])
    with pytest.raises(ValueError, match="guidance must be the same"):
        lm.prepare_generation(PROMPTS[:2], 9, [per_text[0], replace(per_text[0], guidance=1.0)])
    with pytest.raises(ValueError, match="a policy with shadow masks"):
        lm.prepare_generation(PROMPTS[:2], 9, [per_text[0], SamplingConfig(policy=Wino())])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_wino_terminates_and_does_not_depend_on_neighbours(family: str) -> None:
    lm = model(family=family)
    result = lm.generate("The cat", max_new_tokens=12, policy=Wino(threshold=0.005))
    assert result.tokens <= 12 and result.forwards <= 12
    again = lm.generate(["The cat", "a"], max_new_tokens=12, policy=Wino(threshold=0.005))
    assert again[0].text == result.text


def test_suppressed_tokens_equal_transformers() -> None:
    lm = model(BlockCausal(4))
    plain = lm.prepare_generation(["The cat"], 8, SamplingConfig(tolerance=0.0))
    plain.results()
    suppressed = int(plain.canvas.tokens[0, -8:].mode().values)
    run = lm.prepare_generation(["The cat"], 8, SamplingConfig(tolerance=0.0, suppress_tokens=(suppressed,)))
    run.results()
    given = run.canvas.tokens[:, :-8]
    generate: Any = lm.denoiser.network.generate
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=lm.tokenizer.end_token_id,
        suppress_tokens=[suppressed, lm.config.mask_token_id],
    )  # fmt: skip
    expected = generate(given, generation_config=settings, attention_mask=torch.ones_like(given))
    actual = run.canvas.tokens[0, : expected.shape[1]]
    assert actual.tolist() == expected[0].tolist() and suppressed not in actual[-8:].tolist()


SETTINGS = {
    "steps": st.one_of(st.none(), st.integers(1, 99)),
    "policy": st.one_of(
        st.none(),
        st.builds(Unmask, st.just(Entropy()), st.builds(EntropyBudget, st.floats(0, 1))),
        st.builds(Klass, threshold=st.floats(0.1, 1)),
        st.builds(ReMdm, st.just(Unmask()), st.just("cap")),
    ),
    "temperature": st.floats(0, 2),
    "top_k": st.one_of(st.none(), st.integers(1, 50)),
    "suppress_tokens": st.lists(st.integers(0, 99)).map(tuple),
    "cache": st.sampled_from(["exact", "prefix", "dual", "none"]),
    "seed": st.integers(0, 2**32),
    "stop": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1))),
}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_settings_are_saved_and_loaded(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> None:
    settings, file = SamplingConfig(**given), tmp_path_factory.mktemp("settings") / "sampling_config.json"
    settings.save(file)
    assert SamplingConfig.load(file) == settings


def test_errors_name_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "fast.json"
    with pytest.raises(ValueError, match="fast.json is not a valid settings file"):
        SamplingConfig.load(file)
    for text, message in (
        ('{"stepz": 3}', 'has no "stepz"; did you mean "steps"'),
        ('{"steps": 0}', "steps=0"),
        ("{", ""),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"fast.json is not a valid settings file: .*{message}"):
            SamplingConfig.load(file)
    with pytest.raises(ValueError, match="is code, which cannot be saved"):
        SamplingConfig(logits_processor=lambda logits, canvas, positions: logits).save(file)


@pytest.mark.parametrize(
    ("family", "attention", "recipe"),
    [
        ("llama", Bidirectional(), "ar"),
        ("llama", BlockCausal(4), "block"),
        ("llama", BlockCausal(4, clean="block"), "block"),
        ("bert", BlockCausal(4, clean="block"), "block"),
        ("bert", Bidirectional(), "mlm"),
        ("bert", Prefix(), "mlm"),
    ],
)
@pytest.mark.parametrize("name", ["quality", "balanced", "fast"])
def test_presets_suit_the_model(family: str, attention: AttentionPattern, recipe: str, name: Preset) -> None:
    lm = model(attention, family)
    lm.denoiser.diffusion_config = replace(lm.config, recipe=recipe)
    result = lm.prepare_generation(["The cat"], 9, SamplingConfig.preset(name, lm.config)).results()[0]
    assert 0 < result.tokens <= 9 and result.forwards <= 9
    if attention == BlockCausal(4) and name == "quality":
        assert result.text == lm.generate("The cat", 9, tolerance=0.0).text


@pytest.mark.parametrize(
    ("start", "changes", "expected"),
    [
        ({"tolerance": 2.0, "seed": 3}, {"steps": 8}, {"steps": 8, "seed": 3}),
        ({"tolerance": 2.0}, {"cache": "exact", "guidance": 0.0}, {"tolerance": 2.0}),
        ({"steps": 8, "guidance": 1.0}, {"tolerance": 0.0}, {"tolerance": 0.0}),
        ({"policy": Unmask()}, {"threshold": 0.8}, {"threshold": 0.8}),
        ({"threshold": 0.9, "window": 32}, {"policy": Wino()}, {"policy": Wino(), "window": 32}),
        ({"threshold": 0.9}, {"steps": 8}, {"threshold": 0.9, "steps": 8}),
    ],
)
def test_changes_drop_what_they_exclude(start: dict, changes: dict, expected: dict) -> None:
    assert SamplingConfig(**start).override(**changes) == SamplingConfig(**expected)
    with pytest.raises(ValueError, match="leave out"):
        SamplingConfig(**start).override(tolerance=0.5, threshold=0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.9, "policy": Ancestral()}, "threshold=0.9 is a policy by itself"),
        ({"tolerance": 0.0, "threshold": 0.7}, "leave out threshold"),
        ({"tolerance": 0.0, "guidance": 1.0}, "leave out guidance"),
        ({"tolerance": -0.1}, "tolerance=-0.1 must be at least 0"),
        ({"length_beam": 0}, "length_beam=0"),
        ({"window": 0}, "window=0"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": 2**64}, "must be from -2"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_a_model_with_an_ar_half_decodes_losslessly_unless_told_otherwise() -> None:
    lm = model(BlockCausal(4))

    def texts(**sampling: Any) -> list[tuple[str, int]]:
        return [(result.text, result.forwards) for result in lm.generate(PROMPTS, 8, **sampling)]

    for sampling in (
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "seed": 3},
        {"repetition_penalty": 2.0},
    ):
        assert texts(**sampling) == texts(tolerance=0.0, **sampling)
    for sampling in ({"steps": 2}, {"cache": "none"}, {"window": 3}, {"guidance": 1.0}):
        assert texts(**sampling) == texts(policy=Unmask(), **sampling)
    infilling = model(BlockCausal(4, clean="block"))  # keeps no AR half
    assert infilling.generate("The", 8).text == infilling.generate("The", 8, policy=Unmask()).text
