"""Rewriting of regular expressions that match whole texts: anchors at their ends, and patterns inside JSON strings."""

import re

# A piece of an expression: an escape, a character class, the start of a group, or a character.
_PIECE = re.compile(
    r"\\[pP]\{\w+\}|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[\w<>=!:]*|.", re.DOTALL
)
_STARTS, _ENDS = ("^", r"\A"), ("$", r"\Z", r"\z")
_JSON_CLASS = r'[^"\\\x00-\x1F\x7F-\x9F]'  # the characters that stand for themselves in a JSON string


def strip_anchors(regex: str) -> str:
    """The expression without the anchors at the ends of its alternatives, which match whole texts anyway.

    ValueError for an anchor elsewhere.
    """
    stripped = []
    for alternative in _alternatives(regex):
        while alternative and alternative[0] in _STARTS:
            alternative = alternative[1:]
        while alternative and alternative[-1] in _ENDS:
            alternative = alternative[:-1]
        if inner := next((piece for piece in alternative if piece in (*_STARTS, *_ENDS)), None):
            raise ValueError(
                f"the anchor {inner} can only be at an end of the expression or of one of its alternatives; leave it "
                "out, or escape it if the character is meant"
            )
        stripped.append("".join(alternative))
    return "|".join(stripped)


def json_string_pattern(pattern: str) -> str:
    """A pattern for JSON strings whose content matches a pattern as a whole. ValueError as in `strip_anchors`.

    Characters that JSON escapes are left out of classes, and a literal quote or backslash is escaped.
    """
    pieces = _PIECE.findall(strip_anchors(pattern))
    return f'"({"".join(map(_inside_json, pieces))})"'


def _inside_json(piece: str) -> str:
    """A piece of an expression inside a JSON string."""
    if piece == '"' or piece == r"\"":
        return r'\\"'
    if piece == r"\\":
        return r"\\\\"
    if piece in (r"\n", r"\r", r"\t", r"\f"):
        return rf"\\{piece[1]}"
    if piece == ".":
        return _JSON_CLASS
    if re.match(r"\[|\\[sSDWpPxu]", piece):
        return f"[{piece}&&{_JSON_CLASS}]"
    return piece


def _alternatives(regex: str) -> list[list[str]]:
    """The pieces of each alternative outside of groups."""
    alternatives, depth = [[]], 0
    for piece in _PIECE.findall(regex):
        depth += piece.startswith("(") - (piece == ")")
        if piece == "|" and depth == 0:
            alternatives.append([])
        else:
            alternatives[-1].append(piece)
    return alternatives
