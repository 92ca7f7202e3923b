"""A regular expression for any JSON object."""

_NESTING = 2  # levels of arrays and objects inside the object; each takes several times the states of the one before
_STRING = r'"([^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])*"'
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"


def json_object_regex() -> str:
    """A regular expression for any JSON object with up to two further levels of arrays and objects in it."""
    value = f"({_STRING}|{_NUMBER}|true|false|null)"
    for _ in range(_NESTING):
        value = f"({value}|{_list(value, '[]')}|{_members(value)})"
    return _members(value)


def _members(value: str) -> str:
    return _list(f"{_STRING}[ ]?:[ ]?{value}", "{}")


def _list(item: str, brackets: str) -> str:
    """Items between brackets. Automata run through both copies of the item at once, in one set of states."""
    opening, closing = brackets
    return rf"\{opening}[ ]?(({item}[ ]?,[ ]?)*{item}[ ]?)?\{closing}"
