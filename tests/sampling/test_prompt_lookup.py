"""Drafts copied from the text, compared with a search token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.sampling.prompt_lookup import LONGEST_MATCH, copied_drafts

rows = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def search(text: list[int], count: int) -> tuple[list[int], int]:
    """The drafts after the latest one of the longest matches, and the number of tokens that match."""

    def match(end: int) -> int:
        length = 0
        while length < LONGEST_MATCH and length <= end and text[end - length] == text[len(text) - 1 - length]:
            length += 1
        return length

    ends = range(len(text) - 1)
    length, end = max(((match(end), end) for end in ends), default=(0, 0))
    period = len(text) - 1 - end
    return [text[end + 1 + i % period] for i in range(count)] if length else [], length


@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 5))
def test_the_longest_match_is_copied(texts: list[list[int]], count: int) -> None:
    n = max(map(len, texts)) + 2
    tokens = torch.tensor([text + [9] * (n - len(text)) for text in texts])
    copied, prob = copied_drafts(tokens, torch.tensor([len(text) for text in texts]), count)
    assert copied.shape == prob.shape == (len(texts), count)
    for row, text in enumerate(texts):
        expected, length = search(text, count)
        if not length:
            assert not prob[row].any()
            continue
        assert copied[row].tolist() == expected
        rates = torch.tensor([1 - 0.75 / (length + i) for i in range(count)])
        torch.testing.assert_close(prob[row], rates.cumprod(0))


def test_what_is_not_settled_is_not_compared() -> None:
    tokens = torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6]])
    copied, _ = copied_drafts(tokens, torch.tensor([5]), 2)
    assert copied.tolist() == [[7, 5]]
    copied, _ = copied_drafts(tokens, torch.tensor([8]), 4)
    assert copied.tolist() == [[8, 5, 6, 8]]  # the latest match, which repeats itself at its end
    assert not copied_drafts(tokens, torch.tensor([1]), 3)[1].any()
