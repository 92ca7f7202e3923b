"""JSON schemas are followed in full or refused, checked with jsonschema, and with the engine that generation uses."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from outlines_core import Index, Vocabulary

from diffusify.text.grammar import schema_regex
from diffusify.text.regex_syntax import json_string_pattern, strip_anchors

BYTES = Vocabulary(0, {bytes([byte]): [byte + 1] for byte in range(1, 256)})


def accepts(regex: str) -> Callable[[str], bool]:
    """Whether an expression matches a text as a whole, by the engine that compiles constraints."""
    index = Index(strip_anchors(regex), BYTES)

    def check(text: str) -> bool:
        state: int | None = index.get_initial_state()
        for byte in text.encode():
            state = None if state is None else index.get_next_state(state, byte + 1)
        return state is not None and index.is_final_state(state)

    return check


def integer(**bounds: Any) -> dict[str, Any]:
    return {"type": "integer"} | bounds


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (integer(maximum=5), [5, -3], [6, 999]),
        (integer(exclusiveMinimum=0, maximum=120, title="Age", description="in years"), [1, 120], [0, -1, 121]),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, [0, 0.25], [1, 1.5, -0.1]),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": -1}, [0, 3.5], [-0.5]),
        ({"type": ["integer", "null"], "minimum": 3}, [3, None], [2]),
        (integer(multipleOf=5, minimum=0, maximum=20), [0, 15], [7, 25]),
        (integer(multipleOf=0.5), [7], ["a"]),
        ({"type": "string", "pattern": "cat|dog"}, ["cat", "dog"], ["ca", "og"]),
        ({"type": ["string", "null"], "pattern": "^cat|dog$"}, ["cat", "dog", None], ["c"]),
        ({"type": "array", "items": integer(minimum=1), "maxItems": 2}, [[], [1], [2, 3]], [[0], [1, 2, 3]]),
        ({"type": "array", "items": integer(), "uniqueItems": True, "maxItems": 1}, [[], [1]], [[1, 1]]),
        ({"type": "array", "items": False}, [[]], [[1]]),
        ({"type": "array", "prefixItems": [integer(), True], "minItems": 2, "items": False}, [[1, "a"]], [[1]]),
        ({"anyOf": [integer(minimum=1, maximum=2), {"type": "boolean"}]}, [1, True], [0, 3]),
        ({"allOf": [integer(maximum=3)], "description": "one part"}, [2], [4]),
        ({"$ref": "#/$defs/n", "$defs": {"n": integer(minimum=7)}}, [7], [6]),
        ({"type": "object", "additionalProperties": integer(minimum=0)}, [{}, {"a": 1}], [{"a": -1}]),
        ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a", "abcd"]),
        ({"type": "string", "minimum": 3}, ["a"], [1]),  # it has no effect on strings
        ({"enum": ["a", 1]}, ["a", 1], ["b"]),
        (True, [1, "a", None], []),
    ],
)
def test_what_matches_follows_the_schema(schema: Any, good: list, bad: list) -> None:
    definitions = schema.pop("$defs", {}) if isinstance(schema, dict) else {}
    whole = {"type": "object", "properties": {'v "1"\\': schema}, "required": ['v "1"\\'], "$defs": definitions}
    matches = accepts(schema_regex(whole))
    for value in good:
        jsonschema.validate({'v "1"\\': value}, whole)
        assert matches(json.dumps({'v "1"\\': value}))
    for value in bad:
        assert not jsonschema.Draft202012Validator(whole).is_valid({'v "1"\\': value}) or isinstance(value, str)
        assert not matches(json.dumps({'v "1"\\': value}))


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"type": "array", "items": integer(), "uniqueItems": True}, r"keyword uniqueItems \(true\) at #"),
        (integer(multipleOf=3), "multipleOf=3 needs a minimum and a maximum"),
        (integer(minimum=5, maximum=2), "minimum, maximum at #: no number is within the bounds 5 and 2"),
        (integer(minimum="5"), r'minimum \("5"\)'),
        ({"type": "string", "pattern": "a", "minLength": 3}, r"minLength \(3\) .* write it into the pattern"),
        ({"type": "string", "pattern": "a^b"}, r"the anchor \^ can only be at an end"),
        ({"type": "string", "format": "date", "minLength": 3}, "keyword minLength"),
        ({"type": "string", "not": {"const": "a"}}, "keyword not"),
        ({"type": "object", "patternProperties": {"a": {}}}, "keyword patternProperties"),
        ({"type": "object", "required": ["a"]}, r"keyword required \(\[\"a\"\]\).*schema for 'a'"),
        ({"type": "object", "minProperties": 2}, "keyword minProperties"),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{}]}, "keyword anyOf"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "keyword contains .* at #/properties/a"),
        ({"allOf": [integer(), integer(minimum=2)]}, "keyword allOf .* combine its schemas"),
        ({"enum": [1, 2], "maximum": 1}, "keyword maximum"),
        ({"minimum": 1}, "keyword minimum .* give a type"),
        ({"type": "integr"}, "type 'integr' at # is not known"),
        ({"type": "array", "items": 3}, "#/items is 3"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_keyword(schema: dict, error: str) -> None:
    with pytest.raises(ValueError, match=f"the JSON schema cannot be compiled: .*{error}"):
        schema_regex(schema)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (".*", ["", "a ü", "cat"], []),
        (r"[\w\s]+", ["a b"], ["a-b"]),
        (r"[^a]+", ["b c"], ["a"]),
        (r"\S+\.", ["x."], [" ."]),
        (r'a"b\\c', ['a"b\\c'], ["abc"]),
        (r"x\ny", ["x\ny"], ["xny"]),
        (r"[\]a]+\d{2}\$", ["a]12$"], ["a]12"]),
        (r"^[$^]$", ["$", "^"], ["a"]),
    ],
)
def test_a_pattern_stays_inside_its_quotes(pattern: str, good: list[str], bad: list[str]) -> None:
    matches = accepts(json_string_pattern(pattern))
    assert all(matches(json.dumps(text, ensure_ascii=False)) for text in good)
    assert not any(matches(json.dumps(text)) for text in bad)
    assert not any(matches(broken) for broken in ('"a"b"', '"a\nb"', '"\\"', 'a"', '"a', '"a"", "b": "c"'))


def test_anchors_at_the_ends_have_no_effect() -> None:
    anchored = ["^[0-9]{4}$", r"\A^a|b\Z", r"^a$|^b\$$", r"^([$^])$", r"\^a\\$"]
    plain = ["[0-9]{4}", "a|b", r"a|b\$", "([$^])", r"\^a\\"]
    assert [strip_anchors(regex) for regex in anchored] == plain
    for regex in ("a^b", "(^a)", "a$b", r"(a\z)"):
        with pytest.raises(ValueError, match="can only be at an end"):
            strip_anchors(regex)
