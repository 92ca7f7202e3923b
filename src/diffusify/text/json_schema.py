"""JSON schemas that outlines_core follows in full: what it would drop becomes a pattern, or is refused by keyword.

outlines_core reads the first of a schema's keywords that it knows, and ignores the others.
"""

import json
from decimal import Decimal
from typing import Any

from diffusify.text.number_patterns import Bounds, integer_pattern, multiples_pattern, number_pattern
from diffusify.text.regex_syntax import json_string_pattern

# The keywords that decide how outlines_core reads a schema, in its order.
_FORMS = ("properties", "allOf", "anyOf", "oneOf", "prefixItems", "enum", "const", "$ref", "type")
_COMBINATIONS = ("allOf", "anyOf", "oneOf")
_DEFINITIONS = ("$defs", "definitions")
_NUMERIC = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
# The keywords that constrain values of one type, and have no effect on others.
_BY_TYPE = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "minProperties", "maxProperties", "patternProperties"}
        | {"propertyNames", "dependentRequired", "dependentSchemas", "dependencies"}
    ),
    "array": frozenset(
        {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains"}
    ),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": _NUMERIC,
    "number": _NUMERIC,
    "boolean": frozenset(),
    "null": frozenset(),
}
_CONSTRAINTS = frozenset().union(*_BY_TYPE.values(), _FORMS, ("not", "if", "then", "else"))
_ANYTHING = {"anyOf": [{}]}  # outlines_core puts the alternatives of a plain {} in no group
_PLACEHOLDER = "\ue000{}\ue001"


class SchemaReader:
    """Rewrites a schema for outlines_core, with placeholders for the `patterns` of values that it cannot express."""

    def __init__(self) -> None:
        self.patterns: dict[str, str] = {}  # by the regular expression that outlines_core makes of their placeholder

    def rewrite(self, schema: Any, where: str = "#") -> dict[str, Any]:
        """The schema with placeholders. ValueError for a keyword that cannot be followed."""
        if schema is True:
            return _ANYTHING
        if not isinstance(schema, dict):
            raise ValueError(f"{where} is {schema!r}; write an object of keywords")
        rewritten = {
            name: {key: self.rewrite(value, f"{where}/{name}/{key}") for key, value in schema[name].items()}
            for name in _DEFINITIONS
            if isinstance(schema.get(name), dict)
        }
        given = {name: value for name, value in schema.items() if name in _CONSTRAINTS}
        form = next((name for name in _FORMS if name in given), None)
        if form is None:
            if given:
                raise _refused(next(iter(given)), given, where, "give a type beside it")
            return rewritten | _ANYTHING
        if form in ("properties", "prefixItems", "type"):
            types = {"properties": "object", "prefixItems": "array"}.get(form) or given["type"]
            kinds = types if isinstance(types, list) else [types]
            values = [self._typed(kind, given, where) for kind in kinds]
            return rewritten | (values[0] if len(values) == 1 else {"anyOf": values})
        for name in given:
            if name not in (form, "type"):
                raise _refused(name, given, where, f"write it without {form} beside it")
        value = given[form]
        if form in _COMBINATIONS:
            if form == "allOf" and len(value) != 1:
                raise _refused(form, given, where, "combine its schemas into one")
            value = [self.rewrite(part, f"{where}/{form}/{n}") for n, part in enumerate(value)]
        return rewritten | {form: value}

    def _typed(self, kind: Any, given: dict[str, Any], where: str) -> dict[str, Any]:
        """A schema for values of one type."""
        if kind not in _BY_TYPE:
            raise ValueError(f"type {kind!r} at {where} is not known; known: {', '.join(_BY_TYPE)}")
        for name in given:
            if name not in _BY_TYPE[kind] and not any(name in each for each in _BY_TYPE.values()) and name != "type":
                raise _refused(name, given, where, "describe the allowed values by their type alone")
        own = {name: value for name, value in given.items() if name in _BY_TYPE[kind]}
        read = {"object": self._object, "array": self._array, "string": self._string}.get(kind)
        if read is not None:
            return {"type": kind} | read(own, where)
        if _NUMERIC & own.keys():
            return self._placeholder(_numbers(kind, own, where))
        return {"type": kind}

    def _object(self, own: dict[str, Any], where: str) -> dict[str, Any]:
        properties, required = own.get("properties"), own.get("required", [])
        if properties is None and own.get("additionalProperties") is False:
            properties = {}
        count = (own.get("minProperties", 0), own.get("maxProperties"))
        for name in ("patternProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies"):
            if own.get(name):
                raise _refused(name, own, where, "list the properties")
        if unknown := [name for name in required if name not in (properties or {})]:
            raise _refused("required", own, where, f"give a schema for {unknown[0]!r} in properties")
        if properties is None:
            if count != (0, None):
                raise _refused("minProperties" if count[0] else "maxProperties", own, where, "list the properties")
            values = own.get("additionalProperties", True)
            return (
                {}
                if values is True
                else {"additionalProperties": self.rewrite(values, f"{where}/additionalProperties")}
            )
        if count[0] > len(required):
            raise _refused("minProperties", own, where, "name the properties that are required")
        if count[1] is not None and count[1] < len(properties):
            raise _refused("maxProperties", own, where, "list fewer properties")
        return {
            "properties": {
                _json_name(name): self.rewrite(value, f"{where}/properties/{name}")
                for name, value in properties.items()
            },
            "required": [_json_name(name) for name in required],
        }

    def _array(self, own: dict[str, Any], where: str) -> dict[str, Any]:
        if own.get("uniqueItems") and own.get("maxItems", 2) > 1:
            raise _refused("uniqueItems", own, where, "check it afterwards")
        for name in ("contains", "minContains", "maxContains"):
            if name in own:
                raise _refused(name, own, where, "check it afterwards")
        least, most = own.get("minItems", 0), own.get("maxItems")
        if "prefixItems" in own:
            prefix = own["prefixItems"]
            if least > len(prefix) or (most is not None and most < len(prefix)):
                raise _refused(
                    "minItems" if least > len(prefix) else "maxItems", own, where, "list as many prefixItems"
                )
            return {"prefixItems": [self.rewrite(each, f"{where}/prefixItems/{n}") for n, each in enumerate(prefix)]}
        limits = {name: own[name] for name in ("minItems", "maxItems") if name in own}
        if isinstance(own.get("items"), list):
            raise _refused("items", own, where, "write a list of schemas as prefixItems")
        items = own.get("items", True)
        if items is False:
            return {"maxItems": 0}
        return limits | ({} if items is True else {"items": self.rewrite(items, f"{where}/items")})

    def _string(self, own: dict[str, Any], where: str) -> dict[str, Any]:
        if "pattern" in own:
            for name in own.keys() - {"pattern"}:
                raise _refused(name, own, where, "write it into the pattern")
            return self._placeholder(json_string_pattern(own["pattern"]))
        if "format" in own and len(own) > 1:
            raise _refused(next(name for name in own if name != "format"), own, where, "the format decides the length")
        return own

    def _placeholder(self, pattern: str) -> dict[str, Any]:
        name = _PLACEHOLDER.format(len(self.patterns))
        self.patterns[json.dumps(name, ensure_ascii=False)] = pattern
        return {"const": name}


def _numbers(kind: str, own: dict[str, Any], where: str) -> str:
    """A pattern for numbers within the bounds of a schema."""
    for name, value in own.items():
        if isinstance(value, str | list | dict | None):
            raise _refused(name, own, where, "write a number")
    lows, highs = [], []
    for bounds, closed, open in ((lows, "minimum", "exclusiveMinimum"), (highs, "maximum", "exclusiveMaximum")):
        if closed in own:
            bounds.append((Decimal(str(own[closed])), own.get(open) is True))  # in draft 4 the other one is a flag
        if not isinstance(own.get(open, False), bool):
            bounds.append((Decimal(str(own[open])), True))
    low, low_open = max(lows, default=(None, False))
    high, high_open = min(highs, default=(None, False), key=lambda bound: (bound[0], not bound[1]))
    bounds = Bounds(low, high, low_open, high_open)
    try:
        if "multipleOf" in own:
            factor = Decimal(str(own["multipleOf"]))
            if kind == "number" or 1 % factor != 0:
                return multiples_pattern(factor, bounds)
        return integer_pattern(bounds) if kind == "integer" else number_pattern(bounds)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{', '.join(own)} at {where}: {error}") from error


def _json_name(name: str) -> str:
    """The name of a property as outlines_core has to get it, which escapes nothing."""
    return json.dumps(name, ensure_ascii=False)[1:-1]


def _refused(name: str, schema: dict[str, Any], where: str, advice: str) -> ValueError:
    value = json.dumps(schema[name], default=str)
    return ValueError(f"the keyword {name} ({value[:60]}) at {where} cannot be followed; {advice}, or leave it out")
