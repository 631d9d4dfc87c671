import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from q4kd.harness.checks import CHECKS
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.schema import editor_schema
from q4kd.harness.claims.schema_match import Schema

SCHEMA = editor_schema()
CLAIMS = [dict(claim.prose) for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]
USES = [use for claim in CLAIMS for use in (claim["falsifier"], *claim["falsifier"].get("also", []))]
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 1.0, 0.5, 1e31, "", "a", "A b", "x" * 200, [], [1, 1], {}, {"a": 1}]
)


def agree(schema: Any, value: Any) -> bool:
    """Return whether the value obeys, having seen that the quick yes and the explained no say the same."""
    expected = best_match(Draft202012Validator(schema).iter_errors(value))
    quick = Schema(schema)
    assert quick._is_valid(value) == (expected is None), value
    found = quick.error(value)
    assert (found and (found.message, found.absolute_path)) == (expected and (expected.message, expected.absolute_path))
    return expected is None


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
    agree(CHECKS[name].PARAMS, params)


def test_the_structure_and_every_check_have_a_quick_yes() -> None:
    agree({**SCHEMA, "$defs": {**SCHEMA["$defs"], "registered": True}}, {"falsification_tests": CLAIMS})
    for use in USES:
        assert Schema(CHECKS[use["check"]].PARAMS)._is_valid(use["params"])


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
    "schema", [{"uniqueItems": True}, {"enum": [1]}, {"const": True}, {"prefixItems": [{}], "items": True}]
)
def test_equal_numbers_and_booleans_are_told_apart_as_jsonschema_does(schema: dict[str, Any]) -> None:
    for value in ([1, 1], [1, True], [1], 1, 1.0, True, 2, "x"):
        agree(schema, value)


@pytest.mark.parametrize(
    ("schema", "obeys"),
    [
        ({"type": "object"}, {1: 2, None: 3}),
        ({"prefixItems": [], "items": True}, [1, 1]),
        ({"pattern": "^(?P<a>a)(?P=a)\\Z"}, "aa"),
        ({"pattern": "^a$"}, "a\n"),
    ],
)
def test_what_has_no_quick_answer_is_left_to_jsonschema(schema: dict[str, Any], obeys: object) -> None:
    assert not Schema(schema)._is_valid(obeys)
    assert Schema(schema).error(obeys) is None
    assert Schema({**schema, "not": {}}).error(obeys) is not None
