import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from q4kd.harness.checks import CHECKS
from q4kd.harness.contract import default_contracts_folder, load_contracts
from q4kd.harness.contract_schema import editor_schema
from q4kd.harness.schema_match import Schema, UnknownKeywordError, compile_schema

SCHEMA = editor_schema()
CLAIMS = [dict(claim.prose) for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]
USES = [use for claim in CLAIMS for use in (claim["falsifier"], *claim["falsifier"].get("also", []))]
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 1.0, 0.5, 1e31, "", "a", "A b", "x" * 200, [], [1, 1], {}, {"a": 1}]
)


def agree(schema: Any, value: Any) -> bool:
    """Return whether the value obeys, having seen that both say the same."""
    expected = Draft202012Validator(schema).is_valid(value)
    assert compile_schema(schema)(value) == expected, value
    return expected


@st.composite
def broken(draw: st.DrawFn, whole: Any) -> Any:
    """Return a copy of a value with a few nodes replaced, removed or added."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, 2))):
        node, parent, key = value, None, None
        while isinstance(node, (dict, list)) and node and draw(st.integers(0, 3)):
            parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            continue
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(ODD))
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["extra", "work", "flops", "formula", "needs", "timeout_s"]))] = copy.deepcopy(
                draw(ODD)
            )
        else:
            parent.append(copy.deepcopy(draw(ODD)))
    return value


WORKS = [{"formula": "forward", "weights": 1, "tokens": 2}, {"flops": 1.5, "bytes": 3}, {"bytes": 1}]


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(CLAIMS).flatmap(broken), st.sampled_from(WORKS).flatmap(broken))
def test_a_claim_obeys_for_both_or_for_neither(claim: Any, work: Any) -> None:
    structure = {**SCHEMA, "$defs": {**SCHEMA["$defs"], "registered": True}}
    agree(structure, {"falsification_tests": [claim]})
    agree({**structure, "properties": {"work": {"$ref": "#/$defs/work"}}}, {"work": work})


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(USES).flatmap(lambda use: st.tuples(st.just(use["check"]), broken(use["params"]))))
def test_parameters_obey_for_both_or_for_neither(use: tuple[str, Any]) -> None:
    name, params = use
    try:
        agree(CHECKS[name].PARAMS, params)
    except UnknownKeywordError:
        assert Schema(CHECKS[name].PARAMS).error(CHECKS) is not None


def test_the_structure_and_most_checks_are_compiled() -> None:
    compile_schema({**SCHEMA, "$defs": {**SCHEMA["$defs"], "registered": True}})
    slow = []
    for name in CHECKS:
        try:
            compile_schema(CHECKS[name].PARAMS)
        except UnknownKeywordError:
            slow.append(name)
    assert len(slow) <= len(CHECKS) / 2, f"validated slowly: {slow}"


NUMBER, WORD = {"type": "number"}, {"type": "string"}
NODE = {"type": ["null", "object"], "additionalProperties": {"$ref": "#/$defs/node"}}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": NODE}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (True, [1, None], []),
        (False, [], [1, None]),
        ({"type": "integer"}, [1, 2.0], [True, 1.5, "1"]),
        ({"type": ["null", "boolean"]}, [None, True], [0, ""]),
        ({"enum": ["a", None]}, ["a", None], ["b", 0, [], False]),
        ({"const": "a"}, ["a"], ["b", None]),
        ({"exclusiveMaximum": 2, "exclusiveMinimum": 0}, [1, "x", True], [2, 0]),
        ({"minLength": 1, "maxLength": 2, "pattern": "^a"}, ["a", "ab", 5], ["", "abc", "b"]),
        ({"minItems": 1, "maxItems": 2, "items": NUMBER}, [[1], "x"], [[], [1, 2, 3], ["a"]]),
        ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}, []], [{}, {"a": 1, "b": 2}]),
        ({"properties": {"a": NUMBER}, "additionalProperties": WORD}, [{"a": 1, "b": "x"}, 5], [{"a": "x"}, {"b": 1}]),
        ({"propertyNames": {"pattern": "^a"}}, [{"a": 1}, 5], [{"b": 1}]),
        ({"oneOf": [NUMBER, {"minimum": 5}]}, [1, "x"], [6]),
        ({"anyOf": [NUMBER, WORD]}, [1, "x"], [None]),
        ({"not": NUMBER}, ["x"], [1]),
        ({"if": NUMBER, "then": {"minimum": 1}, "else": WORD}, [1, "x"], [0, None]),
        (TREE, [None, {"a": {"b": None}}], [1, {"a": {"b": 1}}]),
    ],
)
def test_each_keyword(schema: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not agree(schema, value)] == []
    assert [value for value in bad if agree(schema, value)] == []


@pytest.mark.parametrize(
    "schema", [{"uniqueItems": True}, {"enum": [1]}, {"const": True}, {"prefixItems": [], "items": True}]
)
def test_what_is_not_compiled_is_left_to_jsonschema(schema: dict[str, Any]) -> None:
    with pytest.raises(UnknownKeywordError):
        compile_schema(schema)
    both: list[Any] = [[1, 1], [1], 1, True, 2, "x"]
    validator = Draft202012Validator(schema)
    assert [Schema(schema).error(value) is None for value in both] == [validator.is_valid(value) for value in both]
