"""Strings become canvases, and canvases become strings again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.examples import Template
from diffusify.text.prompts import (
    UNKNOWN_LENGTH,
    continuation_canvas,
    count_length_candidates,
    decode_canvas,
    decode_spans,
    few_shot,
    infill_canvas,
    parse_masked_spans,
    resizable_canvas,
)
from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import WORDS, byte_level, sentence_bpe, unigram, word_piece

BYTES, PIECES, UNIGRAM, SENTENCE = byte_level(), word_piece(), unigram(), sentence_bpe()
BREAKS = byte_level(WORDS + "\n\n\n\nSo    it    is.\n\n\n\n    So\t\t\tit" * 9)
ALL = [BYTES, PIECES, UNIGRAM, SENTENCE]


def fill(canvas: Canvas, *rows: list[int]) -> Canvas:
    """Write token ids into the open positions, row by row; those without an id stay open."""
    tokens, open = canvas.tokens.clone(), canvas.open.clone()
    for row, ids in enumerate(rows):
        at = canvas.open[row].nonzero().flatten()[: len(ids)]
        tokens[row, at], open[row, at] = torch.tensor(ids[: len(at)], dtype=torch.long), False
    return replace(canvas, tokens=tokens, open=open)


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", []),
        ("plain [x] ]]", ["plain [x] ]]"]),
        ("a [[8]] b", ["a ", range(8, 9), " b"]),
        ("[[1]][[ 02 ]]", [range(1, 2), range(2, 3)]),
        ("so [[3-12]][[ 5 - 5 ]]", ["so ", range(3, 13), range(5, 6)]),
        (r"\[[8]] [[3]]", ["[[8]] ", range(3, 4)]),
        (r"x = \[[1, 2], [3, 4]]", ["x = [[1, 2], [3, 4]]"]),
        ("[[[8]]]", ["[", range(8, 9), "]"]),
        ("a\n[[2]]\n", ["a\n", range(2, 3), "\n"]),
        ("so[[...]] it [[ \N{HORIZONTAL ELLIPSIS} ]]", ["so", UNKNOWN_LENGTH, " it ", UNKNOWN_LENGTH]),
    ],
)
def test_parse_masked_spans(text: str, segments: list[str | range]) -> None:
    assert parse_masked_spans(text) == segments


@given(st.lists(st.text("[]8\\ a") | st.integers(1, 999_999)))
def test_parsing_undoes_escaping(segments: list[str | int]) -> None:
    # A bracket or backslash right before a span would be parsed as part of it.
    texts = [p.replace("[[", r"\[[").rstrip("[\\") + "." if isinstance(p, str) else f"[[{p}]]" for p in segments]
    parsed = parse_masked_spans("".join(texts))
    assert [p[0] for p in parsed if isinstance(p, range)] == [p for p in segments if isinstance(p, int)]
    again = [p.replace("[[", r"\[[") if isinstance(p, str) else f"[[{p[0]}]]" for p in parsed]
    assert "".join(again) == "".join(texts)


@pytest.mark.parametrize(
    "span", ["[[abc]]", "[[0]]", "[[-1]]", "[[]]", "[[1.5]]", "[[5-3]]", "[[3-]]", "[[1000000]]", "[[1", "[["]
)
def test_bad_spans(span: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_masked_spans("[[2]] then " + span)
    assert span in str(error.value) and "[[8]]" in str(error.value) and r"\[[" in str(error.value)


def test_span_lengths_are_tried_from_the_shortest_to_the_longest() -> None:
    texts = ["a[[3-5]]b[[2]]", "c[[1-30]]"]
    assert count_length_candidates(texts) == 8
    assert count_length_candidates(["a[[3-5]]"]) == 3 and count_length_candidates(["a[[3]]"]) == 1
    canvas = infill_canvas(BYTES, texts, context=None, candidates=8)
    assert canvas.open.sum(1).tolist() == [5, 5, 6, 6, 6, 6, 7, 7, 1, 5, 9, 13, 18, 22, 26, 30]
    assert infill_canvas(BYTES, ["a[[3-5]]"], context=None, candidates=3).open.sum(1).tolist() == [3, 4, 5]


@given(st.lists(st.sampled_from([range(3, 13), range(2, 3), UNKNOWN_LENGTH]), min_size=1), st.integers(4, 90))
def test_spans_take_the_room_that_a_context_has(spans: list[range], context: int) -> None:
    text = ["a", *spans]
    shortest = 3 + sum(span[0] for span in spans)
    if shortest > context:
        with pytest.raises(ValueError, match=f"needs at least {shortest} tokens, but the model's context is {context}"):
            infill_canvas(BYTES, [text], context=context, candidates=4)
        return
    tokens = infill_canvas(BYTES, [text], context=context, candidates=4).real.sum(1)
    share = (context - shortest) // len(spans)
    assert tokens[0] == shortest and tokens.diff().ge(0).all()
    assert tokens[-1] == shortest + sum(min(len(span) - 1, share) for span in spans)
    canvas, _ = resizable_canvas(BYTES, [text], LengthTokens(5, 6), context=context, candidates=2)
    assert canvas.real.sum(1).max() <= context


@pytest.mark.parametrize("tokenizer", ALL)
def test_continuation(tokenizer: TextTokenizer) -> None:
    canvas = continuation_canvas(tokenizer, ["the dog", ""], 3, context=None)
    prompt = tokenizer.encode("the dog")
    assert canvas.tokens[0, : len(prompt) + 1].tolist() == [tokenizer.start_token_id, *prompt]
    assert canvas.open.sum(1).tolist() == [3, 3] and canvas.open[1, 1:4].all()
    assert canvas.real.sum(1).tolist() == [len(prompt) + 4, 4]
    assert decode_canvas(tokenizer, canvas) == ["the dog___", "___"]
    assert decode_canvas(tokenizer, canvas, placeholder="") == ["the dog", ""]
    cat = tokenizer.encode("cat")[:2]
    filled = fill(canvas, [tokenizer.end_token_id, *cat], [*cat, tokenizer.end_token_id])
    assert decode_canvas(tokenizer, filled)[0] == "the dog"
    assert decode_canvas(tokenizer, filled, placeholder="")[1] == tokenizer.decode(cat)
    assert decode_spans(tokenizer, filled)[0] == [""]


def test_continuation_lengths() -> None:
    size = len(BYTES.encode("the dog")) + 1
    assert continuation_canvas(BYTES, ["the dog"], 4, context=size + 4).tokens.shape == (1, size + 4)
    with pytest.raises(
        ValueError, match=f"{size} tokens and max_new_tokens=9 make {size + 9} tokens.* at most 4 or shorten"
    ):
        continuation_canvas(BYTES, ["the dog"], 9, context=size + 4)
    with pytest.raises(ValueError, match="context is 2; shorten the prompt"):
        continuation_canvas(BYTES, ["the dog"], 1, context=2)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        continuation_canvas(BYTES, ["the dog"], 0, context=None)
    with pytest.raises(ValueError, match="at least one"):
        continuation_canvas(BYTES, [], 3, context=None)


def test_prompts_of_token_ids_are_used_unchanged() -> None:
    ids = ChatTemplate(byte_level()).prompt([{"role": "user", "content": "the dog"}])
    canvas = continuation_canvas(BYTES, [ids, [5]], 3, context=len(ids) + 3)
    assert canvas.tokens[0, : len(ids)].tolist() == ids and canvas.open.sum(1).tolist() == [3, 3]
    assert canvas.tokens[1, 0] == 5 and canvas.real.sum(1).tolist() == [len(ids) + 3, 4]
    text = continuation_canvas(BYTES, ["the dog"], 3, context=None)
    same = continuation_canvas(BYTES, [[BYTES.start_token_id, *BYTES.encode("the dog")]], 3, context=None)
    assert torch.equal(text.tokens, same.tokens) and torch.equal(text.open, same.open)
    with pytest.raises(ValueError, match="a prompt of token ids is empty"):
        continuation_canvas(BYTES, [ids, []], 3, context=None)


def test_few_shot() -> None:
    template = Template("Question: {q}\nAnswer:", " {a}")
    shots = [{"q": "1 + 1", "a": 2}, {"q": "{a}", "a": "[[8]]"}]
    assert few_shot(shots, {"q": "2 + 2"}, template) == (
        "Question: 1 + 1\nAnswer: 2\n\nQuestion: {a}\nAnswer: [[8]]\n\nQuestion: 2 + 2\nAnswer:"
    )
    assert few_shot([], {"q": "2 + 2"}, template) == template.fill_prompt({"q": "2 + 2"})
    with pytest.raises(ValueError, match='no field "a"'):
        few_shot([{"q": "1 + 1"}], {"q": "2 + 2"}, template)


def test_a_prompt_may_contain_the_names_of_special_tokens() -> None:
    prompt = "<|mask|> and <|endoftext|> are text"
    canvas = continuation_canvas(BYTES, [prompt], 2, context=None)
    assert int(canvas.open.sum()) == 2
    assert decode_canvas(BYTES, canvas) == [prompt + "__"]


@given(
    st.lists(st.text(max_size=6).filter(lambda text: "\u2581" not in text), min_size=2, max_size=4),
    st.lists(st.text(min_size=1, max_size=6).filter(lambda text: "\u2581" not in text), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([BYTES, SENTENCE]),
)
def test_infilling_keeps_the_given_text(around: list[str], inside: list[str], end: bool, by: TextTokenizer) -> None:
    words = [by.encode(word, continues=True) for word in inside[: len(around) - 1]]
    escaped = [piece.replace("[[", r"\[[").replace("\\\\", "") + "." for piece in around]
    given = [parse_masked_spans(piece)[0] for piece in escaped]
    masked = [f"[[{len(word)}]]" for word in words]
    text = escaped[0] + "".join(span + piece for span, piece in zip(masked, escaped[1:], strict=True))
    canvas = infill_canvas(by, [text], context=None, add_end_token=end)
    assert decode_canvas(by, canvas, placeholder="#") == [
        str(given[0]) + "".join("#" * len(w) + str(g) for w, g in zip(words, given[1:], strict=True))
    ]
    canvas = fill(canvas, sum(words, []))
    spans = decode_spans(by, canvas)[0]
    assert spans == inside[: len(around) - 1]
    assert decode_canvas(by, canvas) == [
        str(given[0]) + "".join(s + str(g) for s, g in zip(spans, given[1:], strict=True))
    ]
    assert (int(canvas.tokens[0, -1]) == by.end_token_id) == end
    assert not canvas.editable[0, 0] and not canvas.editable[0, -1]


@pytest.mark.parametrize("tokenizer", ALL)
def test_the_space_before_a_span_belongs_to_the_span(tokenizer: TextTokenizer) -> None:
    words = tokenizer.encode(" lazy", continues=True)
    canvas = infill_canvas(tokenizer, [f"the [[{len(words)}]] dog"], context=None)
    assert decode_canvas(tokenizer, canvas) == ["the" + "_" * len(words) + " dog"]
    canvas = fill(canvas, words)
    assert decode_canvas(tokenizer, canvas) == ["the lazy dog"]
    assert decode_spans(tokenizer, canvas) == [[" lazy"]]


@given(st.text("a \n\t", max_size=6))
def test_text_before_a_span_is_tokenized_as_before_a_word(before: str) -> None:
    """Two line breaks are one token at the end of a text and two tokens before a word."""
    assert len(BREAKS.encode("\n\n")) == 1 and len(BREAKS.encode("\n\nSo")) == 3
    word = BREAKS.encode(" So" if before.endswith(" ") else "So", continues=True)
    canvas = infill_canvas(BREAKS, [f"{before}[[{len(word)}]]"], context=None, add_end_token=False)
    assert fill(canvas, word).tokens[0, 1:].tolist() == BREAKS.encode(before + "So")


@pytest.mark.parametrize("tokenizer", ALL)
def test_a_span_at_the_start(tokenizer: TextTokenizer) -> None:
    words = tokenizer.encode("the lazy")
    canvas = infill_canvas(tokenizer, [f"[[{len(words)}]] dog"], context=None)
    assert decode_canvas(tokenizer, canvas, placeholder="") == [" dog"]
    canvas = fill(canvas, words)
    assert decode_canvas(tokenizer, canvas) == ["the lazy dog"]
    assert decode_spans(tokenizer, canvas) == [["the lazy"]]


def test_adjacent_spans_are_one_run_and_an_end_token_ends_the_text() -> None:
    canvas = infill_canvas(BYTES, ["a[[1]] [[2]]b[[2]]c", "[[1]]"], context=None)
    assert canvas.open.sum(1).tolist() == [5, 1]
    assert decode_spans(BYTES, canvas) == [["___", "__"], ["_"]]
    x, end = BYTES.encode("x")[0], BYTES.end_token_id
    filled = fill(canvas, [x, end, x, x, x], [x])
    assert decode_canvas(BYTES, filled) == ["ax", "x"]
    assert decode_spans(BYTES, filled) == [["x", ""], ["x"]]


def test_noise_is_never_decoded() -> None:
    canvas = infill_canvas(BYTES, ["a[[3]]b"], context=None)
    noisy = replace(canvas, tokens=torch.where(canvas.open, BYTES.end_token_id, canvas.tokens))
    assert decode_canvas(BYTES, noisy) == ["a___b"]


def test_finished_texts_are_decoded_whole() -> None:
    rows = torch.tensor([BYTES.document("a dog")])
    assert decode_canvas(BYTES, Canvas.clean(rows)) == ["a dog"]


def test_infill_errors() -> None:
    with pytest.raises(ValueError, match=r"'no span' has no masked span; write \[\[\.\.\.\]\]"):
        infill_canvas(BYTES, ["a[[2]]", "no span"], context=None)
    assert infill_canvas(BYTES, ["a[[2]]"], context=5).tokens.shape == (1, 5)
    with pytest.raises(ValueError, match="needs at least 5 tokens, but the model's context is 4"):
        infill_canvas(BYTES, ["a[[2]]"], context=4)
    with pytest.raises(ValueError, match="needs at least 1000002 tokens"):
        infill_canvas(BYTES, ["a[[999999]]"], context=4)
    with pytest.raises(ValueError, match="at least one"):
        infill_canvas(BYTES, [], context=None)
