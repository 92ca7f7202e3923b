"""Texts that JSON can spell but tokenizers refuse."""


def check_unicode(text: str) -> str:
    """The text itself. ValueError for a lone surrogate, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate at character {error.start}; give text that is valid UTF-8") from error
    return text
