"""Text is never encoded as special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from diffusify.text.tokenizer import TextTokenizer
from tests.text.makers import byte_level, sentence_bpe, unigram, with_mask, word_piece

BYTES, PIECES, UNIGRAM, SENTENCE = byte_level(), word_piece(), unigram(), sentence_bpe()
ALL = [BYTES, PIECES, UNIGRAM, SENTENCE]
NAMES = ["<|endoftext|>", "<|im_end|>", "<|mask|>", "[MASK]", "[SEP]", "<s>", "</s>", "<mask>", "<pad>"]
TEXTS = st.lists(st.sampled_from([*NAMES, " ", "\n", "the", "x", "<", ">"]) | st.text(max_size=5)).map("".join)


@pytest.mark.parametrize("tokenizer", ALL)
@given(text=TEXTS, continues=st.booleans())
@settings(max_examples=60)
def test_no_text_becomes_a_special_token(tokenizer: TextTokenizer, text: str, continues: bool) -> None:
    fast = tokenizer.tokenizer
    special = {*fast.all_special_ids, *fast.added_tokens_decoder, tokenizer.mask_token_id}
    forbidden = {i for i in special if i != fast.unk_token_id}
    assert not forbidden & set(tokenizer.encode(text, continues=continues))


def test_the_plain_tokenizers_do_encode_special_tokens() -> None:
    assert BYTES.mask_token_id in BYTES.tokenizer("<|mask|>")["input_ids"]
    ids = UNIGRAM.tokenizer("<s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert UNIGRAM.start_token_id in ids  # which is why TextTokenizer splits such texts


@given(TEXTS)
def test_byte_level_loses_nothing(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.encode(text, continues=True) == BYTES.encode(text)


@given(TEXTS.filter(lambda text: "\u2581" not in text))
def test_sentencepiece_with_bytes_loses_nothing(text: str) -> None:
    assert SENTENCE.decode(SENTENCE.encode(text)) == text
    ids = SENTENCE.encode(text, continues=True)
    assert SENTENCE.decode(ids, continues=True) == text
    assert SENTENCE.decode([*SENTENCE.encode("the cat"), *ids]) == "the cat" + text


@pytest.mark.parametrize("tokenizer", [UNIGRAM, SENTENCE])
def test_a_continuing_text_gets_no_extra_space(tokenizer: TextTokenizer) -> None:
    head, tail = tokenizer.encode("the qu"), tokenizer.encode("ick fox", continues=True)
    assert tokenizer.decode(head + tail) == "the quick fox"
    assert tokenizer.decode(head + tokenizer.encode("ick fox")) == "the qu ick fox"
    assert tokenizer.decode(tokenizer.encode(" fox", continues=True), continues=True) == " fox"
    assert tokenizer.decode(tokenizer.encode(" fox", continues=True)) == "fox"


def test_names_of_special_tokens_survive_in_unigram() -> None:
    assert UNIGRAM.decode(UNIGRAM.encode("the <s> is </s>. <mask>")) == "the <s> is </s>. <mask>"


def test_word_piece_decodes_to_words() -> None:
    ids = PIECES.document("The quick, lazy dog.")
    assert (ids[0], ids[-1]) == (PIECES.tokenizer.cls_token_id, PIECES.tokenizer.sep_token_id)
    # The tokenizer's own setting clean_up_tokenization_spaces would join these.
    assert PIECES.decode(PIECES.encode("do not")) == "do not"
    assert PIECES.decode(ids, continues=True) == " " + PIECES.decode(ids)


@pytest.mark.parametrize("tokenizer", ALL)
def test_documents(tokenizer: TextTokenizer) -> None:
    texts = ["the dog", "", "<|mask|> </s>"]
    assert tokenizer.documents(texts) == [tokenizer.document(text) for text in texts]
    assert tokenizer.document(texts[0]) == [
        tokenizer.start_token_id, *tokenizer.encode(texts[0]), tokenizer.end_token_id,
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.document("the dog")) == "the dog"
    assert tokenizer.decode([tokenizer.mask_token_id, tokenizer.pad_token_id]) == ""
    assert tokenizer.documents([]) == []


def test_a_mask_token_that_is_not_marked_special_is_never_encoded() -> None:
    base = byte_level().tokenizer
    assert isinstance(base, PreTrainedTokenizerFast)
    base.add_tokens(["<gap>"])
    tokenizer = with_mask(base, "<gap>")
    assert tokenizer.mask_token_id in base("a <gap>")["input_ids"]
    ids = tokenizer.encode("a <gap> b")
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.mask_token_id]) == "a <gap> b"


def test_start_end_and_pad_tokens() -> None:
    assert (PIECES.start_token_id, PIECES.end_token_id, PIECES.pad_token_id) == (2, 3, 0)
    assert BYTES.pad_token_id == BYTES.end_token_id == BYTES.start_token_id
    assert UNIGRAM.pad_token_id != UNIGRAM.end_token_id
    bare = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x"))), 0)
    with pytest.raises(ValueError, match="no start token; set its bos_token"):
        _ = bare.start_token_id
    with pytest.raises(ValueError, match="no end token"):
        _ = bare.end_token_id
